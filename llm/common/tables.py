"""Text for a terminal: tables, durations, times of day."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from datetime import datetime


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width under a rule: the first is flush left, the numbers after it flush right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


# What LaTeX reads as a command, or its usual fonts lack.
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"→": r"$\rightarrow$", "−": "$-$", "–": "--", "≤": r"$\leq$", "±": r"$\pm$"},
    **{"<": "$<$", ">": "$>$"},
}


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular for LaTeX with the rules of booktabs: the first column flush left, the others flush right."""

    def cell(text: str) -> str:
        escaped = "".join(LATEX.get(character, character) for character in text)
        return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)  # a minus, not a hyphen

    lines = [" & ".join(map(cell, row)) + r" \\" for row in [header, *rows]]
    columns = "l" + "r" * (len(header) - 1)
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def duration(seconds: float | None) -> str:
    """In the two largest units."""
    if seconds is not None and seconds < 1:
        return "less than 1 s"
    whole = int(seconds or 0)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def clock(iso: str) -> str:
    """A moment by this machine's clock, to the minute."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M")
    return iso
