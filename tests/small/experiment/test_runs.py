"""A run's folder as versions before wrote it: what run.json says makes the same run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.common.errors import UserError
from small.experiment.runs import RunSpec, one_by_one
from small.grid import runs as grid
from small.icl.runs import IclFolder, IclSpec
from small.icl.settings import IclSettings, IclSizes, Task
from small.spaces import space
from small.tem import runs as tem
from small.vision import runs as vision

# Written by version 0.1; the space of grid is that of spaces.Graph.
RECORDS: dict[str, dict[str, Any]] = {
    "grid": {
        "space": json.loads(json.dumps(space("3x3").record())),
        "sizes": {
            "width": 16, "heads": 4, "head_dim": 16, "neurons": 8, "layers": 2, "code": 32, "segment": 8, "memory": 8,
            "dropout": 0.0,
        },
        "variant": {
            "act": "nmda:1", "streams": ["values"], "source": "previous", "position": "paper", "transition": "tanh"
        },
        "settings": {
            "seed": 0, "maps": 2, "letters": 10, "trials": 4, "steps": 16, "batch": 4, "lr": 0.002, "clip": 1.0,
            "objective": "parallel", "walkers": 4, "evaluate_every": 2, "products": "float32",
        },
    },
    "tem": {
        "model": {
            "name": "tem",
            "sizes": {
                "code": 120, "modules": [30, 30, 24, 18, 18], "places": 20, "sensory": 10, "two_hot": True,
                "neurons": 128, "transition": "identity",
            },
            "rule": {"decay": 0.9999, "rate": 0.5, "keep": 0.8, "steps": 5, "act": "clipped", "form": "sums"},
        },
        "settings": {
            "seed": 0, "spaces": ["3x3", "3x4"], "symbols": 6, "steps": 6, "batch": 4, "walk_from": 8, "walk_to": 12,
            "lr": 0.001, "clip": 1.0, "test_every": 2, "tested": 4, "tested_steps": 20,
        },
        "spaces": {"3x3": "f276aab8c0d93d98", "3x4": "bfe128aba9434a04"},
    },
    "vision": {
        "data": {"name": "cifar100", "classes": 5, "side": 32, "train": 64, "test": 60, "crc32": "925e86b9"},
        "sizes": {
            "side": 32, "classes": 5, "patch": 4, "width": 16, "heads": 2, "neurons": 8, "layers": 1, "dropout": 0.0
        },
        "variant": {"act": "gelu", "streams": [], "source": "previous"},
        "settings": {
            "seed": 0, "epochs": 2, "batch": 16, "lr": 0.003, "weight_decay": 0.05, "warmup": 1, "smoothing": 0.1,
            "augmentation": "strong", "products": "float32",
        },
    },
}  # fmt: skip
ICL = {
    "task": {
        "classes": 512, "labels": 32, "pairs": 8, "copies": 2, "bursty": 0.5, "novel": 0.5, "novel_classes": 128,
        "noise": 0.1, "content": 85, "positions": 65, "distinct_labels": True, "blank": False,
    },
    "sizes": {"width": 150, "labels": 32, "key_width": 128, "neurons": 128, "layers": 2},
    "settings": {
        "variants": ["classic", "queries+values:learned"], "seeds": [0, 1], "steps": 40, "batch": 8, "lr": 0.01,
        "decay": 1e-06, "snapshot_every": 10, "evaluation": 20, "until": 0.95, "patience": 5, "products": "float32",
    },
}  # fmt: skip
READ: dict[str, Callable[[Path], RunSpec]] = {
    "grid": grid.read_asked, "tem": tem.read_asked, "vision": vision.read_asked
}  # fmt: skip


def _known(value: Any, before: Any) -> Any:
    """The value without the fields that were not there before."""
    return {name: value[name] for name in before} if isinstance(before, dict) else value


@pytest.mark.parametrize("room", RECORDS)
def test_what_an_earlier_version_wrote_is_the_same_run(room: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RECORDS[room] | {"attempts": []}))
    spec = READ[room](tmp_path)
    today = json.loads(json.dumps(spec.record()))  # with defaults of what settings have had since
    assert spec.label == tmp_path.name and today == spec.completed(RECORDS[room])
    for part, values in RECORDS[room].items():
        assert {name: _known(today[part][name], value) for name, value in values.items()} == values
    assert "seed" not in spec.facts and spec.facts["lr"] == RECORDS[room]["settings"]["lr"]
    (tmp_path / "run.json").write_text(json.dumps(RECORDS[room] | {"settings": {"momentum": 1}, "attempts": []}))
    with pytest.raises(UserError, match=r"run\.json is of another version"):
        READ[room](tmp_path)


def test_a_training_of_an_earlier_version_is_resumed_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(ICL | {"attempts": []}))
    settings = IclSettings(("classic", "queries+values:learned"), (0, 1), 80, 8, snapshot_every=10, evaluation=20)
    with IclFolder(tmp_path, IclSpec(Task(), IclSizes(), settings)) as folder:  # more steps: those may change
        assert folder.restore([]) == 0
    with (
        pytest.raises(UserError, match=r"different settings \(task.pairs \(8 there, 4 asked for\)\)"),
        IclFolder(tmp_path, IclSpec(Task(pairs=4), IclSizes(), settings)),
    ):
        pass


def test_runs_are_counted_as_they_begin(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [RunSpec(label=name) for name in "ab"]
    for number, run in enumerate(one_by_one(runs), start=1):
        assert capsys.readouterr().out == f"{number} of 2: {run.label}\n"
