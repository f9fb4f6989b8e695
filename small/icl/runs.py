"""Runs of one training folder: what they are asked to be, their snapshots, and the weights of all at the last one.

snapshots.csv has a row for each snapshot and run: accuracy and loss on Test, IC, IC2 and IW. Plain SGD has no state but
the weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from llm.common.errors import UserError

from ..experiment.runs import TENSORS, RunSpec, TrainingFolder, as_csv, read_record, read_spec, read_table
from .model import Transformers
from .settings import IclSettings, IclSizes, Task
from .task import KINDS

PARTS = ("task", "sizes", "settings")
MAY_CHANGE = ("settings.steps", "settings.until", "settings.patience")  # between two attempts
ROWS = "snapshots.csv"
UNSHIFTED = "ic2_unshifted"  # loss on IC2 against the label that was learned, as in the authors' code
COLUMNS = (
    "snapshot",
    "step",
    "variant",
    "seed",
    *(f"{kind}_accuracy" for kind in KINDS),
    *(f"{kind}_loss" for kind in (*KINDS, UNSHIFTED)),
)


@dataclass(frozen=True)
class IclSpec(RunSpec):
    """The runs of one folder, as they are asked for: every variant with every seed."""

    program: ClassVar = "small.icl"
    task: Task
    sizes: IclSizes
    settings: IclSettings


class Snapshot(NamedTuple):
    """One run at one step. Snapshot n is after n * snapshot_every steps; number 0 is the untrained model."""

    snapshot: int
    step: int
    variant: str
    seed: int
    accuracy: dict[str, float]  # of each of KINDS
    loss: dict[str, float]  # nats; of UNSHIFTED too, but in trainings of earlier versions


class IclFolder(TrainingFolder):
    """The folder of the runs of one task."""

    def __init__(self, path: Path, spec: IclSpec) -> None:
        super().__init__(path, spec, ROWS, MAY_CHANGE)
        self.snapshots, self._every = list[Snapshot](), spec.settings.snapshot_every

    def restore(self, models: Sequence[Transformers]) -> int:
        """Read the snapshots, and the weights of the last one into the models; returns its step, 0 for a new training.

        Raises:
            UserError: weights or snapshots are damaged, or not of these models.
        """
        if not (step := self.restore_into(weights(models))) and not (self.path / TENSORS).is_file():
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
        """Add a snapshot of all runs, with the weights to resume from.

        Raises:
            UserError: the disk is full; the snapshot before it is complete.
        """
        self.snapshots += rows
        self.write(_as_csv(self.snapshots), weights(models), step)


def read_snapshots(path: Path) -> list[Snapshot]:
    """Read every snapshot of a training, in order; UserError if there is none yet, or the file is damaged."""
    read_record(path, IclSpec.program, PARTS)
    if not (path / ROWS).is_file():
        raise UserError(f"{path} has no snapshot yet: wait for the first, or repeat its train command")
    return read_table(
        path / ROWS,
        lambda row: Snapshot(
            int(row["snapshot"]),
            int(row["step"]),
            row["variant"],
            int(row["seed"]),
            {kind: float(row[f"{kind}_accuracy"]) for kind in KINDS},
            {kind: float(row[f"{kind}_loss"]) for kind in (*KINDS, UNSHIFTED) if row.get(f"{kind}_loss")},
        ),
    )


def read_asked(path: Path) -> IclSpec:
    """Read what run.json of a training says of it; UserError if it is not of this version."""

    def make(record: dict[str, Any]) -> IclSpec:
        many = {name: tuple(record["settings"][name]) for name in ("variants", "seeds")}
        settings = IclSettings(**record["settings"] | many)
        return IclSpec(Task(**record["task"]), IclSizes(**record["sizes"]), settings, label=path.name)

    return read_spec(path, IclSpec.program, PARTS, make)


def joined(paths: Sequence[Path]) -> list[Snapshot]:
    """Read the snapshots of several trainings of the same variants with other seeds.

    Raises:
        UserError: they differ in more than their seeds and how long they ran, or share a seed.
    """
    first: dict[str, Any] = {}
    owners: dict[int, Path] = {}
    for path in paths:
        record = read_record(path, IclSpec.program, PARTS)
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
            + [row.accuracy[kind] for kind in KINDS]
            + [row.loss.get(kind, "") for kind in (*KINDS, UNSHIFTED)]
            for row in snapshots
        ),
    )


def weights(models: Sequence[Transformers]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every weight of every run, whatever models the runs are batched in."""
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
