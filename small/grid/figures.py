"""The figures of Kim et al. 2023; each function returns a matplotlib figure."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from llm.common.plots import INK, new_figure, style

from ..plots import PALETTE, colours, draw_curves
from ..variants import Act
from .biophysics import Receptor
from .runs import MAPS, GridRun, grouped, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"working": "working-memory error", "reference": "reference-memory error", "first": "error at first visits"}


def over_trials(runs: Sequence[GridRun]) -> "Figure":
    """Figure 3a: both errors over trials on familiar and on novel maps; single seeds light, means dark.

    The dotted line is chance, 1 - 1 / letters.
    """
    groups = grouped(runs)
    drawn = list(zip(colours(len(groups)), groups, names(groups), strict=True))
    with style():
        figure = new_figure(9.6, 6.0)
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for row, name in zip(panels, ("reference", "working"), strict=True):
            for axes, maps in zip(row, MAPS, strict=True):
                for colour, group, label in drawn:
                    _draw_group(axes, group, maps, name, colour, label)
                chance = 1 - 1 / runs[0].settings.letters
                axes.axhline(chance, color=INK, linestyle=":", linewidth=0.8, label="chance")
                axes.set_ylim(0, 1.02)
                axes.set_title(f"{TITLES[name]}, {maps} maps", fontsize=10)
                axes.grid(True)
        for axes in panels[1]:
            axes.set_xlabel("trials")
        for axes in panels[:, 0]:
            axes.set_ylabel("error, share of predictions")
        panels[0, 1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def _draw_group(axes: Any, group: Sequence[GridRun], maps: str, name: str, colour: Any, label: str) -> None:
    draw_curves(
        axes, [{row.trial: getattr(row.errors[maps], name) for row in run.rows} for run in group], colour, label
    )


def against_alpha(runs: Sequence[GridRun], name: str = "reference") -> "Figure":
    """Figures 3b and S6: an error on familiar maps against NMDA's alpha; a curve for all else that is the same."""
    return _against(runs, "act", number_of, "α of NMDA", name)


def against_rate(runs: Sequence[GridRun]) -> "Figure":
    """Figure S8: the reference-memory error on familiar maps against Adam's learning rate."""
    return _against(runs, "lr", lambda run: run.settings.lr, "learning rate at the start")


def against_slope(runs: Sequence[GridRun]) -> "Figure":
    """Figure S10, above: the reference-memory error on familiar maps against LeakyReLU's slope."""
    return _against(runs, "act", number_of, "slope of LeakyReLU below 0")


def number_of(run: GridRun) -> float:
    """NMDA's alpha, LeakyReLU's slope; NaN for an activation without a number."""
    number = run.variant.activation.number
    return math.nan if number is None else number


def _against(
    runs: Sequence[GridRun], field: str, x: Callable[[GridRun], float], xlabel: str, error: str = "reference"
) -> "Figure":
    """An error on familiar maps at equally far values of a field: mean and deviation over seeds."""
    places = {value: place for place, value in enumerate(sorted({x(run) for run in runs}))}
    curves = grouped(runs, without=field)
    with style():
        figure = new_figure(4.6, 3.4)
        axes = figure.subplots()
        for colour, curve, name in zip(colours(len(curves)), curves, names(curves, field), strict=True):
            found: dict[float, list[float]] = {}
            for run in curve:
                found.setdefault(x(run), []).append(getattr(run.last.errors["familiar"], error))
            values = sorted(found)
            means, deviations = ([part(found[value]) for value in values] for part in (np.mean, np.std))
            at = [places[value] for value in values]
            axes.errorbar(at, means, deviations, color=colour, marker="o", capsize=3, label=name)
        axes.set_xticks(list(places.values()), [f"{value:g}" for value in places])
        axes.set(xlabel=xlabel, ylabel=TITLES[error])
        axes.set_title("familiar maps", fontsize=10)
        axes.legend(fontsize=8)
        axes.grid(True)
    return figure


def across_activations(runs: Sequence[GridRun]) -> "Figure":
    """Figure 3c: the reference-memory error on familiar maps of every group, mean and deviation over seeds."""
    groups = sorted(grouped(runs), key=lambda group: float(np.mean(_reference(group))))
    with style():
        figure = new_figure(4.8, 3.4)
        axes = figure.subplots()
        for place, group in enumerate(groups):
            values = _reference(group)
            axes.bar(place, np.mean(values), yerr=np.std(values), color=PALETTE[0], capsize=3)
        axes.set_xticks(range(len(groups)), names(groups), rotation=30, ha="right", fontsize=8)
        axes.set(ylabel=TITLES["reference"])
        axes.set_title("familiar maps", fontsize=10)
        axes.grid(True, axis="y")
    return figure


def _reference(group: Sequence[GridRun]) -> list[float]:
    return [run.last.errors["familiar"].reference for run in group]


def mann_whitney(runs: Sequence[GridRun]) -> "Figure":
    """Figure S7: p of the Mann-Whitney test of the reference-memory error, every group against every other.

    Two-sided, by permutation: of all orders where there are at most 10,000, so that three seeds against three cannot
    come below 0.1, else of so many drawn ones.
    """
    groups = grouped(runs)
    found = np.full((len(groups), len(groups)), np.nan)
    for row, one in enumerate(groups):
        for column, other in enumerate(groups):
            if row != column:
                permuted = stats.PermutationMethod(n_resamples=10_000, rng=np.random.default_rng(0))
                test = stats.mannwhitneyu(_reference(one), _reference(other), method=permuted)
                found[row, column] = test.pvalue
    labels = names(groups)
    with style():
        figure = new_figure(1.6 + 0.75 * len(groups), 1.2 + 0.65 * len(groups))
        axes = figure.subplots()
        image = axes.imshow(np.log10(found), cmap="viridis", vmin=-4, vmax=0)
        for (row, column), p in np.ndenumerate(found):
            if row != column:
                stars = "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.1 else ""
                axes.text(
                    column,
                    row,
                    f"{p:.2g}\n{stars}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if p < 0.01 else "black",
                )
        axes.set_xticks(range(len(groups)), labels, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(groups)), labels, fontsize=8)
        figure.colorbar(image, ax=axes, label="log10 p", shrink=0.8)
    return figure


def receptor(concentrations: Sequence[float] = (0.0, 0.1, 1.0, 10.0)) -> "Figure":
    """Figure 1a: open probability and current of the NMDA receptor against the voltage, at so many mM of magnesium."""
    voltage = np.linspace(-100, 60, 321)
    with style():
        figure = new_figure(8.0, 3.4)
        left, right = figure.subplots(1, 2)
        for colour, concentration in zip(PALETTE, concentrations, strict=False):
            made = Receptor(concentration)
            label = f"[Mg2+] = {concentration:g} mM, α = {made.alpha:.2g}"
            left.plot(voltage, made.open_probability(voltage), color=colour, label=label)
            right.plot(voltage, made.current(voltage), color=colour)
        left.set(xlabel="voltage, mV", ylabel="open probability (Eq. S7)", ylim=(0, 1.02))
        right.set(xlabel="voltage, mV", ylabel="current / conductance, mV (Eq. S9)")
        right.legend(*left.get_legend_handles_labels(), fontsize=7, loc="upper left")
        for axes in (left, right):
            axes.grid(True)
    return figure


def activations(acts: Sequence[str] = ("nmda:0", "nmda:1", "nmda:10", "gelu_sigmoid", "relu")) -> "Figure":
    """Figure S2: activations and their derivatives."""
    with style():
        figure = new_figure(8.0, 3.4)
        left, right = figure.subplots(1, 2)
        for colour, act in zip(PALETTE, map(Act.parse, acts), strict=False):
            x = torch.linspace(-6, 6, 601, requires_grad=True)
            y = act.module()(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
            left.plot(x.detach().numpy(), y.detach().numpy(), color=colour, label=act.title)
            right.plot(x.detach().numpy(), slope.numpy(), color=colour)
        left.set(xlabel="x", title="activation", ylim=(-3, 6))
        right.set(xlabel="x", title="derivative")
        left.legend(fontsize=7)
        for axes in (left, right):
            axes.grid(True)
    return figure
