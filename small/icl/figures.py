"""The figures of Burns et al. 2025 that belong to Sections 2 and 3: 3, 6, 7, 8; and the phase plot.

Each function returns a matplotlib figure.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm.common.plots import INK, new_figure, style

from ..plots import PALETTE
from .amicl import SEPARATIONS, SHOWN, SIMILARITIES, attention
from .amicl_trials import CONVENTIONS, paper_task
from .runs import UNSHIFTED, Snapshot
from .task import TITLES, World

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE_BUT_DARKER = {"dot": "-", "pearson": "--"}
LABELS = {"dot": "dot product", "pearson": "Pearson's correlation", "manhattan": "Manhattan", "euclidean": "Euclidean"}

# Of the losses of one variant: colour, line, label. No colour is one of the first four variants'.
LOSSES = {
    "test": (PALETTE[7], "-", TITLES["test"]),
    "iw": (PALETTE[4], "-", TITLES["iw"]),
    "ic": (PALETTE[5], "-", TITLES["ic"]),
    "ic2": (PALETTE[6], "-", "IC2, shifted label"),
    UNSHIFTED: (PALETTE[6], "--", "IC2, label that was learned"),
}


# ---- Training: Figure 3 ----------------------------------------------------------------------------------------------


def training(snapshots: Sequence[Snapshot]) -> "Figure":
    """Figure 3: accuracy on Test, IW, IC and IC2, Test loss of all variants, all losses of one of them.

    Single runs are light, means over seeds dark; a mean ends where the first of its runs ends. The one is values, or
    else the last variant; its losses have colours of their own. The loss on IC2 is there against the shifted label,
    which is right, and against the label that was learned, as in the paper's code.
    """
    names = list(dict.fromkeys(row.variant for row in snapshots))
    chosen = "values" if "values" in names else names[-1]
    with style():
        figure = new_figure(9.6, 6.0)
        panels = figure.subplots(2, 3, sharex=True)
        for axes, kind in zip(panels.flat, ("test", "iw", "ic", "ic2"), strict=False):
            for colour, name in zip(_colours(names), names, strict=True):
                _draw_runs(axes, [row for row in snapshots if row.variant == name], "accuracy", kind, colour, name)
            axes.set(title=f"{TITLES[kind]} accuracy", ylabel="share of right answers", ylim=(0, 1.02))
        axes = panels[1, 1]
        for colour, name in zip(_colours(names), names, strict=True):
            _draw_runs(axes, [row for row in snapshots if row.variant == name], "loss", "test", colour, name)
        axes.set(title="Test loss", ylabel="nats", ylim=(0, None))
        axes = panels[1, 2]
        own = [row for row in snapshots if row.variant == chosen]
        drawn = [kind for kind in LOSSES if all(kind in row.loss for row in own)]  # older trainings lack one
        for kind in drawn:
            colour, line, label = LOSSES[kind]
            _draw_runs(axes, own, "loss", kind, colour, label, line)
        finite = [row.loss[kind] for row in own for kind in drawn if np.isfinite(row.loss[kind])]
        axes.set(title=f"losses of {chosen}", ylabel="nats")
        axes.set_ylim(0, min(4 * np.log(32), 1.05 * max(finite, default=1.0)))
        axes.legend(fontsize=7)
        panels[0, 0].legend(fontsize=8)
        for axes in panels[1]:
            axes.set_xlabel("thousand steps")
        for axes in panels.flat:
            axes.grid(True)
        figure.supxlabel("Light: single seeds. Dark: their mean, up to where the first of them ended.", fontsize=8)
    return figure


def _draw_runs(
    axes: Any, rows: Sequence[Snapshot], what: str, kind: str, colour: str, label: str, line: str = "-"
) -> None:
    by_seed: dict[int, dict[float, float]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, {})[row.step / 1000] = getattr(row, what)[kind]
    for run in by_seed.values():
        axes.plot(list(run), list(run.values()), line, color=colour, alpha=0.3, linewidth=0.8)
    steps = sorted(set.intersection(*(set(run) for run in by_seed.values())))
    mean = np.mean([[run[step] for step in steps] for run in by_seed.values()], axis=0)
    axes.plot(steps, mean, line, color=colour, linewidth=1.8, label=label)


def _colours(names: Sequence[str]) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(len(names))]


# ---- AMICL: Figures 6, 7, 8 ------------------------------------------------------------------------------------------


def matrices(seed: int = 0) -> "Figure":
    """Figure 6: attention matrices of one trial of 20 tokens at a = 2, each similarity with each separation.

    A row is a query, a column a key; the last row is the one that is read, and the answer's columns are ticked.
    """
    world = World(paper_task(length=20, width=100), seed)
    trial = world.trials(0, 1)
    columns = (2 * (trial.labels[0] == trial.answers[0]).nonzero().flatten() + 1).tolist()
    with style():
        figure = new_figure(7.2, 9.2)
        panels = figure.subplots(len(SIMILARITIES), len(SEPARATIONS))
        for row, similarity in zip(panels, SIMILARITIES, strict=True):
            for axes, separation in zip(row, SEPARATIONS, strict=True):
                weights = attention(trial.inputs, 2.0, similarity, separation)[0]
                image = axes.imshow(weights, cmap="viridis", interpolation="nearest")
                figure.colorbar(image, ax=axes, shrink=0.8)
                axes.set_title(f"{LABELS[similarity]}, {separation}", fontsize=8)
                axes.set_xticks(columns, ["answer"] * len(columns), fontsize=7, rotation=90)
                axes.set_yticks([0, len(weights) - 1], ["1", "s"], fontsize=7)
    return figure


def weight_curves(found: Mapping[str, Any]) -> "Figure":
    """Figure 7: accuracy against a, of dot product and Pearson's correlation with argmax, under both conventions."""
    with style():
        figure = new_figure(6.4, 3.2)
        axes = figure.subplots()
        for colour, convention in zip(PALETTE, CONVENTIONS, strict=False):
            for similarity in SHOWN:
                axes.plot(
                    found[convention]["a"]["a"],
                    found[convention]["a"][similarity],
                    ONE_BUT_DARKER[similarity],
                    color=colour,
                    label=f"{LABELS[similarity]}, as in the {convention}",
                )
        axes.axhline(0.99, linewidth=0.8, color=INK, linestyle=":", label="0.99")
        axes.set(xlabel="a, weight of the previous token", ylabel="share of right answers", ylim=(0, 1.02))
        axes.grid(True)
        axes.legend(fontsize=8)
    return figure


def size_curves(found: Mapping[str, Any]) -> "Figure":
    """Figure 8: accuracy against length and width, argmax at a = 2, under both conventions."""
    with style():
        figure = new_figure(7.6, 3.2)
        panels = figure.subplots(1, 2, sharey=True)
        titles = {"length": "s, tokens of a trial", "width": "e, components of a token"}
        for axes, (name, title) in zip(panels, titles.items(), strict=True):
            for colour, convention in zip(PALETTE, CONVENTIONS, strict=False):
                curves = found[convention][name]
                for similarity in SHOWN:
                    axes.plot(
                        curves[name], curves[similarity], ONE_BUT_DARKER[similarity], marker=".", color=colour,
                        label=f"{LABELS[similarity]}, as in the {convention}",
                    )  # fmt: skip
            axes.set(xscale="log", xlabel=title, ylim=(0, 1.02))
            axes.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
            axes.grid(True)
        panels[0].set_ylabel("share of right answers")
        panels[0].legend(fontsize=7)
    return figure


# ---- Sweeps: the phase plot ------------------------------------------------------------------------------------------


def phase(
    x: tuple[str, list[Any]], y: tuple[str, list[Any]], steps: Mapping[str, Any], at_most: int, threshold: float
) -> "Figure":
    """Step at which IC passes the threshold over two knobs, a panel a variant; left white where a run never did.

    Args:
        x, y: names and values of the knobs.
        steps: {variant: (len(y), len(x)) mean steps, NaN where a run never passed}.
        at_most: steps that were trained.
        threshold: accuracy on IC.
    """
    with style():
        figure = new_figure(1.2 + 2.9 * len(steps), 0.9 + 0.55 * max(3, len(y[1])))
        panels = figure.subplots(1, len(steps), squeeze=False)[0]
        image: Any = None
        for axes, (name, grid) in zip(panels, steps.items(), strict=True):
            values = np.asarray(grid, float) / 1000
            image = axes.imshow(values, cmap="viridis_r", vmin=0, vmax=at_most / 1000, aspect="auto", origin="lower")
            for (row, column), value in np.ndenumerate(values):
                never = np.isnan(value)
                axes.text(
                    column, row, f">{at_most / 1000:g}" if never else f"{value:.3g}", ha="center", va="center",
                    fontsize=8, color="black" if never or value < 0.55 * at_most / 1000 else "white",
                )  # fmt: skip
            axes.set_xticks(range(len(x[1])), [str(value) for value in x[1]])
            axes.set_yticks(range(len(y[1])), [str(value) for value in y[1]])
            axes.set(title=name, xlabel=x[0])
        panels[0].set_ylabel(y[0])
        figure.colorbar(image, ax=list(panels), label=f"thousand steps until IC exceeds {threshold:g}")
    return figure
