"""The verdict on a study as files: report.html, results.json, study.yaml, tables as CSV and LaTeX, pictures."""

import csv
import io
from pathlib import Path

from evals.page.comparison_files import table_files
from evals.page.study_page import draw, format_study_page, study_sections
from evals.verdict.ladder import LEVEL
from evals.verdict.study import judge_study
from evals.verdict.study_tables import format_study, number_rows, size_header, size_rows, study_record
from llm.common.errors import UserError
from llm.common.files import as_json, write_files
from llm.common.plots import in_every_form
from llm.common.tables import latex_table


def study(path: Path, out: Path | None, level: float = LEVEL, bench: Path | None = None, made_by: str = "") -> str:
    """Judge a study, write all files to `out`, and return what is printed.

    Raises:
        UserError: `out` is missing or a file, or the study cannot be judged (`judge_study`). Nothing is written then.
    """
    if out is None:
        raise UserError("where the verdict goes is not said; give --out DIR")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")
    found = judge_study(path, level, bench)
    drawn = draw(found)
    sections = study_sections(found, drawn)
    content = study_record(found, made_by)
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(number_rows(found))
    by_size = latex_table(size_header(found.verdict.level), size_rows(found.verdict))
    write_files(
        {
            **{
                out / file: content
                for name, (figure, caption) in drawn.items()
                for file, content in in_every_form(figure, name, caption).items()
            },
            **{out / "tables" / name: content for name, content in table_files(sections).items()},
            out / "study.yaml": found.text,
            out / "table.csv": table.getvalue(),
            out / "table.tex": by_size,
            out / "results.json": as_json(content),
            out / "report.html": format_study_page(found, sections, content, made_by),
        }
    )
    return format_study(found)
