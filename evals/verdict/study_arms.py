"""The arms of a study next to each other: where each comes from, how large it is, what it takes, and what is left of
its difference at equal parameters and FLOPs.

A study of one size cannot turn parameters or FLOPs into nats: the baseline was not trained at another. So they are
named, and a reader compares an arm with a control of its size if the study has one.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import numpy as np

from evals.verdict.ladder import LadderVerdict
from llm.common.errors import UserError
from llm.runs import reading
from llm.runs.study_record import MAIN, NULL_ARM, SOURCE, RunState, StudyRecord, StudyRun

SEVERAL = 3  # arms with a change, up to which their own pictures are enough


class ArmCost(NamedTuple):
    """What an arm has and takes at a size; None: not known.

    Args:
        parameters: all of them, embeddings included, as counted when the run started, divided by the baseline's.
        flops: model FLOPs of a run of equal tokens, divided by the baseline's.
        tuned: the value of the tuned key, if a search is over.
        total: parameters as such.
        step_time: of a step, divided by the baseline's, if `llm study bench` measured it.
    """

    parameters: float | None
    flops: float | None
    tuned: float | None = None
    total: int | None = None
    step_time: float | None = None


def arm_costs(
    record: StudyRecord, states: Mapping[StudyRun, RunState], step_times: Mapping[str, float]
) -> dict[tuple[str, str], ArmCost]:
    """Return (arm, size) -> its cost, of every arm and size with a run that is over.

    Args:
        record: of the study.
        states: of its runs.
        step_times: arm -> time of a step, divided by the baseline's; taken for every size.
    """
    runs: dict[tuple[str, str], StudyRun] = {}
    for run, state in states.items():
        if run.stage == MAIN and state.over:
            longest = runs.setdefault((run.arm, run.size), run)
            runs[run.arm, run.size] = max(longest, run, key=lambda each: each.tokens)
    counts = {key: _parameters(record, run) for key, run in runs.items()}
    found = {}
    for (arm, size), run in runs.items():
        ours, base = counts[arm, size], counts.get((record.baseline, size))
        other = runs.get((record.baseline, size))
        trained_as = record.baseline if arm == NULL_ARM else arm
        found[arm, size] = ArmCost(
            ours / base if ours and base else None,
            run.flops / run.tokens / (other.flops / other.tokens) if other else None,
            record.choices.get(trained_as, {}).get(size),
            ours,
            step_times.get(trained_as),
        )
    return found


def _parameters(record: StudyRecord, run: StudyRun) -> int | None:
    try:
        return reading.record(record.folder / run.name).get("parameters")
    except UserError:
        return None


def adjusted_differences(
    verdict: LadderVerdict, costs: Mapping[tuple[str, str], ArmCost]
) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """Return (arm, size) -> its difference in nats at equal parameters and at equal FLOPs; none with a single size.

    From the difference is taken what the baseline gains from as many more parameters, or FLOPs: the slope of its mean
    loss over their logarithm at that size, from the neighbouring sizes, times the logarithm of the ratio. The slope is
    taken as exact. With budgets in tokens per parameter, larger baselines also see more tokens.
    """
    ladder = verdict.ladder
    losses: dict[str, list[float]] = {}  # of the baseline, by size
    for (arm, size, _), of_budgets in ladder.losses.items():
        if arm == ladder.baseline and all(map(math.isfinite, of_budgets)):
            losses.setdefault(size, []).append(fmean(of_budgets))
    names = [size.name for size in ladder.sizes]
    if len(names) < 2 or any(name not in losses for name in names):
        return {}
    means = [fmean(losses[name]) for name in names]
    totals = [costs[ladder.baseline, name].total for name in names]
    slopes = {
        "parameters": np.gradient(means, np.log(np.array(totals, dtype=float))) if all(totals) else None,
        "flops": np.gradient(means, [size.log_compute for size in ladder.sizes]),
    }
    found = {}
    for arm in ladder.arms:
        for at in verdict.arms[arm].sizes:
            cost = costs.get((arm, at.size.name))
            left = [
                at.difference.value - float(slope[names.index(at.size.name)]) * math.log(ratio)
                if slope is not None and (ratio := getattr(cost, name, None))
                else None
                for name, slope in slopes.items()
            ]
            found[arm, at.size.name] = (left[0], left[1])
    return found


def arm_sources(record: StudyRecord) -> dict[str, str]:
    """Return arm -> where it comes from and how it differs, as the YAML says; arms without such a text are left out."""
    arms = record.content.get("arms") or {}
    return {arm: overrides[SOURCE] for arm, overrides in arms.items() if SOURCE in (overrides or {})}


def format_cost(cost: ArmCost | None) -> tuple[str, str, str]:
    """Return parameters as "+12.7%", FLOPs and step time as "1.15 ×", "–" if they are not known."""
    parameters, flops, time = (cost.parameters, cost.flops, cost.step_time) if cost else (None, None, None)
    return (
        f"{100 * (parameters - 1):+.1f}%" if parameters else "–",
        f"{flops:.2f} ×" if flops else "–",
        f"{time:.2f} ×" if time else "–",
    )
