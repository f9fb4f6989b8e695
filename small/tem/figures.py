"""Figure 4 of tem-transformer.txt; returns a matplotlib figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evals.plots import new_figure, style

from ..groups import grouped
from ..plots import colours, draw_curves
from .runs import Done, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curves(runs: Sequence[Done]) -> "Figure":
    """Figure 4: accuracy over zero-shot links (solid) and at cells seen before, per gradient step and per second.

    Single seeds light, their mean dark; over seconds, the mean of curves read off at as many places.
    """
    of = grouped(runs)
    with style():
        figure = new_figure(9.0, 3.6)
        left, right = figure.subplots(1, 2, sharey=True)
        for colour, group, label in zip(colours(len(of)), of, names(of), strict=True):
            draw_curves(left, [{row.step: row.zero_shot for row in run.rows} for run in group], colour, label)
            shortest = min(run.last.seconds for run in group)
            places = np.linspace(0, shortest, 200)
            curves = [
                np.interp(places, [row.seconds for row in run.rows], [row.zero_shot for row in run.rows])
                for run in group
            ]
            draw_curves(right, [dict(zip(places, curve, strict=True)) for curve in curves], colour, label)
        left.set(xlabel="gradient steps", ylabel="zero-shot accuracy", ylim=(0, 1.02))
        right.set(xlabel="seconds of training")
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
        for axes in (left, right):
            axes.grid(True)
    return figure
