"""Two finished runs side by side: one table, one figure of losses, and what the difference may be called.

run folders, exported folders -> checked as a pair -> rows -> table, loss.png, table.csv, metrics.csv -> one sentence

Only files are read. Runs that differ in their data, seed or length are refused: a difference between them would not be
the declared change's. With one seed each there is no interval, and the sentence says so whatever the numbers are.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.models import Export, open_export, read_json, write_file
from evals.plots import Curve, Losses, draw_losses, text_table
from llm.errors import UserError

# What two results of one task must share to be compared; `ioi.json` holds only the last two.
PROTOCOL = ("n", "limit", "batch_size", "task_version", "versions", "dtype", "device")
METRICS = ("tokens", "train_loss", "validation_loss")


@dataclass(frozen=True)
class Run:
    """A finished run: the records of its folder, and the rows of its metrics.csv as they stand there."""

    folder: Path
    record: dict[str, Any]  # run.json
    summary: dict[str, Any]  # summary.json
    metrics: list[dict[str, str]]

    @property
    def name(self) -> str:
        return str(self.record["name"])

    def curve(self, measure: str) -> Curve:
        """One column of metrics.csv over tokens, where it was measured."""
        points = [(float(row["tokens"]), float(row[measure])) for row in self.metrics if row[measure]]
        return Curve([tokens for tokens, _ in points], [value for _, value in points])


class Row(NamedTuple):
    """One line of the table: a value for each of the two models, None where it was not measured."""

    measure: str
    values: Sequence[float | None]
    form: str  # the format of a value
    errors: Sequence[float | None] = (None, None)  # standard errors

    def cells(self) -> list[str]:
        """The values for the eye, each with its standard error where it has one."""
        shown = ["–" if value is None else format(value, self.form) for value in self.values]
        return [
            text if error is None else f"{text} ± {error:{self.form}}"
            for text, error in zip(shown, self.errors, strict=True)
        ]

    @property
    def difference(self) -> float | None:
        """The second model's value minus the first's."""
        first, second = self.values
        return None if first is None or second is None else second - first


# ---- Reading and checking --------------------------------------------------------------------------------------------


def read_run(folder: str | Path) -> Run:
    """The run in `folder`; a UserError where it is no run folder, or not finished."""
    folder = Path(folder)
    for name in ("run.json", "metrics.csv"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a run folder (no {name}); give one that `python -m llm fit` wrote")
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder} is not finished (no summary.json); go on with `python -m llm fit ... --resume auto`")
    record, summary = read_json(folder / "run.json"), read_json(folder / "summary.json")
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        metrics = list(reader)
    lacking = [
        *(f"{key} in run.json" for key in ("name", "seed", "store_fingerprint") if key not in record),
        *(
            f"{key} in summary.json"
            for key in ("step", "tokens_seen", "validation_loss", "seconds", "parameters")
            if key not in summary
        ),
        *(f"{key} in metrics.csv" for key in METRICS if key not in (reader.fieldnames or ())),
    ]
    if lacking:
        raise UserError(f"{folder} lacks {', '.join(lacking)}; give a folder that `python -m llm fit` wrote")
    return Run(folder, record, summary, metrics)


def check_pair(first: Run, second: Run) -> None:
    """Refuse two runs whose difference could come from the data, the seed or the length; all of them named together."""
    sides = [{**run.record, **run.summary} for run in (first, second)]
    differing = [
        f"{key} ({sides[0][key]} and {sides[1][key]})"
        for key in ("store_fingerprint", "seed", "step", "tokens_seen")
        if sides[0][key] != sides[1][key]
    ]
    if differing:
        raise UserError(
            f"{first.folder} and {second.folder} differ in {', '.join(differing)}; train both on the same store, "
            "with the same seed, for the same number of steps"
        )


def check_export(run: Run, export: Export) -> None:
    """Refuse an exported folder that says it is another run's, or of another step. A foreign model says nothing."""
    for key, expected in (("run", run.name), ("step", run.summary["step"])):
        found = export.info.get(key, expected)
        if found != expected:
            raise UserError(
                f"{export.folder} has {key} {found} and {run.folder} {expected}; give the exports in the order of the "
                "runs, each made of its run's last step"
            )


def _same_protocol(what: str, results: Sequence[dict[str, Any] | None]) -> None:
    """Refuse two results that were not measured alike."""
    first, second = results
    if first is None or second is None:
        return
    if differing := [f"{k} ({first[k]} and {second[k]})" for k in PROTOCOL if first.get(k) != second.get(k)]:
        raise UserError(
            f"{what} was measured with different {', '.join(differing)}; run `python -m evals` on both alike"
        )


# ---- The table -------------------------------------------------------------------------------------------------------


def table_rows(runs: Sequence[Run], exports: Sequence[Export]) -> list[Row]:
    """The lines of the table, for the two runs and (if any) their two exports; probabilities and accuracies in %."""

    def summarised(key: str) -> list[float]:
        return [run.summary[key] for run in runs]

    return [
        Row("parameters", summarised("parameters"), ",d"),
        Row("steps", summarised("step"), ",d"),
        Row("tokens seen", summarised("tokens_seen"), ",d"),
        Row("validation loss, nats per token", summarised("validation_loss"), ".4f"),
        *(_ioi_rows(exports) if exports else ()),
        *(_accuracy_rows(exports) if exports else ()),
        Row("training time, s", summarised("seconds"), ",.0f"),
    ]


def _ioi_rows(exports: Sequence[Export]) -> list[Row]:
    """Mean over the four sentences of the probability of the correct and of the incorrect name."""
    results = [export.result("ioi") for export in exports]
    _same_protocol("IOI", results)
    return [
        Row(f"IOI {outcome} name, %", [result and 100 * result["mean"][outcome] for result in results], ".2f")
        for outcome in ("correct", "incorrect")
    ]


def _accuracy_rows(exports: Sequence[Export]) -> list[Row]:
    """Accuracies of every task and number of shots that either export was evaluated on, with standard errors."""
    kept = [{(r["task"], r["shots"]): r for r in export.result("lm_eval", [])} for export in exports]
    rows = []
    for task, shots in sorted(kept[0].keys() | kept[1].keys()):
        results = [results.get((task, shots)) for results in kept]
        _same_protocol(f"{task}, {shots}-shot,", results)
        items = next(result["n"] for result in results if result)
        for metric in ("acc", "acc_norm"):
            values, errors = (
                [100 * r[key] if r and r[key] is not None else None for r in results]
                for key in (metric, f"{metric}_stderr")
            )
            rows.append(Row(f"{task}, {shots}-shot, {metric}, {items} items, %", values, ".2f", errors))
    return rows


def labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names; told apart as A and B where they are the same."""
    names = [run.name for run in runs]
    return (
        names
        if len(set(names)) == len(names)
        else [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=True)]
    )


def sentence(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The difference, second minus first, and what it may be called."""

    def signed(row: Row, digits: int) -> str:
        if row.difference is None:
            return "not measured"
        return f"{round(row.difference, digits) + 0.0:+.{digits}f}"  # + 0.0: no minus before a zero

    loss = next(row for row in rows if row.measure.startswith("validation loss"))
    parts = [f"validation loss {signed(loss, 4)} nats per token"]
    ioi = [
        f"{row.measure.removesuffix(', %')} {signed(row, 2)} points" for row in rows if row.measure.startswith("IOI")
    ]
    return (
        f"{names[1]} minus {names[0]}: {', '.join(parts + (ioi or ['IOI not measured']))}; "
        "one seed each gives no interval, so this is no verdict."
    )


# ---- Output ----------------------------------------------------------------------------------------------------------


def compare(run_folders: Sequence[Path], export_folders: Sequence[Path], out: Path) -> str:
    """Compare two runs, write loss.png, table.csv and metrics.csv to `out`, and return the table and the sentence.

    `export_folders`: none, or one for each run. Everything is read and checked before the first file is written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")
    if len({folder.resolve() for folder in map(Path, run_folders)}) < len(run_folders):
        raise UserError(f"{run_folders[0]} is given twice; give the two runs of a pair")
    runs = [read_run(folder) for folder in run_folders]
    check_pair(*runs)
    exports = [open_export(folder) for folder in export_folders]
    for run, export in zip(runs, exports, strict=False):  # without --exports there is none
        check_export(run, export)
    names, rows = labels(runs), table_rows(runs, exports)
    losses = [
        Losses(name, run.curve("train_loss"), run.curve("validation_loss"))
        for name, run in zip(names, runs, strict=True)
    ]
    write_file(out / "loss.png", draw_losses(losses))
    write_file(out / "table.csv", table_csv(names, rows))
    write_file(out / "metrics.csv", metrics_csv(names, runs))
    return f"{text_table(['', *names], [[row.measure, *row.cells()] for row in rows])}\n\n{sentence(names, rows)}"


def table_csv(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The table's numbers in full precision; an empty cell was not measured."""
    header = ["measure", *names, *(f"{name}, standard error" for name in names)]
    return _csv([header, *([row.measure, *row.values, *row.errors] for row in rows)])


def metrics_csv(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Both runs' metrics under one header, with the run's name in front; cells stay as the runs wrote them."""
    columns = list(dict.fromkeys(column for run in runs for row in run.metrics[:1] for column in row))
    lines = [
        [name, *(row.get(column) for column in columns)]
        for name, run in zip(names, runs, strict=True)
        for row in run.metrics
    ]
    return _csv([["run", *columns], *lines])


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
