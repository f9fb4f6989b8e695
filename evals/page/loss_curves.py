"""The losses of two sides over tokens, drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.verdict.record import Losses
from llm.common.plots import COLOURS, MARKERS, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_losses(sides: Sequence[Losses]) -> "Figure":
    """The losses of two sides over tokens: training thin, validation bold with a mark where it was measured.

    Left the whole run, right its second half on a scale of its own, where two close models can be told apart.
    """
    with style():
        figure = new_figure(10, 4.2)
        whole, half = figure.subplots(1, 2)
        _loss_axes(whole, sides, second_half=False)
        _loss_axes(half, sides, second_half=True)
    return figure


def draw_loss(sides: Sequence[Losses], second_half: bool) -> "Figure":
    """One panel of `draw_losses`."""
    with style():
        figure = new_figure()
        _loss_axes(figure.subplots(), sides, second_half)
    return figure


def _loss_axes(axes: Any, sides: Sequence[Losses], second_half: bool) -> None:
    last = max((max(c.tokens, default=0.0) for side in sides for c in (*side.training, *side.validation)), default=0.0)
    unit, word = token_unit(last)
    for side, colour, marker in zip(sides, COLOURS, MARKERS, strict=True):
        _draw_side(axes, side, unit, colour, marker)
    axes.set_xlabel(f"tokens seen{word}")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y")
    if second_half:
        axes.set(title="second half", ylim=_range_after(sides, last / 2))
        axes.set_xlim(0.495 * last / unit, 1.005 * last / unit)  # the marks at both ends are whole
    else:
        axes.set(title="whole run", xlim=(0, None))
        axes.legend()


def token_unit(tokens: float) -> tuple[float, str]:
    """A divisor that makes `tokens` readable, and how an axis names it."""
    for unit, word in ((1e9, " (billion)"), (1e6, " (million)"), (1e3, " (thousand)")):
        if tokens >= unit:
            return unit, word
    return 1.0, ""


def _draw_side(axes: Any, side: Losses, unit: float, colour: str, marker: str) -> None:
    """Both losses of every seed of one side; validation lies above the training of either."""
    training = {"linewidth": 0.8, "alpha": 0.4, "label": f"{side.name}, training"}
    validation = {"linewidth": 2.0, "marker": marker, "markersize": 4.5, "label": f"{side.name}, validation"}
    for curves, style_of in ((side.training, training), (side.validation, validation | {"zorder": 3})):
        for n, curve in enumerate(curves):
            label = style_of["label"] if n == 0 else "_"
            axes.plot([at / unit for at in curve.tokens], curve.values, color=colour, **(style_of | {"label": label}))


def _range_after(sides: Sequence[Losses], start: float) -> tuple[float, float] | None:
    """The values from `start` tokens on, with a margin: all of validation, and training without its outer twentieths,
    so that single noisy batches do not flatten what is to be told apart. None where nothing was measured there.
    """
    values: list[float] = []
    for side in sides:
        for training in side.training:
            if late := [value for at, value in zip(*training, strict=True) if at >= start]:
                values += np.quantile(late, (0.05, 0.95)).tolist()
        for validation in side.validation:
            values += [value for at, value in zip(*validation, strict=True) if at >= start]
    if not values:
        return None
    margin = 0.05 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin
