"""The head of a page and its table on a phone; one minus sign."""

import re
from pathlib import Path

from llm.common.html import Headline, Section, Table, page, typeset, with_minus
from tests.browser import check_page, open_page

SHOWN = ("−0.0135", "−0.1798 to +0.1528", "no difference shown")


def verdict_page() -> str:
    """The head and the table of a comparison, with names as long as a study's."""
    header = ["", "classic-seed1-1.2M", "values-seed1-1.2M", "difference", "interval", "p (Holm)", "shown"]
    loss = [
        "validation loss per document, nats per token",
        "0.9045",
        "0.8910",
        "-0.0135",
        "-0.1798 to +0.1528",
        "0.760",
    ]
    table = Table("What was measured", header, [[*loss, "no difference shown"]], "Of -0.5 at the least.", stacked=True)
    numbers = [
        ("difference, nats per token", "-0.0135"),
        ("95% interval", "-0.1798 to +0.1528"),
        ("validation loss per document", "no difference shown"),
    ]
    text = "One seed each: no difference between values-seed1-1.2M and classic-seed1-1.2M is shown."
    headline = Headline(text, numbers, "One seed each: -0.0135 nats per token.")
    return page("a against b", [headline], typeset([Section("Result", "Cost -3.2%.", tables=[table])]), "run --x -1")


def test_the_verdict_is_in_view_on_a_phone(tmp_path: Path) -> None:
    """Difference, interval and verdict: in the head, within two lines of the title's size; in the table unscrolled."""
    path = tmp_path / "page.html"
    path.write_text(verdict_page(), encoding="utf-8")
    check_page(path, 0)
    lines = "e => e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight)"
    for width, most in ((1400, 2), (400, 3)):
        with open_page(path, width=width, height=800) as (opened, _, _):
            assert round(opened.locator(".verdict").evaluate(lines)) <= most
            for place in (".numbers dd", "tbody td"):
                for shown in SHOWN:
                    box = opened.locator(place, has_text=shown).first.bounding_box()
                    assert box["x"] >= 0 and box["x"] + box["width"] <= width, (width, place, shown)
                    assert place != ".numbers dd" or box["y"] + box["height"] <= 800
            scrolls = opened.locator(".scroll").evaluate("e => e.scrollWidth > e.clientWidth")
            assert not scrolls, width


def test_one_minus_sign_on_the_page() -> None:
    made = verdict_page()
    seen = re.sub(r"<style>.*?</style>|<[^>]*>|run --x -1", "", made, flags=re.S)
    assert not re.search(r"(?<!\w)-\d", seen) and seen.count("−") == 7
    for text in ("step-00001", "values-seed1-1.2M", "2026-01-31", "--spread", "a/-1", "0-shot", "x-1"):
        assert with_minus(text) == text
    assert with_minus("-1 to -.5, (-2.5e-05)") == "−1 to −.5, (−2.5e−05)"
