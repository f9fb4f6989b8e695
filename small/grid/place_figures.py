"""Figures that show neurons: 4, S5, S9, S10 and S13 of Kim et al. 2023, Figure 5 of Kim et al. 2022.

Each function returns a matplotlib figure of runs and what was measured of their neurons.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from llm.common.plots import INK, new_figure, style

from ..plots import colours, draw_map, draw_squares
from ..rate_maps import autocorrelogram
from ..spaces import Graph
from .recording import Neurons
from .runs import GridRun, grouped, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Callable[[GridRun], Neurons]
LAYERS = {"ffn": "feed-forward neurons", "softmax": "softmax neurons"}
SHOWN = 16  # rate maps of a kind, four by four
AT_MOST = 3  # groups next to each other
EXACT_UP_TO = 7  # groups: 5,040 pairings


def rate_maps(run: GridRun, neurons: Neurons) -> "Figure":
    """Figures 4a, 4b: rate maps of one run from a high to a low score, feed-forward left and softmax right."""
    with style():
        figure = new_figure(9.8, 4.8)
        halves: Any = figure.subfigures(1, 2)
        for half, (kind, title) in zip(halves, LAYERS.items(), strict=True):
            order = _by_score(neurons, kind)
            chosen = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)]
            half.suptitle(f"{title}, {run.variant.activation.title}", fontsize=9)
            _draw_maps(half, neurons, kind, chosen, run.space, 4)
    return figure


def best_maps(runs: Sequence[GridRun], measure: Measure, side: int = 4) -> "Figure":
    """The feed-forward neurons with the greatest scores, of the first run of every group, side by side.

    Figure 4h, and with a side of 8 Figure 5 of Kim et al. 2022.
    """
    groups = grouped(runs)
    firsts = [group[0] for group in groups]
    width = 1.15 * side if side <= 4 else 0.85 * side
    with style():
        rows, columns = -(-len(firsts) // AT_MOST), min(len(firsts), AT_MOST)
        figure = new_figure(width * columns, width * rows)
        parts: Any = figure.subfigures(rows, columns, squeeze=False)
        for part, run, name in zip(parts.flat, firsts, names(groups), strict=False):
            neurons = measure(run)
            part.suptitle(name, fontsize=9)
            _draw_maps(part, neurons, "ffn", _by_score(neurons, "ffn")[: side * side], run.space, side)
    return figure


def _by_score(neurons: Neurons, kind: str) -> np.ndarray:
    """Numbers of the neurons that have a score, over all layers, from the greatest on."""
    scores = getattr(neurons, f"{kind}_scores").flatten().numpy()
    return np.argsort(-np.nan_to_num(scores, nan=-1), kind="stable")[: np.isfinite(scores).sum()]


def _draw_maps(part: Any, neurons: Neurons, kind: str, chosen: np.ndarray, graph: Graph, rows: int) -> None:
    """Maps as they were scored, each in shares of its greatest rate; above it its score and, per visit, its peak.

    In up to so many rows and columns.
    """
    scores, peaks = (getattr(neurons, f"{kind}_{name}").flatten().numpy() for name in ("scores", "peaks"))
    rates = getattr(neurons, f"{kind}_rates").flatten(0, 1).numpy()
    rows = max(1, min(rows, math.ceil(len(chosen) ** 0.5)))
    panels, patches = part.subplots(rows, rows, squeeze=False), None
    for axes, neuron in zip(panels.flat, chosen, strict=False):
        patches = draw_map(axes, rates[neuron] / rates[neuron].max(), graph, top=1.0)
        axes.set_title(f"{scores[neuron]:.2f} ({peaks[neuron]:.2g})", fontsize=6, pad=2)
    for axes in panels.flat[len(chosen) :]:
        axes.set_axis_off()
    if patches is not None:
        bar = part.colorbar(patches, ax=panels, shrink=0.6, ticks=(0, 1))
        bar.set_label("rate / greatest rate; above: score (peak per visit)", fontsize=7)


def scores_and_errors(runs: Sequence[GridRun], measure: Measure) -> "Figure":
    """Figures 4c to 4g, S5, S9, S10: distributions of the scores, and their mean against the reference-memory error.

    Above feed-forward neurons, below softmax neurons, without silent ones; dashed, their shuffles. A light point is a
    run, a dark one the mean of its group, and r and p are Spearman's of the groups: seeds of one group do not count as
    so many independent ones.
    """
    groups = grouped(runs)
    bins = np.linspace(0, 1, 51)
    with style():
        figure = new_figure(9.0, 6.4)
        for row, (kind, title) in zip(figure.subplots(2, 2), LAYERS.items(), strict=True):
            means, errors = [], []
            for colour, group, name in zip(colours(len(groups)), groups, names(groups), strict=True):
                for suffix, line, label in (("scores", "-", name), ("shuffled", "--", None)):
                    every = [_known(getattr(measure(run), f"{kind}_{suffix}")) for run in group]
                    row[0].hist(
                        np.concatenate(every), bins=bins, density=True, histtype="step", color=colour, linestyle=line,
                        label=label,
                    )  # fmt: skip
                own = [mean_score(measure(run), kind) for run in group]
                wrong = [run.last.errors["familiar"].reference for run in group]
                row[1].scatter(own, wrong, color=colour, s=18, alpha=0.4)
                row[1].scatter(np.mean(own), np.mean(wrong), color=colour, s=32)
                means.append(float(np.mean(own)))
                errors.append(float(np.mean(wrong)))
            row[0].plot([], [], "--", color=INK, label="their shuffles")
            row[0].set(xlabel="place-cell score", ylabel="density")
            row[1].set(xlabel=f"mean place-cell score\n{spearman(means, errors)}", ylabel="reference-memory error")
            row[0].set_title(f"{title}: scores", fontsize=10)
            row[1].set_title(f"{title}: mean score and error", fontsize=10)
            for axes in row:
                axes.grid(True)
        handles = figure.axes[0].get_legend_handles_labels()
        figure.axes[1].legend(*handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def _known(scores: torch.Tensor) -> np.ndarray:
    values = scores.flatten().numpy()
    return values[np.isfinite(values)]


def mean_score(neurons: Neurons, kind: str, suffix: str = "scores") -> float:
    """Mean of what neurons that are not silent have; NaN of none."""
    known = _known(getattr(neurons, f"{kind}_{suffix}"))
    return float(known.mean()) if len(known) else math.nan


def spearman(left: Sequence[float], right: Sequence[float]) -> str:
    """Spearman's r and p in words; nothing can be said of fewer than three, of equal values, or where one is missing.

    Of few p is exact, of all pairings; of more it is Student's t's, but never less than two pairings of all.
    """
    if len(left) < 3 or not np.isfinite([*left, *right]).all() or not np.ptp(left) or not np.ptp(right):
        return "too few groups for a correlation"
    found = stats.spearmanr(left, right)
    p = max(float(found.pvalue), 2 / math.factorial(len(left)))
    if len(left) <= EXACT_UP_TO:
        ranks, other = stats.rankdata(left), stats.rankdata(right)
        p = stats.permutation_test(
            (ranks,), lambda x: stats.pearsonr(x, other).statistic, permutation_type="pairings", n_resamples=np.inf
        ).pvalue
    statistic = f"{found.statistic:.2f}".replace("-", "−")
    return f"Spearman's r = {statistic}, p = {p:.2g}, n = {len(left)} groups"


def position_codes(run: GridRun, neurons: Neurons) -> "Figure":
    """Rate maps and autocorrelograms of the recurrent code, those components with the greatest grid scores.

    Of a square space alone.
    """
    maps = neurons.codes.view(-1, *run.space.shape)  # type: ignore[misc]  # the gallery asks for a shape
    best = neurons.code_grid.nan_to_num(-torch.inf).argsort(descending=True)[: SHOWN // 2]
    chance = neurons.code_grid_shuffled.nan_to_num(-torch.inf).amax(1).median()
    with style():
        figure = new_figure(1.2 * len(best), 2.8)
        draw_squares(figure, maps[best], autocorrelogram(maps[best]), neurons.code_grid[best].tolist())
        title = f"recurrent code, {run.variant.activation.title}: grid score (best of a shuffle: {chance:.2f})"
        figure.suptitle(title, fontsize=9)
    return figure


def sparsity(runs: Sequence[GridRun], measure: Measure) -> "Figure":
    """Figure S13: Gini index of each group, the mean over layers, moments and seeds.

    Of the size of the activity: signed activities have means near zero, by which Eq. S13 divides.
    """
    groups = grouped(runs)
    with style():
        figure = new_figure(4.8, 3.4)
        axes = figure.subplots()
        for place, (colour, group) in enumerate(zip(colours(len(groups)), groups, strict=True)):
            values = [float(measure(run).gini.mean()) for run in group]
            axes.bar(place, np.mean(values), yerr=np.std(values), color=colour, capsize=3)
        axes.set_xticks(range(len(groups)), names(groups), rotation=30, ha="right", fontsize=8)
        axes.set(ylabel="Gini index of |activity| (Eq. S13)")
        axes.grid(True, axis="y")
    return figure
