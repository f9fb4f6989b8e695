"""docs/exports.md shows the matrix as it is."""

import importlib
from pathlib import Path

from .kinds import KINDS, ROWS

PAGE = Path(__file__).parents[3] / "docs" / "exports.md"


def test_the_page_shows_every_row_and_column() -> None:
    for name in ("training", "generation", "adapters", "serving", "vocabulary"):
        importlib.import_module(f"{__package__}.test_{name}")
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).stem}
    assert len(files) == 5, "name the new file above"
    lines = PAGE.read_text().splitlines()
    start = lines.index(f"| call | {' | '.join(KINDS)} |")
    shown = lines[start + 2 : lines.index("", start)]
    assert sorted(shown) == sorted(f"| {title} |{' yes |' * len(KINDS)}" for title in ROWS)
