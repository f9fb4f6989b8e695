"""What Figure 4 of Whittington et al. 2022 says, in numbers: a table of groups, and the comparison of two."""

from collections.abc import Sequence

import numpy as np

from llm.common.tables import text_table

from ..experiment import groups
from .runs import Row, TemRun, names

REACHED = 0.9  # zero-shot accuracy


def accuracy_table(runs: Sequence[TemRun]) -> str:
    """Return accuracies at the last step, and how long they took; and the comparison of two models."""
    of = groups.grouped(runs)
    rows = []
    for group, name in zip(of, names(of), strict=True):
        reached = [_reached(run) for run in group]
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


def _reached(run: TemRun) -> Row | None:
    """Return the first test whose zero-shot accuracy is at least REACHED."""
    return next((row for row in run.rows if row.zero_shot >= REACHED), None)


def comparison(first: Sequence[TemRun], second: Sequence[TemRun]) -> str:
    """Compare the zero-shot accuracies of two groups within seeds, with a 95% interval.

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
