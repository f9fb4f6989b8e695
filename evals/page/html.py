"""One page of HTML that opens without a network: text, figures as SVG and tables, in a single file.

pieces (Section, Picture, Table) -> escaped -> one document with its own style, no script and no address of anything

A policy in the head forbids the browser to fetch whatever it is, so that nothing leaves the page even where a piece of
it names an address. The page follows the reader's light or dark theme and folds into one column on a phone.
"""

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

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
    """A figure from `llm.common.plots.as_svg`, which names it for readers who do not see it, and what stands below
    it."""

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


class Headline(NamedTuple):
    """What the page is read for, large at the top, then its numbers (what, and its value), then the whole sentence."""

    text: str
    numbers: Sequence[tuple[str, str]] = ()
    sentence: str = ""


def page(
    title: str, verdict: str | Sequence[Headline], sections: Sequence[Section], made_by: str, details: str = ""
) -> str:
    """The whole document; everything but the figures is plain text and is escaped here.

    Args:
        verdict: what the page is read for; it stands large at the top.
        made_by: the command that made the page, its date and versions; line breaks are kept.
        details: JSON of all numbers, kept in the page as <script type="application/json" id="results">, folded.

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
    ]
    return HEAD.format(title=escape(title), style=_style()) + "\n".join(filter(None, parts)) + "\n</body>\n</html>\n"


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
    data = details.replace("<", "\\u003c")  # within JSON it is in strings alone; and no string ends the element
    return (
        "<details><summary>All numbers, as JSON</summary>\n"
        '<div class="data" role="region" aria-label="All numbers, as JSON" tabindex="0">'
        f'<script type="application/json" id="results">\n{data}\n</script></div></details>'
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
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
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

# The series are Okabe and Ito's blue and vermillion on a light ground, their sky blue and orange on a dark one.
# `.scroll`: a shade at a side says that the table goes on there; at its end a cover of the ground's colour, which
# scrolls along, hides the shade.
STYLE = """\
:root {
  color-scheme: light;
  --ground: #ffffff; --raised: #f4f6f8; --ink: #1c2127; --soft: #57606a; --line: #d5dbe1; --link: #0a5a9c;
  --shade: rgb(20 30 40 / 0.28); --series-1: #0072b2; --series-2: #d55e00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --ground: #15181c; --raised: #1e2328; --ink: #e6e9ec; --soft: #a5aeb7; --line: #39414a; --link: #7cbcf0;
    --shade: rgb(190 205 220 / 0.3); --series-1: #56b4e9; --series-2: #e69f00;
  }
}
*, ::before, ::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  max-width: 84rem; margin: 0 auto; padding: 1.5rem max(1rem, 3vw) 3rem;
  background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif;
}
h1 { margin: 0 0 0.4rem; font-size: 1rem; font-weight: 600; color: var(--soft); overflow-wrap: anywhere; }
.verdict {
  margin: 0; font-size: clamp(1.2rem, 1rem + 0.9vw, 1.6rem); line-height: 1.3; font-weight: 600; text-wrap: pretty;
}
.sentence + .verdict, .verdict + .verdict { margin-top: 1.4rem; }
.numbers { display: flex; flex-wrap: wrap; gap: 0.6rem 2.2rem; margin: 0.8rem 0 0; }
.numbers > div { padding: 0; border: 0; }
.numbers dd { font-size: 1.15rem; font-weight: 600; }
.sentence { max-width: 62rem; margin: 0.8rem 0 0; color: var(--soft); }
a { color: var(--link); }
nav {
  display: flex; flex-wrap: wrap; gap: 0.25rem 1.2rem; margin-top: 1.4rem; padding: 0.6rem 0;
  border-block: 1px solid var(--line); font-size: 0.925rem;
}
nav a { padding: 0.15rem 0; text-underline-offset: 0.2em; text-decoration-thickness: 1px; }
section { margin-top: 2.4rem; }
h2 { margin: 0 0 0.5rem; font-size: 1.25rem; line-height: 1.3; }
section > p { max-width: 46rem; margin: 0.5rem 0; }
figure { margin: 0; min-width: 0; }
figcaption, .note { font-size: 0.9rem; line-height: 1.45; color: var(--soft); overflow-wrap: anywhere; }
.pictures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.8rem 1.5rem;
  margin-top: 1rem; align-items: start;
}
.pictures figcaption { margin-top: 0.4rem; }
svg { display: block; max-width: 100%; height: auto; fill: currentColor; overflow: visible; }
svg text:not(:has(tspan)) { font-family: inherit !important; }
.table { margin-top: 1.4rem; }
.table figcaption { margin-bottom: 0.35rem; color: var(--ink); font-weight: 600; }
.note { margin: 0.4rem 0 0; max-width: 46rem; }
.scroll {
  overflow-x: auto; width: fit-content; max-width: 100%;
  background:
    linear-gradient(to right, var(--ground) 40%, transparent) left / 2.4rem 100% no-repeat local,
    linear-gradient(to left, var(--ground) 40%, transparent) right / 2.4rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 0.9rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 0.9rem 100% no-repeat scroll;
}
table { border-collapse: collapse; font-size: 0.925rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; border-bottom: 2px solid var(--line); }
td { max-width: 26rem; }
.number { text-align: right; }
tbody .short { white-space: nowrap; }
.long { min-width: 8.5rem; overflow-wrap: anywhere; }
tr > :first-child {
  position: sticky; left: 0; padding-left: 0; max-width: 18rem; background: var(--ground);
}
tbody th { font-weight: 400; }
tbody th:not(.short, .number) { min-width: 8.5rem; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 0.9rem 1.5rem;
  margin: 1.2rem 0 0;
}
dl > div { min-width: 0; padding-top: 0.45rem; border-top: 1px solid var(--line); }
dt { font-size: 0.9rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
summary { cursor: pointer; color: var(--link); width: fit-content; }
.data { margin-top: 0.6rem; padding: 0.8rem; max-height: 24rem; overflow: auto; background: var(--raised); }
.data script { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { padding: 0.8rem; overflow-x: auto; background: var(--raised); }
pre, .data script, .made { font: 0.875rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.made { margin: 1rem 0 0; color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 40rem) {
  body { padding-top: 1rem; }
  th, td { padding-inline: 0.55rem; }
  tr > :first-child { max-width: 9.5rem; border-right: 1px solid var(--line); }
  .numbers { gap: 0.5rem 1.4rem; }
  .stacked .scroll { width: auto; background: none; }
  .stacked thead { display: none; }
  .stacked table, .stacked tbody { display: block; }
  .stacked tr {
    display: grid; grid-template-columns: 2fr 3fr 2fr; gap: 0.2rem 0.6rem; padding: 0.6rem 0;
    border-bottom: 1px solid var(--line);
  }
  .stacked th, .stacked td {
    min-width: 0; max-width: none; padding: 0; border: 0; text-align: left; white-space: normal !important;
  }
  .stacked tr > :first-child { position: static; max-width: none; border: 0; font-weight: 600; }
  .stacked tr > :first-child, .stacked td[data-head=""] { grid-column: 1 / -1; order: -2; }
  .stacked td[data-head="difference"], .stacked td[data-head="interval"], .stacked td[data-head="shown"] { order: -1; }
  .stacked td::before { content: attr(data-head); display: block; font-size: 0.875rem; color: var(--soft); }
  .stacked td:empty { visibility: hidden; }
}
@media print {
  html { font-size: 9.5pt; }
  body { max-width: none; padding: 0; }
  table { font-size: 0.8rem; }
  th, td { padding: 0.25rem 0.4rem; }
  .long { min-width: 5rem; }
  nav, details { display: none; }
  .scroll { overflow: visible; background: none; }
  tr > :first-child { position: static; }
  figure, tr, dl > div { break-inside: avoid; }
  h2 { break-after: avoid; }
}
svg [style*="stroke: #000000"] { stroke: currentColor !important; }
"""
