"""Results for the eye: tables as text, curves as PNG."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Blue and vermillion of Okabe and Ito's palette: told apart under every common colour-blindness, and in grey.
COLOURS = ("#0072B2", "#D55E00")
MARKERS = ("o", "s")


class Curve(NamedTuple):
    """Values over tokens, of equal length."""

    tokens: list[float]
    values: list[float]


class Losses(NamedTuple):
    """The two losses of one model, in nats per token."""

    name: str
    training: Curve
    validation: Curve


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width under a rule: the first is flush left, the numbers after it flush right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def draw_losses(models: Sequence[Losses]) -> bytes:
    """A PNG of the losses of two models over tokens: training thin, validation bold with a mark where it was measured.

    Left the whole run, right its second half on a scale of its own, where two close models can be told apart.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no backend is chosen for the whole process, no display is needed

    last = max(max(model.training.tokens + model.validation.tokens, default=0.0) for model in models)
    unit, word = _unit(last)
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        whole, half = figure.subplots(1, 2)
        for axes in (whole, half):
            for model, colour, marker in zip(models, COLOURS, MARKERS, strict=True):
                _draw_model(axes, model, unit, colour, marker)
            axes.set_xlabel(f"tokens seen{word}")
            axes.grid(axis="y", color="0.9", linewidth=0.8)
            axes.set_axisbelow(True)
        whole.set(ylabel="loss (nats per token)", title="whole run", xlim=(0, None))
        half.set(title="second half", ylim=_range_after(models, last / 2))
        half.set_xlim(0.495 * last / unit, 1.005 * last / unit)  # the marks at both ends are whole
        whole.legend(frameon=False)
        png = io.BytesIO()
        figure.savefig(png, dpi=150)
    return png.getvalue()


def _unit(tokens: float) -> tuple[float, str]:
    """A divisor that makes `tokens` readable, and how an axis names it."""
    for unit, word in ((1e9, " (billion)"), (1e6, " (million)"), (1e3, " (thousand)")):
        if tokens >= unit:
            return unit, word
    return 1.0, ""


def _draw_model(axes: Any, model: Losses, unit: float, colour: str, marker: str) -> None:
    """Both losses of one model; validation lies above the training of either."""
    training = {"linewidth": 0.8, "alpha": 0.4, "label": f"{model.name}, training"}
    validation = {"linewidth": 2.0, "marker": marker, "markersize": 4.5, "label": f"{model.name}, validation"}
    for curve, style in ((model.training, training), (model.validation, validation | {"zorder": 3})):
        axes.plot([tokens / unit for tokens in curve.tokens], curve.values, color=colour, **style)


def _range_after(models: Sequence[Losses], start: float) -> tuple[float, float] | None:
    """The values from `start` tokens on, with a margin: all of validation, and training without its outer twentieths,
    so that single noisy batches do not flatten what is to be told apart. None where nothing was measured there.
    """
    values: list[float] = []
    for model in models:
        training, validation = (
            [value for tokens, value in zip(*curve, strict=True) if tokens >= start]
            for curve in (model.training, model.validation)
        )
        values += validation
        if training:
            values += np.quantile(training, (0.05, 0.95)).tolist()
    if not values:
        return None
    margin = 0.05 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin
