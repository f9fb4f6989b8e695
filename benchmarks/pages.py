"""Markdown pages from the templates and results of this folder.

A template becomes the page of the same name, BENCHMARKS.md in the root and the others in this folder. `{{kind name}}`
becomes what the function of `tables.KINDS` makes of results/name.json; `{{kind name: word, word}}` passes words to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from llm.common.errors import UserError
from llm.common.files import read_json

from .tables import KINDS, Result

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
TEMPLATES = HERE / "templates"
SUMMARY = TEMPLATES / "BENCHMARKS.md"
PLACE = re.compile(r"\{\{(\w+) (\w+)(?:: ([^{}]+))?\}\}")


class Place(NamedTuple):
    """A place in a template that a result fills."""

    kind: str
    name: str
    words: list[str]

    @classmethod
    def of(cls, match: re.Match[str]) -> Place:
        kind, name, words = match.groups()
        return cls(kind, name, words.split(", ") if words else [])


def places(template: Path) -> list[Place]:
    """Return the places of a template, in order."""
    return [Place.of(match) for match in PLACE.finditer(template.read_text(encoding="utf-8"))]


def load(name: str) -> Result:
    """Return results/name.json; raise a UserError if the file is missing."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise UserError(f"{path.relative_to(ROOT)} is missing: measure it, or remove it from the templates")
    return read_json(path)


def fill(template: Path) -> str:
    """Return the page of a template; raise a UserError for a place that cannot be filled."""

    def filled(match: re.Match[str]) -> str:
        place = Place.of(match)
        if place.kind not in KINDS:
            raise UserError(f"{template.relative_to(ROOT)}: unknown kind {place.kind}: write one of {', '.join(KINDS)}")
        try:
            return KINDS[place.kind](load(place.name), *place.words)
        except (KeyError, TypeError) as error:
            raise UserError(f"{template.relative_to(ROOT)}: cannot fill {match[0]}: {error!r}") from error

    made_by = f"<!-- Made by python -m benchmarks: edit {template.relative_to(ROOT)}, not this page. -->"
    return f"{made_by}\n{PLACE.sub(filled, template.read_text(encoding='utf-8'))}"


def pages() -> dict[Path, str]:
    """Return the text of every page by its path, BENCHMARKS.md first."""
    others = sorted(path for path in TEMPLATES.glob("*.md") if path != SUMMARY)
    return {ROOT / SUMMARY.name: fill(SUMMARY)} | {HERE / path.name: fill(path) for path in others}
