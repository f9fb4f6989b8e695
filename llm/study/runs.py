"""The runs of a study, in the order in which they are trained, and the config of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runs.study_record import MAIN, NULL_ARM, TUNE, StudyRun
from .description import Overrides, Study, configured
from .inspection import Inspection


def study_runs(inspection: Inspection) -> list[StudyRun]:
    """Return all runs: those of the search first, then by size, and each trunk before its branches."""
    return [*_tuning_runs(inspection), *_main_runs(inspection)]


def _tuning_runs(inspection: Inspection) -> Iterator[StudyRun]:
    study, tune = inspection.study, inspection.study.tune
    if tune is None:
        return
    for size in map(str, tune.sizes):
        for n in range(1, tune.seeds + 1):
            for arm in study.arms:
                for value in map(float, tune.values):
                    name = f"{size}/{arm}-tune{n}-{tune.key.split('.')[-1]}{value:g}"
                    seed = study.derived(size, "tune", str(n))
                    yield _run(inspection, name, TUNE, size, arm, seed, number=0, value=value)


def _main_runs(inspection: Inspection) -> Iterator[StudyRun]:
    study = inspection.study
    for size in study.sizes:
        budgets = inspection.budgets(size)
        for label in study.seeds:
            for arm in study.all_arms():
                seed, trunk = study.seed_of(size, label), None
                for number in reversed(range(len(budgets))):
                    name = f"{size}/{arm}-seed{label}-{study.tokens.label(number)}"
                    yield _run(inspection, name, MAIN, size, arm, seed, number, trunk=trunk)
                    if trunk is None and study.tokens.cooldown:
                        trunk = name


def _run(
    inspection: Inspection,
    name: str,
    stage: str,
    size: str,
    arm: str,
    seed: int,
    number: int,
    trunk: str | None = None,
    value: float | None = None,
) -> StudyRun:
    """Return the run of budget `number`."""
    found = inspection.of(size, arm)
    steps = inspection.budgets(size)[number]
    tokens = steps * found.tokens_per_step
    return StudyRun(
        name=name,
        stage=stage,
        size=size,
        arm=arm,
        budget=inspection.study.tokens.label(number),
        seed=seed,
        steps=steps,
        tokens=tokens,
        parameters=inspection.of(size, inspection.study.baseline).non_embedding,
        flops=found.flops_per_token * tokens,
        trunk=trunk,
        start=steps - inspection.cooldown(steps) if trunk else 0,
        value=value,
    )


def run_config(inspection: Inspection, run: StudyRun, runs: list[StudyRun], tuned: float | None) -> dict[str, Any]:
    """Return the config of a run, nested.

    Args:
        run: one of `runs`.
        tuned: the value of the tuned key; None if nothing is tuned.
    """
    study = inspection.study
    ours: Overrides = {
        "seed_everything": run.seed,
        "trainer.max_steps": run.steps,
        "run.folder": _path(study, run.name),
    }
    if run.arm == NULL_ARM:
        ours["initializer_seed"] = study.derived(run.size, str(run.seed), NULL_ARM)
    if cooldown := inspection.cooldown(run.steps):
        ours |= {"model.schedule.shape": "constant", "model.schedule.cooldown_steps": cooldown}
    if branches := sorted(other.start for other in runs if other.trunk == run.name):
        ours["run.keep_steps"] = branches
    if run.trunk is not None:
        ours["run.start_from"] = _path(study, f"{run.trunk}/checkpoints/step-{run.start:08d}")
    if study.tune and tuned is not None:
        ours[study.tune.key] = tuned
    return configured(study.base, study.overrides(run.size, run.arm), ours)


def config_path(study: Study, run: StudyRun) -> Path:
    """Return the file with the config of a run."""
    return study.folder / "configs" / f"{run.name}.yaml"


def _path(study: Study, name: str) -> str:
    return str(study.folder / name)
