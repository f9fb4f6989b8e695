"""Many runs in one folder, and Table S1 of nmda-transformer.txt from them.

    activations x seeds -> OUT/act=nmda:10,seed=0/ -> runs that are there -> groups of seeds -> table, tests

Runs of one seed share their order, their augmentation and their first weights, whatever the activation; so two
activations are compared within seeds and within test images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evals.plots import text_table
from evals.stats import holm, paired_effect
from llm.errors import UserError

from .. import groups
from ..folder import RECORD, read_record, run_folders
from ..variants import Act, Variant
from .datasets import DATASETS
from .model import Sizes
from .train import PARTS, PROGRAM, ROWS, Row, Settings, read_right, read_rows

BASE = "gelu"  # what the others are compared with
PAPER = {  # (data set, activation): top-1 test accuracy in %, mean and deviation of three trials (Table S1)
    ("cifar100", "gelu"): "69.92 ± 0.34", ("cifar100", "nmda:10"): "70.27 ± 0.47",
    ("cifar100", "nmda:0"): "49.91 ± 0.58", ("tiny-imagenet", "gelu"): "54.90 ± 0.45",
    ("tiny-imagenet", "nmda:10"): "55.72 ± 0.03", ("tiny-imagenet", "nmda:0"): "40.36 ± 0.52",
}  # fmt: skip


class Asked(NamedTuple):
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
    rows: Sequence[Row]

    @property
    def finished(self) -> bool:
        """Whether its last epoch is there."""
        return self.rows[-1].epoch == self.settings.epochs

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the runs of a group share: everything but the seed."""
        parts = (asdict(part) for part in (self.sizes, self.variant, self.settings))
        return {name: value for part in (self.data, *parts) for name, value in part.items() if name != "seed"}


def combinations(variant: Variant, settings: Settings, acts: Sequence[str], seeds: Sequence[int]) -> list[Asked]:
    """A run of each activation with each seed, seed by seed; UserError where one is unknown or there twice."""
    variants = [replace(variant, act=act) for act in acts]
    if len(set(variants)) < len(variants):
        raise UserError(f"an activation is asked for twice: {', '.join(each.act for each in variants)}")
    return [Asked(f"act={v.act},seed={seed}", v, replace(settings, seed=seed)) for seed in seeds for v in variants]


def read_runs(outs: Sequence[Path]) -> list[Done]:
    """The runs of several folders that have a row, by activation; each may be one run itself.

    Raises:
        UserError: there is none in one of them, or one is damaged.
    """
    found = [_read(folder) for out in outs for folder in run_folders(out, PROGRAM, ROWS)]
    return sorted(found, key=lambda run: (*_place(run.variant.act), run.settings.seed))


def _place(act: str) -> tuple[bool, str, float]:
    """The order of the paper's columns: GELU, then the others, NMDA's alpha falling."""
    name, number = Act.parse(act)
    return act != BASE, name, -(number or 0.0)


def _read(folder: Path) -> Done:
    record = read_record(folder, PROGRAM, PARTS)
    try:
        made = Sizes(**record["sizes"]), Variant(**record["variant"]), Settings(**record["settings"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / RECORD} is of another version ({error}): train again with another --out") from error
    return Done(folder, record["data"], *made, read_rows(folder))


def names(of: Sequence[Sequence[Done]], *known: str) -> list[str]:
    """What to call each group: its activation, unless that is `known`, and whatever else tells the groups apart."""
    differences = groups.differences(of, ("act", "train", "test", "classes", "side", "crc32", *known))
    found = []
    for group, rest in zip(of, differences, strict=True):
        act = [] if "act" in known else [group[0].variant.activation.title]
        found.append(", ".join([*act, rest] if rest else act))
    return found


def report(runs: Sequence[Done]) -> str:
    """Table S1 with the paper's rows, and the tests, as text."""
    settings = groups.grouped(runs, without="act")  # all activations of one setting are a row
    acts = sorted({run.variant.act for run in runs}, key=_place)
    titles = [next(run.variant.activation.title for run in runs if run.variant.act == act) for act in acts]
    rows, sentences = [], []
    for row, rest in zip(settings, names(settings, "act", "name"), strict=True):
        data = row[0].data["name"]
        name = ", ".join(filter(None, [DATASETS[data].title, rest]))
        by_act = {act: [run for run in row if run.variant.act == act] for act in acts}
        rows.append([name, *(_cell(by_act[act]) for act in acts)])
        rows.append(["  the paper's", *(PAPER.get((data, act), "") for act in acts)])
        sentences += [f"{name}: {sentence}" for sentence in comparisons(by_act)]
    title = "Table S1: top-1 test accuracy in %, mean ± standard deviation over seeds"
    return "\n".join([title, "", text_table(["", *titles], rows), *([""] if sentences else []), *sentences])


def _cell(runs: Sequence[Done]) -> str:
    """Of the runs of one activation; the paper's had three trials and are finished."""
    if not runs:
        return ""
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    if not all(run.finished for run in runs):
        seeds += f", epoch {'/'.join(str(run.rows[-1].epoch) for run in runs)} of {runs[0].settings.epochs}"
    return f"{groups.mean_and_deviation([100 * run.rows[-1].accuracy for run in runs], 2)} ({seeds})"


def comparisons(by_act: dict[str, list[Done]]) -> Iterator[str]:
    """A sentence for each activation beside GELU, over the seeds that both have finished."""
    effects = {}
    for act, runs in by_act.items():
        if act == BASE or not runs or not by_act.get(BASE):
            continue
        sides = [{run.settings.seed: run for run in side if run.finished} for side in (by_act[BASE], runs)]
        shared = sorted(sides[0].keys() & sides[1].keys())
        if not shared:
            yield f"nothing is said of {runs[0].variant.activation.title} yet, as no seed is finished with it and GELU."
            continue
        base, other = (
            torch.stack([read_right(side[seed].folder, side[seed].data["test"]) for seed in shared]).numpy()
            for side in sides
        )
        effects[runs[0].variant.activation.title] = paired_effect(base, other)
    adjusted = holm({title: effect.p_value for title, effect in effects.items()})
    for title, effect in effects.items():
        shown = adjusted[title] < 1 - effect.level
        word = "not shown to differ from" if not shown else "above" if effect.difference > 0 else "below"
        yield (
            f"{title} is {word} GELU: {100 * effect.difference:+.2f} points, 95% interval {100 * effect.low:+.2f} to "
            f"{100 * effect.high:+.2f}, p {adjusted[title]:.2g}{_of(len(effects))}, {effect.seeds} "
            f"seed{'s' if effect.seeds > 1 else ''} x {effect.items:,} test images."
        )


def _of(tests: int) -> str:
    return f" (Holm, of {tests})" if tests > 1 else ""
