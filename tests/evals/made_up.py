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
) -> Path:
    """A finished run: a row a step, validation every tenth, which ends at `loss`; `config` overrides dotted keys."""
    folder.mkdir(parents=True)
    lines = [HEADER]
    for step in range(1, steps + 1):
        train = loss + 4 * math.exp(-step / 8)
        validation = f"{loss + 4 * math.exp(-step / 8) * (step < steps)}" if step % 10 == 0 else ""
        lines.append(
            f"{step},{step * 1000},{train},{math.exp(train)},0.001,1.0,5000,,{validation},{step / 2},{digest}{step},0"
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
    facts = {"name": folder.name, "parameters": 12345, "seed": seed, "store_fingerprint": store, "git_commit": "c"}
    (folder / "run.json").write_text(json.dumps({**facts, "flops_per_token": FLOPS, **(record or {})}))
    summary = {"step": steps, "tokens_seen": steps * 1000, "validation_loss": loss, "seconds": steps / 2}
    summary |= {"parameters": 12345, "peak_memory_bytes": 2_000_000_000}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


MEASURED = {"dtype": "float32", "device": "cpu", "batch_size": 16}


def make_export(
    run: Path, nats: np.ndarray, step: int = 40, seed: int = 1, store: str = "f1", tokens: Any = None
) -> Path:
    """The export of a run's last step in the run's folder, with a loss a document; its weights are never read."""
    folder = run / f"exports/step-{step:08d}"
    (folder / "evals/samples").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "hippoformer.json").write_text(json.dumps({"run": run.name, "step": step, "seed": seed}))
    counted = np.full(len(nats), 100) if tokens is None else np.asarray(tokens)
    losses = {"store_fingerprint": store, "split": "validation", "documents": list(range(len(nats)))}
    losses |= {
        "tokens": counted.tolist(),
        "nats": nats.tolist(),
        "n": len(nats),
        "limit": 1000,
        "context": 32,
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
    (export / "evals/ioi.json").write_text(json.dumps({"sentences": sentences, "mean": mean, **MEASURED}))
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
    content |= {"positions": {"loss": [3.0 - 0.1 * n for n in range(8)], "standard_error": [0.1] * 8}}
    content |= {"score": {"early": 1, "late": 8, "value": float(scores.mean()), "per_window": scores.tolist()}}
    content |= {"heads": {**heads, "loss_first": 5.0, "loss_second": 3.0}, "gini": [0.4, 0.6], **MEASURED}
    (export / "evals/incontext.json").write_text(json.dumps(content))
