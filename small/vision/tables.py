"""Table S1 of Kim et al. 2023 from runs, and tests of the activations against GELU."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evals.verdict.statistics import Effect, holm, paired_effect
from llm.common.errors import UserError
from llm.common.tables import text_table

from ..experiment import groups
from ..variants import Act
from .datasets import DATASETS
from .runs import BASE, VisionRun, by_data_set, names, place, read_right

PAPER = {  # (data set, activation): top-1 test accuracy in %, mean and deviation of three trials (Table S1)
    ("cifar100", "gelu"): "69.92 ± 0.34", ("cifar100", "nmda:10"): "70.27 ± 0.47",
    ("cifar100", "nmda:0"): "49.91 ± 0.58", ("tiny-imagenet", "gelu"): "54.90 ± 0.45",
    ("tiny-imagenet", "nmda:10"): "55.72 ± 0.03", ("tiny-imagenet", "nmda:0"): "40.36 ± 0.52",
}  # fmt: skip


class TableRow(NamedTuple):
    """Runs that differ in activation and seed alone."""

    name: str
    data: str
    by_act: dict[str, list[VisionRun]]


def table_s1(runs: Sequence[VisionRun]) -> str:
    """Return Table S1 with the paper's rows, and the tests, as text."""
    rows = [row for name, own in by_data_set(runs).items() for row in _rows(name, own)]
    acts = sorted({run.variant.act for run in runs}, key=place)
    cells = []
    for row in rows:
        cells.append([row.name, *(_cell(row.by_act.get(act, [])) for act in acts)])
        paper = [PAPER.get((row.data, act), "") for act in acts]
        if any(paper) and not next(iter(row.by_act.values()))[0].variant.streams:  # the paper has none
            cells.append(["  the paper's", *paper])
    title = "Table S1: top-1 test accuracy in %, mean ± standard deviation over seeds (divided by their number)"
    table = text_table(["", *(Act.parse(act).title for act in acts)], cells)
    return "\n".join([title, "", table, "", *verdicts(rows)])


def _rows(data: str, runs: Sequence[VisionRun]) -> Iterator[TableRow]:
    settings = groups.grouped(runs, without="act")
    for row, rest in zip(settings, names(settings, "act"), strict=True):
        by_act: dict[str, list[VisionRun]] = {}
        for run in row:
            by_act.setdefault(run.variant.act, []).append(run)
        yield TableRow(", ".join(filter(None, [DATASETS[data].title, rest])), data, by_act)


def _cell(runs: Sequence[VisionRun]) -> str:
    """Of the runs of one activation: those that are finished, or how far they are where none is."""
    if not runs:
        return ""
    finished = [run for run in runs if run.finished]
    accuracy = groups.mean_and_deviation([100 * run.rows[-1].accuracy for run in finished or runs], 2)
    if not finished:
        return f"{accuracy} (epoch {'/'.join(str(run.rows[-1].epoch) for run in runs)} of {runs[0].settings.epochs})"
    waiting = f", {len(runs) - len(finished)} not done" if len(finished) < len(runs) else ""
    return f"{accuracy} ({_seeds(len(finished))}{waiting})"


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def verdicts(rows: Sequence[TableRow]) -> list[str]:
    """Return a sentence for each activation against GELU, over the seeds that both have finished.

    The p values are corrected for the number of all comparisons of the report; the intervals are not.
    """
    found = {
        (row.name, act): _effect(row.by_act.get(BASE, []), runs)
        for row in rows
        for act, runs in row.by_act.items()
        if act != BASE
    }
    adjusted = holm({key: effect.p_value for key, effect in found.items() if isinstance(effect, Effect)})
    sentences = []
    for key, effect in found.items():
        title = f"{key[0]}: {Act.parse(key[1]).title}"
        if isinstance(effect, Effect):
            sentences.append(verdict(title, effect, adjusted[key]))
        else:
            sentences.append(f"{title} is compared with nothing: {effect}.")
    if len(adjusted) > 1:
        sentences.append(
            f"p values are corrected for {len(adjusted)} comparisons (Holm 1979); each interval is that of one alone."
        )
    return sentences


def _effect(base: Sequence[VisionRun], other: Sequence[VisionRun]) -> Effect | str:
    """The paired difference in accuracy, over the seeds of both; or why there is none."""
    if not base:
        return "there is no GELU run of the same settings here"
    sides = [{run.settings.seed: run for run in side if run.finished} for side in (base, other)]
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        return "no seed is finished with it and with GELU"
    first, second = (
        np.stack([read_right(side[seed].folder, side[seed].data["test"]) for seed in shared]) for side in sides
    )
    try:
        return paired_effect(first, second)
    except UserError as error:
        return str(error)


def verdict(title: str, effect: Effect, p_value: float) -> str:
    """What a difference to GELU says."""
    shown = p_value < 1 - effect.level
    word = "not shown to differ from" if not shown else "above" if effect.difference > 0 else "below"
    difference, low, high = (100 * value for value in (effect.difference, effect.low, effect.high))
    caution = "; with one seed this speaks of two trainings, not of the activations" if effect.seeds == 1 else ""
    return (
        f"{title} is {word} GELU: {difference:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}, p {p_value:.2g}, "
        f"{_seeds(effect.seeds)} x {effect.items:,} test images{caution}."
    )
