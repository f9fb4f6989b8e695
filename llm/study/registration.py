"""A study on disk: what it said when its first run started, what was changed since, and the config of every run.

FOLDER/
    study.json      the record (`llm/runs/study_record.py`)
    configs/        SIZE/RUN.yaml: `python -m llm fit --config` trains that run
    logs/           SIZE/RUN.log: output of the runs that `study run` started
    SIZE/RUN/       run folders
"""

from __future__ import annotations

from typing import Any

import yaml

from ..common.environment import now
from ..common.errors import UserError
from ..common.files import write_file
from ..common.lock import wait_for
from ..runs import reading
from ..runs.study_record import BASE, NULL_ARM, RECORD, TUNE, StudyRecord, StudyRun, changes_between, read_record
from . import tuning
from .description import Study
from .inspection import Inspection
from .runs import config_path, run_config, study_runs


def register(inspection: Inspection) -> StudyRecord:
    """Bring a study's record and the configs of its runs up to date; returns the record.

    The configs of runs that wait for the result of a search are written once it is there.

    Raises:
        UserError: a store is not here, or the study was changed in a way that a run which has started does not follow.
    """
    study = inspection.study
    if away := inspection.missing_stores:
        raise UserError(
            f"the store {' and '.join(away)} is not here: make it with python -m llm prepare, see docs/data.md"
        )
    with wait_for(study.folder):
        record = _record(inspection)
        configs = {
            run.name: run_config(inspection, run, record.runs, _tuned(record, run))
            for run in record.runs
            if is_ready(study, record, run)
        }
        _check_started(inspection, record, configs)
        record.write()
        for run in record.runs:
            if run.name in configs:
                text, path = yaml.safe_dump(configs[run.name], sort_keys=False), config_path(study, run)
                if not path.is_file() or path.read_text() != text:
                    write_file(path, text)
    return record


def is_ready(study: Study, record: StudyRecord, run: StudyRun) -> bool:
    """Return whether everything is known that the config of a run needs."""
    return run.stage == TUNE or study.tune is None or bool(record.choices)


def _tuned(record: StudyRecord, run: StudyRun) -> float | None:
    """Return the value of the tuned key that a run trains with."""
    if run.stage == TUNE:
        return run.value
    arm = record.baseline if run.arm == NULL_ARM else run.arm
    return record.choices[arm][run.size] if record.choices else None


def _record(inspection: Inspection) -> StudyRecord:
    study = inspection.study
    known = read_record(study.folder) if (study.folder / RECORD).is_file() else None
    begun = known and any((study.folder / run.name / "run.json").is_file() for run in known.runs)
    registered = known.registered if known and begun else {"study": study.text, "base": study.base_text, "time": now()}
    record = StudyRecord(
        folder=study.folder,
        registered=registered,
        content=yaml.safe_load(study.text),
        changes=[
            *changes_between(registered["study"], study.text),
            *changes_between(registered["base"], study.base_text, BASE),
        ],
        notes=inspection.notes,
        baseline=study.baseline,
        arms=study.all_arms(),
        sizes=list(study.sizes),
        runs=study_runs(inspection),
    )
    if study.tune:
        _choose(inspection, record)
    return record


def _choose(inspection: Inspection, record: StudyRecord) -> None:
    """Fill in the choices, and a note for each optimum at an edge, if the search is over."""
    study, tune = inspection.study, inspection.study.tune
    states = {run: state for run in record.runs if run.stage == TUNE and (state := record.state(run)).over}
    if tune is None or any(run.stage == TUNE and run not in states for run in record.runs):
        return
    at_edges: dict[tuple[str, float], list[str]] = {}  # size and value -> arms
    for arm in study.arms:
        best: dict[float, float] = {}
        for size in map(str, tune.sizes):
            losses: dict[float, list[float]] = {}
            for run, state in states.items():
                if (run.arm, run.size) == (arm, size):
                    losses.setdefault(float(run.value or 0), []).append(float(state.loss or 0))
            value, at_edge = tuning.best_value(losses)
            best[inspection.of(size, study.baseline).non_embedding] = value
            if at_edge:
                at_edges.setdefault((size, value), []).append(arm)
        rule = tuning.RULES[tune.rule](best)
        record.choices[arm] = {
            size: tuning.rounded(rule(inspection.of(size, study.baseline).non_embedding)) for size in study.sizes
        }
    record.notes += [
        f"{tune.key} of {', '.join(arms)} at {size} is {value:g}, the edge of the values that were tried: a better one "
        "may lie beyond"
        for (size, value), arms in at_edges.items()
    ]


def _check_started(inspection: Inspection, record: StudyRecord, configs: dict[str, dict[str, Any]]) -> None:
    """Refuse a study whose runs would be others than those that have started under their names."""
    study, problems = inspection.study, dict[str, list[str]]()
    for run in record.runs:
        path = config_path(study, run)
        if run.name not in configs or not path.is_file() or not (study.folder / run.name / "run.json").is_file():
            continue
        old, new = reading.settings(yaml.safe_load(path.read_text())), reading.settings(configs[run.name])
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                problems.setdefault(f"{key} was {old.get(key)} and is {new.get(key)}", []).append(run.name)
    if problems:
        changes = "; ".join(
            f"{problem} in {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
            for problem, names in problems.items()
        )
        raise UserError(
            f"{study.path} no longer describes the runs in {study.folder} that have started ({changes}): undo the "
            "change, or set folder to a new one"
        )
