"""A comparison as files: page, numbers, the losses as PNG; every table in tables/, picture in pictures/."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.page.comparison_page import format_page, page_sections
from evals.page.loss_curves import draw_losses
from evals.verdict import verdict
from evals.verdict.compare import ComparisonSettings, find
from evals.verdict.record import Comparison, arm_rows, change, header, losses_of, records, sentence
from llm.common.errors import UserError
from llm.common.files import as_json, write_files
from llm.common.html import Section
from llm.common.plots import as_png
from llm.common.tables import latex_table, text_table


def compare(folders: Sequence[Path], out: Path, settings: ComparisonSettings | None = None, made_by: str = "") -> str:
    """Compare, write all files to `out`, and return what is printed.

    Everything is read and checked before the first file is written. Raises UserError where the runs are no pairs, an
    export is not of its run's last step, or two results were not measured alike.
    """
    settings = settings or ComparisonSettings()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")
    arms = find(folders, settings)
    write(arms, out, made_by)
    changes = [f"The change{of(arms, found)}: {change(found.pairs)}." for found in arms]
    costs = [verdict.cost_sentence(found.pairs.names, found.costs) for found in arms]
    notes = dict.fromkeys(note for found in arms for note in [*found.notes])
    lines = [line for line in [*notes, *costs] if line]
    parts = ["\n".join(changes), text_table(header(arms), arm_rows(arms)), "\n".join(lines), sentence(arms)]
    return "\n\n".join(part for part in parts if part)


def of(arms: Sequence[Comparison], found: Comparison) -> str:
    """Which arm, in words; nothing where there is one."""
    return f" of {found.pairs.names[1]}" if len(arms) > 1 else ""


def write(arms: Sequence[Comparison], out: Path, made_by: str) -> None:
    """Write page, numbers, tables and pictures: each arm's losses as PNG, those of the page as SVG and PDF."""
    content, sections = records(arms, made_by), page_sections(arms)
    names = [f"{found.pairs.names[1]}-loss.png" if len(arms) > 1 else "loss.png" for found in arms]
    table = [["measure" if cell == "" else cell for cell in header(arms)], *arm_rows(arms)]
    write_files(
        {
            **{out / n: as_png(draw_losses(losses_of(found.pairs))) for n, found in zip(names, arms, strict=True)},
            **{out / "pictures" / name: content for name, content in picture_files(sections).items()},
            **{out / "tables" / name: content for name, content in table_files(sections).items()},
            out / "table.csv": _csv(table),
            out / "table.tex": latex_table(table[0], table[1:]),
            out / "results.json": as_json(content),
            out / "report.html": format_page(arms, sections, content, made_by),
        }
    )


def picture_files(sections: Sequence[Section]) -> dict[str, str | bytes]:
    """The page's pictures as NN-CAPTION.svg and .pdf, in the order of the page."""
    files: dict[str, str | bytes] = {}
    pictures = (picture for section in sections for picture in section.pictures)
    for number, picture in enumerate(pictures, start=1):
        name = _file_name(number, picture.caption)
        files |= {f"{name}.svg": picture.svg, f"{name}.pdf": picture.pdf}
    return files


def table_files(sections: Sequence[Section]) -> dict[str, str]:
    """The page's tables as NN-CAPTION.csv and .tex, in the order of the page."""
    files: dict[str, str] = {}
    for number, table in enumerate((table for section in sections for table in section.tables), start=1):
        name = _file_name(number, table.caption)
        files |= {
            f"{name}.csv": _csv([table.header, *table.rows]),
            f"{name}.tex": latex_table(table.header, table.rows),
        }
    return files


def _file_name(number: int, caption: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")
    return f"{number:02d}-{words[:60].rstrip('-')}"


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
