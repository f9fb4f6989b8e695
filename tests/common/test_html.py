"""The page of results: whole in a real browser, wide and narrow, light and dark; and a check that finds what is not."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from llm.common import plots
from llm.common.html import Picture, Section, Table, page
from tests.browser import check_page, open_browser, open_page

NASTY = """<script>alert("1")</script> & 'values' </title>"""
PICTURES = 7
NUMBERS = {"runs": {NASTY: [1.25, None]}, "end": "</script><!--"}


def curves(number: int) -> Figure:
    """Two models over steps, each with a band and marks; the figures of several numbers differ."""
    with plots.style():
        figure = plots.new_figure()
        axes = figure.subplots()
        steps = np.linspace(0, 20, 40)
        for name, colour, marker in zip(("classic", "values & <b>"), plots.COLOURS, plots.MARKERS, strict=True):
            values = 2 + 4 * np.exp(-steps / (4 + 0.2 * number + 0.9 * (name != "classic")))
            axes.plot(steps, values, color=colour, marker=marker, markevery=6, label=name)
            axes.fill_between(steps, values - 0.1, values + 0.1, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(2.0, color=plots.INK, linewidth=0.8)
        axes.set(xlabel="steps (thousand)", ylabel="nats per token", title=f"task {number}")
        axes.grid(axis="y")
        axes.legend()
    return figure


def heat_map() -> Figure:
    """Layers and heads of two models that are alike, each with its bar of colours."""
    with plots.style():
        figure = plots.new_figure()
        for axes in figure.subplots(1, 2):
            image = axes.imshow(np.random.default_rng(0).random((6, 8)), vmin=0, vmax=1, aspect="auto")
            figure.colorbar(image, label="prefix matching")
            axes.set(xlabel="head", ylabel="layer")
    return figure


def intervals() -> Figure:
    """A difference with its interval for each task."""
    with plots.style():
        figure = plots.new_figure()
        axes = figure.subplots()
        axes.errorbar([0.4, -1.2, 2.0], range(3), xerr=[0.8, 0.9, 1.1], fmt="o", color=plots.COLOURS[1], capsize=3)
        axes.set_yticks(range(3), ["ARC-Easy", "HellaSwag", "PIQA"])
        axes.axvline(0, color=plots.INK, linewidth=0.8)
        axes.set_xlabel("difference (percentage points)")
    return figure


@cache
def whole_page(name: str = NASTY) -> str:
    """A page as a comparison makes them: seven figures, tables wider than a phone, facts and all numbers."""
    svgs = [plots.as_svg(curves(number), f"{name}, {number // 2}") for number in range(PICTURES - 2)]
    svgs += [plots.as_svg(heat_map(), f"heads of {name}"), plots.as_svg(intervals(), "differences by task")]
    first, *others = [Picture(svg, f"Figure {number}. What {name} is like.") for number, svg in enumerate(svgs, 1)]
    wide = Table(
        "Accuracy by task and number of shots",
        ["task", "shots", "items", "classic", name, "difference", "95% interval", "p (Holm)", "McNemar", "verdict"],
        [
            [
                task,
                str(shots),
                "2,376",
                "41.2 ± 1.0",
                "41.9 ± 1.0",
                "+0.7",
                "−0.4 to +1.8",
                "0.62",
                "0.41",
                "no verdict",
            ]
            for task in ("ARC-Easy", "ARC-Challenge", "HellaSwag", "OpenBookQA", "PIQA")
            for shots in (0, 5)
        ],
        "Intervals are of a paired bootstrap over items, 10,000 resamples.",
    )
    small = Table("Cost", ["", "classic", "values"], [["ms per step", "812", "840"], ["peak memory (GiB)", "–", "3.5"]])
    long = "a1b2c3d4" * 8
    sections = [
        Section("Loss", "The loss of each document, paired.\n\nA second paragraph of " + name, [first], [small]),
        Section("Tasks", "", [], [wide]),
        Section(f"Inside {name}", "", others),
        Section("The pair", "", facts=[("store", long), ("seeds", "1, 2, 3"), ("steps", "20,000"), (name, name)]),
    ]
    verdict = (
        "The change made no difference that these 3 seeds can show: −0.004 nats per token (95%: −0.011 to +0.003)."
    )
    made_by = f"python -m evals compare runs/classic 'runs/{name}' --out {'deep/' * 30}\n2026-01-31, version 0.1.0"
    return page(f"classic and {name}", verdict, sections, made_by, json.dumps(NUMBERS, indent=1))


@pytest.fixture(scope="module")
def one_browser() -> Iterator[None]:
    """One for all tests of this file: it takes longer to start than to read a page."""
    with open_browser():
        yield


@pytest.fixture
def written(tmp_path: Path, one_browser: None) -> Callable[[str], Path]:
    """Writes a document where the browser can open it."""

    def write(document: str) -> Path:
        path = tmp_path / "page.html"
        path.write_text(document, encoding="utf-8")
        return path

    return write


# ---- In a browser ----------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_readable(written: Callable[[str], Path]) -> None:
    check_page(written(whole_page()), PICTURES)


def test_names_are_text_and_numbers_are_kept(written: Callable[[str], Path]) -> None:
    with open_page(written(whole_page())) as (opened, console, _):
        assert opened.title() == f"classic and {NASTY}"
        assert opened.locator("h1").text_content() == f"classic and {NASTY}"
        assert opened.locator("svg").first.get_attribute("aria-label") == f"{NASTY}, 0"
        assert json.loads(opened.locator("#results").text_content()) == NUMBERS
        assert opened.locator("script").count() == 1  # the numbers: no name became one
        assert opened.locator("tbody th[scope=row]").count() == 12
        assert opened.locator("thead th:not([scope=col])").count() == 0
        summary = opened.locator("summary")
        assert not opened.locator("#results").is_visible()
        summary.click()
        assert opened.locator("#results").is_visible()
        assert console == []


def test_figures_take_the_colours_of_the_theme(written: Callable[[str], Path]) -> None:
    """The ink is the page's own, and both series are other colours in the dark, each told from the other."""
    path = written(whole_page())
    for dark in (False, True):
        with open_page(path, dark=dark) as (opened, _, _):
            ink, spine, text, *series = opened.evaluate(
                """() => {
                  const seen = (s, what) => getComputedStyle(document.querySelector(s))[what];
                  const line = c => seen(`svg path[style*="fill: none; stroke: ${c}"]`, 'stroke');
                  return [seen('body', 'color'), line('currentColor'), seen('svg text', 'fill'),
                          line('#0072b2'), line('#d55e00')];
                }"""
            )
        assert spine == text == ink
        expected = ("rgb(86, 180, 233)", "rgb(230, 159, 0)") if dark else ("rgb(0, 114, 178)", "rgb(213, 94, 0)")
        assert tuple(series) == expected


def test_a_wide_table_scrolls_in_its_own_box(written: Callable[[str], Path]) -> None:
    with open_page(written(whole_page()), width=400) as (opened, _, _):
        box = opened.locator(".scroll").nth(1)
        inside, outside = box.evaluate("e => [e.scrollWidth, e.clientWidth]")
        assert outside <= 400 < inside
        aligned = "e => [...e.cells].map(cell => getComputedStyle(cell).textAlign)"
        assert opened.locator("tbody tr").last.evaluate(aligned) == ["left", *["right"] * 8, "left"]
        box.evaluate("e => { e.scrollLeft = e.scrollWidth }")
        assert opened.locator("tbody tr").last.locator("td").last.bounding_box()["x"] < 400
        assert opened.locator("tbody tr").last.locator("th").bounding_box()["x"] >= 0  # the task stays in sight


# Where, what is put in its place, and what the check says of it. The first figure is drawn on.
WRONG = {
    "a request": ("</main>", '<img alt="" src="https://example.invalid/a.png"></main>', "Content Security Policy"),
    "a script": ("</main>", "<script>1 + undefined_name</script></main>", "Content Security Policy"),
    "too wide": ("</main>", '<p style="width: 500px">wide</p></main>', "400 pixels wide.* scrolls sideways"),
    "cut off": (
        "</main>",
        '<p style="width: 3rem; overflow-wrap: normal; overflow: hidden">uncommon</p></main>',
        "cut off",
    ),
    "small": ("</main>", '<p style="font-size: 9px">small</p></main>', "'small' is 9.0 pixels"),
    "small in a figure": ("font-size: 10px", "font-size: 6px", "is 6.* pixels high"),
    "faint": ("</main>", '<p style="color: #999999">faint</p></main>', "'faint' has a contrast of 2.8"),
    "faint in a figure": (
        "middle; fill: currentColor",
        "middle; fill: #dddddd",
        "1200 pixels wide, light.* has a contrast of 1.4",
    ),
    "black in a figure": (
        "middle; fill: currentColor",
        "middle; fill: #000000",
        "1200 pixels wide, dark.* has a contrast of 1.2",
    ),
    "overlap": ("</main>", '<p style="margin-top: -3rem">over</p></main>', "lie on each other"),
    "overlap in a figure": (
        "<text ",
        '<text x="60" y="60">under it</text><text x="62" y="62">on it</text><text ',
        "on it",
    ),
    "out of the figure": ("<text ", '<text x="-60" y="60">lost</text><text ', "sticks out of its figure"),
    "one too many": ("</main>", '<svg width="200" height="200"></svg></main>', "2 figures"),
    "hidden": ("<figure>\n<svg ", '<figure>\n<svg style="visibility: hidden" ', "figure 1"),
    "nothing painted": ("<figure>\n<svg ", '<figure>\n<svg style="opacity: 0.02" ', "figure 1: nothing to be seen"),
    "nameless": ('role="img" ', "", "figure 1 has no name"),
    "one id twice": ('id="section-1-title"', 'id="section-1"', "stand twice"),
    "no dark theme": ("--ground: #15181c", "--ground: #f5f5f5", "1200 pixels wide, dark"),
    "a dark line": ("--series-1: #56b4e9", "--series-1: #203040", r"dark: a line of rgb\(32, 48, 64\)"),
}


@cache
def small_page() -> str:
    """A page with one figure and one table, in which nothing is wrong."""
    table = Table("Cost", ["", "classic"], [["ms per step", "812"]])
    section = Section("Loss", "Of each document.", [Picture(plots.as_svg(curves(0), "loss"), "The loss.")], [table])
    return page("a and b", "No difference.", [section], "python -m evals compare a b")


def replaced(document: str, old: str, new: str) -> str:
    assert old in document
    return document.replace(old, new, 1)


def test_the_check_passes_a_small_page(written: Callable[[str], Path]) -> None:
    check_page(written(small_page()), 1)


@pytest.mark.parametrize("fault", WRONG)
def test_the_check_finds_what_is_wrong(written: Callable[[str], Path], fault: str) -> None:
    old, new, complaint = WRONG[fault]
    with pytest.raises(AssertionError, match=complaint):
        check_page(written(replaced(small_page(), old, new)), 1)


ASKING = {
    "img": '<img alt="" src="{}">',
    "script": '<script src="{}"></script>',
    "style": '<link rel="stylesheet" href="{}">',
    "import": "<style>@import url({});</style>",
    "frame": '<iframe src="{}"></iframe>',
    "video": '<video src="{}"></video>',
    "object": '<object data="{}"></object>',
}


@pytest.mark.parametrize("way", ASKING)
def test_the_policy_lets_no_request_out(written: Callable[[str], Path], way: str) -> None:
    """Without it the same page asks, which is seen: so the checks of no requests see them."""
    address = "https://example.invalid/a"
    asking = replaced(small_page(), "</main>", ASKING[way].format(address) + "</main>")
    with open_page(written(re.sub(r"<meta http-equiv[^>]*>", "", asking))) as (_, console, requests):
        assert requests[1:] == [address]
        assert "Content Security Policy" not in "".join(console)  # it fails for there is no network
    with open_page(written(asking)) as (_, console, _):
        assert any("Content Security Policy" in line for line in console)


# ---- As text ---------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


class Reader(HTMLParser):
    """Python's own reader of HTML: the start tags, and by tag the texts that follow them."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts[self.tags[-1]][-1] += data


@settings(max_examples=30, deadline=None)
@given(words=st.lists(WORDS, min_size=9, max_size=9), data=st.dictionaries(WORDS, WORDS | st.none(), min_size=1))
def test_whatever_it_is_told_stays_text(words: list[str], data: dict[str, str | None]) -> None:
    """As many elements as with plain words, and each holds what was given."""

    def make(words: list[str], data: object) -> Reader:
        title, verdict, head, what, value, caption, column, cell, made_by = words
        table = Table(caption, [column, "n"], [[cell, "1"]], cell)
        section = Section(head, "", [], [table], [(what, value)])
        return Reader(page(title, verdict, [section], made_by, json.dumps(data, ensure_ascii=False)))

    read = make(words, data)
    assert read.tags == make(["plain"] * 9, {}).tags
    told = {"title": 0, "h1": 0, "h2": 2, "dt": 3, "dd": 4, "figcaption": 5}
    for tag, place in told.items():
        assert read.texts[tag][0].strip() == words[place].strip()
    assert json.loads(read.texts["script"][0]) == data


def test_a_figure_is_well_formed_and_its_ids_its_own() -> None:
    """Under a name that is not XML; two figures of one name share no id, and each finds what it refers to."""
    names = []
    for number in range(2):
        svg = plots.as_svg(curves(number), NASTY)
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == NASTY and root.get("role") == "img"
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)) > 20
        meant = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert meant and {a or b for a, b in meant} <= set(ids)
        names.append(set(ids))
        assert svg == plots.as_svg(curves(number), NASTY)  # the same figure is the same bytes
    assert not names[0] & names[1]


def test_a_text_that_looks_like_an_id_stays() -> None:
    with plots.style():
        figure = plots.new_figure()
        figure.text(0.1, 0.5, 'a id="b" href="#c" url(#d)')
    texts = [
        text.text for text in ElementTree.fromstring(plots.as_svg(figure, "x")).iter() if text.tag.endswith("text")
    ]
    assert texts == ['a id="b" href="#c" url(#d)']


def test_what_the_caller_got_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="'Cost': a row of 1 cells under 2 heads"):
        page("a", "b", [Section("c", tables=[Table("Cost", ["x", "y"], [["1"]])])], "d")
    with pytest.raises(ValueError, match="Expecting"):
        page("a", "b", [], "d", "{not json")


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "−0.4 to +1.8", "(0.2, 0.3)", "≥ 3", ".5", "–", "", "[1, 2]", "+7%"], "number short"),
        (["1", "no"], "short"),
        (["a sentence that takes more than one line"], None),
        (["a_name_that_takes_more_than_one_line"], "long"),
    ],
)
def test_columns_are_set_by_what_they_hold(cells: list[str], kind: str | None) -> None:
    document = page("a", "b", [Section("c", tables=[Table("d", ["x", "y"], [["z", cell] for cell in cells])])], "e")
    assert set(re.findall(r"<td(?: class=\"([^\"]*)\")?>", document)) == {kind or ""}
