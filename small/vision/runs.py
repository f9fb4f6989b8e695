"""Many runs in one folder, and Table S1 of Kim et al. 2023 from them.

    activations x seeds -> OUT/act=nmda:10,seed=0/ -> runs that are there -> groups of seeds -> table, tests

Runs of one seed share their order, their augmentation and their first weights, whatever the activation; so two
activations are compared within seeds and within test images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.verdict.statistics import Effect, holm, paired_effect
from llm.common.errors import UserError
from llm.common.tables import text_table

from .. import groups
from ..folder import RECORD, TENSORS, checkpoint_step, read_record, run_folders
from ..variants import Act, Variant
from .datasets import DATASETS
from .model import Sizes
from .train import PARTS, PROGRAM, ROWS, Settings, read_right, read_table
from .train import Row as Epoch

BASE = "gelu"  # what the others are compared with
PAPER = {  # (data set, activation): top-1 test accuracy in %, mean and deviation of three trials (Table S1)
    ("cifar100", "gelu"): "69.92 ± 0.34", ("cifar100", "nmda:10"): "70.27 ± 0.47",
    ("cifar100", "nmda:0"): "49.91 ± 0.58", ("tiny-imagenet", "gelu"): "54.90 ± 0.45",
    ("tiny-imagenet", "nmda:10"): "55.72 ± 0.03", ("tiny-imagenet", "nmda:0"): "40.36 ± 0.52",
}  # fmt: skip


class RunSpec(NamedTuple):
    """One run, as it is asked for."""

    label: str  # name of its folder
    variant: Variant
    settings: Settings


@dataclass(frozen=True)
class Done:
    """One run, as it is there."""

    folder: Path
    data: dict[str, Any]
    sizes: Sizes
    variant: Variant
    settings: Settings
    rows: Sequence[Epoch]

    @property
    def finished(self) -> bool:
        """Whether its last epoch is there."""
        return self.rows[-1].epoch == self.settings.epochs

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the runs of a group share: everything but the seed."""
        parts = (asdict(part) for part in (self.sizes, self.variant, self.settings))
        return {name: value for part in (self.data, *parts) for name, value in part.items() if name != "seed"}


def combinations(variant: Variant, settings: Settings, acts: Sequence[str], seeds: Sequence[int]) -> list[RunSpec]:
    """A run of each activation with each seed, seed by seed; UserError where one is unknown or there twice."""
    variants = [replace(variant, act=act) for act in acts]
    if len(set(variants)) < len(variants):
        raise UserError(f"an activation is asked for twice: {', '.join(each.act for each in variants)}")
    return [RunSpec(f"act={v.act},seed={seed}", v, replace(settings, seed=seed)) for seed in seeds for v in variants]


def read_runs(outs: Sequence[Path]) -> list[Done]:
    """The runs of several folders that have a checkpoint, by activation; each may be one run itself.

    Raises:
        UserError: there is none in one of them, one is damaged, or two are of the same settings and seed.
    """
    found = [run for out in outs for folder in run_folders(out, PROGRAM, TENSORS) if (run := _read(folder))]
    for group in groups.grouped(found):
        of_seed: dict[int, Done] = {}
        for run in group:
            if other := of_seed.get(run.settings.seed):
                raise UserError(f"{other.folder} and {run.folder} are one run twice: give only one of them")
            of_seed[run.settings.seed] = run
    return sorted(found, key=lambda run: (*_place(run.variant.act), run.settings.seed))


def _place(act: str) -> tuple[bool, str, float]:
    """The order of the paper's columns: GELU, then the others, NMDA's alpha falling."""
    name, number = Act.parse(act)
    return act != BASE, name, -(number or 0.0)


def _read(folder: Path) -> Done:
    """A run as of its last checkpoint: a kill may have left a table that is one row ahead."""
    record = read_record(folder, PROGRAM, PARTS)
    try:
        data = {name: record["data"][name] for name in ("name", "classes", "side", "train", "test", "crc32")}
        made = Sizes(**record["sizes"]), Variant(**record["variant"]), Settings(**record["settings"])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder / RECORD} is of another version ({error}): train again with another --out") from error
    if data["name"] not in DATASETS:
        raise UserError(f"{folder / RECORD} is of a data set {data['name']!r}, which this version does not know")
    step, rows = checkpoint_step(folder), read_table(folder)
    if [row.epoch for row in rows[:step]] != [*range(1, step + 1)]:
        raise UserError(f"{folder / ROWS} is not of its checkpoint, of epoch {step}: train again with another --out")
    return Done(folder, data, *made, rows[:step])


def by_data_set(runs: Sequence[Done]) -> dict[str, list[Done]]:
    """The runs of each data set."""
    return {name: own for name in DATASETS if (own := [run for run in runs if run.data["name"] == name])}


def names(of: Sequence[Sequence[Done]], *known: str) -> list[str]:
    """What to call each group of one data set: its activation, unless that is `known`, and whatever else differs."""
    found = []
    for group, rest in zip(of, groups.differences(of, ("act", *known)), strict=True):
        act = [] if "act" in known else [group[0].variant.activation.title]
        found.append(", ".join([*act, *filter(None, [rest])]))
    return found


# ---- Table S1 --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Runs that differ in activation and seed alone."""

    name: str
    data: str
    by_act: dict[str, list[Done]]


def report(runs: Sequence[Done]) -> str:
    """Table S1 with the paper's rows, and the tests, as text."""
    rows = [row for name, own in by_data_set(runs).items() for row in _rows(name, own)]
    acts = sorted({run.variant.act for run in runs}, key=_place)
    cells = []
    for row in rows:
        cells.append([row.name, *(_cell(row.by_act.get(act, [])) for act in acts)])
        paper = [PAPER.get((row.data, act), "") for act in acts]
        if any(paper) and not next(iter(row.by_act.values()))[0].variant.streams:  # the paper has none
            cells.append(["  the paper's", *paper])
    title = "Table S1: top-1 test accuracy in %, mean ± standard deviation over seeds (divided by their number)"
    table = text_table(["", *(Act.parse(act).title for act in acts)], cells)
    return "\n".join([title, "", table, "", *verdicts(rows)])


def _rows(data: str, runs: Sequence[Done]) -> Iterator[Row]:
    settings = groups.grouped(runs, without="act")
    for row, rest in zip(settings, names(settings, "act"), strict=True):
        by_act: dict[str, list[Done]] = {}
        for run in row:
            by_act.setdefault(run.variant.act, []).append(run)
        yield Row(", ".join(filter(None, [DATASETS[data].title, rest])), data, by_act)


def _cell(runs: Sequence[Done]) -> str:
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


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each activation beside GELU, over the seeds that both have finished.

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


def _effect(base: Sequence[Done], other: Sequence[Done]) -> Effect | str:
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
