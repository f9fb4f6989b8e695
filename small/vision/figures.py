"""Curves of runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evals.plots import new_figure, style

from ..groups import grouped
from ..plots import colours, draw_curves
from .runs import Done, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def over_epochs(runs: Sequence[Done]) -> "Figure":
    """Training loss and test accuracy over epochs; single seeds light, means dark."""
    of = grouped(runs)
    with style():
        figure = new_figure(8.0, 3.4)
        left, right = figure.subplots(1, 2, sharex=True)
        for colour, group, label in zip(colours(len(of)), of, names(of), strict=True):
            draw_curves(left, [{row.epoch: row.loss for row in run.rows} for run in group], colour, label)
            draw_curves(right, [{row.epoch: 100 * row.accuracy for row in run.rows} for run in group], colour, label)
        left.set(xlabel="epochs", title="training loss, nats (smoothed labels)")
        right.set(xlabel="epochs", title="top-1 test accuracy, %")
        right.legend(fontsize=8)
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(True)
    return figure
