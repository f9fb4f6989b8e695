"""The picture of BENCHMARKS.md: our throughput relative to the fastest transformers contender, per config."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llm.common.plots import COLOURS, INK, as_png, new_figure, style

from .pages import HERE, SUMMARY, load, places
from .tables import PRECISIONS, to_fastest

PICTURE = HERE / "ratios.png"
SOURCE = "Description"  # the text chunk of the PNG that holds the drawn ratios, for --check
BAR = 0.38  # height; two bars per config


class Ratio(NamedTuple):
    """A bar: a config in one precision."""

    label: str
    precision: str
    median: float
    low: float
    high: float


def ratios() -> list[Ratio]:
    """Return the ratios of the table in BENCHMARKS.md, in its order."""
    found = []
    for place in places(SUMMARY):
        if place.kind == "row":
            result = load(place.name)
            ratio = to_fastest(result)
            low, high = ratio["interval"] or (ratio["median"], ratio["median"])  # none of a single round
            found.append(Ratio(place.words[0], PRECISIONS[result["precision"]], ratio["median"], low, high))
    return found


def draw(bars: list[Ratio]) -> bytes:
    """Draw the ratios as a PNG that carries them as text."""
    labels = list(dict.fromkeys(bar.label for bar in bars))
    with style():
        figure = new_figure(7, 0.3 + 0.5 * len(labels))
        axes = figure.subplots()
        for shift, colour, precision in zip((-BAR / 2, BAR / 2), COLOURS, PRECISIONS.values(), strict=True):
            shown = [bar for bar in bars if bar.precision == precision]
            heights = [labels.index(bar.label) + shift for bar in shown]
            errors = [[bar.median - bar.low for bar in shown], [bar.high - bar.median for bar in shown]]
            axes.barh(heights, [bar.median for bar in shown], BAR, color=colour, label=precision)
            axes.errorbar([bar.median for bar in shown], heights, xerr=errors, fmt="none", ecolor=INK, capsize=3)
            for bar, height in zip(shown, heights, strict=True):
                axes.text(bar.high + 0.03, height, f"{bar.median:.2f}", va="center")
        axes.axvline(1, color=INK, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("tokens/s / fastest transformers contender, with 95% interval")
        axes.legend(loc="lower right")
    return _with_text(as_png(figure), json.dumps(bars))


def drawn_from(path: Path) -> list[Ratio]:
    """Return the ratios that a picture carries; none if there is no picture."""
    if not path.is_file():
        return []
    return [Ratio(*bar) for bar in json.loads(Image.open(path).info.get(SOURCE, "[]"))]


def _with_text(png: bytes, text: str) -> bytes:
    info, out = PngInfo(), io.BytesIO()
    info.add_text(SOURCE, text)
    image = Image.open(io.BytesIO(png))
    image.save(out, "PNG", pnginfo=info, dpi=image.info["dpi"], optimize=True)
    return out.getvalue()
