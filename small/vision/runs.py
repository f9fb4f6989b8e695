"""Runs of one folder: what each is asked to be, its table, which there are, and what each is called.

    activations x seeds -> OUT/act=nmda:10,seed=0/ -> runs that are there -> groups of seeds

Runs of one seed share their order, their augmentation and their initial weights, whatever the activation; so two
activations are compared within seeds and within test images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from llm.common.errors import UserError

from ..experiment import groups
from ..experiment.runs import (
    RECORD,
    TENSORS,
    RunSpec,
    SavedRun,
    TableFolder,
    checkpoint_step,
    copy_into,
    read_rows,
    read_spec,
    run_folders,
)
from ..variants import Act, Variant
from .datasets import DATASETS
from .settings import VisionSettings, VisionSizes

ROWS = "accuracy.csv"
BASE = "gelu"  # what the others are compared with


@dataclass(frozen=True)
class VisionSpec(RunSpec):
    """One transformer, as it is asked for."""

    program: ClassVar = "small.vision"
    data: dict[str, Any]
    sizes: VisionSizes
    variant: Variant
    settings: VisionSettings


class Row(NamedTuple):
    """What is known after an epoch."""

    epoch: int
    loss: float  # nats, the mean over the epoch's steps, with smoothed labels
    test_loss: float  # nats, without smoothing
    accuracy: float  # top-1, of the test images, 0 to 1


def folder_of(path: Path, spec: VisionSpec) -> TableFolder[Row]:
    """Return the folder of one run: accuracy.csv has a row for each epoch."""
    return TableFolder(path, spec, ROWS, Row)


def read_right(path: Path, images: int) -> Tensor:
    """Return which test images the run's last checkpoint classified correctly, (images,) bool; UserError if damaged."""
    right = torch.empty(images, dtype=torch.bool)
    copy_into([("test.right", right)], path)
    return right


# ---- Many runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionRun(SavedRun[Row], VisionSpec):
    """One transformer, as of the last checkpoint in its folder."""

    @property
    def finished(self) -> bool:
        """Whether its last epoch is there."""
        return self.last.epoch == self.settings.epochs


def combinations(spec: VisionSpec, acts: Sequence[str], seeds: Sequence[int]) -> list[VisionSpec]:
    """Return a run of each activation with each seed, seed by seed; UserError if one is unknown or there twice."""
    variants = [replace(spec.variant, act=act) for act in acts]
    if len(set(variants)) < len(variants):
        raise UserError(f"an activation is asked for twice: {', '.join(each.act for each in variants)}")
    return [
        replace(spec, label=f"act={v.act},seed={seed}", variant=v, settings=replace(spec.settings, seed=seed))
        for seed in seeds
        for v in variants
    ]


def read_runs(outs: Sequence[Path]) -> list[VisionRun]:
    """Read the runs of several folders that have a checkpoint, by activation; each may be one run itself.

    Raises:
        UserError: there is none in one of them, one is damaged, or two are of the same settings and seed.
    """
    found = [run for out in outs for folder in run_folders(out, VisionSpec.program, TENSORS) if (run := _read(folder))]
    for group in groups.grouped(found):
        of_seed: dict[int, VisionRun] = {}
        for run in group:
            if other := of_seed.get(run.settings.seed):
                raise UserError(f"{other.folder} and {run.folder} are one run twice: give only one of them")
            of_seed[run.settings.seed] = run
    return sorted(found, key=lambda run: (*place(run.variant.act), run.settings.seed))


def place(act: str) -> tuple[bool, str, float]:
    """Return the order of the paper's columns: GELU, then the others, NMDA's alpha falling."""
    name, number = Act.parse(act)
    return act != BASE, name, -(number or 0.0)


def read_asked(path: Path) -> VisionSpec:
    """Read what run.json of a run says of it; UserError if it is not of this version."""
    keys = ("name", "classes", "side", "train", "test", "crc32")
    spec = read_spec(
        path,
        VisionSpec.program,
        ("data", "sizes", "variant", "settings"),
        lambda record: VisionSpec(
            {name: record["data"][name] for name in keys},
            VisionSizes(**record["sizes"]),
            Variant(**record["variant"]),
            VisionSettings(**record["settings"]),
            label=path.name,
        ),
    )
    if spec.data["name"] not in DATASETS:
        raise UserError(f"{path / RECORD} is of a data set {spec.data['name']!r}, which this version does not know")
    return spec


def _read(folder: Path) -> VisionRun:
    """Read a run as of its last checkpoint: a kill may have left a table that is one row ahead."""
    spec, step = read_asked(folder), checkpoint_step(folder)
    rows = read_rows(folder / ROWS, Row)[:step]
    if [row.epoch for row in rows] != [*range(1, step + 1)]:
        raise UserError(f"{folder / ROWS} is not of its checkpoint, of epoch {step}: train again with another --out")
    return VisionRun(**spec.parts, label=spec.label, folder=folder, rows=rows)


def by_data_set(runs: Sequence[VisionRun]) -> dict[str, list[VisionRun]]:
    """Return the runs of each data set."""
    return {name: own for name in DATASETS if (own := [run for run in runs if run.data["name"] == name])}


def names(of: Sequence[Sequence[VisionRun]], *known: str) -> list[str]:
    """Name each group of one data set: its activation, unless that is `known`, and whatever else differs."""
    found = []
    for group, rest in zip(of, groups.differences(of, ("act", *known)), strict=True):
        act = [] if "act" in known else [group[0].variant.activation.title]
        found.append(", ".join([*act, *filter(None, [rest])]))
    return found
