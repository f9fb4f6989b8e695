"""Evaluations of a study's runs by size: what `python -m evals run` and others left in the exports of their last steps.

main runs that are done -> their exports at the last step -> pairs of equal seed by size, budget and arm -> measured
alike and on the same items, as `compare` has it -> a `Finding` each, p values corrected over all of them
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from evals.exported_steps import exported_steps
from evals.exports import Export
from evals.verdict import verdict
from evals.verdict.measurements import Measure, read_measures
from evals.verdict.verdict import Finding
from llm.common.errors import UserError
from llm.runs.study_record import MAIN, NULL_ARM, RunState, StudyRecord, StudyRun

METRIC = "acc_norm"  # of the tasks that have it


class Evaluation(NamedTuple):
    """One quantity of an arm and the baseline at one size and budget."""

    size: str
    budget: str
    arm: str
    finding: Finding


def read_evaluations(
    record: StudyRecord, states: Iterable[tuple[StudyRun, RunState]], level: float
) -> tuple[list[Evaluation], list[str]]:
    """Return every quantity that was measured of pairs, and a sentence on whatever is left out.

    Holm's correction runs over sizes, budgets and arms within each family of `Measure`; the null arm is a family of its
    own.
    """
    exports = {}
    for run, state in states:
        if run.stage == MAIN and state.state == "done":
            steps = exported_steps(record.folder / run.name)
            if run.steps in steps:
                exports[run.size, run.budget, run.arm, run.seed] = steps[run.steps]
    places: list[tuple[str, str, str]] = []
    measured: list[list[Measure]] = []
    notes: list[str] = []
    for place, pairs in _pairs(record, exports):
        try:
            measures, lacking = read_measures(pairs, {}, METRIC)
        except UserError as error:
            measures, lacking = [], [f"Evaluations of {' '.join(place)} are left out: {error}."]
        notes += lacking
        if measures:
            places.append(place)
            measured.append(measures)
    found = []
    for null in (False, True):
        own = [n for n, (_, _, arm) in enumerate(places) if (arm == NULL_ARM) == null]
        every = verdict.find_arms([measured[n] for n in own], level)
        found += [Evaluation(*places[n], each) for n, of in zip(own, every, strict=True) for each in of]
    return found, list(dict.fromkeys(notes))


def _pairs(
    record: StudyRecord, exports: dict[tuple[str, str, str, int], Export]
) -> Iterator[tuple[tuple[str, str, str], list[tuple[Export, Export]]]]:
    """Yield (size, budget, arm) and the exports of baseline and arm, a tuple a seed that both have."""
    for size, budget, arm in dict.fromkeys(key[:3] for key in exports):
        if arm != record.baseline:
            seeds = [seed for s, b, name, seed in exports if (s, b, name) == (size, budget, arm)]
            pairs = [
                (exports[size, budget, record.baseline, seed], exports[size, budget, arm, seed])
                for seed in seeds
                if (size, budget, record.baseline, seed) in exports
            ]
            if pairs:
                yield (size, budget, arm), pairs
