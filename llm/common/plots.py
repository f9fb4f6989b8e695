"""Figures with one look: as PNG or PDF for a paper, as SVG for a page.

A figure is drawn once and written in any form; `INK` is what follows the page's text colour in the second.
"""

import hashlib
import html
import io
import re
from typing import TYPE_CHECKING, Any

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


def as_pdf(figure: "Figure") -> bytes:
    """A figure for a paper, as vectors: dark on white, the same bytes each time."""
    pdf = io.BytesIO()
    with style():
        figure.savefig(pdf, format="pdf", facecolor="white", metadata={"CreationDate": None, "Producer": None})
    return pdf.getvalue()


def in_every_form(figure: "Figure", name: str, caption: str) -> dict[str, bytes | str]:
    """A figure as NAME.png, NAME.svg and NAME.pdf: file name -> content. It is laid out once, for the first."""
    png = as_png(figure)
    figure.set_layout_engine("none")  # laying out hundreds of panels takes longer than drawing them
    return {
        f"{name}.png": png,
        f"{name}.svg": as_svg(figure, caption),
        f"{name}.pdf": as_pdf(figure),
    }


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
