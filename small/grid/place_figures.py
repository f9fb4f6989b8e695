"""Figure 4 of Kim et al. 2023 and those of its appendix that show neurons: S5, S9, S10, S13.

Each function returns a matplotlib figure of runs and what was measured of their neurons.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from llm.common.plots import new_figure, style

from ..plots import colours, draw_map, draw_squares
from ..rate_maps import autocorrelogram, grid_scores
from ..spaces import Graph
from .recording import Neurons
from .runs import GridRun, grouped, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Callable[[GridRun], Neurons]
LAYERS = {"ffn": "feed-forward neurons", "softmax": "softmax neurons"}
SHOWN = 16  # rate maps of a kind, four by four
EXACT_UP_TO = 7  # groups: 5,040 pairings


def rate_maps(run: GridRun, neurons: Neurons) -> "Figure":
    """Figures 4a, 4b: rate maps of one run from a high to a low score, feed-forward left and softmax right."""
    with style():
        figure = new_figure(9.0, 4.8)
        halves: Any = figure.subfigures(1, 2)
        for half, (kind, title) in zip(halves, LAYERS.items(), strict=True):
            scores = getattr(neurons, f"{kind}_scores").flatten().numpy()
            rates = getattr(neurons, f"{kind}_rates").flatten(0, 1).numpy()
            order = np.argsort(-scores)
            chosen = order[np.linspace(0, len(order) - 1, SHOWN).round().astype(int)]
            half.suptitle(f"{title}, {run.variant.activation.title}", fontsize=9)
            _draw_maps(half, rates[chosen], scores[chosen], run.space)
    return figure


def best_maps(runs: Sequence[GridRun], measure: Measure) -> "Figure":
    """Figure 4h: the feed-forward neurons with the greatest scores, of the first run of every group."""
    groups = grouped(runs)
    firsts = [group[0] for group in groups]
    with style():
        figure = new_figure(4.2 * len(firsts), 4.6)
        parts: Any = figure.subfigures(1, len(firsts), squeeze=False)
        for part, run, name in zip(parts[0], firsts, names(groups), strict=True):
            neurons = measure(run)
            scores = neurons.ffn_scores.flatten().numpy()
            best = np.argsort(-scores)[:SHOWN]
            part.suptitle(name, fontsize=9)
            _draw_maps(part, neurons.ffn_rates.flatten(0, 1).numpy()[best], scores[best], run.space)
    return figure


def _draw_maps(part: Any, rates: np.ndarray, scores: np.ndarray, graph: Graph) -> None:
    """Four by four maps, each with its score, from its least rate to its greatest."""
    for axes, rate, score in zip(part.subplots(4, 4).flat, rates, scores, strict=False):
        draw_map(axes, rate, graph)
        axes.set_title(f"{score:.2f}", fontsize=7, pad=2)


def scores_and_errors(runs: Sequence[GridRun], measure: Measure) -> "Figure":
    """Figures 4c to 4g, S5, S9, S10: distributions of the scores, and their mean against the reference-memory error.

    Above feed-forward neurons, below softmax neurons. A light point is a run, a dark one the mean of its group, and r
    and p are Spearman's of the groups: seeds of one group do not count as so many independent ones.
    """
    groups = grouped(runs)
    with style():
        figure = new_figure(9.0, 6.4)
        for row, (kind, title) in zip(figure.subplots(2, 2), LAYERS.items(), strict=True):
            means, errors = [], []
            for colour, group, name in zip(colours(len(groups)), groups, names(groups), strict=True):
                every = [getattr(measure(run), f"{kind}_scores").flatten().numpy() for run in group]
                own = [float(scores.mean()) for scores in every]
                wrong = [run.last.errors["familiar"].reference for run in group]
                row[0].hist(
                    np.concatenate(every), bins=np.linspace(0, 1, 51), density=True, histtype="step", color=colour,
                    label=name,
                )  # fmt: skip
                row[1].scatter(own, wrong, color=colour, s=18, alpha=0.4)
                row[1].scatter(np.mean(own), np.mean(wrong), color=colour, s=32)
                means.append(float(np.mean(own)))
                errors.append(float(np.mean(wrong)))
            row[0].set(title=title, xlabel="place-cell score", ylabel="density")
            row[1].set(xlabel="mean place-cell score", ylabel="reference-memory error", title=spearman(means, errors))
            for axes in row:
                axes.grid(True)
        figure.axes[0].legend(fontsize=7)
    return figure


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
    return f"Spearman's r = {found.statistic:.2f}, p = {p:.2g}, n = {len(left)}"


def position_codes(run: GridRun, neurons: Neurons) -> "Figure":
    """Rate maps and autocorrelograms of the recurrent code, those components with the greatest grid scores.

    Of a square space alone.
    """
    maps = neurons.codes.view(-1, *run.space.shape)  # type: ignore[misc]  # the gallery asks for a shape
    scores = grid_scores(maps.double())
    best = scores.nan_to_num(-torch.inf).argsort(descending=True)[: SHOWN // 2]
    with style():
        figure = new_figure(1.2 * len(best), 2.8)
        draw_squares(figure, maps[best], autocorrelogram(maps[best]), scores[best].tolist())
        figure.suptitle(f"recurrent code, {run.variant.activation.title}: grid score", fontsize=9)
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
