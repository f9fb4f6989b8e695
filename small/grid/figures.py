"""The figures of nmda-transformer.txt; each function returns a matplotlib figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.plots import new_figure, style

from ..plots import PALETTE
from .runs import Done, grouped
from .train import MAPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"working": "working-memory error", "reference": "reference-memory error", "first": "error at first visits"}


def over_trials(runs: Sequence[Done]) -> "Figure":
    """Figure 3a: both errors over trials on familiar and on novel maps; single seeds light, means dark.

    The dotted line is chance, 1 - 1 / letters.
    """
    groups = grouped(runs)
    with style():
        figure = new_figure(8.0, 6.0)
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for row, name in zip(panels, ("reference", "working"), strict=True):
            for axes, maps in zip(row, MAPS, strict=True):
                for colour, group in zip(colours(groups), groups, strict=True):
                    _draw_group(axes, group, maps, name, colour)
                chance = 1 - 1 / runs[0].settings.letters
                axes.axhline(chance, color="black", linestyle=":", linewidth=0.8)
                axes.set(title=f"{TITLES[name]}, {maps} maps", ylim=(0, 1.02))
                axes.grid(True)
        for axes in panels[1]:
            axes.set_xlabel("trials")
        panels[0, 1].legend(fontsize=8)
    return figure


def _draw_group(axes: Any, group: Sequence[Done], maps: str, name: str, colour: Any) -> None:
    curves = [{row.trial: getattr(row.errors[maps], name) for row in run.rows} for run in group]
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.3, linewidth=0.8)
    trials = sorted(set.intersection(*(set(curve) for curve in curves)))
    mean = np.mean([[curve[trial] for trial in trials] for curve in curves], axis=0)
    axes.plot(trials, mean, color=colour, linewidth=1.8, label=label_of(group[0]))


def label_of(run: Done) -> str:
    """A run's group in a legend."""
    name, _, number = run.variant.act.partition(":")
    word = {"nmda": "NMDA α = ", "leaky_relu": "LeakyReLU "}.get(name, name) + number
    return f"{word}, N = {run.settings.maps}"


def colours(groups: Sequence[Sequence[Done]]) -> list[Any]:
    """One for each group: the palette, or, where that has too few, a map from dark to light."""
    if len(groups) <= len(PALETTE):
        return list(PALETTE[: len(groups)])
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0, 0.9, len(groups))]


def against_alpha(runs: Sequence[Done], name: str = "reference") -> "Figure":
    """Figures 3b and S6: an error on familiar maps against NMDA's alpha, a curve for each number of maps."""
    nmda = [run for run in runs if run.variant.act.startswith("nmda:")]
    with style():
        figure = new_figure(4.6, 3.4)
        axes = figure.subplots()
        for colour, maps in zip(PALETTE, sorted({run.settings.maps for run in nmda}), strict=False):
            by_alpha: dict[float, list[float]] = {}
            for run in nmda:
                if run.settings.maps == maps:
                    alpha = float(run.variant.act.partition(":")[2])
                    by_alpha.setdefault(alpha, []).append(getattr(run.last.errors["familiar"], name))
            alphas = sorted(by_alpha)
            means = [np.mean(by_alpha[alpha]) for alpha in alphas]
            deviations = [np.std(by_alpha[alpha]) for alpha in alphas]
            axes.errorbar(
                range(len(alphas)), means, deviations, color=colour, marker="o", capsize=3, label=f"N = {maps}"
            )
            axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set(xlabel="α of NMDA", ylabel=f"{TITLES[name]}, familiar maps")
        axes.legend(fontsize=8)
        axes.grid(True)
    return figure
