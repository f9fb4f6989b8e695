"""Trainings over two knobs: at which step does IC pass a threshold?

two knobs -> a training in OUT/<x>,<y> for each pair of values, resumed where it was killed -> sweep.csv, phase plot

A knob is a number of the task (noise, bursty, copies, ...), of the sizes (layers, key_width, ...), of the settings
(lr, batch, ...), or `alpha`: NMDA's in the MLP of every variant.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm.common.errors import UserError
from llm.common.files import write_file
from llm.common.tables import text_table

from ..experiment.runs import as_csv, make_folder, one_by_one
from ..plots import Picture
from .gallery import of_sweep
from .runs import IclSpec
from .settings import IclSizes, Task
from .tables import first_above
from .train import Machine, train

OF_SETTINGS = ("batch", "lr", "decay")


class Knob(NamedTuple):
    """A name and its values, in order."""

    name: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Knob":
        """`NAME=VALUE,VALUE,...`; UserError where it is not that, or no knob has this name."""
        name, _, listed = text.partition("=")
        known = [*(f.name for f in fields(Task)), *(f.name for f in fields(IclSizes)), *OF_SETTINGS, "alpha"]
        known = [name for name in known if name not in ("width", "distinct_labels", "blank", "positions")]
        if name not in known:
            raise UserError(f"{name!r} is not a knob: give one of {', '.join(known)}, as in noise=0,0.1,0.3")
        try:
            values = tuple(float(value) if "." in value or "e" in value else int(value) for value in listed.split(","))
        except ValueError:
            raise UserError(f"{text!r} is not NAME=VALUE,VALUE,...; give numbers, as in noise=0,0.1,0.3") from None
        if len(set(values)) < len(values):
            raise UserError(f"{text!r} has a value twice")
        return cls(name, values)


def points(x: Knob, y: Knob, spec: IclSpec, threshold: float = 0.9) -> list[IclSpec]:
    """Return a training of every pair of values, y outside, x inside; UserError if one of them cannot be."""
    until = spec.settings.until
    if x.name == y.name:
        raise UserError(f"--x and --y are both {x.name!r}: give two different knobs")
    if not 0 < threshold < 1 or (until is not None and until < threshold):
        raise UserError(f"--threshold {threshold} must be between 0 and 1, and not above --stop-accuracy {until}")
    made = []
    for row, column in product(y.values, x.values):
        point = _turned(_turned(spec, x.name, column), y.name, row)
        made.append(replace(point, label=f"{x.name}={column},{y.name}={row}"))
    return made


def _turned(spec: IclSpec, name: str, value: float) -> IclSpec:
    """Return a training with one number changed."""
    if name == "alpha":
        variants = tuple(f"{variant}:nmda{value}" for variant in spec.settings.variants)
        return replace(spec, settings=replace(spec.settings, variants=variants))

    def with_it(part: Any) -> Any:
        if not hasattr(part, name):
            return part
        kind = type(getattr(part, name))
        if kind(value) != value:
            raise UserError(f"{name}={value}: give whole numbers")
        return replace(part, **{name: kind(value)})

    task = with_it(spec.task)
    sizes = replace(with_it(spec.sizes), width=task.width, labels=task.labels)
    return replace(spec, task=task, sizes=sizes, settings=with_it(spec.settings))


def sweep(
    x: Knob, y: Knob, made: Sequence[IclSpec], out: Path, threshold: float, machine: Machine, command: str
) -> tuple[str, Picture]:
    """Train every point, write OUT/sweep.csv, and return the table and the phase plot.

    A mean over seeds is taken where all of them passed; elsewhere it is NaN, shown as "> steps".
    """
    make_folder(out)
    rows: list[tuple[Any, ...]] = []
    means: dict[str, list[float]] = {}
    for point in one_by_one(made):
        snapshots = train(out / point.label, point, machine, command)
        every = point.settings.snapshot_every
        for name, runs in first_above(snapshots, "ic", threshold).items():
            plain = name.rpartition(":nmda")[0] if "alpha" in (x.name, y.name) else name
            passed = [np.nan if value is None else value * every for value in runs.values()]
            means.setdefault(plain, []).append(float(np.mean(passed)))
            rows += [(point.label, plain, seed, step) for seed, step in zip(runs, passed, strict=True)]
    header = [f"{x.name} and {y.name}", "variant", "seed", f"step_at_which_ic_passes_{threshold}"]
    found = ([*row[:3], "" if np.isnan(row[3]) else int(row[3])] for row in rows)
    write_file(out / "sweep.csv", as_csv(header, found))
    steps = made[0].settings.steps
    grids = {name: np.reshape(values, (len(y.values), len(x.values))) for name, values in means.items()}
    picture = of_sweep((x.name, list(x.values)), (y.name, list(y.values)), grids, steps, threshold)
    shown = [[point.label, *(_steps(means[name][n], steps) for name in means)] for n, point in enumerate(made)]
    return text_table([f"step at which IC passes {threshold}", *means], shown), picture


def _steps(mean: float, at_most: int) -> str:
    return f"> {at_most:,}" if np.isnan(mean) else f"{mean:,.0f}"
