"""Text for a terminal: tables, durations, times of day."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width under a rule: the first is flush left, the numbers after it flush right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


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
