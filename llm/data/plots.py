"""Lengths of documents for the eye: a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from .store_figures import Figures, length_edges

# Blue and vermillion of Okabe and Ito's palette, as in `llm.common.plots`.
DOCUMENTS, TOKENS = "#0072B2", "#D55E00"
BINS_A_DOUBLING = 4


def draw_lengths(every: Sequence[Figures]) -> bytes:
    """A panel for each of these splits: how documents, and the tokens in them, are spread over document lengths.

    Bins are a quarter of a doubling wide. Where there is no whole number to cut at, as between 1 and 2, they are wider,
    and lower by as much: areas are shares.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no backend is chosen for the whole process, no display is needed

    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * len(every), 4.2), layout="constrained")
        panels = figure.subplots(1, len(every), sharex=True, sharey=True, squeeze=False)[0]
        for axes, figures in zip(panels, every, strict=True):
            _draw_split(axes, figures)
        panels[0].set_ylabel("share for a quarter of a doubling (%)")
        panels[0].set_ylim(bottom=0)
        panels[0].legend(frameon=False, loc="upper left")
        png = io.BytesIO()
        figure.savefig(png, dpi=150)
    return png.getvalue()


def _draw_split(axes: Any, figures: Figures) -> None:
    edges = length_edges(figures, BINS_A_DOUBLING)
    widths = BINS_A_DOUBLING * np.diff(np.log2(edges))
    for shares, colour, name in zip(
        figures.shares(edges), (DOCUMENTS, TOKENS), ("documents", "tokens in them"), strict=True
    ):
        heights = 100 * shares / widths
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.15)
        axes.stairs(heights, edges, color=colour, linewidth=1.6, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda length, _: f"{length:,.0f}")
    axes.tick_params("x", rotation=45)
    axes.set_xlabel(f"tokens in a document (median {figures.percentile(50):,}, 95 % up to {figures.percentile(95):,})")
    axes.set_title(f"{figures.store.split}: {figures.store.documents:,} documents, {figures.store.tokens:,} tokens")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
