"""Many runs in one folder: which there are, what each is called, and what came of them.

    asked-for combinations -> OUT/act=nmda:10,maps=32,seed=0/ -> runs that are there -> groups of seeds -> tables

A run is a folder of `train`; runs of a group differ in their seeds alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from llm.common.errors import UserError
from llm.common.tables import text_table

from .. import groups
from ..folder import run_folders
from ..groups import mean_and_deviation, word
from ..spaces import Graph
from .model import Sizes, Variant
from .train import MAPS, PROGRAM, ROWS, Row, Settings, check_segments, read_asked, read_rows

ALWAYS = ("act", "maps", "seed")  # in a run's name, whether they vary or not
SHOWN = ("working", "reference", "first")
NAMED = ("act", "maps", "cells")  # what a group's name has anyway, or never


class RunSpec(NamedTuple):
    """One run, as it is asked for."""

    label: str  # name of its folder
    graph: Graph
    sizes: Sizes
    variant: Variant
    settings: Settings


@dataclass(frozen=True)
class Done:
    """One run, as it is there."""

    folder: Path
    graph: Graph
    sizes: Sizes
    variant: Variant
    settings: Settings
    rows: Sequence[Row]

    @property
    def label(self) -> str:
        """Its name."""
        return self.folder.name

    @property
    def last(self) -> Row:
        """Its last evaluation."""
        return self.rows[-1]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the runs of a group share: every field but the seed, and the space."""
        found = {
            name: value for part in (self.sizes, self.variant, self.settings) for name, value in asdict(part).items()
        }
        del found["seed"]
        return found | {"space": self.graph.name, "cells": json.dumps(self.graph.record())}


def combinations(
    graph: Graph, sizes: Sizes, variant: Variant, settings: Settings, knobs: dict[str, Sequence[Any]]
) -> list[RunSpec]:
    """Every combination of the knobs' values.

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
        found.append(RunSpec(label, graph, *made))  # type: ignore[arg-type]
    return found


def read_runs(out: Path) -> list[Done]:
    """The runs of a folder that have a row, in the order of their names; `out` may be one run itself.

    Raises:
        UserError: there is none, or one is damaged.
    """
    return [_read(folder) for folder in run_folders(out, PROGRAM, ROWS)]


def _read(folder: Path) -> Done:
    return Done(folder, *read_asked(folder), read_rows(folder))


def grouped(runs: Sequence[Done], without: str | None = None) -> list[list[Done]]:
    """The runs that differ in their seeds alone, or in the field `without` too; by activation, its number, and maps."""
    return groups.grouped(sorted(runs, key=_order), without)


def _order(run: Done) -> tuple[str, float, int, str]:
    act = run.variant.activation
    return act.name, act.number or 0.0, run.settings.maps, run.label


def names(of: Sequence[Sequence[Done]], without: str | None = None) -> list[str]:
    """What to call each group: activation and number of maps, and whatever else tells the groups apart."""
    found = []
    for group, differences in zip(of, groups.differences(of, (*NAMED, without)), strict=True):
        words = [] if without == "act" else [group[0].variant.activation.title]
        words += [f"N = {group[0].settings.maps}", differences]
        found.append(", ".join(filter(None, words)))
    return found


def table(runs: Sequence[Done]) -> str:
    """The last errors of every group: mean ± standard deviation over seeds, on familiar and on novel maps."""
    of, rows = grouped(runs), []
    for group, name in zip(of, names(of), strict=True):
        trials = sorted({run.last.trial for run in group})
        errors = ([getattr(run.last.errors[maps], error) for run in group] for error in SHOWN for maps in MAPS)
        rows.append([name, str(len(group)), "/".join(map(str, trials)), *map(mean_and_deviation, errors)])
    return text_table(["", "seeds", "trial", *(f"{error}, {maps}" for error in SHOWN for maps in MAPS)], rows)
