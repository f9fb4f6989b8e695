"""A page in a real headless browser: opened, and held against what a reader needs of it.

    check_page(path, pictures=7)        # 1,200 and 400 pixels wide, in the light and in the dark

The browser is the system's Chromium or Chrome, driven by playwright through pipes; `make browser` installs it.
"""

import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = (1200, 900), (400, 800)  # pixels of CSS
OPEN: list[Any] = []  # the browser that is open: playwright cannot be started within itself

# Every text that is seen: its words, size and colours. `ground` is None for a text in a figure that lies on something
# filled, such as the cell of a heat map; `scale` is what the figure is shrunk by.
TEXTS = """() => {
  const filled = new Map();
  for (const svg of document.querySelectorAll('svg')) filled.set(svg, [...svg.querySelectorAll('image, path, use')]
    .filter(e => !e.closest('defs, clipPath') && (e.tagName === 'image' || getComputedStyle(e).fill !== 'none'))
    .map(e => e.getBoundingClientRect()));
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)$/.test(colour) && colour !== 'transparent') return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const words = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getBoundingClientRect();
    if (!words || !box.width || element.closest('script, style')) continue;
    const style = getComputedStyle(element), svg = element.closest('svg');
    const at = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
    const covered = svg && filled.get(svg).some(
      b => b.left <= at[0] && at[0] <= b.right && b.top <= at[1] && at[1] <= b.bottom);
    texts.push({
      words: words.slice(0, 60), size: parseFloat(style.fontSize), inside: !!svg,
      scale: svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1,
      colour: svg ? style.fill : style.color, ground: covered ? null : ground(element),
    });
  }
  return texts;
}"""

# Pairs of boxes that lie on each other though neither is in the other: of the page, and of the texts in a figure.
# Rects of texts are as high as the font's line, hence the share of the smaller one that may be covered.
OVERLAPS = """() => {
  const name = e => `${e.tagName.toLowerCase()} "${e.textContent.trim().replace(/\\s+/g, ' ').slice(0, 40)}"`;
  const found = [];
  const compare = (elements, share) => {
    const boxes = elements.map(e => [e, e.getBoundingClientRect()]).filter(([, b]) => b.width && b.height);
    boxes.forEach(([e, a], i) => boxes.slice(i + 1).forEach(([f, b]) => {
      if (e.contains(f) || f.contains(e)) return;
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      const least = Math.min(a.width * a.height, b.width * b.height);
      if (width > 1 && height > 1 && width * height > share * least) found.push(`${name(e)} and ${name(f)}`);
    }));
  };
  compare([...document.querySelectorAll('h1, h2, p, nav, .pictures > figure, figure > svg, figcaption, .scroll, '
    + 'dl > div, dt, dd, summary, .data')], 0);
  for (const svg of document.querySelectorAll('svg')) compare([...svg.querySelectorAll('text')], 0.2);
  return found;
}"""

# What is cut off or sticks out: contents wider than their own box, boxes beyond the window, texts beyond their figure.
CUT = """() => {
  const found = [];
  const say = (e, what) => found.push(`${e.tagName.toLowerCase()} "${e.textContent.trim().slice(0, 40)}" ${what}`);
  for (const e of document.querySelectorAll('h1, h2, p, a, dt, dd, th, td, figcaption, summary')) {
    if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline') say(e, 'is wider than its box');
    const box = e.getBoundingClientRect();
    const edge = document.documentElement.clientWidth;
    if (!e.closest('.scroll') && box.right > edge + 1) say(e, `ends at ${box.right} of ${edge}`);
  }
  for (const text of document.querySelectorAll('svg text')) {
    const box = text.getBoundingClientRect(), all = text.closest('svg').getBoundingClientRect();
    const out = Math.max(all.left - box.left, box.right - all.right, all.top - box.top, box.bottom - all.bottom);
    if (out > 3) say(text, `sticks out of its figure by ${out.toFixed(1)} pixels`);
  }
  return found;
}"""


def browser() -> str | None:
    """The path of the system's browser, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Playwright's headless browser; within it the same one is given again. Skips the test where there is none."""
    if OPEN:
        yield OPEN[-1]
        return
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    if (program := browser()) is None:
        pytest.skip("no Chromium or Chrome on this machine: make browser")
    with sync_api.sync_playwright() as playwright:
        OPEN.append(playwright.chromium.launch(executable_path=program))
        try:
            yield OPEN[-1]
        finally:
            OPEN.pop().close()


@contextmanager
def open_page(
    path: str | Path, width: int = WIDE[0], dark: bool = False, height: int = WIDE[1]
) -> Iterator[tuple[Any, list[str], list[str]]]:
    """A page of a file in a window of that many pixels: playwright's page, its console and the addresses asked for.

    A narrow window is a phone's, where a page has to say that it is made for the width. The console holds "type: text"
    of each message, errors that nothing caught as "pageerror: text". The network is off: what is asked for is seen and
    not had.
    """
    console: list[str] = []
    requests: list[str] = []
    settings = {"viewport": {"width": width, "height": height}, "color_scheme": "dark" if dark else "light"}
    with open_browser() as chromium:
        context = chromium.new_context(**settings, is_mobile=width < 600, offline=True)
        try:
            page = context.new_page()
            page.on("console", lambda message: console.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: console.append(f"pageerror: {error}"))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(Path(path).resolve().as_uri())  # returns when all that the page asks for is there or refused
            yield page, console, requests
        finally:
            context.close()


def check_page(path: str | Path, pictures: int) -> None:
    """Assert that a page is whole and readable, wide and on a phone, in the light and in the dark.

    Nothing on the console and no request but for the page; `pictures` figures, each painted; no text smaller than 14
    pixels, in figures 8; contrasts of WCAG AA; nothing on anything else, nothing cut off, no scrolling of the whole
    page sideways.
    """
    with open_browser():
        for (width, height), dark in product((WIDE, PHONE), (False, True)):
            with open_page(path, width, dark, height) as (page, console, requests):
                page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
                where = f"{width} pixels wide, {'dark' if dark else 'light'}"
                check_alone(page, console, requests, where)
                check_ground(page, dark, where)
                check_pictures(page, pictures, where)
                check_texts(page, where)
                across = page.evaluate("document.documentElement.scrollWidth")
                assert across <= width, f"{where}: {across} pixels across, so that the whole page scrolls sideways"
                overlaps, cut = page.evaluate(OVERLAPS), page.evaluate(CUT)
                assert not overlaps, f"{where}: these lie on each other: {'; '.join(overlaps)}"
                assert not cut, f"{where}: these are cut off: {'; '.join(cut)}"
                assert console == [], f"{where}: {console}"  # nor was anything said to what was done here


def check_alone(page: Any, console: list[str], requests: list[str], where: str) -> None:
    """Nothing was said on the console, nothing asked for, no id stands twice; headings go down one level at a time."""
    assert console == [], f"{where}: {console}"
    asked = [url for url in requests if not url.startswith("data:")]
    assert asked == [page.url], f"{where}: asked for {asked}"
    twice = """[...document.querySelectorAll('[id]')].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i)"""
    assert not (ids := page.evaluate(twice)), f"{where}: ids that stand twice: {ids}"
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))")
    in_order = all(level <= before + 1 for before, level in pairwise(headings))
    assert headings[:1] == [1] and headings.count(1) == 1 and in_order, f"{where}: headings of levels {headings}"


def check_ground(page: Any, dark: bool, where: str) -> None:
    """The page is dark where the reader asks for it, and its text light."""
    ground, ink = page.evaluate(
        "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))",
    )
    assert (luminance(rgb(ground)) < 0.1) == dark and (luminance(rgb(ink)) > 0.5) == dark, f"{where}: {ink} on {ground}"


def check_pictures(page: Any, count: int, where: str) -> None:
    """All are there, told to readers who do not see them, and paint something that stands out from the ground."""
    ground = rgb(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    svgs = page.locator("svg").all()
    assert len(svgs) == count, f"{where}: {len(svgs)} figures"
    seen = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB"))
    for number, svg in enumerate(svgs, start=1):
        which = f"{where}: figure {number}"
        assert svg.get_attribute("role") == "img" and svg.get_attribute("aria-label"), f"{which} has no name"
        box = svg.bounding_box()
        assert svg.is_visible() and box["width"] > 100 and box["height"] > 50, f"{which}: {box}"
        left, top, right, bottom = (
            round(edge) for edge in (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
        )
        painted = contrast(seen[top:bottom, left:right], ground) >= 3
        assert painted.size and painted.mean() > 0.005, f"{which}: nothing to be seen"
    lines = page.evaluate(
        """[...document.querySelectorAll('svg path')].filter(e => !e.closest('defs, clipPath'))
        .map(e => getComputedStyle(e)).filter(s => s.fill === 'none' && s.stroke.startsWith('rgb')
        && s.strokeOpacity === '1').map(s => s.stroke)"""
    )
    for line in sorted(set(lines)):
        assert contrast(rgb(line), ground) >= 3, f"{where}: a line of {line} on rgb{ground}"


def check_texts(page: Any, where: str) -> None:
    """Every text is large enough and stands out from what it lies on."""
    texts = page.evaluate(TEXTS)
    assert texts, f"{where}: not a word"
    for text in texts:
        size, least = text["size"] * text["scale"], 8 if text["inside"] else 14
        assert size >= least - 0.01, f"{where}: {text['words']!r} is {size:.1f} pixels high"
        if text["ground"] is not None:
            ratio = contrast(rgb(text["colour"]), rgb(text["ground"]))
            assert ratio >= (3 if text["inside"] else 4.5), f"{where}: {text['words']!r} has a contrast of {ratio:.1f}"


# ---- Contrast as WCAG 2.1 defines it, for one colour or an array of them (..., 3) ------------------------------------


VALUES = np.arange(256) / 255
LINEAR = np.where(VALUES <= 0.04045, VALUES / 12.92, ((VALUES + 0.055) / 1.055) ** 2.4)


def rgb(colour: str) -> tuple[int, ...]:
    """The three numbers of `rgb(1, 2, 3)`, which is how a browser says what it computed."""
    return tuple(int(number) for number in re.findall(r"\d+", colour)[:3])


def luminance(colour: Any) -> Any:
    """Relative luminance of 8-bit sRGB, 0 to 1."""
    return LINEAR[np.asarray(colour)] @ np.array((0.2126, 0.7152, 0.0722))


def contrast(first: Any, second: Any) -> Any:
    """The contrast ratio of two colours, 1 to 21."""
    one, other = luminance(first) + 0.05, luminance(second) + 0.05
    return np.maximum(one, other) / np.minimum(one, other)
