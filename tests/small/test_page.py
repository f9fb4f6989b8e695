"""The page of a folder: parsed, and opened in a browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from small.page import show, show_pictures
from small.plots import Picture
from small.spaces import space
from small.walk_page import write_walk
from tests.browser import open_page

ODD = "<b>a & b</b>"  # as a name that somebody gave


def picture(name: str) -> Picture:
    def draw() -> Figure:
        figure = Figure()
        figure.subplots().plot([1, 2], [3, 1])
        return figure

    return Picture(name, f"What {ODD} shows.", draw)


def run_json(alpha: float, attempts: list[dict], key: str = "attempts") -> str:
    settings = {"alpha": alpha, "seed": 0, "name": ODD, "cells": list(range(99))}
    return json.dumps({"settings": settings, key: attempts})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two runs, one of which was resumed and one of which is of version 0.1, with pictures and a walk."""
    once = {"began": "2026-01-01", "from_step": 0, "to_step": 10, "seconds": 20.0, "device": "a CPU", "command": ODD}
    for name, text in (
        ("a", run_json(1.0, [once, {**once, "from_step": 10, "to_step": 14, "seconds": 2.0}])),
        ("b", run_json(10.0, [once], key="lives")),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    cells = np.array([0, 1, 4, 4, 3])
    activity = {f"unit {ODD}</script>": np.array([0.5, np.nan, -1.0, 2.0]), "other": np.arange(5.0)}
    write_walk(tmp_path, "a", space("2x3"), cells, activity)
    show(f"a table {ODD}", tmp_path, "table.txt", [picture("one,a=1"), picture("two")], "small.grid", [tmp_path])
    return tmp_path


class Parsed(HTMLParser):
    """Elements that are open, all tags, and all text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def test_the_page_has_all_pictures_settings_and_times_and_escapes_every_text(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    page = Parsed(text)
    assert not page.open and "b" not in {tag for tag, _ in page.tags}
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert images == ["one%2Ca%3D1.png", "two.png"]
    assert page.text.count(f"What {ODD} shows.") == 2 and f"a table {ODD}" in page.text
    assert "settings: name" in page.text and "99 entries" in page.text
    cells = " ".join(re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text))
    assert "a 2026-01-01 0 to 10 20 2 a CPU" in cells and "a 2026-01-01 10 to 14 2 0.5 a CPU" in cells
    assert "b 2026-01-01 0 to 10 20 2 a CPU" in cells
    assert all((folder / f"two.{form}").is_file() for form in ("png", "svg", "pdf"))


def test_the_browser_may_run_the_pages_own_script_alone(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "http" not in script.replace("http://www.w3.org/2000/svg", "")


def test_pictures_of_earlier_commands_stay_as_long_as_they_are_there(folder: Path) -> None:
    (folder / "two.png").unlink()
    show_pictures(folder, [picture("three")], "small.grid", [folder])
    names = [*json.loads((folder / "pictures.json").read_text())]
    assert names == ["one,a=1", "three"]
    (folder / "walk.json").write_text("{")  # damaged: a page without a walk
    show_pictures(folder, [], "small.grid")
    assert "<script" not in (folder / "index.html").read_text()


def wait_for(page: Any, condition: str) -> None:
    """Playwright's own wait_for_function evaluates strings in the page, which its policy forbids."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(condition)


def test_a_browser_shows_pictures_and_walks(folder: Path) -> None:
    for width in (1200, 400):
        with open_page(folder / "index.html", width) as (page, console, _):
            page.evaluate("document.querySelectorAll('img').forEach(each => { each.loading = 'eager'; })")
            wait_for(page, "[...document.images].every(each => each.complete && each.naturalWidth > 0)")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("#walk-unit option").all_text_contents() == [f"unit {ODD}</script>", "other"]
            assert page.locator("#walk-now").text_content() == "0 of 4"
            page.locator("#walk-step").fill("3")
            assert page.locator("#walk-now").text_content() == "3 of 4, activity −1"
            circle = page.locator("#walk-map circle")
            assert (circle.get_attribute("cx"), circle.get_attribute("cy")) == ("1", "1")
            page.locator("#walk-unit").select_option("1")
            assert page.locator("#walk-now").text_content() == "3 of 4, activity 3"
            page.locator("#walk-play").click()
            wait_for(page, "document.getElementById('walk-step').value === '4'")
            assert page.locator("#walk-play").text_content() == "Play"
            assert console == []
