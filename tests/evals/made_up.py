"""Run folders and exports as `fit`, `export` and `python -m evals` leave them, with numbers of the test's own."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HEADER = (
    "step,tokens,train_loss,perplexity,learning_rate,gradient_norm,tokens_per_second,mfu,validation_loss,seconds,"
    "data_digest,skipped_steps"
)
FLOPS = 250_000.0  # per token
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_run(
    folder: Path,
    stream: Sequence[str] = (),
    loss: float = 2.0,
    seed: int = 1,
    steps: int = 40,
    store: str = "f1",
    digest: str = "d",
    config: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    weights: str | None = None,
    cost: float = 1.0,
) -> Path:
    """A finished run: a row a step, validation every tenth, which ends at `loss`; `config` overrides dotted keys.

    weights: the sha256 of its last checkpoint, of which only the manifest is there; none without it. cost: how many
    times as many parameters as others; its square as many FLOPs, its cube the time, its fourth power the memory.
    """
    folder.mkdir(parents=True)
    lines = [HEADER]
    for step in range(1, steps + 1):
        train = loss + 4 * math.exp(-step / 8)
        validation = f"{loss + 4 * math.exp(-step / 8) * (step < steps)}" if step % 10 == 0 else ""
        lines.append(
            f"{step},{step * 1000},{train},{math.exp(train)},0.001,1.0,{5000 / cost**3},,{validation},"
            f"{step / 2 * cost**3},{digest}{step},0"
        )
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    settings: dict[str, Any] = {
        "seed_everything": seed,
        "decoder": {**DECODER, "vocab_size": 512, "stream": list(stream)},
        "model": {"optimizer": {"lr": 0.001}},
        "data": {"store": "store", "batch_size": 8, "workers": 0},
        "trainer": {"max_steps": steps},
        "run": {"folder": str(folder)},
    }
    for key, value in (config or {}).items():
        *parts, last = key.split(".")
        place = settings
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    parameters = round(12345 * cost)
    facts = {"name": folder.name, "parameters": parameters, "seed": seed, "store_fingerprint": store, "git_commit": "c"}
    (folder / "run.json").write_text(json.dumps({**facts, "flops_per_token": FLOPS * cost**2, **(record or {})}))
    summary = {"step": steps, "tokens_seen": steps * 1000, "validation_loss": loss, "seconds": steps / 2 * cost**3}
    summary |= {"parameters": parameters, "peak_memory_bytes": round(2_000_000_000 * cost**4)}
    (folder / "summary.json").write_text(json.dumps(summary))
    if weights is not None:
        checkpoint = folder / f"checkpoints/step-{steps:08d}"
        checkpoint.mkdir(parents=True)
        manifest = {"model.safetensors": {"bytes": 0, "sha256": weights}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


MEASURED = {"dtype": "float32", "device": "cpu", "batch_size": 16}


def document_lengths(documents: int) -> np.ndarray:
    """Tokens of as many documents, (N,): from 60 to 140, in the mean about 100."""
    return 60 + 37 * np.arange(documents) % 81


def make_export(
    run: Path,
    nats: np.ndarray,
    step: int = 40,
    seed: int = 1,
    store: str = "f1",
    tokens: Any = None,
    weights: str | None = None,
    dtype: str = "float32",
    out: Path | None = None,
) -> Path:
    """The export of a run's last step, with a loss a document; its weights are never read.

    tokens: of each document (`document_lengths`). weights: the sha256 of the checkpoint. out: where it goes, if not
    into the run's folder.
    """
    folder = out or run / f"exports/step-{step:08d}"
    (folder / "evals/samples").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    record = json.loads((run / "run.json").read_text()) if (run / "run.json").is_file() else {}
    info = {"run": record.get("name", run.name), "step": step, "seed": seed, "dtype": dtype}
    info |= {"store_fingerprint": store, "checkpoint_sha256": weights}
    (folder / "hippoformer.json").write_text(json.dumps(info))
    counted = document_lengths(len(nats)) if tokens is None else np.asarray(tokens)
    losses = {"store_fingerprint": store, "split": "validation", "documents": list(range(len(nats)))}
    losses |= {
        "tokens": counted.tolist(),
        "nats": nats.tolist(),
        "n": len(nats),
        "limit": 1000,
        "context": 32,
        "weights_sha256": weights,
        **MEASURED,
    }
    (folder / "evals/losses.json").write_text(json.dumps([losses]))
    return folder


def add_task(export: Path, task: str, shots: int, right: np.ndarray, **changes: Any) -> None:
    """A task's result and its items; `right` is a boolean an item."""
    path = export / "evals/lm_eval.json"
    kept = json.loads(path.read_text()) if path.is_file() else []
    line = {"task": task, "shots": shots, "acc": float(right.mean()), "acc_norm": float(right.mean()), "n": len(right)}
    line |= {
        "acc_stderr": 0.02,
        "acc_norm_stderr": 0.02,
        "limit": None,
        "task_version": 1.0,
        "versions": {},
        **MEASURED,
    }
    path.write_text(json.dumps([*kept, line | changes]))
    rows = [
        {"doc_id": n, "doc_hash": f"h{n}", "prompt_hash": f"p{n}", "target": 0, "loglikelihoods": [-1.0, -2.0]}
        | {"acc": float(correct), "acc_norm": float(correct)}
        for n, correct in enumerate(right)
    ]
    samples = export / f"evals/samples/{task}-{shots}shot.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_ioi(export: Path, correct: float, incorrect: float, differences: np.ndarray) -> None:
    """Table 2's probabilities (the same on each sentence), and the generated set's logit differences."""
    sentences = {"correct": [correct] * 4, "incorrect": [incorrect] * 4}
    mean = {"correct": correct, "incorrect": incorrect}
    for name in ("ioi", "ioi_as_published"):
        (export / f"evals/{name}.json").write_text(json.dumps({"sentences": sentences, "mean": mean, **MEASURED}))
    prompts = [f"prompt {n}" for n in range(len(differences))]
    items = {"prompt": prompts, "correct": [" A"] * len(prompts), "incorrect": [" B"] * len(prompts)}
    items |= {"logit_difference": differences.tolist(), "quadruple": [n // 4 for n in range(len(prompts))]}
    (export / "evals/ioi_generated.json").write_text(
        json.dumps({"items": items, "sentences": len(prompts), **MEASURED})
    )


def add_incontext(export: Path, scores: np.ndarray, store: str = "f1") -> None:
    """In-context measures of a model with two layers of two heads."""
    heads = {"prefix_matching": [[0.1, 0.2], [0.3, 0.9]], "previous_token": [[0.8, 0.1], [0.1, 0.1]]}
    content = {"store_fingerprint": store, "split": "validation", "windows": len(scores), "context": 8}
    bins = {"bins": [[1, 1], [2, 3], [4, 8]], "per_window": [[score, 2 * score, 0.1] for score in scores.tolist()]}
    content |= {"positions": {"loss": [3.0 - 0.1 * n for n in range(8)], "standard_error": [0.1] * 8, **bins}}
    content |= {"score": {"early": 1, "late": 8, "value": float(scores.mean()), "per_window": scores.tolist()}}
    content |= {"heads": {**heads, "loss_first": 5.0, "loss_second": 3.0}, "gini": [0.4, 0.6], **MEASURED}
    (export / "evals/incontext.json").write_text(json.dumps(content))


def add_recall(export: Path, values: np.ndarray, store: str = "f1") -> None:
    """Recall of two numbers of pairs, of copies and of a needle at two depths; `values` of the sequences of each."""
    scores = {"standard_error": 0.1, "values": values.tolist()}
    content = {"store_fingerprint": store, "split": "validation", "settings": [[2, 30], [8, 60]], "seed": 0}
    content |= {"sequences": len(values), "context": 60, **MEASURED}
    content["mqar"] = [
        {"pairs": p, "length": length, "chance": 1 / p, "accuracy": float(values.mean()), "loss": 3.0, **scores}
        for p, length in content["settings"]
    ]
    content["induction"] = {"copy": 29, "chance": 6.0, "loss_first": 6.0, "loss_second": float(values.mean()), **scores}
    content["needle"] = [{"depth": d, "chance": 0.0, "gain": float(values.mean()), **scores} for d in (0.0, 1.0)]
    (export / "evals/recall.json").write_text(json.dumps(content))
