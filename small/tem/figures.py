"""Figure 4 of Whittington et al. 2022, and curves of capacity; each function returns a matplotlib figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llm.common.plots import INK, new_figure, style

from ..experiment.groups import grouped
from ..plots import colours, draw_curves
from .capacity import REACHED, Curve
from .runs import TemRun, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACIES = {"zero_shot": "zero-shot accuracy", "visited": "accuracy at visited cells"}
PLACES = 200  # at which curves over seconds are read off


def learning_curves(runs: Sequence[TemRun]) -> "Figure":
    """Figure 4: both accuracies, per gradient step and per second.

    Single seeds light, their mean dark, with its 95% interval; over seconds, curves are read off at as many places.
    """
    of = grouped(runs)
    with style():
        figure = new_figure(9.0, 6.0)
        panels = figure.subplots(2, 2, sharey=True, sharex="col")
        for row, (name, title) in zip(panels, ACCURACIES.items(), strict=True):
            for colour, group, label in zip(colours(len(of)), of, names(of), strict=True):
                by_step = [{step.step: getattr(step, name) for step in run.rows} for run in group]
                draw_curves(row[0], by_step, colour, label, interval=True)
                places = np.linspace(0, min(run.last.seconds for run in group), PLACES)
                curves = [
                    np.interp(places, [step.seconds for step in run.rows], [getattr(step, name) for step in run.rows])
                    for run in group
                ]
                by_second = [dict(zip(places, curve, strict=True)) for curve in curves]
                draw_curves(row[1], by_second, colour, label, interval=True)
            row[0].set(ylabel=title, ylim=(0, 1.02))
            for axes in row:
                axes.grid(True)
        panels[1, 0].set_xlabel("gradient steps")
        panels[1, 1].set_xlabel("seconds of training")
        panels[0, 1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def capacities(curves: Sequence[Curve]) -> "Figure":
    """Recall against the number of memories: a panel for each width, a curve for each rule."""
    widths = sorted({curve.width for curve in curves})
    rules = list(dict.fromkeys(curve.rule for curve in curves))
    with style():
        figure = new_figure(1.4 + 2.6 * len(widths), 3.2)
        panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
        for axes, width in zip(panels, widths, strict=True):
            for colour, rule in zip(colours(len(rules)), rules, strict=True):
                (curve,) = (one for one in curves if (one.rule, one.width) == (rule, width))
                dashed = "--" if rule == "exponential" else "-"  # lies on the softmax
                axes.plot(curve.memories, curve.recall, color=colour, linestyle=dashed, label=rule)
            axes.axhline(REACHED, color=INK, linestyle=":", linewidth=0.8, label=f"recall {REACHED:g}")
            axes.set(xscale="log", title=f"width {width}", xlabel="memories", ylim=(0, 1.02))
            ticks = [10**power for power in range(1 + int(np.log10(max(curve.memories))))]
            axes.set_xticks(ticks, [f"{tick:,d}" for tick in ticks])
            axes.grid(True)
        panels[0].set_ylabel("recall, share of memories")
        panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure
