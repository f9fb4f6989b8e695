"""The folder of a training: its snapshots, and the weights of all runs at the last one (`small.folder`).

snapshots.csv has a row for each snapshot and run: accuracy and loss on Test, IC, IC2 and IW. Plain SGD keeps nothing
but weights.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from llm.common.errors import UserError

from ..folder import TENSORS, TrainingFolder, as_csv, read_record
from .model import Sizes, Transformers
from .task import KINDS, Task

if TYPE_CHECKING:
    from .settings import Settings

PROGRAM, PARTS = "small.icl", ("task", "sizes", "settings")
MAY_CHANGE = ("settings.steps", "settings.until", "settings.patience")  # between two lives
ROWS = "snapshots.csv"
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


class Folder(TrainingFolder):
    """Of the runs of one task."""

    def __init__(self, path: Path, task: Task, sizes: Sizes, settings: "Settings") -> None:
        asked = {"task": asdict(task), "sizes": asdict(sizes), "settings": asdict(settings)}
        super().__init__(path, PROGRAM, asked, MAY_CHANGE, ROWS)
        self.snapshots, self._every = list[Snapshot](), settings.snapshot_every

    def restore(self, models: Sequence[Transformers]) -> int:
        """Read the snapshots and the weights of the last one into the models; returns its step, 0 for a new training.

        Raises:
            UserError: weights or snapshots are damaged, or not of these models.
        """
        if not (step := self.restore_into(_weights(models))) and not (self.path / TENSORS).is_file():
            return 0
        self.snapshots = [row for row in read_snapshots(self.path) if row.step <= step]
        expected = sum(len(model.runs) for model in models) * (step // self._every + 1)
        if len(self.snapshots) != expected:
            raise UserError(
                f"{self.table} has {len(self.snapshots)} rows up to step {step} in place of {expected}: delete "
                f"{self.path / TENSORS} to train from the start"
            )
        return step

    def keep(self, rows: Sequence[Snapshot], step: int, models: Sequence[Transformers]) -> None:
        """Add a snapshot of all runs, with the weights to go on from.

        Raises:
            UserError: the disk is full; the snapshot before it is whole.
        """
        self.snapshots += rows
        self.write(_as_csv(self.snapshots), _weights(models), step)


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


def joined(paths: Sequence[Path]) -> list[Snapshot]:
    """The snapshots of several trainings of the same variants with other seeds.

    Raises:
        UserError: they differ in more than their seeds and how long they ran, or share a seed.
    """
    first: dict[str, Any] = {}
    owners: dict[int, Path] = {}
    for path in paths:
        record = read_record(path, PROGRAM, PARTS)
        facts = {
            f"{part}.{name}": value
            for part in PARTS
            for name, value in record[part].items()
            if f"{part}.{name}" not in (*MAY_CHANGE, "settings.seeds")
        }
        first = first or facts
        if different := [
            f"{name} ({first.get(name)}, {value})" for name, value in facts.items() if first.get(name) != value
        ]:
            raise UserError(
                f"{paths[0]} and {path} differ in {', '.join(different)}: join trainings that differ in seeds"
            )
        for seed in record["settings"]["seeds"]:
            if seed in owners:
                raise UserError(f"{owners[seed]} and {path} both have seed {seed}: train one with another --first-seed")
            owners[seed] = path
    return [row for path in paths for row in read_snapshots(path)]


def _as_csv(snapshots: Sequence[Snapshot]) -> str:
    return as_csv(
        COLUMNS,
        (
            [row.snapshot, row.step, row.variant, row.seed]
            + [part[kind] for part in (row.accuracy, row.loss) for kind in KINDS]
            for row in snapshots
        ),
    )


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
