"""`python -m benchmarks`: make BENCHMARKS.md, its picture and the pages in benchmarks/ from the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llm.common.errors import UserError, exit_status
from llm.common.files import write_files

from .pages import HERE, ROOT, pages
from .picture import PICTURE, draw, drawn_from, ratios

EXAMPLE = """examples:
  python -m benchmarks            # after a measurement: make all pages and the picture
  python -m benchmarks --check    # list the files that differ from the results; exit status 1 if there are any"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns: the exit status: 0; 1 if --check finds a difference; 2 for an unknown argument or an unusable file.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Make BENCHMARKS.md, its picture and the pages in benchmarks/ from templates and results.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; list the files that differ")
    differing: list[str] = []

    def run() -> None:
        if unknown := [word for word in words if word not in ("--check", "-h", "--help")]:
            raise UserError(f"unknown argument {unknown[0]}: pass --check, --help or nothing")
        if not parser.parse_args(words).check:
            write_files({**pages(), PICTURE: draw(ratios())})
            return
        differing.extend(outdated())
        if not differing:
            print("pages and picture are what the results give")

    status = exit_status(run)
    if differing:
        print(f"{', '.join(differing)}: not what the results give; run python -m benchmarks")
    return 1 if differing else status


def outdated() -> list[str]:
    """Return the files that are missing, differ from what the results give, or have no template."""
    made = pages()
    files = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    files += [path for path in HERE.glob("*.md") if path not in made]
    files += [] if drawn_from(PICTURE) == ratios() else [PICTURE]
    return sorted(str(path.relative_to(ROOT)) for path in files)


if __name__ == "__main__":
    sys.exit(main())
