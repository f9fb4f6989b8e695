"""What the tests of `fit` share: running it, and reading what it leaves behind."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llm.cli import main
from llm.runs import reading

Config = Callable[..., Path]


def fit(config: Path, *words: str) -> int:
    return main(["fit", "--config", str(config), *words])


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def losses(run: Path) -> dict[int, str]:
    return {int(row["step"]): row["train_loss"] for row in metrics(run) if row["train_loss"]}


def measured(run: Path) -> list[dict[str, str]]:
    """The rows without what a clock says."""
    clocked = {"seconds", "tokens_per_second"}
    return [{name: value for name, value in row.items() if name not in clocked} for row in metrics(run)]


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events of a kind; without one all but that the machine was busy, as it may be while tests run."""
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in told if (event["event"] == kind if kind else event["event"] != reading.BUSY)]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_same_weights(a: Path, b: Path, step: int) -> None:
    left, right = weights(a, step), weights(b, step)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
