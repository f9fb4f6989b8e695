"""Curves of runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm.common.plots import new_figure, style

from ..experiment.groups import grouped
from ..plots import colours, draw_curves
from .datasets import DATASETS
from .runs import VisionRun, by_data_set, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def over_epochs(runs: Sequence[VisionRun]) -> "Figure":
    """Training loss and test accuracy over epochs, a row for each data set; single seeds light, means dark."""
    data_sets = by_data_set(runs)
    with style():
        figure = new_figure(9.0, 3.4 * len(data_sets))
        panels = figure.subplots(len(data_sets), 2, squeeze=False)
        for (left, right), (name, own) in zip(panels, data_sets.items(), strict=True):
            of = grouped(own)
            for colour, group, label in zip(colours(len(of)), of, names(of), strict=True):
                draw_curves(left, [{row.epoch: row.loss for row in run.rows} for run in group], colour, label)
                accuracies = [{row.epoch: 100 * row.accuracy for row in run.rows} for run in group]
                draw_curves(right, accuracies, colour, label)
            title = DATASETS[name].title
            left.set(xlabel="epoch", ylabel="nats per image", title=f"{title}: training loss")
            right.set(xlabel="epoch", ylabel="% of test images", title=f"{title}: top-1 test accuracy")
            right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
            for axes in (left, right):
                axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
                axes.grid(True)
    return figure
