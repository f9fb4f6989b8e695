"""A comparison as files: report.html, results.json, table.csv and loss.png."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.page.comparison_page import format_page
from evals.page.loss_curves import draw_losses
from evals.verdict import verdict
from evals.verdict.compare import ComparisonSettings, find
from evals.verdict.record import Comparison, change, losses_of, record, rows
from llm.common.errors import UserError
from llm.common.files import as_json, write_files
from llm.common.plots import as_png
from llm.common.tables import text_table


def compare(folders: Sequence[Path], out: Path, settings: ComparisonSettings | None = None, made_by: str = "") -> str:
    """Compare, write report.html, results.json, table.csv and loss.png to `out`, and return what is printed.

    Everything is read and checked before the first file is written. Raises UserError where the runs are no pairs, an
    export is not of its run's last step, or two results were not measured alike.
    """
    settings = settings or ComparisonSettings()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")
    found = find(folders, settings)
    write(found, out, made_by)
    names = found.pairs.names
    table = text_table(["", *names, *verdict.HEADER], rows(found))
    cost = verdict.cost_sentence(names, found.costs)
    parts = [f"The change: {change(found.pairs)}.", table, "\n".join([*found.notes, cost]), found.sentence]
    return "\n\n".join(part for part in parts if part)


def write(found: Comparison, out: Path, made_by: str) -> None:
    """Write the four files."""
    content = record(found, made_by)
    page = format_page(found, content, made_by)
    write_files(
        {
            out / "loss.png": as_png(draw_losses(losses_of(found.pairs))),
            out / "table.csv": _csv([["measure", *found.pairs.names, *verdict.HEADER], *rows(found)]),
            out / "results.json": as_json(content),
            out / "report.html": page,
        }
    )


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
