"""Pairs of runs, with and without the change: one verdict, one table, one page, one file of numbers.

run folders -> checked as pairs -> exported last steps -> losses per document (measured where they are not kept) -> all
that can be paired -> intervals and p values -> the sentence -> OUT/{report.html, results.json, table.csv, loss.png}

What `python -m evals run`, `ioi` and `incontext` left in the exports is taken up; nothing is trained here.
"""

import csv
import io
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals import efficiency, verdict
from evals.comparison import Comparison, change, losses_of, record, rows
from evals.measures import METRICS, Exports, both, read_measures
from evals.models import Export, open_export, write_file, write_json
from evals.pair import Pairs, read_pairs
from evals.plots import as_png, draw_losses, text_table
from evals.report import report
from evals.runs import Run, exported_steps, step_folder
from llm.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How two sides are compared.

    declare: config keys that may differ beside the switches; exports: of the last steps, where they are not in the run
    folders; stores: instead of those that the runs name; documents: of validation, 0 takes only kept losses; metric: of
    the tasks; targets: losses to reach, in nats per token.
    """

    declare: tuple[str, ...] = ()
    exports: tuple[Path, ...] = ()
    stores: tuple[Path, ...] = ()
    documents: int = 1000
    metric: str = METRICS[0]
    level: float = verdict.LEVEL
    targets: tuple[float, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 16


def compare(folders: Sequence[Path], out: Path, settings: Settings | None = None, made_by: str = "") -> str:
    """Compare, write report.html, results.json, table.csv and loss.png to `out`, and return what is printed.

    Everything is read and checked before the first file is written. Raises UserError where the runs are no pairs, an
    export is not of its run's last step, or two results were not measured alike.
    """
    settings = settings or Settings()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")
    found = find(folders, settings)
    write(found, out, made_by)
    names = found.pairs.names
    table = text_table(["", *names, *verdict.HEADER], rows(found))
    cost = verdict.cost_sentence(names, found.costs)
    parts = [f"The change: {change(found.pairs)}.", table, "\n".join([*found.notes, cost]), found.sentence]
    return "\n\n".join(part for part in parts if part)


def find(folders: Sequence[Path], settings: Settings) -> Comparison:
    """Everything that `compare` tells, without writing anything but exports and losses that are lacking."""
    pairs = read_pairs(folders, settings.declare)
    given = [open_export(folder) for folder in settings.exports]
    exports = [(export_of(pair.first, given), export_of(pair.second, given)) for pair in pairs.pairs]
    fingerprints = measure_losses(pairs, exports, settings) if settings.documents else kept_fingerprints(pairs, exports)
    measures, notes = read_measures(exports, fingerprints, settings.metric)
    findings = verdict.find(measures, settings.level)
    savings = [efficiency.saving(pair) for pair in pairs.pairs]
    targets = {target: [efficiency.saving(pair, target) for pair in pairs.pairs] for target in settings.targets}
    costs = efficiency.costs(pairs.pairs)
    table_2 = read_table_2(exports, notes)
    sentence = verdict.sentence(pairs.names, pairs.seeds, findings, savings)
    notes = [*pairs.notes, *notes]
    return Comparison(pairs, exports, findings, savings, targets, costs, table_2, settings.metric, notes, sentence)


# ---- Exports and losses ----------------------------------------------------------------------------------------------


def export_of(run: Run, given: Sequence[Export]) -> Export:
    """The export of a run's last step: one of those given, or RUN/exports/step-N, made where it is not there."""
    assert run.summary is not None
    last = int(run.summary["step"])
    if given:
        mine = [export for export in given if (export.info.get("run"), export.info.get("seed")) == (run.name, run.seed)]
        fitting = [export for export in mine if export.info.get("step") == last]
        if not fitting:
            steps = f"; {mine[0].folder} is of step {mine[0].info.get('step')}" if mine else ""
            raise UserError(
                f"no export of {run.name}, seed {run.seed}, step {last} is given{steps}; make it with `python -m llm "
                f"export {run.folder} OUT`, or give none"
            )
        return fitting[0]
    known = exported_steps(run.folder)
    if last not in known:
        print(f"exporting the last step of {run.folder} ...", file=sys.stderr)
        command = ["-m", "llm", "export", str(run.folder), str(step_folder(run.folder, last)), "--step", str(last)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].removeprefix("error: ")
            raise UserError(f"{run.folder} cannot be exported: {why}")
        known = exported_steps(run.folder)
    return known[last]


def stores_of(run: Run) -> list[Path]:
    """The stores that a run's config names."""
    named = run.config.get("data", {}).get("store")
    if not named:
        raise UserError(f"{run.folder}/config.yaml names no data.store; give it with --store")
    return [Path(named)] if isinstance(named, str) else [Path(name) for name in named]


def measure_losses(pairs: Pairs, exports: Exports, settings: Settings) -> list[str]:
    """Have the loss of every validation document measured for all exports; returns the stores' fingerprints."""
    from evals import losses
    from llm.data.store import TokenStore

    run = pairs.pairs[0].first
    stores = list(settings.stores) or stores_of(run)
    fingerprints = [TokenStore.open(store, "validation").fingerprint for store in stores]
    if len(stores) == 1 and fingerprints[0] != run.record["store_fingerprint"]:
        raise UserError(
            f"{stores[0]} is not the store that {run.folder} was trained on (fingerprint {fingerprints[0][:12]}, not "
            f"{run.record['store_fingerprint'][:12]}); give that one with --store"
        )
    share = max(1, settings.documents // len(stores))
    for export in (export for pair in exports for export in pair):
        for store in stores:
            losses.measure(export, store, share, settings.batch_size, settings.device, settings.dtype)
    return fingerprints


def kept_fingerprints(pairs: Pairs, exports: Exports) -> list[str]:
    """The stores whose losses the first export keeps, where nothing is to be measured."""
    kept = exports[0][0].result("losses", [])
    return [result["store_fingerprint"] for result in kept] or [pairs.pairs[0].first.record["store_fingerprint"]]


def read_table_2(exports: Exports, notes: list[str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Both sides' probabilities on the paper's four sentences, mean and population deviation over the seeds."""
    results = both(exports, "ioi", notes)
    if results is None:
        return None
    sides = []
    for which in (0, 1):
        outcomes = {}
        for outcome in ("correct", "incorrect"):
            values = np.array([pair[which]["sentences"][outcome] for pair in results])  # [seeds, 4]
            outcomes[outcome] = {"mean": values.mean(axis=0).tolist(), "deviation": values.std(axis=0).tolist()}
        sides.append(outcomes)
    return sides[0], sides[1]


# ---- Output ----------------------------------------------------------------------------------------------------------


def write(found: Comparison, out: Path, made_by: str) -> None:
    """Write the four files."""
    content = record(found, made_by)
    page = report(found, content, made_by)
    write_file(out / "loss.png", as_png(draw_losses(losses_of(found.pairs))))
    write_file(out / "table.csv", _csv([["measure", *found.pairs.names, *verdict.HEADER], *rows(found)]))
    write_json(out / "results.json", content)
    write_file(out / "report.html", page)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
