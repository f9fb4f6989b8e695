"""The folder of a training: what was asked for, every snapshot, and the weights to go on from.

    FOLDER/
        run.json                 task, sizes, settings; the lives: command, versions, commit, device, seconds
        snapshots.csv            a row for each snapshot and run: accuracy and loss on Test, IC, IC2 and IW
        checkpoint.safetensors   the weights of all runs at the last snapshot; plain SGD keeps nothing else

Each file is written aside and renamed, the rows before the weights: what a kill leaves behind is the last snapshot.
"""

import csv
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evals.models import write_file, write_json
from llm.errors import UserError
from llm.train.environment import environment, now
from llm.train.lock import hold

from .model import Sizes, Transformers
from .task import KINDS, Task

if TYPE_CHECKING:
    from .train import Settings

MAY_CHANGE = ("settings.steps", "settings.until", "settings.patience")  # between two lives
PARTS = ("task", "sizes", "settings")
RECORD, ROWS, WEIGHTS = "run.json", "snapshots.csv", "checkpoint.safetensors"
COLUMNS = (
    "snapshot",
    "step",
    "variant",
    "seed",
    *(f"{kind}_{what}" for what in ("accuracy", "loss") for kind in KINDS),
)


class Snapshot(NamedTuple):
    """One run at one step. Snapshot n is after n * snapshot_every steps; number 0 is the untrained model."""

    snapshot: int
    step: int
    variant: str
    seed: int
    accuracy: dict[str, float]  # of each of KINDS
    loss: dict[str, float]  # nats


class Folder:
    """A training's folder, held while it is open: no other process trains there.

    Args:
        path: made where it is not there.
        task, sizes, settings: what is asked for now.

    Raises:
        UserError: on entry, where the folder is in use, not of a training, or of other runs than those asked for.
    """

    def __init__(self, path: Path, task: Task, sizes: Sizes, settings: "Settings") -> None:
        self.path, self.snapshots, self._every = path, list[Snapshot](), settings.snapshot_every
        asked = {"task": asdict(task), "sizes": asdict(sizes), "settings": asdict(settings)}
        self._asked = json.loads(json.dumps(asked))  # tuples are lists in the file

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give another --out")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / RECORD).is_file():
            left = {entry.name for entry in self.path.iterdir()} - {".lock", f"{RECORD}.part"}  # of a killed start
            if left:
                raise UserError(f"{self.path} is not empty and holds no training (no {RECORD}): give another --out")
        made_folder(self.path)
        try:
            self._lock = hold(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): give another --out") from error
        try:
            self._record = self._read_record()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _read_record(self) -> dict[str, Any]:
        if not (self.path / RECORD).is_file():
            return self._asked | {"lives": []}
        record = read_record(self.path)
        before, wanted = (dict(_flat(part)) for part in (record, self._asked))
        different = [
            f"{key} ({before.get(key)} there, {value} asked for)"
            for key, value in wanted.items()
            if before.get(key) != value and key not in MAY_CHANGE
        ]
        if different:
            raise UserError(
                f"{self.path} holds other runs, they differ in {', '.join(different)}: give the same settings to go on "
                "with them, or another --out"
            )
        return record | self._asked

    def restore(self, models: Sequence[Transformers]) -> int:
        """Read the snapshots and the weights of the last one into the models; returns its step, 0 for a new training.

        Raises:
            UserError: weights or snapshots are damaged, or not of these models.
        """
        if not (self.path / WEIGHTS).is_file():
            return 0
        try:
            with safe_open(self.path / WEIGHTS, "pt") as file:
                step = int(file.metadata()["step"])
                with torch.no_grad():
                    for name, weight in _weights(models):
                        weight.copy_(file.get_tensor(name))
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"{self.path / WEIGHTS} cannot be read ({error}): delete it to train from the start"
            ) from error
        self.snapshots = [row for row in read_snapshots(self.path) if row.step <= step]
        expected = sum(len(model.runs) for model in models) * (step // self._every + 1)
        if len(self.snapshots) != expected:
            raise UserError(
                f"{self.path / ROWS} has {len(self.snapshots)} rows up to step {step} in place of {expected}: delete "
                f"{self.path / WEIGHTS} to train from the start"
            )
        return step

    def begin(self, step: int, facts: dict[str, Any]) -> None:
        """A life begins at a step; `facts` go to its entry in run.json."""
        self._began = time.monotonic()
        self._record["lives"].append({"began": now(), "from_step": step, "to_step": step, "seconds": 0.0, **facts})
        self._record["lives"][-1] |= environment()
        self._write_record()

    def keep(self, rows: Sequence[Snapshot], step: int, models: Sequence[Transformers]) -> None:
        """Add a snapshot of all runs, with the weights to go on from.

        Raises:
            UserError: the disk is full; the snapshot before it is whole.
        """
        self.snapshots += rows
        write_file(self.path / ROWS, _as_csv(self.snapshots))
        weights = {name: weight.detach().cpu().clone() for name, weight in _weights(models)}
        write_file(self.path / WEIGHTS, save(weights, {"step": str(step)}))
        self._record["lives"][-1] |= {"to_step": step, "seconds": round(time.monotonic() - self._began, 1)}
        self._write_record()

    def _write_record(self) -> None:
        write_json(self.path / RECORD, self._record)


def read_record(path: Path) -> dict[str, Any]:
    """run.json of a training; UserError where there is none."""
    try:
        record = json.loads((path / RECORD).read_bytes())
        if not isinstance(record["lives"], list) or not all(isinstance(record[part], dict) for part in PARTS):
            raise ValueError("it is of something else")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no training of python -m small.icl ({RECORD}: {error})") from error
    return record


def read_snapshots(path: Path) -> list[Snapshot]:
    """Every snapshot of a training, in order; UserError where there is none yet, or the file is damaged."""
    if not (path / ROWS).is_file():
        raise UserError(f"{path} has no snapshot yet: wait for the first, or give its train command again")
    try:
        with (path / ROWS).open(newline="") as file:
            found = [
                Snapshot(
                    int(row["snapshot"]), int(row["step"]), row["variant"], int(row["seed"]),
                    {kind: float(row[f"{kind}_accuracy"]) for kind in KINDS},
                    {kind: float(row[f"{kind}_loss"]) for kind in KINDS},
                )
                for row in csv.DictReader(file)
            ]  # fmt: skip
        if not found:
            raise ValueError("it has no rows")
        return found
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path / ROWS} cannot be read ({error!r}): train again with another --out") from error


def _as_csv(snapshots: Sequence[Snapshot]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in snapshots:
        values = [part[kind] for part in (row.accuracy, row.loss) for kind in KINDS]
        writer.writerow([row.snapshot, row.step, row.variant, row.seed, *values])
    return text.getvalue()


def made_folder(path: Path) -> None:
    """Make a folder for results; UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): give another --out") from error


def _weights(models: Sequence[Transformers]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight of every run, whatever models the runs are batched in."""
    for model in models:
        for name, tensor in model.named_parameters():
            if name.startswith("streams."):  # of one variant: a row a seed
                _, place, weight = name.split(".")
                layer, owner = divmod(int(place), len(model.variants))
                for seed, own in zip(model.seeds, tensor, strict=True):
                    yield f"{model.variants[owner].name}.{seed}.stream.{layer}.{weight}", own
            else:
                for (variant, seed), own in zip(model.runs, tensor, strict=True):
                    yield f"{variant.name}.{seed}.{name}", own


def _flat(record: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{part}.{key}", value) for part in PARTS for key, value in record[part].items()]
