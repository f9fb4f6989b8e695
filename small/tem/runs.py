"""Many runs in one folder, and what Figure 4 of Whittington et al. 2022 says, in numbers.

models x seeds -> OUT/tem-t,seed=0/ -> runs that are there -> groups of seeds -> table, comparison
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm.common.errors import UserError
from llm.common.tables import text_table

from .. import groups
from ..folder import RECORD, TENSORS, checkpoint_step, read_record, run_folders
from .train import PARTS, PROGRAM, Model, Row, Settings, digests, read_table

REACHED = 0.9  # zero-shot accuracy
NAMES = {"tem-t": "TEM-t", "tem": "TEM"}


class RunSpec(NamedTuple):
    """One run, as it is asked for."""

    label: str  # name of its folder
    model: Model
    settings: Settings


@dataclass(frozen=True)
class Done:
    """One run, as of its last checkpoint."""

    folder: Path
    model: Model
    settings: Settings
    rows: Sequence[Row]

    @property
    def last(self) -> Row:
        """Its last test."""
        return self.rows[-1]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the runs of a group share: everything but the seed."""
        rule = {} if self.model.rule is None else {f"rule.{k}": v for k, v in asdict(self.model.rule).items()}
        found = {"model": self.model.name, **asdict(self.model.sizes), **rule, **asdict(self.settings)}
        del found["seed"]
        return found

    def reached(self) -> Row | None:
        """The first test whose zero-shot accuracy is at least REACHED."""
        return next((row for row in self.rows if row.zero_shot >= REACHED), None)


def combinations(models: Sequence[Model], settings: Settings, seeds: Sequence[int]) -> list[RunSpec]:
    """A run of each model with each seed, seed by seed."""
    return [RunSpec(f"{model.name},seed={s}", model, replace(settings, seed=s)) for s in seeds for model in models]


def read_runs(out: Path) -> list[Done]:
    """The runs of a folder that have a checkpoint, TEM-t first; `out` may be one run itself.

    Raises:
        UserError: there is none, or one is damaged.
    """
    found = [_read(folder) for folder in run_folders(out, PROGRAM, TENSORS)]
    return sorted(found, key=lambda run: (list(NAMES).index(run.model.name), run.settings.seed))


def _read(folder: Path) -> Done:
    record = read_record(folder, PROGRAM, PARTS)
    try:
        settings = Settings(**record["settings"] | {"spaces": tuple(record["settings"]["spaces"])})
        model = Model.from_record(record["model"])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder / RECORD} is of another version ({error}): train again with another --out") from error
    if record["spaces"] != digests(settings):
        raise UserError(f"a file among the spaces of {folder} has changed since: put it back, or train anew")
    step = checkpoint_step(folder)  # a kill may have left a table that is one row ahead
    return Done(folder, model, settings, [row for row in read_table(folder) if row.step <= step])


def names(of: Sequence[Sequence[Done]]) -> list[str]:
    """What to call each group: its model, and what else tells it from others of this model."""
    found = []
    for group in of:
        alike = [other for other in of if other[0].model.name == group[0].model.name]
        rest = groups.differences(alike, ())[alike.index(group)]
        found.append(", ".join(filter(None, [NAMES[group[0].model.name], rest])))
    return found


def report(runs: Sequence[Done]) -> str:
    """Accuracies at the last step, and how long they took; and the comparison of two models."""
    of = groups.grouped(runs)
    rows = []
    for group, name in zip(of, names(of), strict=True):
        reached = [run.reached() for run in group]
        there = [row for row in reached if row is not None]
        rows.append(
            [
                name, str(len(group)), "/".join(map(str, sorted({run.last.step for run in group}))),
                groups.mean_and_deviation([run.last.zero_shot for run in group]),
                groups.mean_and_deviation([run.last.visited for run in group]),
                f"{np.mean([run.last.memories for run in group]):.0f}",
                f"{1e3 * np.mean([run.last.seconds / max(1, run.last.step) for run in group]):.1f}",
                f"{np.mean([row.step for row in there]):.0f}" if len(there) == len(group) else "not",
                f"{np.mean([row.seconds for row in there]):.0f}" if len(there) == len(group) else "not",
            ]
        )  # fmt: skip
    header = [
        "", "seeds", "steps", "zero-shot", "visited", "memories", "ms a step", f"steps to {REACHED}", f"s to {REACHED}"
    ]  # fmt: skip
    sentences = [comparison(*of)] if len(of) == 2 else []
    return "\n\n".join([text_table(header, rows), *filter(None, sentences)])


def comparison(first: Sequence[Done], second: Sequence[Done]) -> str:
    """The zero-shot accuracy of one group less the other's, within seeds, with its 95% interval.

    At the last step at which all runs of the seeds that both have were tested.
    """
    sides = [{run.settings.seed: {row.step: row for row in run.rows} for run in side} for side in (first, second)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    steps = set.intersection(*(set(side[seed]) for side in sides for seed in seeds)) if seeds else {0}
    title = " - ".join(names([first, second]))
    if len(seeds) < 2 or not max(steps):
        return f"{title}: no test, as fewer than two seeds of both have been tested at one step."
    last = max(steps)
    one, other = (np.array([side[seed][last].zero_shot for seed in seeds]) for side in sides)
    differences = one - other
    half = groups.half_interval(differences)
    took = [np.mean([side[seed][last].seconds for seed in seeds]) for side in sides]
    return (
        f"{title}: zero-shot accuracy {differences.mean():+.3f} after {last} steps, 95% interval "
        f"{differences.mean() - half:+.3f} to {differences.mean() + half:+.3f} within {len(seeds)} seeds; a step of "
        f"the second takes {took[1] / took[0]:.1f} times as long."
    )
