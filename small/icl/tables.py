"""Tables 1, 5 and 6 and the t-tests of Burns et al. 2025, Section 3.4, from the snapshots of a training.

snapshots -> the first snapshot of each run whose accuracy exceeds a threshold -> mean and deviation -> tests

A run that never exceeds it counts in no mean, the table says so, and no test is made of its variant. The paper's
t-tests take the two groups for independent (Student's, equal variances). Runs of one seed share their data and their
initial weights here, so the differences within seeds, with their interval, are the sharper comparison; both are given.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

from llm.common.tables import text_table

from .runs import Snapshot
from .task import TITLES

THRESHOLDS = (0.95, 0.5, 0.9)  # Tables 1, 5, 6
TASKS = ("ic", "ic2")
PAPER = {  # (threshold, task): mean and standard deviation of each variant's first snapshot
    (0.95, "ic"): {"classic": (64.5, 5.12), "queries": (52.5, 1.5), "keys": (61.75, 0.83), "values": (49.0, 2.12)},
    (0.95, "ic2"): {"classic": (63.25, 4.15), "queries": (51.75, 1.92), "keys": (61.25, 0.83), "values": (47.75, 1.3)},
    (0.5, "ic"): {"classic": (51.0, 4.24), "queries": (41.5, 2.29), "keys": (49.75, 0.43), "values": (32.75, 0.83)},
    (0.5, "ic2"): {"classic": (51.5, 4.39), "queries": (41.5, 1.66), "keys": (49.25, 0.83), "values": (33.25, 1.09)},
    (0.9, "ic"): {"classic": (59.25, 4.49), "queries": (48.25, 1.48), "keys": (57.5, 0.5), "values": (42.25, 1.3)},
    (0.9, "ic2"): {"classic": (59.0, 4.53), "queries": (48.0, 1.87), "keys": (57.25, 0.83), "values": (42.0, 0.71)},
}
TABLES = {0.95: "Table 1", 0.5: "Table 5", 0.9: "Table 6"}
First = dict[str, dict[int, int | None]]  # {variant: {seed: number of the first snapshot, or None}}


class Test(NamedTuple):
    """`first` against `second`: snapshots of the one less those of the other."""

    first: str
    second: str
    t: float  # the paper's: two independent groups
    p: float
    difference: float  # within seeds
    low: float  # of its 95% interval, by Student's t; infinite where the difference is the same in all seeds
    high: float
    paired_p: float
    seeds: int


def first_above(snapshots: Sequence[Snapshot], task: str, threshold: float) -> First:
    """The number of each run's first snapshot whose accuracy on a task exceeds a threshold."""
    found: First = {}
    for row in sorted(snapshots, key=lambda row: row.snapshot):
        runs = found.setdefault(row.variant, {})
        if runs.setdefault(row.seed, None) is None and row.accuracy[task] > threshold:
            runs[row.seed] = row.snapshot
    return found


def compare(first: Mapping[int, int | None], second: Mapping[int, int | None], names: tuple[str, str]) -> Test | None:
    """The tests of two variants; None with fewer than two seeds, or where a run never got there.

    To leave out the slow runs would favour the variant that has them.
    """
    if len(first) < 2 or first.keys() != second.keys() or None in [*first.values(), *second.values()]:
        return None
    a, b = (np.array([side[seed] for seed in first], float) for side in (first, second))
    with warnings.catch_warnings(action="ignore"):  # groups without any spread have no t
        independent, paired = stats.ttest_ind(a, b), stats.ttest_rel(a, b)
    # Snapshots are whole numbers: equal differences in few seeds do not mean that there is no spread.
    low, high = paired.confidence_interval(0.95) if np.ptp(a - b) else (-math.inf, math.inf)
    return Test(
        *names, float(independent.statistic), float(independent.pvalue), float((a - b).mean()), float(low),
        float(high), float(paired.pvalue), len(first),
    )  # fmt: skip


def format_tables(snapshots: Sequence[Snapshot]) -> str:
    """Return all tables and tests as text."""
    parts = []
    for threshold in THRESHOLDS:
        title = f"{TABLES[threshold]}: first snapshot with an accuracy above {threshold}, mean ± standard deviation"
        parts.append(f"{title}\n\n{_table(snapshots, threshold)}")
    parts.append(f"t-tests at {THRESHOLDS[0]}, in snapshots\n\n{_tests(snapshots, THRESHOLDS[0])}")
    if sentence := verdict(snapshots):
        parts.append(sentence)
    return "\n\n".join(parts)


def verdict(snapshots: Sequence[Snapshot], threshold: float = THRESHOLDS[0]) -> str:
    """How many snapshots the variants save against classic on IC, in one line each; nothing without classic."""
    firsts = first_above(snapshots, "ic", threshold)
    lines = []
    for name, runs in firsts.items():
        if name == "classic" or "classic" not in firsts:
            continue
        test = compare(runs, firsts["classic"], (name, "classic"))
        if test is None:
            lines.append(f"{name}: nothing is said of it ({_passed(runs, firsts['classic'], name, 'classic')}).")
            continue
        base = float(np.mean([value for value in firsts["classic"].values() if value is not None]))
        word = "earlier than" if test.high < 0 else "later than" if test.low > 0 else "not shown to differ from"
        lines.append(
            f"{name} is {word} classic on IC: {test.difference:+.2f} snapshots ({100 * test.difference / base:+.0f}%), "
            f"95% interval {_interval(test)}, {test.seeds} seeds."
        )
    return "\n".join(lines)


def _passed(first: Mapping[int, int | None], second: Mapping[int, int | None], *names: str) -> str:
    """How many runs of both got there."""
    counts = [f"{sum(n is not None for n in runs.values())} of {len(runs)}" for runs in (first, second)]
    return " and ".join(f"{count} {name}" for count, name in zip(counts, names, strict=True)) + " passed"


def _interval(test: Test) -> str:
    if math.isinf(test.low):
        return "not known, the difference is the same in all seeds"
    return f"{test.low:+.2f} to {test.high:+.2f}"


def _table(snapshots: Sequence[Snapshot], threshold: float) -> str:
    firsts = {task: first_above(snapshots, task, threshold) for task in TASKS}
    names, last = list(firsts["ic"]), max(row.snapshot for row in snapshots)
    rows = []
    for task in TASKS:
        rows.append([TITLES[task], *(_mean(firsts[task][name], last) for name in names)])
        paper = PAPER[threshold, task]
        rows.append(["  the paper's", *(f"{paper[n][0]:g} ± {paper[n][1]:g}" if n in paper else "" for n in names)])
    return text_table(["", *names], rows)


def _mean(runs: Mapping[int, int | None], last: int) -> str:
    values = [value for value in runs.values() if value is not None]
    missing = f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}{missing}" if values else f"not by {last}"


def _tests(snapshots: Sequence[Snapshot], threshold: float) -> str:
    rows = []
    for task in TASKS:
        firsts = first_above(snapshots, task, threshold)
        for second, first in combinations(firsts, 2):
            test = compare(firsts[first], firsts[second], (first, second))
            pair = f"{TITLES[task]}: {first} - {second}"
            if test is None:
                rows.append([pair, "", "", "", _passed(firsts[first], firsts[second], "", "").replace("  ", " "), ""])
                continue
            numbers = [f"{test.t:.2f}", f"{test.p:.3f}", f"{test.difference:+.2f}", _interval(test)]
            rows.append([pair, *numbers, f"{test.paired_p:.3f}"])
    return text_table(["", "t", "p", "within seeds", "95% interval", "p"], rows)
