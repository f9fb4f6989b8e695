"""`python -m benchmarks`: BENCHMARKS.md from `template.md` and the JSON files in `results/`.

A line `{{kind name}}` of the template becomes the table of results/name.json that `tables.py` makes for its kind, with
the command, the device, the versions and the commit it was measured at; `{{kind name: words, words}}` chooses.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from .tables import KINDS

HERE = Path(__file__).parent
PAGE = HERE.parent / "BENCHMARKS.md"
PLACE = re.compile(r"^\{\{(\w+) (\w+)(?:: (.+))?\}\}$", re.M)


def page() -> str:
    """The text of BENCHMARKS.md."""

    def made(match: re.Match[str]) -> str:
        kind, name, words = match.groups()
        path = HERE / "results" / f"{name}.json"
        if not path.is_file():
            sys.exit(f"error: {path.name} of template.md is not in {path.parent}: measure it, or take its line out")
        return KINDS[kind](json.loads(path.read_text()), *(words.split(", ") if words else ()))

    return PLACE.sub(made, (HERE / "template.md").read_text())


def main() -> int:
    """Write the page; with --check say only whether it is as it should be."""
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__, file=sys.stdout if "--help" in sys.argv else sys.stderr)
        return 0 if "--help" in sys.argv else 2
    if sys.argv[1:]:
        same = PAGE.read_text() == page()
        print(f"{PAGE.name} is {'' if same else 'not '}what python -m benchmarks makes")
        return 0 if same else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
