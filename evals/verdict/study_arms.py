"""The arms of a study next to each other: where each comes from, how large it is and what it takes.

A study of one size cannot turn parameters or FLOPs into nats: the baseline was not trained at another. So they are
named, and a reader compares an arm with a control of its size if the study has one.
"""

from collections.abc import Mapping
from typing import NamedTuple

from llm.common.errors import UserError
from llm.runs import reading
from llm.runs.study_record import MAIN, NULL_ARM, SOURCE, RunState, StudyRecord, StudyRun

SEVERAL = 3  # arms with a change, up to which their own pictures are enough


class ArmCost(NamedTuple):
    """What an arm has and takes at a size, divided by the baseline's; None: not known.

    Args:
        parameters: all of them, embeddings included, as counted when the run started.
        flops: model FLOPs of a run of equal tokens.
        tuned: the value of the tuned key, if a search is over; not a ratio.
    """

    parameters: float | None
    flops: float | None
    tuned: float | None = None


def arm_costs(record: StudyRecord, states: Mapping[StudyRun, RunState]) -> dict[tuple[str, str], ArmCost]:
    """Return (arm, size) -> its cost, of every arm and size with a run that is over."""
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
        choices = record.choices.get(record.baseline if arm == NULL_ARM else arm, {})
        found[arm, size] = ArmCost(
            ours / base if ours and base else None,
            run.flops / run.tokens / (other.flops / other.tokens) if other else None,
            choices.get(size),
        )
    return found


def _parameters(record: StudyRecord, run: StudyRun) -> int | None:
    try:
        return reading.record(record.folder / run.name).get("parameters")
    except UserError:
        return None


def arm_sources(record: StudyRecord) -> dict[str, str]:
    """Return arm -> where it comes from and how it differs, as the YAML says; arms without such a text are left out."""
    arms = record.content.get("arms") or {}
    return {arm: overrides[SOURCE] for arm, overrides in arms.items() if SOURCE in (overrides or {})}


def format_cost(cost: ArmCost | None) -> tuple[str, str]:
    """Return parameters as "+12.7%" and FLOPs as "1.15 x", "–" if they are not known."""
    parameters, flops = (cost.parameters, cost.flops) if cost else (None, None)
    return (
        f"{100 * (parameters - 1):+.1f}%" if parameters else "–",
        f"{flops:.2f} ×" if flops else "–",
    )
