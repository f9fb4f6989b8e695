"""Figures 1, 2b and 5 of Whittington et al. 2022, and the scores compared with their shuffles; and the table of these.

Each figure is of runs and what was measured of their units.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from llm.common.plots import INK, new_figure, style
from llm.common.tables import text_table

from ..experiment.groups import grouped, mean_and_deviation
from ..plots import colours, draw_map, draw_squares
from ..rate_maps import autocorrelogram
from ..spaces import Graph
from .recording import Units, mean_known, remapping
from .runs import TemRun, largest_space, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Callable[[TemRun], Units]
SHOWN = 8  # maps in a row
SCORES = {"grid": "grid score", "band": "band score"}
HIPPOCAMPAL = {"tem-t": "memory neurons", "tem": "conjunctions"}
WORDS = """\
by place: share of the codes' variance that the cell explains. best: greatest score. pass: share of units whose score at
most 4 of 100 shuffles reach (by chance 0.05). grids, bands: those of them with a band score up to 1/2, and above it.
within, across: correlation of a hippocampal unit's maps in one environment, and in two. pairs: how far units that are
alike in one environment are alike in another; and so for codes."""


def unit_table(runs: Sequence[TemRun], measure: Measure, untrained: Measure) -> str:
    """Return scores and remapping of every group, mean and deviation over seeds, trained and with initial weights."""
    groups = grouped(runs)
    rows = []
    for group, name in zip(groups, names(groups), strict=True):
        for title, of in ((name, measure), (f"{name}, untrained", untrained)):
            each = [_row(of(run)) for run in group]
            means = (mean_and_deviation([row[column] for row in each], 2) for column in each[0])
            rows.append([title, str(len(group)), *means])
    return f"{text_table(['', 'seeds', *_row(measure(runs[0]))], rows)}\n\n{WORDS}"


def _row(units: Units) -> dict[str, float]:
    """The columns of one run."""
    cells, codes = remapping(units.hippocampal), remapping(units.entorhinal)
    return {
        "by place": units.by_place.item(),
        "grid, best": _greatest(units.grid),
        "band, best": _greatest(units.band),
        "grid, pass": units.share("grid"),
        "band, pass": units.share("band"),
        "grids": units.share("grids"),
        "bands": units.share("bands"),
        "within": float(mean_known(cells.within)),
        "across": float(mean_known(cells.across)),
        "pairs": cells.pairs,
        "pairs, codes": codes.pairs,
    }


def _greatest(scores: Tensor) -> float:
    """NaN of none."""
    known = scores[scores.isfinite()]
    return known.max().item() if len(known) else float("nan")


def codes_in_a_room(units: Units, room: Graph) -> "Figure":
    """Figures 1d to 1f and 2b: the codes with the greatest grid scores and the greatest band scores.

    Below each rate map its autocorrelogram. In a room that is not square, the first codes.
    """
    with style():
        if room.shape is None:
            figure = new_figure(1.1 * SHOWN, 1.8)
            figure.suptitle(f"codes in the room {_room(room)}, by number", fontsize=9)
            for axes, rates in zip(figure.subplots(1, SHOWN, squeeze=False)[0], units.codes, strict=False):
                draw_map(axes, rates.numpy(), room)
            return figure
        figure = new_figure(1.1 * SHOWN, 5.6)
        parts: Any = figure.subfigures(2, 1)
        for part, (kind, title) in zip(parts, SCORES.items(), strict=True):
            scores = getattr(units, kind)
            best = scores.nan_to_num(-np.inf).argsort(descending=True)[:SHOWN]
            maps = units.codes[best].unflatten(1, room.shape)
            draw_squares(part, maps, autocorrelogram(maps), scores[best].tolist())
            part.suptitle(
                f"codes with the greatest {title}s ({units.share(kind):.0%} pass), room {_room(room)}", fontsize=9
            )
    return figure


def _room(room: Graph) -> str:
    return "x".join(map(str, room.shape)) if room.shape else room.name


def in_environments(run: TemRun, units: Units) -> "Figure":
    """Figures 5d, 5e and the lower row of 2b: units of the hippocampus, each a column, in several environments.

    On the right how much a unit's maps are alike in one environment (in two halves of what was walked) and in two.
    """
    rates = units.hippocampal
    room = largest_space(run.settings)
    shown = np.linspace(0, rates.shape[2] - 1, min(SHOWN, rates.shape[2])).round().astype(int)
    found, codes = remapping(rates), remapping(units.entorhinal)
    with style():
        figure = new_figure(1.0 * SHOWN + 3.4, 1.05 * len(rates) + 0.5)
        parts: Any = figure.subfigures(1, 2, width_ratios=(1.0 * SHOWN, 3.4))
        left, right = parts
        for environment, row in enumerate(left.subplots(len(rates), len(shown), squeeze=False)):
            for axes, unit in zip(row, shown, strict=True):
                draw_map(axes, rates[environment, :, unit].nanmean(0).numpy(), room)
                if not environment:
                    axes.set_title(str(unit), fontsize=7, pad=2)
            row[0].set_ylabel(f"env. {environment}", fontsize=7)
        left.suptitle(f"{HIPPOCAMPAL[run.model.name]}, by number", fontsize=9)
        axes = right.subplots()
        bins = np.linspace(-1, 1, 41)
        for colour, (label, values) in zip(
            colours(2), {"one environment": found.within, "two environments": found.across}.items(), strict=True
        ):
            axes.hist(values[np.isfinite(values)], bins=bins, histtype="step", color=colour, label=label)
        kept = f"kept pairs: {found.pairs:.2f}; of codes: {codes.pairs:.2f}".replace("-", "−")
        axes.set(xlabel=f"correlation of a unit's maps\n{kept}", ylabel="units")
        axes.set_title("alike in one and in two environments?", fontsize=9)
        axes.legend(fontsize=7)
        axes.grid(True)
    return figure


def scores_and_shuffles(runs: Sequence[TemRun], measure: Measure) -> "Figure":
    """Grid and band scores of all units of a group, and, dashed, of all their shuffles."""
    groups = grouped(runs)
    with style():
        figure = new_figure(8.0, 3.4)
        for axes, (kind, title) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
            bins = np.linspace(*((-1.0, 1.5) if kind == "grid" else (0.0, 1.0)), 51)
            for colour, group, name in zip(colours(len(groups)), groups, names(groups), strict=True):
                units = [measure(run) for run in group]
                for suffix, line, label in (("", "-", name), ("_shuffled", "--", None)):
                    values = np.concatenate([getattr(each, kind + suffix).flatten().numpy() for each in units])
                    values = values[np.isfinite(values)]
                    axes.hist(
                        values, bins=bins, density=True, histtype="step", color=colour, linestyle=line, label=label
                    )
            axes.set(xlabel=title, ylabel="density")
            axes.grid(True)
            axes.plot([], [], "--", color=INK, label="their shuffles")
            axes.set_title(f"{title}s of all codes", fontsize=10)
        figure.axes[1].legend(fontsize=7)
    return figure
