"""Pairs of runs, a baseline and one or more arms: one verdict an arm, one table, one page, one file of numbers.

run folders -> checked as pairs -> exported last steps -> losses per document (measured where they are not kept) -> all
that can be paired -> intervals and p values, corrected over the arms -> a sentence for each arm, with the null arm
-> OUT/{report.html, results.json, table.csv, table.tex, loss.png, pictures/}

What `python -m evals run`, `ioi`, `incontext` and `recall` left in the exports is taken up; nothing is trained here.
"""

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.exported_steps import ExportedRun, exported_steps, step_folder
from evals.exports import Export, open_export
from evals.verdict import efficiency, related, verdict
from evals.verdict.measurements import Exports, Measure, both, kept_losses, read_measures
from evals.verdict.pair import Pairs, read_arms, read_companions, read_null
from evals.verdict.record import Comparison
from evals.verdict.statistics import student_interval
from llm.common.errors import UserError
from llm.data.mixture import Component, mixed_fingerprint, open_stores


@dataclass(frozen=True)
class ComparisonSettings:
    """How arms are compared with a baseline.

    declare: config keys that may differ beside the switches; exports: of the last steps, where they are not in the run
    folders; stores: instead of those that the runs name; documents: of validation, 0 takes only kept losses; metric: of
    the tasks; targets: losses to reach, in nats per token; trusted: an
    export may run code of its own; null: runs of the baseline with other initial weights, one a seed, or for one seed
    any number with other initial weights or seeds, instead of those of the study that the runs belong to; bench: what
    `llm bench --json` wrote, of contenders that the sides are named after.
    """

    declare: tuple[str, ...] = ()
    exports: tuple[Path, ...] = ()
    stores: tuple[Path, ...] = ()
    documents: int = 1000
    metric: str = "acc_norm"
    level: float = verdict.LEVEL
    targets: tuple[float, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 16
    trusted: bool = False
    null: tuple[Path, ...] = ()
    bench: Path | None = None


class Measured(NamedTuple):
    """What can be paired of an arm's exports, and a sentence on each result that is lacking."""

    exports: Exports
    measures: list[Measure]
    notes: list[str]


def find(folders: Sequence[Path], settings: ComparisonSettings) -> list[Comparison]:
    """Compare each arm with the baseline, without writing anything but exports and losses that are lacking."""
    arms = read_arms(folders, settings.declare)
    baseline = arms[0].side(0)
    null_folders = settings.null or related.null_runs(baseline)
    null_arms: list[Pairs] = []
    if len(baseline) == 1:
        null_arms = read_companions(baseline[0], null_folders or related.other_runs(baseline[0]))
    elif null_folders:
        null_arms = [read_null(baseline, null_folders)]
    times = [efficiency.read_step_time(settings.bench, arm, settings.level) if settings.bench else None for arm in arms]
    shares = shares_of(arms[0], settings)  # before exports are made, which takes long
    given = [open_export(folder, settings.trusted) for folder in settings.exports]
    measured = [_measured(pairs, given, shares, settings) for pairs in arms]
    nulls = [_measured(pairs, given, shares, settings).measures for pairs in null_arms]
    spreads = related.spreads(nulls) if len(baseline) == 1 else {}
    found = verdict.find_arms([arm.measures for arm in measured], settings.level, spreads=spreads)
    null = _null(null_arms, nulls, settings.level)
    return [
        _comparison(pairs, arm, findings, null, shares, settings, step_time)
        for pairs, arm, findings, step_time in zip(arms, measured, found, times, strict=True)
    ]


def _measured(
    pairs: Pairs, given: Sequence[Export], shares: dict[str, float], settings: ComparisonSettings
) -> Measured:
    """Export and measure an arm and its baseline where that is lacking."""
    exports = exports_of(pairs, given, settings.trusted)
    if settings.documents:
        read_measures(exports, {}, settings.metric)  # what is refused is refused before the long work
        measure_losses(pairs, exports, settings)
    return Measured(exports, *read_measures(exports, shares, settings.metric))


class Null(NamedTuple):
    """The null arm and its difference from the baseline in the primary quantity."""

    pairs: Pairs
    finding: verdict.Finding


def _null(arms: Sequence[Pairs], measures: Sequence[list[Measure]], level: float) -> Null | None:
    """The first null arm of the baseline's own seeds; None where there is none, or its loss was not measured."""
    for pairs, own in zip(arms, measures, strict=True):
        if all(pair.first.seed == pair.second.seed for pair in pairs.pairs):
            primary = [measure for measure in own if measure.family == "primary"]
            return next((Null(pairs, finding) for finding in verdict.find(primary, level)), None)
    return None


def _comparison(
    pairs: Pairs,
    arm: Measured,
    findings: list[verdict.Finding],
    null: Null | None,
    shares: dict[str, float],
    settings: ComparisonSettings,
    step_time: efficiency.Cost | None,
) -> Comparison:
    savings = [efficiency.saving(pair) for pair in pairs.pairs]
    targets = {target: [efficiency.saving(pair, target) for pair in pairs.pairs] for target in settings.targets}
    costs = efficiency.costs(pairs.pairs, step_time)
    table_2 = read_table_2(arm.exports, "ioi", arm.notes, settings.level)
    published = read_table_2(arm.exports, "ioi_as_published", arm.notes, settings.level)
    how = how_measured(kept_losses(arm.exports[0][0], next(iter(shares))) or {})
    of_null = null.finding if null else None
    spacing = efficiency.validation_spacing(pairs.pairs)
    sentence = verdict.sentence(pairs.names, pairs.seeds, findings, savings, of_null, spacing)
    notes = [*pairs.notes, *arm.notes]
    if step_time is None:
        notes.append(efficiency.time_note(pairs.pairs))
    if null:
        notes.append(verdict.null_note(null.pairs.names[1], pairs.names[0], null.finding))
    notes += [warning for finding in findings if finding.primary for warning in verdict.warnings(finding.measure)]
    return Comparison(
        pairs, arm.exports, findings, savings, targets, costs, table_2, settings.metric, how, notes, sentence, of_null,
        published,
    )  # fmt: skip


# ---- Exports and losses ----------------------------------------------------------------------------------------------


def exports_of(pairs: Pairs, given: Sequence[Export], trusted: bool = False) -> list[tuple[Export, Export]]:
    """The exports of all runs' last steps, a tuple a seed; each checked to be its run's own, and all of one dtype."""
    exports = [(export_of(pair.first, given, trusted), export_of(pair.second, given, trusted)) for pair in pairs.pairs]
    flat = [export for pair in exports for export in pair]
    folders = [export.folder.resolve() for export in flat]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"{twice[0]} would stand for two runs; give each run's own export")
    dtypes = {str(export.info.get("dtype")): export.folder for export in flat}
    if len(dtypes) > 1:
        told = ", ".join(f"{folder} ({dtype})" for dtype, folder in dtypes.items())
        raise UserError(f"the exports hold weights of different dtypes: {told}; export all alike")
    return exports


def export_of(run: ExportedRun, given: Sequence[Export], trusted: bool = False) -> Export:
    """The export of a run's last step: one of those given, or RUN/exports/step-N, made where it is not there."""
    last = run.last_step
    if given:
        fitting = [export for export in given if not _foreign(run, export)]
        if not fitting:
            raise UserError(
                f"no export of {run.folder}, seed {run.seed}, step {last} is given; make it with `python -m llm export "
                f"{run.folder} OUT`, or give none"
            )
        return fitting[0]
    known = exported_steps(run.folder, trusted)
    if last not in known:
        print(f"exporting the last step of {run.folder} ...", file=sys.stderr)
        command = [
            "-m",
            "llm",
            "export",
            str(run.folder),
            "--out",
            str(step_folder(run.folder, last)),
            "--step",
            str(last),
        ]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        known = exported_steps(run.folder, trusted)  # another process may have made it at the same time
        if done.returncode and last not in known:
            why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].removeprefix("error: ")
            raise UserError(f"{run.folder} cannot be exported: {why}")
    if why := _foreign(run, known[last]):
        raise UserError(f"{known[last].folder} is not of {run.folder}: {why}; remove it, and it is made again")
    return known[last]


def _foreign(run: ExportedRun, export: Export) -> str:
    """In what an export is of another run or step, or of other weights than the checkpoint; "" where in nothing."""
    mine = {"run": run.name, "seed": run.seed, "step": run.last_step, "checkpoint_sha256": run.weights_sha256()}
    mine["store_fingerprint"] = run.record["store_fingerprint"]
    if "weights_sha256" in export.info:  # of the weights as they were exported
        mine["weights_sha256"] = export.weights_sha256()
    differing = [
        f"{key} {export.info[key]} and not {value}"
        for key, value in mine.items()
        if value is not None and export.info.get(key, value) not in (value, None)
    ]
    return ", ".join(differing)


def stores_of(run: ExportedRun, given: Sequence[Path]) -> list[Component]:
    """The stores that the run was trained on, with their shares: those its config names, or the same elsewhere."""
    named = run.config.get("data", {}).get("store")
    if not named:
        raise UserError(f"{run.folder}/config.yaml names no data.store; put the config of the run there")
    weights = {str(named): 1.0} if isinstance(named, str) else {str(store): float(w) for store, w in named.items()}
    if given:
        if len(given) != len(weights):
            raise UserError(f"{run.folder} was trained on {len(weights)} store(s); give as many with --store, in order")
        weights = dict(zip(map(str, given), weights.values(), strict=True))
        if len(weights) < len(given):
            raise UserError(f"{given[0]} is given twice with --store; give each store once")
    if lacking := [store for store in weights if not Path(store).exists()]:
        raise UserError(
            f"{run.folder} names the store {lacking[0]}, which is not there; run this in the folder it was trained "
            "from, give it with --store, or take --documents 0"
        )
    components = open_stores(weights)
    if (found := mixed_fingerprint(components)) != run.record["store_fingerprint"]:
        raise UserError(
            f"{', '.join(weights)} is not the store that {run.folder} was trained on (fingerprint {found[:12]}, not "
            f"{run.record['store_fingerprint'][:12]}); give that one with --store"
        )
    return components


def shares_of(pairs: Pairs, settings: ComparisonSettings) -> dict[str, float]:
    """The fingerprint of each store whose validation documents count, and its share of the data."""
    run = pairs.pairs[0].first
    if not settings.documents and not settings.stores and isinstance(run.config.get("data", {}).get("store"), str):
        return {run.record["store_fingerprint"]: 1.0}  # the store itself need not be here
    return {each.validation.fingerprint: each.share for each in stores_of(run, settings.stores)}


def measure_losses(pairs: Pairs, exports: Exports, settings: ComparisonSettings) -> None:
    """Have the loss of every validation document measured for all exports; of several stores each by its share.

    The first seed's exports also continue the beginnings of some documents.
    """
    from evals.probes import continuations, losses

    components = stores_of(pairs.pairs[0].first, settings.stores)
    total = sum(component.share for component in components)
    for export in (export for pair in exports for export in pair):
        for component in components:
            count = max(2, round(settings.documents * component.share / total))
            losses.measure_losses(
                export, Path(component.path), count, settings.batch_size, settings.device, settings.dtype
            )
    for export in exports[0]:
        continuations.measure_continuations(export, Path(components[0].path), settings.device, settings.dtype)


def how_measured(result: Mapping[str, Any]) -> dict[str, Any]:
    """Under what a result was measured."""
    return {key: result[key] for key in ("device", "dtype", "batch_size", "context", "versions") if key in result}


def read_table_2(
    exports: Exports, name: str, notes: list[str], level: float
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Both sides' probabilities on the paper's four sentences, from EXPORT/evals/`name`.json: mean and population
    deviation over the seeds, and half the width of Student's interval of the mean (of one seed: None)."""
    results = both(exports, name, notes)
    if results is None:
        return None
    sides = []
    for which in (0, 1):
        outcomes = {}
        for outcome in ("correct", "incorrect"):
            values = np.array([pair[which]["sentences"][outcome] for pair in results])  # [seeds, 4]
            outcomes[outcome] = {
                "mean": values.mean(axis=0).tolist(),
                "deviation": values.std(axis=0).tolist(),
                "half_width": _half_widths(values, level),
            }
        sides.append(outcomes)
    return sides[0], sides[1]


def _half_widths(values: np.ndarray, level: float) -> list[float] | None:
    """(S, 4) -> of each column."""
    seeds = len(values)
    if seeds < 2:
        return None
    errors = values.std(axis=0, ddof=1) / math.sqrt(seeds)
    return [student_interval(0, float(error), seeds - 1, level).high for error in errors]
