"""Runs of one folder: what each is asked to be, its table, which there are, and what each is called.

    asked-for combinations -> OUT/act=nmda:10,maps=32,seed=0/ -> runs that are there -> groups of seeds

A run is a folder of `train`; runs of a group differ in their seeds alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from llm.common.errors import UserError

from ..experiment import groups
from ..experiment.groups import word
from ..experiment.runs import RunSpec, SavedRun, TableFolder, as_csv, read_spec, read_table, run_folders
from ..spaces import Graph
from .model import Variant
from .settings import GridSettings, GridSizes, check_segments

ROWS = "errors.csv"
MAY_CHANGE = ("settings.trials",)  # between two attempts
MAPS = ("familiar", "novel")
ALWAYS = ("act", "maps", "seed")  # in a run's name, whether they vary or not
NAMED = ("act", "maps", "cells")  # what a group's name has anyway, or never


@dataclass(frozen=True)
class GridSpec(RunSpec):
    """One navigator, as it is asked for."""

    program: ClassVar = "small.grid"
    space: Graph
    sizes: GridSizes
    variant: Variant
    settings: GridSettings

    @cached_property
    def facts(self) -> dict[str, Any]:
        found = asdict(self.sizes) | asdict(self.variant) | asdict(self.settings)
        del found["seed"]
        return found | {"space": self.space.name, "cells": json.dumps(self.space.record())}


class Errors(NamedTuple):
    """Shares of wrong letters, and how many targets they are of; NaN of none."""

    working: float  # the cell was visited within the window
    reference: float  # it was not
    first: float  # it is visited for the first time in the trial
    visited: int
    unvisited: int
    new: int


class Row(NamedTuple):
    """What is known after a trial; trial 0 is the untrained navigator."""

    trial: int
    loss: float  # nats, the mean of the trial's training; NaN at trial 0
    errors: dict[str, Errors]  # of each of MAPS


class GridFolder(TableFolder[Row]):
    """The folder of one run: errors.csv has a row for each trial that was evaluated."""

    COLUMNS: ClassVar = ("trial", "loss", *(f"{maps}_{name}" for maps in MAPS for name in Errors._fields))

    def __init__(self, path: Path, spec: GridSpec) -> None:
        super().__init__(path, spec, ROWS, Row, MAY_CHANGE)

    def read(self) -> list[Row]:
        return read_rows(self.path)

    def as_text(self) -> str:
        values = ([row.trial, row.loss, *(v for maps in MAPS for v in row.errors[maps])] for row in self.rows)
        return as_csv(self.COLUMNS, values)


def read_rows(path: Path) -> list[Row]:
    """Read every row of a run, in order; UserError if there is none yet, or the file is damaged."""
    return read_table(
        path / ROWS,
        lambda row: Row(int(row["trial"]), float(row["loss"]), {maps: _errors(row, maps) for maps in MAPS}),
    )


def _errors(row: dict[str, str], maps: str) -> Errors:
    kinds: dict[str, Any] = Errors.__annotations__
    return Errors(**{name: kind(row[f"{maps}_{name}"]) for name, kind in kinds.items()})


# ---- Many runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridRun(SavedRun[Row], GridSpec):
    """One navigator, as it is in its folder."""


def read_asked(path: Path) -> GridSpec:
    """Read what run.json of a run says of it; UserError if it is not of this version."""
    return read_spec(
        path,
        GridSpec.program,
        ("space", "sizes", "variant", "settings"),
        lambda record: GridSpec(
            Graph.from_record(record["space"]),
            GridSizes(**record["sizes"]),
            Variant(**record["variant"]),
            GridSettings(**record["settings"]),
            label=path.name,
        ),
    )


def combinations(
    graph: Graph, sizes: GridSizes, variant: Variant, settings: GridSettings, knobs: dict[str, Sequence[Any]]
) -> list[GridSpec]:
    """Return a run of every combination of the knobs' values.

    Args:
        knobs: name of a field of sizes, variant or settings -> its values.

    Raises:
        UserError: no such field, no value, or values that cannot be.
    """
    owners = {field.name: part for part in (sizes, variant, settings) for field in fields(part)}
    for name, values in knobs.items():
        if name not in owners:
            raise UserError(f"{name!r} cannot be varied: give one of {', '.join(sorted(owners))}")
        if len(set(values)) < len(values) or not values:
            raise UserError(f"{name} needs a value, and none twice: {', '.join(map(str, values)) or 'none given'}")
    found = []
    for values in product(*knobs.values()):
        chosen = dict(zip(knobs, values, strict=True))
        made = [
            replace(part, **{name: value for name, value in chosen.items() if owners[name] is part})
            for part in (sizes, variant, settings)
        ]
        check_segments(made[0], made[2])  # type: ignore[arg-type]
        facts = {name: value for part in made for name, value in asdict(part).items()}
        named = [*ALWAYS[:-1], *(n for n, v in knobs.items() if len(v) > 1 and n not in ALWAYS), ALWAYS[-1]]
        label = ",".join(f"{name}={word(facts[name])}" for name in named)
        found.append(GridSpec(graph, *made, label=label))  # type: ignore[arg-type]
    return found


def read_runs(out: Path) -> list[GridRun]:
    """Read the runs of a folder that have a row, in the order of their names; `out` may be one run itself.

    Raises:
        UserError: there is none, or one is damaged.
    """
    return [_read(folder) for folder in run_folders(out, GridSpec.program, ROWS)]


def _read(folder: Path) -> GridRun:
    spec = read_asked(folder)
    return GridRun(**spec.parts, label=spec.label, folder=folder, rows=read_rows(folder))


def grouped(runs: Sequence[GridRun], without: str | None = None) -> list[list[GridRun]]:
    """Group the runs that differ in their seeds alone, or in `without` too; by activation, its number, and maps."""
    return groups.grouped(sorted(runs, key=_order), without)


def _order(run: GridRun) -> tuple[str, float, int, str]:
    act = run.variant.activation
    return act.name, act.number or 0.0, run.settings.maps, run.label


def names(of: Sequence[Sequence[GridRun]], without: str | None = None) -> list[str]:
    """Name each group: activation and number of maps, and whatever else tells the groups apart."""
    found = []
    for group, differences in zip(of, groups.differences(of, (*NAMED, without)), strict=True):
        words = [] if without == "act" else [group[0].variant.activation.title]
        words += [f"N = {group[0].settings.maps}", differences]
        found.append(", ".join(filter(None, words)))
    return found
