"""Other runs of a baseline: its null arm and its other seeds, and how far apart they lie."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals.exported_steps import ExportedRun
from evals.verdict.measurements import Measure
from evals.verdict.statistics import Spread
from llm.runs.study_record import NULL_ARM, RECORD, StudyRecord, StudyRun, read_record


def null_runs(baseline: Sequence[ExportedRun]) -> list[Path]:
    """The finished runs of the null arm of the study that the baseline's runs belong to; none if one is missing."""
    found = []
    for run in baseline:
        record, mine = _of_study(run)
        if record is None or mine is None:
            return []
        null = next(
            (each for each in _companions(record, mine) if each.arm == NULL_ARM and each.seed == mine.seed),
            None,
        )
        if null is None:
            return []
        found.append(record.folder / null.name)
    return found


def other_runs(run: ExportedRun) -> list[Path]:
    """The finished runs of the study of a run that differ from it in seed or initial weights alone, its own seed's
    null run first."""
    record, mine = _of_study(run)
    if record is None or mine is None:
        return []
    companions = [each for each in _companions(record, mine) if each.arm in (NULL_ARM, record.baseline)]
    companions.sort(key=lambda each: (each.seed != mine.seed, each.arm != NULL_ARM, each.seed))
    return [record.folder / each.name for each in companions]


def _of_study(run: ExportedRun) -> tuple[StudyRecord | None, StudyRun | None]:
    """The study that a run of a baseline belongs to, and what it says of the run; None twice where there is none."""
    study = run.folder.resolve().parent.parent
    if not (study / RECORD).is_file():
        return None, None
    record = read_record(study)
    record.folder = study
    name = f"{run.folder.resolve().parent.name}/{run.folder.name}"
    return record, next((each for each in record.runs if each.name == name and each.arm == record.baseline), None)


def _companions(record: StudyRecord, mine: StudyRun) -> list[StudyRun]:
    """The finished runs of the same stage, size and budget, without the run itself."""
    return [
        each
        for each in record.runs
        if (each.stage, each.size, each.budget) == (mine.stage, mine.size, mine.budget)
        and each.name != mine.name
        and record.state(each).state == "done"
    ]


def spreads(measures: Sequence[Sequence[Measure]]) -> dict[str, Spread]:
    """The spread of each quantity over a run and its companions.

    Args:
        measures: a list a companion; the first side is the run itself, the second the companion.
    """
    values: dict[str, list[float]] = {}
    for own in measures:
        for measure in own:
            run, companion = measure.means
            values.setdefault(measure.name, [run]).append(companion)
    return {name: Spread(float(np.std(each, ddof=1)), len(each)) for name, each in values.items()}
