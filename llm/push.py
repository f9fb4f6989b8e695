"""`python -m llm push EXPORT OWNER/NAME`: an exported folder goes to the Hugging Face hub, with a model card.

Stages: folder checked -> README.md from what the folder holds -> repository (private unless asked) -> one commit.

The card says what the model is, which run and data it comes from, its results in EXPORT/evals as a `model-index`, and
how to load it. A README.md that someone else wrote is kept.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.repocard_data import EvalResult, ModelCardData

from .common.errors import UserError
from .common.exported import read_card, weight_files, weights_sha256
from .common.files import first_line, read_json, write_file

MADE = "<!-- made by llm push -->"
IGNORED = [
    ".*",
    "**/.*",
    "evals/samples/*",
    "*.partial",
]  # caches, and items of tasks, which have licences of their own
SWITCHES = ("stream", "stream_source", "stream_weight", "value_embedding", "residual", "hidden_act", "parametrization")


def push(export: Path, name: str, license: str | None = None, public: bool = False) -> str:
    """Upload an exported folder as the model OWNER/NAME and return its address. What is there is replaced.

    Raises:
        UserError: no exported folder, weights that are not those that were exported, a name that cannot be, no token,
            no network.
    """
    facts = _checked(export)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is not a name of the hub: give OWNER/NAME")
    readme = export / "README.md"
    if not readme.is_file() or MADE in readme.read_text(encoding="utf-8"):
        write_file(readme, model_card(export, facts, name, license))
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=export,
            ignore_patterns=IGNORED,
            commit_message=f"{facts['run']}, step {facts['step']}",
        )
    except LocalTokenNotFoundError as error:
        raise UserError("the hub needs a token: log in with `hf auth login`") from error
    except HFValidationError as error:
        raise UserError(f"{name} is not a name of the hub ({first_line(error)}): give OWNER/NAME") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing goes to the hub: unset it") from error
    except Exception as error:  # the client and its transport raise kinds of their own
        raise UserError(
            f"the hub did not take {export} ({first_line(error)}): check the network, and `hf auth whoami` for the "
            "right to write there, and run the same command again"
        ) from error
    return str(getattr(commit, "commit_url", commit))


def _checked(export: Path) -> dict[str, Any]:
    """What hippoformer.json says of a whole export."""
    facts = read_card(export) if export.is_dir() else {}
    if lacking := [name for name in ("run", "step", "parameters", "seed", "dtype") if name not in facts]:
        raise UserError(
            f"{export} is not an exported folder (hippoformer.json lacks {', '.join(lacking)}): make one with "
            f"`python -m llm export RUN --out {export}`"
        )
    if not weight_files(export) or not (export / "config.json").is_file():
        raise UserError(f"{export} lacks its weights or config.json: export it again")
    if facts.get("weights_sha256") not in (None, weights_sha256(export)):
        raise UserError(f"the weights in {export} are not those that were exported: export it again")
    return facts


# ---- The card --------------------------------------------------------------------------------------------------------


def model_card(export: Path, facts: dict[str, Any], name: str, license: str | None) -> str:
    """README.md: YAML that the hub reads, then text."""
    config = read_json(export / "config.json")
    results = list(eval_results(export))
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hippoformer"],
        model_name=name.split("/")[1],
        eval_results=results or None,
        ignore_metadata_errors=False,
    )
    switches = [f"`{key}: {json.dumps(config[key])}`" for key in SWITCHES if config.get(key)]
    sizes = (("layers", "num_hidden_layers"), ("wide", "hidden_size"), ("heads", "num_attention_heads"))
    size = ", ".join(f"{config[key]:,} {word}" for word, key in sizes if isinstance(config.get(key), int))
    lines = [
        f"---\n{data.to_yaml()}\n---\n{MADE}",
        f"# {name.split('/')[1]}",
        f"A causal language model of {facts['parameters']:,} parameters ({size}), trained with hippoformer.",
        f"- Run `{facts['run']}`, step {facts['step']:,}, seed {facts['seed']}, {facts['dtype']} weights.",
        f"- Switches: {', '.join(switches) or 'none'}.",
        f"- Data: token store with the fingerprint `{facts.get('store_fingerprint')}`; "
        f"{facts.get('tokens_seen') or 0:,} tokens seen, at most {facts.get('context')} at once.",
        f"- Commit `{facts.get('git_commit')}`, weights sha256 `{facts.get('weights_sha256')}`.",
        "## Results\n",
        *(f"- {result.dataset_name}: {result.metric_name} {result.metric_value:.4f}" for result in results),
        *["Not evaluated."] * (not results),
        "\n## Use\n",
        "The folder carries the code of the model: read it, then trust it.\n",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'    model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        f'    tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
    ]
    return "\n".join(lines) + "\n"


def eval_results(export: Path) -> Iterator[EvalResult]:
    """The results in EXPORT/evals of these weights: tasks in their first metric, and validation losses."""
    weights = weights_sha256(export)
    tasks, losses = (_rows(export / "evals" / f"{name}.json") for name in ("lm_eval", "losses"))
    for result in tasks:
        metric = next((key for key in ("acc_norm", "acc", "exact_match", "bits_per_byte") if key in result), None)
        if metric is None or result.get("weights") not in (None, weights):
            continue
        yield EvalResult(
            task_type="text-generation",
            dataset_type=str(result["task"]),
            dataset_name=f"{result['task']}, {result['shots']}-shot, {result['n']:,} items",
            metric_type=metric,
            metric_name=metric,
            metric_value=float(result[metric]),
        )
    for result in losses:
        if result.get("weights_sha256") in (None, weights):
            yield EvalResult(
                task_type="text-generation",
                dataset_type="token-store",
                dataset_name=f"{result['split']} of {result['store_fingerprint'][:12]}, {result['n']:,} documents",
                metric_type="loss",
                metric_name="nats per token",
                metric_value=float(result["loss"]),
            )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The results that a file lists; none where there is no such file."""
    content = read_json(path) if path.is_file() else []
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{path} is damaged; delete it and measure again")
    return content


def run(args: argparse.Namespace) -> None:
    """Upload, and print where it is."""
    print(push(args.export, args.name, args.license, args.public))
