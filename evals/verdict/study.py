"""The verdict on a study: its finished runs as a ladder of sizes, what is missing of it, and what may be said.

study.json and run folders (`llm.runs.study_record`) -> state of each run -> ladder -> `ladder.judge`
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from evals.verdict import ladder_words
from evals.verdict.ladder import LEVEL, Ladder, LadderVerdict, Run, Size, judge, make_ladder
from evals.verdict.statistics import Interval, student_interval
from evals.verdict.study_arms import SEVERAL, ArmCost, arm_costs
from evals.verdict.study_evaluations import Evaluation, read_evaluations
from llm.common.errors import UserError
from llm.common.files import read_json
from llm.runs.study_record import (
    BASE,
    BENCH,
    MAIN,
    NULL_ARM,
    RunState,
    StudyRecord,
    StudyRun,
    changes_between,
    read_record,
)

NAMED = 4  # runs that one sentence names
SAME_FLOPS = 1e-3  # relative
States = Mapping[StudyRun, RunState]


@dataclass(frozen=True)
class StudyVerdict:
    """What a study says.

    Args:
        record: of the study.
        text: its YAML as it is now.
        changes: what was changed since the first run started, a sentence each.
        states: how far each run is, searches included.
        missing: what is not in the ladder and why, a sentence each.
        notes: what else a reader has to know, a sentence each.
        verdict: on all finished runs.
        step_times: of arms, over the baseline's, where they were measured.
        evaluations: of the runs' exports, where there are any.
        costs: (arm, size) -> parameters and FLOPs relative to the baseline's.
    """

    record: StudyRecord
    text: str
    changes: list[str]
    states: States
    missing: list[str]
    notes: list[str]
    verdict: LadderVerdict
    step_times: Mapping[str, Interval]
    evaluations: Sequence[Evaluation] = ()
    costs: Mapping[tuple[str, str], ArmCost] = field(default_factory=dict)

    @property
    def sentences(self) -> dict[str, str]:
        """The verdict on each arm with a change."""
        return {arm: ladder_words.sentence(self.verdict, arm) for arm in self.verdict.ladder.changed}

    @property
    def headlines(self) -> list[str]:
        """The verdict in a few sentences: one for each arm, or of many arms an overview."""
        if len(self.sentences) > SEVERAL:
            return [ladder_words.overview(self.verdict)]
        return list(self.sentences.values())


def judge_study(path: Path, level: float = LEVEL, bench: Path | None = None) -> StudyVerdict:
    """Judge the finished runs of a study, given its YAML or its folder.

    Args:
        path: of the YAML or the folder.
        level: of the intervals.
        bench: what `llm bench --json` or `llm study bench` wrote, with the baseline and arms as contenders (default:
            the bench.json in the study's folder, if there is one).

    Raises:
        UserError: none of its runs has been started; no pair of an arm and the baseline is finished; its budgets do
            not stand in one ratio at all sizes; `bench` has no step times of the baseline and an arm.
    """
    record = read_record(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else yaml.safe_dump(record.content, sort_keys=False)
    of_base = [change for change in record.changes if change.startswith(BASE)]
    changes = [*changes_between(record.registered["study"], text), *of_base]
    states = {run: record.state(run) for run in record.runs}
    ladder, left_out = _ladder(record, states)
    missing = [*left_out, *_not_finished(record, states)]
    if bench is None and (record.folder / BENCH).is_file():
        bench = record.folder / BENCH
    times = {} if bench is None else _step_times(bench, ladder, level)
    found = judge(ladder, level)
    evaluations, unpaired = read_evaluations(record, states.items(), level)
    notes = dict.fromkeys(
        [*record.notes, *_costs(record), *(note for arm in found.arms.values() for note in arm.notes), *unpaired]
    )
    of_step = {record.baseline: 1.0, **{arm: time.value for arm, time in times.items()}} if times else {}
    costs = arm_costs(record, states, of_step)
    return StudyVerdict(record, text, changes, states, missing, list(notes), found, times, evaluations, costs)


def _ladder(record: StudyRecord, states: States) -> tuple[Ladder, list[str]]:
    """Return all seeds that are over with all their budgets, and a sentence on whatever is left out as a whole."""
    runs = [run for run in record.runs if run.stage == MAIN]
    over = [run for run in runs if states[run].over]
    budgets = [name for name in dict.fromkeys(run.budget for run in runs) if any(run.budget == name for run in over)]
    sizes = [size for size in record.sizes if any(run.size == size for run in over)]
    left_out = [
        f"{what} {name} has no finished run, and the verdict is without it."
        for what, names, used in (
            ("Budget", dict.fromkeys(run.budget for run in runs), budgets),
            ("Size", record.sizes, sizes),
        )
        for name in names
        if name not in used
    ]
    seeds: dict[tuple[str, str, int], list[StudyRun]] = {}
    for run in over:
        seeds.setdefault((run.arm, run.size, run.seed), []).append(run)
    whole = [run for group in seeds.values() if len(group) == len(budgets) for run in group]
    arms = {run.arm for run in whole}
    left_out += [
        f"No seed of {arm} is finished with all its budgets, and the verdict is without this arm."
        for arm in record.arms
        if arm not in arms
    ]
    if record.baseline not in arms or not arms - {record.baseline, NULL_ARM}:
        raise UserError(
            f"{record.folder} has no finished runs of {record.baseline} and of an arm with a change: train them with "
            "python -m llm study run STUDY"
        )
    return make_ladder(
        [Run(run.arm, run.size, run.seed, run.tokens, _loss(states[run])) for run in whole],
        [_size(size, runs, record.baseline, budgets) for size in sizes],
        record.baseline,
        NULL_ARM if NULL_ARM in arms else None,
    ), left_out


def _loss(state: RunState) -> float:
    """Return the final validation loss; nan if the run diverged."""
    return state.loss if state.loss is not None and math.isfinite(state.loss) else math.nan


def _size(name: str, runs: list[StudyRun], baseline: str, budgets: list[str]) -> Size:
    """Return a size of the baseline with its budgets in ascending order."""
    found = {
        run.tokens: run for run in runs if (run.size, run.arm) == (name, baseline) and run.budget in budgets
    }  # the seeds of a budget have equal tokens
    ordered = [found[tokens] for tokens in sorted(found)]
    return Size(name, ordered[0].parameters, tuple(run.tokens for run in ordered), tuple(run.flops for run in ordered))


def _not_finished(record: StudyRecord, states: States) -> Iterator[str]:
    """Yield a sentence for each run that diverged or failed, and for those of each size that are not over."""
    main = [run for run in record.runs if run.stage == MAIN]
    for run in main:
        state, reason = states[run], f": {states[run].reason}" if states[run].reason else ""
        if state.state in ("diverged", "failed"):
            yield f"{run.name} {state.state} at step {state.step:,} of {run.steps:,}{reason.rstrip('.')}."
        elif state.state == "done" and math.isnan(_loss(state)):
            yield f"{run.name} is done and has no finite validation loss; it counts as diverged."
    for size in record.sizes:
        here = [run for run in main if run.size == size]
        for name, words in (("running", "running"), ("stopped", "interrupted"), ("missing", "not started")):
            names = [run.name for run in here if states[run].state == name]
            if names:
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                what = f"{len(names)} of {len(here)} runs {'is' if len(names) == 1 else 'are'} {words}"
                yield f"Size {size}: {what} ({', '.join(names[:NAMED])}{more})."


def _costs(record: StudyRecord) -> Iterator[str]:
    """Yield a sentence for each arm whose FLOPs at equal tokens are not the baseline's."""
    flops = {(run.arm, run.size, run.budget): run.flops for run in record.runs if run.stage == MAIN}
    for arm in record.arms:
        ratios = [
            value / flops[record.baseline, size, budget]
            for (other, size, budget), value in flops.items()
            if other == arm and (record.baseline, size, budget) in flops
        ]
        if ratios and max(abs(ratio - 1) for ratio in ratios) > SAME_FLOPS:
            yield (
                f"At equal tokens, {arm} takes {min(ratios):.3f} to {max(ratios):.3f} times the FLOPs of "
                f"{record.baseline}; compute multipliers are at equal tokens and do not count this."
            )


def _step_times(bench: Path, ladder: Ladder, level: float) -> dict[str, Interval]:
    """Return the step time of each measured arm over the baseline's: Student's interval of the rounds' log ratios."""
    try:
        rates = {name: np.log(each) for name, each in read_json(bench)["tokens_per_second"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{bench} is not of llm bench: give the file that its --json wrote") from error
    arms = [arm for arm in ladder.changed if arm in rates]
    if ladder.baseline not in rates or not arms or len(rates[ladder.baseline]) < 2:
        raise UserError(
            f"{bench} has no two rounds of {ladder.baseline} and an arm of the study: run python -m llm study "
            "bench STUDY"
        )
    found = {}
    for arm in arms:
        ratios = rates[ladder.baseline] - rates[arm]
        spread = float(ratios.std(ddof=1)) / math.sqrt(len(ratios))
        found[arm] = student_interval(float(ratios.mean()), spread, len(ratios) - 1, level).mapped(math.exp)
    return found
