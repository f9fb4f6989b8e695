"""Results for the eye: tables as text, figures as PNG for a paper and as SVG for a page.

A figure is drawn once and written in either form; `INK` is what follows the page's text colour in the second.
"""

import hashlib
import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Blue and vermillion of Okabe and Ito's palette: told apart under every common colour-blindness, and in grey.
COLOURS = ("#0072B2", "#D55E00")
MARKERS = ("o", "s")
INK = "#010203"  # nobody's choice of a colour: in an SVG it becomes `currentColor`
STYLE: Any = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: searched, scaled, read aloud
    "text.parse_math": False,  # a $ in a run's name is a $
    "svg.hashsalt": "hippoformer",  # the same figure is the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


class Curve(NamedTuple):
    """Values over tokens, of equal length."""

    tokens: list[float]
    values: list[float]


class Losses(NamedTuple):
    """The two losses of one side, in nats per token: a curve of each for every seed."""

    name: str
    training: Sequence[Curve]
    validation: Sequence[Curve]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width under a rule: the first is flush left, the numbers after it flush right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def new_figure(width: float = 4.6, height: float = 3.2) -> "Figure":
    """An empty figure of so many inches; without pyplot: no backend is chosen for the whole process, no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style() -> Any:
    """The look of every figure, as a context: it is taken up as axes and texts are made."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def as_png(figure: "Figure") -> bytes:
    """A figure for a paper: dark on white."""
    png = io.BytesIO()
    with style():
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    return png.getvalue()


def as_svg(figure: "Figure", label: str) -> str:
    """A figure for a page: one <svg> element with no ground of its own, in the page's text colour, told as `label`.

    Ids are made the figure's own by a hash of what it shows, so that several may stand on one page, of one label too.
    """
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    mark = "f" + hashlib.sha256(f"{label}\n{svg}".encode()).hexdigest()[:10]

    known: set[str] = set()

    def own(match: re.Match[str]) -> str:
        tag = match[0]
        if name := re.search(r' id="[^"]*"', tag):
            if name[0] in known:  # matplotlib calls images by what they show, and two colour bars show the same
                tag = tag.replace(name[0], "")
            known.add(name[0])
        return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{mark}-", tag)

    svg = re.sub(r"<[^>]*>", own, svg)  # in tags alone: what a text says stays as it is
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def draw_losses(sides: Sequence[Losses]) -> "Figure":
    """The losses of two sides over tokens: training thin, validation bold with a mark where it was measured.

    Left the whole run, right its second half on a scale of its own, where two close models can be told apart.
    """
    with style():
        figure = new_figure(10, 4.2)
        whole, half = figure.subplots(1, 2)
        _loss_axes(whole, sides, second_half=False)
        _loss_axes(half, sides, second_half=True)
    return figure


def draw_loss(sides: Sequence[Losses], second_half: bool) -> "Figure":
    """One panel of `draw_losses`."""
    with style():
        figure = new_figure()
        _loss_axes(figure.subplots(), sides, second_half)
    return figure


def _loss_axes(axes: Any, sides: Sequence[Losses], second_half: bool) -> None:
    last = max((max(c.tokens, default=0.0) for side in sides for c in (*side.training, *side.validation)), default=0.0)
    unit, word = token_unit(last)
    for side, colour, marker in zip(sides, COLOURS, MARKERS, strict=True):
        _draw_side(axes, side, unit, colour, marker)
    axes.set_xlabel(f"tokens seen{word}")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y")
    if second_half:
        axes.set(title="second half", ylim=_range_after(sides, last / 2))
        axes.set_xlim(0.495 * last / unit, 1.005 * last / unit)  # the marks at both ends are whole
    else:
        axes.set(title="whole run", xlim=(0, None))
        axes.legend()


def token_unit(tokens: float) -> tuple[float, str]:
    """A divisor that makes `tokens` readable, and how an axis names it."""
    for unit, word in ((1e9, " (billion)"), (1e6, " (million)"), (1e3, " (thousand)")):
        if tokens >= unit:
            return unit, word
    return 1.0, ""


def _draw_side(axes: Any, side: Losses, unit: float, colour: str, marker: str) -> None:
    """Both losses of every seed of one side; validation lies above the training of either."""
    training = {"linewidth": 0.8, "alpha": 0.4, "label": f"{side.name}, training"}
    validation = {"linewidth": 2.0, "marker": marker, "markersize": 4.5, "label": f"{side.name}, validation"}
    for curves, style_of in ((side.training, training), (side.validation, validation | {"zorder": 3})):
        for n, curve in enumerate(curves):
            label = style_of["label"] if n == 0 else "_"
            axes.plot([at / unit for at in curve.tokens], curve.values, color=colour, **(style_of | {"label": label}))


def _range_after(sides: Sequence[Losses], start: float) -> tuple[float, float] | None:
    """The values from `start` tokens on, with a margin: all of validation, and training without its outer twentieths,
    so that single noisy batches do not flatten what is to be told apart. None where nothing was measured there.
    """
    values: list[float] = []
    for side in sides:
        for training in side.training:
            if late := [value for at, value in zip(*training, strict=True) if at >= start]:
                values += np.quantile(late, (0.05, 0.95)).tolist()
        for validation in side.validation:
            values += [value for at, value in zip(*validation, strict=True) if at >= start]
    if not values:
        return None
    margin = 0.05 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin
