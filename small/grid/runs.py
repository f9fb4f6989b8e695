"""Many runs in one folder: which there are, what each is called, and what came of them.

    asked-for combinations -> OUT/act=nmda:10,maps=32,seed=0/ -> runs that are there -> groups of seeds -> tables

A run is a folder of `train`; runs of a group differ in their seeds alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.plots import text_table
from llm.errors import UserError

from ..folder import RECORD
from .graph import Graph
from .model import Sizes, Variant
from .train import MAPS, ROWS, Row, Settings, check_segments, read_asked, read_rows

ALWAYS = ("act", "maps", "seed")  # in a run's name, whether they vary or not
SHOWN = ("working", "reference", "first")


class Asked(NamedTuple):
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

    @property
    def group(self) -> tuple[Sizes, Variant, Settings]:
        """What the runs that differ in their seeds alone share."""
        return self.sizes, self.variant, replace(self.settings, seed=0)


def combinations(
    graph: Graph, sizes: Sizes, variant: Variant, settings: Settings, knobs: dict[str, Sequence[Any]]
) -> list[Asked]:
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
        label = ",".join(f"{name}={_word(facts[name])}" for name in named)
        found.append(Asked(label, graph, *made))  # type: ignore[arg-type]
    return found


def _word(value: Any) -> str:
    """A value in the name of a folder."""
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(value) or "none" if isinstance(value, tuple) else str(value)


def read_runs(out: Path) -> list[Done]:
    """The runs of a folder that have a row, in the order of their names; `out` may be one run itself.

    Raises:
        UserError: there is none, or one is damaged.
    """
    folders = [out] if (out / RECORD).is_file() else sorted(path.parent for path in out.glob(f"*/{RECORD}"))
    found = [_read(folder) for folder in folders if (folder / ROWS).is_file()]
    if not found:
        raise UserError(f"{out} holds no run of python -m small.grid with a result: train first")
    return found


def _read(folder: Path) -> Done:
    _, sizes, variant, settings = read_asked(folder)
    return Done(folder, sizes, variant, settings, read_rows(folder))


def grouped(runs: Sequence[Done]) -> list[list[Done]]:
    """The runs of each group, groups in the order of activations (numbers by size), then of the maps."""
    groups: dict[Any, list[Done]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return sorted(groups.values(), key=lambda group: _order(group[0]))


def _order(run: Done) -> tuple[str, float, int, str]:
    name, _, number = run.variant.act.partition(":")
    return name, float(number or 0), run.settings.maps, run.label


def table(runs: Sequence[Done]) -> str:
    """The last errors of every group: mean ± standard deviation over seeds, on familiar and on novel maps."""
    rows = []
    for group in grouped(runs):
        trials = sorted({run.last.trial for run in group})
        errors = ([getattr(run.last.errors[maps], name) for run in group] for name in SHOWN for maps in MAPS)
        label = ",".join(part for part in group[0].label.split(",") if not part.startswith("seed="))
        rows.append([label, str(len(group)), "/".join(map(str, trials)), *map(mean_and_deviation, errors)])
    return text_table(["", "seeds", "trial", *(f"{name}, {maps}" for name in SHOWN for maps in MAPS)], rows)


def mean_and_deviation(values: Sequence[float]) -> str:
    """As in the paper: the deviation of the values themselves."""
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
