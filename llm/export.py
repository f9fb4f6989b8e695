"""`python -m llm export RUN ...`: a checkpoint becomes a folder that transformers and lm-eval load.

Stages: verified checkpoint -> model -> folder (weights, config, tokenizer, model code) -> reload elsewhere, compare
logits -> rename into place.

The folder is self-contained: it carries the files of `llm.model` and loads with `trust_remote_code=True` where this
project is not installed and the network is off. That is tested before it gets its name: a Python in isolated mode, in
another directory and without this project, loads it and must give the same logits.

Without --out it is RUN/exports/step-N, where `python -m evals` finds all steps of a run; --all exports every
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .common.errors import UserError
from .common.exported import CARD, read_card, trained_context, weights_sha256
from .common.files import first_line, follow_umask, write_json
from .data.mixture import mixed_fingerprint, open_stores
from .data.tokenizer import load_tokenizer
from .model import DecoderForCausalLM
from .runs import reading
from .train import checkpoint as checkpoints

# With -I -S neither the working directory, nor PYTHONPATH, nor an editable install of this project is seen; the folder
# of the installed packages is put back by hand.
PROBE = """
import sys
sys.path.append(sys.argv.pop(1))
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, probe = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
own = "auto_map" in model.config.to_dict()
assert own == ("transformers_modules" in type(model).__module__), "the folder's own code was not used"
with torch.no_grad():
    logits = model(load_file(probe)["input_ids"]).logits
save_file({"logits": logits.contiguous()}, probe + ".logits")
"""
PARTIAL = ".partial"
DAY = 86400.0  # seconds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    run: Path,
    out: Path | None = None,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    as_transformers: bool = False,
) -> tuple[Path, bool]:
    """Write the run's checkpoint (its newest, or that of `step`) to the new folder `out`, or to RUN/exports/step-N.

    `as_transformers`: as a LlamaForCausalLM or GPT2LMHeadModel, without code of this project.

    Returns the folder, and whether it was written: where it holds just this export already, nothing is done.

    Raises:
        UserError: no such run or checkpoint, `out` is not empty, the reloaded logits differ from the model's, or
            transformers has no such model.
    """
    record = reading.record(run)
    checkpoint = checkpoints.find(run, step)
    facts = describe(checkpoint, record, dtype) | ({"format": "transformers"} if as_transformers else {})
    out = out or run / "exports" / checkpoint.path.name
    if _is_there(out, facts):
        return out, False
    tokenizer = _tokenizer(run, record)

    config = checkpoint.config()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    model = DecoderForCausalLM(config)
    checkpoints.restore(checkpoint, model)
    model.to(dtype).eval()  # type: ignore[arg-type]  # transformers hides the overloads
    tokenizer.model_max_length = trained_context(config, facts)
    try:
        written = model.to_hf() if as_transformers else model
    except ValueError as error:
        raise UserError(f"--format transformers: {error}") from error
    try:
        _write(out.resolve(), written, tokenizer, facts)
    except OSError as error:
        why = error.strerror or first_line(error)
        raise UserError(f"{out} cannot be written ({why}): free space, or give a folder that can be written") from error
    return out, True


def _write(out: Path, model: PreTrainedModel, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Write the folder, have it reloaded and rename it to `out`; on an error nothing of it is left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_strays(out)
    partial = out.with_name(f".{out.name}-{secrets.token_hex(4)}{PARTIAL}")
    partial.mkdir()
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        follow_umask(partial)
        write_json(partial / CARD, facts | {"weights_sha256": weights_sha256(partial)})
        print("loading the folder in a fresh Python to compare logits ...", file=sys.stderr)
        check_reload(model, partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError) or type(error) is Exception:  # what Rust's writers make of a full disk
            raise OSError(None, first_line(error)) from error
        raise


def export_all(run: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Path, bool]]:
    """`export` every checkpoint of the run to RUN/exports/step-N, in order; a torn one is passed over with a sentence.

    Raises:
        UserError: none can be exported; or, after the others, those folders that hold another export.
    """
    reading.record(run)
    refused, done = [], 0
    for path in reading.folders(run / "checkpoints"):
        try:
            checkpoints.read(path)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        try:
            yield export(run, step=reading.step_of(path), dtype=dtype)
        except UserError as error:
            refused.append(str(error))
        except (OSError, SafetensorError):
            if path.exists():
                raise
            print(f"passed over: its run has removed {path} meanwhile", file=sys.stderr)
            continue
        done += 1
    if refused:
        raise UserError("; ".join(refused))
    if not done:
        raise UserError(f"{run} holds no complete checkpoint: train it first with llm fit")


def _is_there(out: Path, facts: dict[str, Any]) -> bool:
    """Whether `out` holds the export of these facts. Raises UserError where it holds anything else."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give a folder that can be") from error
    known = read_card(out) if out.is_dir() else {}
    if any(known.get(name) != facts.get(name) for name in ("checkpoint_sha256", "step", "dtype", "format")):
        raise UserError(f"output folder {out} is not empty: give another or remove it")
    if known.get("weights_sha256") not in (None, weights_sha256(out)):
        raise UserError(f"the weights in {out} are not those that were exported: remove it and export again")
    return True


def _remove_strays(out: Path) -> None:
    """Remove what an export to `out` has left that was killed: nothing has come to it for a day."""
    for stray in out.parent.glob(f".{out.name}-*{PARTIAL}"):
        if time.time() - stray.stat().st_mtime > DAY:
            shutil.rmtree(stray, ignore_errors=True)


def describe(checkpoint: checkpoints.Checkpoint, record: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """hippoformer.json: which run and step the folder holds. Equal facts are an equal export.

    UserError: run.json does not say what it has to.
    """
    if lacking := [name for name in ("name", "seed", "git_commit") if name not in record]:
        raise UserError(f"run.json of {checkpoint.path.parents[1]} lacks {', '.join(lacking)}: put the whole file back")
    return {
        "run": record["name"],
        "step": checkpoint.step,
        "tokens_seen": checkpoint.state["tokens_seen"],
        "parameters": checkpoint.state["parameters"],
        "seed": record["seed"],
        "store_fingerprint": record.get("store_fingerprint"),  # older runs may lack it, and the next
        "context": (record.get("identity") or {}).get("context"),  # tokens of a row in training
        "dtype": str(dtype).removeprefix("torch."),
        "git_commit": record["git_commit"],
        "checkpoint_sha256": checkpoint.weights_sha256(),
    }


# ---- The tokenizer ---------------------------------------------------------------------------------------------------


def _tokenizer(run: Path, record: dict[str, Any]) -> Any:
    """The run's tokenizer, which begins a text as documents began in training."""
    tokenizer = load_tokenizer(run / "tokenizer")
    try:
        begin = _begin_of_document(run, record)
    except UserError as error:
        print(f"note: the tokenizer puts around a text what it did before training ({error})", file=sys.stderr)
        return tokenizer
    return as_in_training(tokenizer, begin)


def _begin_of_document(run: Path, record: dict[str, Any]) -> int | None:
    """The id that began every document in training; None where there was none.

    A run of version 0.1 does not record it. UserError: nor are the stores there that it was trained on.
    """
    if "begin_of_document" in record:
        return record["begin_of_document"]
    named = reading.config(run).get("data", {}).get("store")
    if not named:
        raise UserError(f"{run}/config.yaml names no data.store")
    stores = open_stores({named: 1.0} if isinstance(named, str) else dict(named))
    if mixed_fingerprint(stores) != record.get("store_fingerprint"):
        raise UserError(f"data.store of {run} is not the one it was trained on")
    return stores[0].train.begin_of_document


def as_in_training(tokenizer: Any, begin: int | None) -> Any:
    """Return the same tokenizer which, when called, puts `begin` in front of a text, or nothing, and nothing behind it.

    It is of transformers' plain class: others, as Llama's, put around a text what their own settings say.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    after = json.loads(backend.to_str())["post_processor"] or {}
    steps: list[Any] = [
        processors.ByteLevel(trim_offsets=step["trim_offsets"])  # touches offsets alone
        for step in after.get("processors", [after])
        if step.get("type") == "ByteLevel"
    ]
    if begin is not None:
        token = backend.id_to_token(begin)
        one, two = [token, "$A"], [token, "$A", f"{token}:1", "$B:1"]
        steps.append(processors.TemplateProcessing(single=one, pair=two, special_tokens=[(token, begin)]))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **tokenizer.special_tokens_map,
    )


# ---- The reload ------------------------------------------------------------------------------------------------------


def check_reload(model: PreTrainedModel, folder: Path, tokens: int = 64) -> None:
    """Load `folder` in an isolated Python without this project and compare logits on random tokens.

    Raises:
        UserError: it does not load, or the logits are not equal to the last bit.
    """
    config = model.config
    length = min(tokens, config.max_position_embeddings)
    vocabulary = getattr(config, "unpadded_vocab_size", None) or config.vocab_size
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
    with tempfile.TemporaryDirectory() as elsewhere:
        found = _reloaded_logits(folder.resolve(), ids, Path(elsewhere))
    if not torch.equal(found, expected):
        difference = (found.float() - expected.float()).abs().max().item()
        raise UserError(f"the reloaded logits differ by up to {difference:.3g} from the trained model's: not kept")


def _reloaded_logits(folder: Path, ids: Tensor, elsewhere: Path) -> Tensor:
    probe = elsewhere / "probe.safetensors"
    save_file({"input_ids": ids}, probe)
    script = elsewhere / "reload.py"
    script.write_text(PROBE)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(elsewhere / "modules"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, Path(torch.__file__).parents[1], folder, probe],
        cwd=elsewhere,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"the exported folder does not load in a fresh Python ({' '.join(last)}): not kept")
    return load_file(f"{probe}.logits")["logits"]


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "run.json").is_file()
    except OSError:  # no name for a file
        return False


def run(args: argparse.Namespace) -> None:
    """Export each run, and say what was written.

    Raises:
        UserError: the options contradict; or, after the other runs, a run that cannot be exported.
    """
    runs, out = args.runs, args.out
    if out is None and len(runs) == 2 and not _is_run(runs[1]):
        runs, out = runs[:1], runs[1]
    if args.all and (out is not None or args.step is not None):
        raise UserError("--all exports every checkpoint to RUN/exports: leave out OUT and --step")
    if out is not None and len(runs) > 1:
        raise UserError(f"--out {out} takes one run, and {len(runs)} are given: leave it out (RUN/exports/step-N)")
    if args.format == "transformers" and (out is None or args.all):
        raise UserError("--format transformers needs --out: RUN/exports is for what python -m evals measures")
    dtype, refused = DTYPES[args.dtype], list[str]()
    for folder in runs:
        try:
            one = None if args.all else export(folder, out, args.step, dtype, args.format == "transformers")
            for written_to, written in [one] if one else export_all(folder, dtype):
                facts = read_card(written_to)
                what = f"{written_to}: step {facts['step']}, {facts['parameters']:,} parameters, {args.dtype}"
                print(f"{what}, {'reloaded logits equal' if written else 'already there'}", flush=True)
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError("; ".join(refused))
