"""One page of HTML that opens without a network: text, figures and tables.

pieces (Section, Picture, Table) -> escaped -> one document with its own style, and no script but the one it is given

A policy in the head forbids the browser to fetch whatever it is, so that nothing leaves the page even where a piece of
it names an address. The page follows the reader's light or dark theme and folds into one column on a phone.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote

from llm.common.html_style import STYLE
from llm.common.plots import COLOURS

LONG = 18  # characters in a cell of a table, from which on it may take several lines


class Table(NamedTuple):
    """Cells as text; a column whose cells are all numbers is set flush right. `note` stands below, small.

    stacked: on a phone each row is a block of its own, so that nothing has to be scrolled sideways.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    stacked: bool = False


class Picture(NamedTuple):
    """A figure and what stands below it.

    svg: from `llm.common.plots.as_svg`, which names it for readers who do not see it; or a `linked` file.
    """

    svg: str
    caption: str
    pdf: bytes = b""  # the same for a paper; not on the page


class Section(NamedTuple):
    """A heading and what stands under it, in this order; an empty line in `text` begins a paragraph."""

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str]] = ()  # a definition list: what, and its value
    code: str = ""  # a file's text, with its line breaks
    markup: str = ""  # HTML, which is not escaped: what a script draws into


class Headline(NamedTuple):
    """What the page is read for, large at the top, then its numbers (what, and its value), then the whole sentence."""

    text: str
    numbers: Sequence[tuple[str, str]] = ()
    sentence: str = ""


def page(
    title: str,
    verdict: str | Sequence[Headline],
    sections: Sequence[Section],
    made_by: str,
    details: str = "",
    script: str = "",
    local_images: bool = False,
) -> str:
    """The whole document; everything but the figures is plain text and is escaped here.

    Args:
        verdict: what the page is read for; it stands large at the top.
        made_by: the command that made the page, its date and versions; line breaks are kept.
        details: JSON of all numbers, kept in the page as <script type="application/json" id="results">, folded.
        script: JavaScript, the only one that the browser may run.
        local_images: the page shows `linked` files, which lie next to it.

    Raises:
        ValueError: `details` is not JSON, or a row of a table is not as long as its header.
    """
    headlines = [Headline(verdict)] if isinstance(verdict, str) else verdict
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        *(_headline(each) for each in headlines),
        "</header>",
        _contents(sections),
        "<main>",
        *(_section(section, number) for number, section in enumerate(sections, start=1)),
        "</main>",
        "<footer>",
        _details(details) if details else "",
        f'<p class="made">{escape(made_by)}</p>',
        "</footer>",
        f"<script>{script}</script>" if script else "",
    ]
    head = HEAD.format(title=escape(title), style=_style(), policy=_policy(script, local_images))
    return head + "\n".join(filter(None, parts)) + "\n</body>\n</html>\n"


def linked(name: str, caption: str, suffixes: Sequence[str] = ("svg", "pdf")) -> Picture:
    """NAME.png next to the page, as dark on white as it is, with links to its other forms."""
    file = escape(quote(name))
    others = " ".join(f'<a href="{file}.{suffix}">{suffix.upper()}</a>' for suffix in suffixes)
    shown = f'<img src="{file}.png" alt="{escape(caption)}" loading="lazy">'
    image = f'<div class="image"><a href="{file}.png">{shown}</a></div>'
    return Picture(f'{image}\n<p class="forms">{escape(name)}: {others}</p>', caption)


def data_element(name: str, content: Any) -> str:
    """JSON for a script of the page to read: <script type="application/json" id=NAME>."""
    text = json.dumps(content, separators=(",", ":"))
    return f'<script type="application/json" id="{escape(name)}">{_inert(text)}</script>'


def _inert(text: str) -> str:
    """JSON without "<", which is in its strings alone, so that none of them ends the element."""
    return text.replace("<", "\\u003c")


def _policy(script: str, local_images: bool) -> str:
    """What the browser may fetch and run, as Content-Security-Policy."""
    images = "'self' file: data:" if local_images else "data:"
    found = f"default-src 'none'; style-src 'unsafe-inline'; img-src {images}"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        found += f"; script-src 'sha256-{digest}'"
    return found


def typeset(sections: Sequence[Section]) -> list[Section]:
    """The sections with a minus sign in every number, where programs write a hyphen; code stays as it is."""
    return [
        section._replace(
            text=with_minus(section.text),
            pictures=[picture._replace(caption=with_minus(picture.caption)) for picture in section.pictures],
            tables=[
                table._replace(rows=[list(map(with_minus, row)) for row in table.rows], note=with_minus(table.note))
                for table in section.tables
            ],
            facts=[(what, with_minus(value)) for what, value in section.facts],
        )
        for section in sections
    ]


def with_minus(text: str) -> str:
    """A text with U+2212 before numbers and in their exponents; names, dates and options keep their hyphens."""
    return re.sub(r"(?<![\w.\-/)\]])-(?=\.?\d)|(?<=\de)-(?=\d)", "−", text)


def _headline(headline: Headline) -> str:
    text = f'<p class="verdict">{escape(with_minus(headline.text))}</p>'
    numbers = [
        f"<div><dt>{escape(what)}</dt><dd>{escape(with_minus(value))}</dd></div>" for what, value in headline.numbers
    ]
    sentence = [f'<p class="sentence">{escape(with_minus(headline.sentence))}</p>'] if headline.sentence else []
    return "\n".join([text, *_within('<dl class="numbers">', numbers, "</dl>"), *sentence])


def _contents(sections: Sequence[Section]) -> str:
    """Links to the sections, where there are enough of them to get lost in."""
    if len(sections) < 3:
        return ""
    links = (f'<a href="#section-{number}">{escape(s.title)}</a>' for number, s in enumerate(sections, start=1))
    return f'<nav aria-label="Sections">{" ".join(links)}</nav>'


def _section(section: Section, number: int) -> str:
    name = f"section-{number}"
    paragraphs = [text for text in re.split(r"\n\s*\n", section.text.strip()) if text]
    facts = [f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in section.facts]
    pictures = [
        f"<figure>\n{picture.svg}\n<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in section.pictures
    ]
    return "\n".join(
        [
            f'<section id="{name}" aria-labelledby="{name}-title">',
            f'<h2 id="{name}-title">{escape(section.title)}</h2>',
            *(f"<p>{escape(text)}</p>" for text in paragraphs),
            *_within('<div class="pictures">', pictures, "</div>"),
            *(_table(table, f"{name}-table-{place}") for place, table in enumerate(section.tables, start=1)),
            *_within("<dl>", facts, "</dl>"),
            *([f'<pre tabindex="0">{escape(section.code)}</pre>'] if section.code else []),
            *([section.markup] if section.markup else []),
            "</section>",
        ]
    )


def _within(before: str, pieces: Sequence[str], after: str) -> Iterable[str]:
    return [before, *pieces, after] if pieces else []


def _table(table: Table, name: str) -> str:
    """A table in a box that scrolls sideways by itself, with its first column staying in sight."""
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(f"table {table.caption!r}: a row of {len(row)} cells under {len(table.header)} heads")
    kinds = [_kind(head, [row[column] for row in table.rows]) for column, head in enumerate(table.header)]
    head = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(table.header, kinds, strict=True))
    rows = []
    labels = [f' data-head="{escape(head)}"' if table.stacked else "" for head in table.header]
    for first, *others in table.rows:
        cells = "".join(
            f"<td{kind}{label}>{escape(cell)}</td>"
            for cell, kind, label in zip(others, kinds[1:], labels[1:], strict=True)
        )
        rows.append(f'<tr><th scope="row"{kinds[0]}>{escape(first)}</th>{cells}</tr>')
    note = [f'<p class="note">{escape(table.note)}</p>'] if table.note else []
    return "\n".join(
        [
            f'<figure class="table{" stacked" * table.stacked}">'
            f'<figcaption id="{name}">{escape(table.caption)}</figcaption>',
            f'<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0">',
            f'<table aria-labelledby="{name}">',
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody>",
            "</table></div>",
            *note,
            "</figure>",
        ]
    )


def _kind(head: str, cells: Sequence[str]) -> str:
    """How a column is set: numbers flush right, short texts on one line, and words too long for a phone broken."""
    kinds = ["number"] if cells and all(map(_is_number, cells)) else []
    if all(len(cell) <= LONG for cell in cells):
        kinds.append("short")
    if any(len(word) > LONG for cell in (head, *cells) for word in cell.split()):
        kinds.append("long")
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _is_number(cell: str) -> bool:
    """Whether a cell begins as a number does: signs, brackets and the like before a digit; or holds nothing."""
    return re.match(r"[\s<>≤≥~≈=±+\-−–—\[(.,]*(\d|$)", cell) is not None


def _details(details: str) -> str:
    """The numbers, once: a script of data is never run, and the style shows it where the reader unfolds it."""
    json.loads(details)
    return (
        "<details><summary>All numbers, as JSON</summary>\n"
        '<div class="data" role="region" aria-label="All numbers, as JSON" tabindex="0">'
        f'<script type="application/json" id="results">\n{_inert(details)}\n</script></div></details>'
    )


def _style() -> str:
    """The style sheet: the colours that figures are drawn in become the page's, which differ from theme to theme."""
    series = "".join(
        f'svg [style*="{what}: {colour}" i] {{ {what}: var(--series-{number}) !important; }}\n'
        for number, colour in enumerate(COLOURS, start=1)
        for what in ("fill", "stroke")
    )
    return STYLE + series


# `data:,` is an empty icon: a browser that reads the page from a server asks for one otherwise.
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
"""
