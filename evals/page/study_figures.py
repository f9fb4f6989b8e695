"""The pictures of a study, one arm each: effect, loss, compute multiplier and residuals over sizes, and its search."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from evals.verdict.ladder import AtSize, LadderVerdict, points
from evals.verdict.scaling_law import Law
from evals.verdict.statistics import Interval
from evals.verdict.study_arms import ArmCost, format_cost
from llm.common.plots import COLOURS, INK, MARKERS, new_figure, style

SHARED: dict[str, Any] = {"linewidth": 3, "alpha": 0.4}
OWN: dict[str, Any] = {"linewidth": 1.1, "linestyle": "--"}


def draw_effect(verdict: LadderVerdict, arm: str) -> Figure:
    """Arm minus baseline at each size with its interval as a band, the null arm with error bars."""
    found, null = verdict.arms[arm].sizes, verdict.null.sizes if verdict.null else ()
    with style():
        figure = new_figure()
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=0.8)
        at, effects = [size.size.parameters for size in found], [size.difference for size in found]
        low, high = [effect.low for effect in effects], [effect.high for effect in effects]
        axes.fill_between(at, low, high, color=COLOURS[1], alpha=0.2, linewidth=0)
        axes.plot(at, [effect.value for effect in effects], color=COLOURS[1], linewidth=1.2)
        for size in found:
            _mark(axes, size.size.parameters, size.difference, arm, size.shown, size is found[0])
        for size in null:
            label = verdict.ladder.null if size is null[0] else None
            _bar(axes, size.size.parameters * 1.06, size.difference, INK)
            axes.plot(size.size.parameters * 1.06, size.difference.value, "D", color=INK, markersize=4, label=label)
        axes.set(xscale="log", xlim=(at[0] / 1.3, at[-1] * 1.4))
        axes.set_xticks(at, [size.size.name for size in found], minor=False)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="size (non-embedding parameters, log)", ylabel="difference (nats per token)")
        axes.set_title(f"validation loss, {arm} − {verdict.ladder.baseline}")
        axes.legend(fontsize=8)
        axes.grid(axis="y")
    return figure


def draw_forest(verdict: LadderVerdict, costs: Mapping[tuple[str, str], ArmCost]) -> Figure:
    """Every arm minus baseline at every size, the best arm first and the null arm last; costs on the right."""
    changed = [arm for arm in verdict.ladder.changed if verdict.arms[arm].sizes]
    changed.sort(key=lambda arm: np.mean([at.difference.value for at in verdict.arms[arm].sizes]))
    arms = [*changed, *([verdict.ladder.null] if verdict.null else [])]
    rows = [(arm, at) for arm in arms if arm for at in verdict.arms[arm].sizes]
    several = len(verdict.ladder.sizes) > 1
    with style():
        figure = new_figure(6.4, 1.2 + 0.26 * len(rows))
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for place, (arm, at) in enumerate(rows):
            null, effect = arm == verdict.ladder.null, at.difference
            colour, fill = INK if null else COLOURS[1], "full" if at.differs else "none"
            axes.plot([effect.low, effect.high], [place] * 2, color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot(effect.value, place, "D" if null else MARKERS[1], color=colour, markersize=5, fillstyle=fill)
        labels = [f"{arm}, {at.size.name}" if several else arm for arm, at in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.set(xlabel="difference (nats per token)", ylim=(len(rows) - 0.5, -0.5))
        axes.set_title(f"validation loss, arm − {verdict.ladder.baseline}")
        axes.grid(axis="x")
        right = axes.secondary_yaxis("right")
        shown = 3 if any(cost.step_time for cost in costs.values()) else 2
        taken = [format_cost(costs.get((arm, at.size.name)))[:shown] for arm, at in rows]
        right.set_yticks(range(len(rows)), [", ".join(each) for each in taken], fontsize=8)
        right.tick_params(length=0)
    return figure


def draw_loss(verdict: LadderVerdict, arm: str) -> Figure:
    """Final losses of both arms over compute, and both joint fits along the largest budgets."""
    ladder, joint = verdict.ladder, verdict.joint
    with style():
        figure = new_figure()
        axes = figure.subplots()
        for side, name in enumerate((ladder.baseline, arm)):
            for number, last in ((slice(None, -1), False), (slice(-1, None), True)):
                runs = [
                    (flops, loss)
                    for size in ladder.sizes
                    for (of, at, _), losses in ladder.losses.items()
                    if (of, at) == (name, size.name)
                    for flops, loss in zip(size.flops[number], losses[number], strict=True)
                ]
                if runs:
                    axes.plot(
                        *zip(*runs, strict=True), MARKERS[side], color=COLOURS[side], markersize=4, alpha=0.8,
                        fillstyle="full" if last else "none", label=name if last else None,
                    )  # fmt: skip
            for law, look in ((joint.shared, SHARED), (joint.own, OWN)) if joint else ():
                flops, losses = _curve(verdict, law, (ladder.baseline, *ladder.arms).index(name))
                axes.plot(flops, losses, color=COLOURS[side], **look)
        if joint:
            axes.plot([], [], color=INK, label="fit, shared exponents", **SHARED)
            axes.plot([], [], color=INK, label="fit, own exponents", **OWN)
        axes.set(yscale="log", ylabel="validation loss (nats per token)")
        _set_compute_axis(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title("loss and compute")
        axes.legend(fontsize=8)
        axes.grid(axis="y")
    return figure


def _curve(verdict: LadderVerdict, law: Law, arm: int) -> tuple[np.ndarray, np.ndarray]:
    """Return compute and an arm's fitted loss between the sizes' largest budgets."""
    sizes = verdict.ladder.sizes
    known = np.log([(size.flops[-1], size.parameters, size.tokens[-1]) for size in sizes])
    compute = np.linspace(known[0, 0], known[-1, 0], 60)
    terms = (1, 2) if len(law.centre) == 2 else (0,)
    logs = np.stack([np.interp(compute, known[:, 0], known[:, term]) for term in terms], axis=1)
    return np.exp(compute), law.loss(np.full(len(compute), arm), logs)[0]


def draw_multiplier(verdict: LadderVerdict, arm: str) -> Figure:
    """Compute multiplier of each size with its interval, its line, and the prediction a decade further, dashed."""
    found = verdict.arms[arm]
    sizes = [size for size in found.sizes if size.log_multiplier is not None]
    with style():
        figure = new_figure()
        axes = figure.subplots()
        axes.axhline(1, color=INK, linewidth=0.8)
        for size in sizes:
            _mark(axes, math.exp(size.size.log_compute), _multiplier(size), arm, size.shown, size is sizes[0])
        if found.slope and found.largest and found.beyond and found.beyond_compute:
            slope, last = found.slope.by_seeds.value, sizes[-1].size.log_compute
            at = np.array([sizes[0].size.log_compute, last, math.log(found.beyond_compute)])
            line = np.exp(found.largest.by_seeds.value + slope * (at - last))
            axes.plot(np.exp(at[:2]), line[:2], color=COLOURS[1], linewidth=1.2, label="line in log compute")
            axes.plot(np.exp(at[1:]), line[1:], "--", color=COLOURS[1], linewidth=1.2, label="extrapolated")
            beyond = found.beyond.mapped(math.exp)
            axes.plot([found.beyond_compute] * 2, [beyond.low, beyond.high], "--", color=COLOURS[1], linewidth=1.6)
            axes.plot(found.beyond_compute, beyond.value, MARKERS[1], color=COLOURS[1], fillstyle="none", markersize=6)
        axes.set_ylabel(f"compute of {verdict.ladder.baseline} / {arm} at equal loss")
        _set_compute_axis(axes)
        axes.set_title(f"compute multiplier of {arm}")
        axes.legend(fontsize=8)
        axes.grid(axis="y")
    return figure


def _multiplier(size: AtSize) -> Interval:
    assert size.log_multiplier is not None
    return size.log_multiplier.mapped(math.exp)


def draw_residuals(verdict: LadderVerdict, arm: str) -> Figure:
    """Measured over fitted loss of both arms, shared exponents, in percent."""
    assert verdict.joint is not None
    fitted, names = points(verdict.ladder), verdict.joint.arms
    with style():
        figure = new_figure()
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=0.8)
        for side, name in enumerate((verdict.ladder.baseline, arm)):
            mine = fitted.arm == names.index(name)
            rest = 100 * np.expm1(verdict.joint.residuals[mine])
            axes.plot(fitted.compute[mine], rest, MARKERS[side], color=COLOURS[side], markersize=4, label=name)
        axes.set_ylabel("measured − fitted loss (%)")
        _set_compute_axis(axes)
        axes.set_title("residuals of the joint fit")
        axes.legend(fontsize=8)
        axes.grid(axis="y")
    return figure


def draw_search(
    losses: Mapping[str, Mapping[float, Sequence[float]]], chosen: Mapping[str, float], arm: str, key: str
) -> Figure:
    """Losses of a search over the tuned value, a line for each size through the seeds' means.

    losses: size -> value -> loss of each seed. chosen: size -> the value that the rule gives, as a tick above.
    """
    with style():
        figure = new_figure()
        axes = figure.subplots()
        for number, (size, found) in enumerate(losses.items()):
            colour, alpha = COLOURS[1], (number + 1) / len(losses)
            means = [float(np.mean(found[value])) for value in sorted(found)]
            axes.plot(sorted(found), means, MARKERS[1] + "-", color=colour, alpha=alpha, markersize=4, label=size)
            if size in chosen:
                axes.axvline(chosen[size], color=colour, alpha=alpha, linewidth=0.8, linestyle=":")
        values = sorted({value for found in losses.values() for value in found})
        axes.set(xscale="log", xlabel=key, ylabel="validation loss (nats per token)")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"search of {arm}")
        axes.legend(fontsize=8)
        axes.grid(axis="y")
    return figure


def _mark(axes: Axes, at: float, interval: Interval, label: str, shown: bool, first: bool) -> None:
    """Draw a value with its interval, filled where a difference is shown; the first one is named."""
    _bar(axes, at, interval, COLOURS[1])
    axes.plot(
        at, interval.value, MARKERS[1], color=COLOURS[1], markersize=6, fillstyle="full" if shown else "none",
        label=label if first else None,
    )  # fmt: skip


def _bar(axes: Axes, at: float, interval: Interval, colour: str) -> None:
    axes.plot([at, at], [interval.low, interval.high], color=colour, linewidth=1.6, solid_capstyle="butt")


def _set_compute_axis(axes: Axes) -> None:
    """Make compute the logarithmic x axis, with plain text at its ticks: decades, or both ends of a narrow range."""
    axes.set(xscale="log", xlabel="training compute of a run (FLOPs)")
    low, high = axes.dataLim.intervalx
    narrow = high < 30 * low
    axes.xaxis.set_major_locator(FixedLocator([low, high]) if narrow else LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}".replace("e+", "e"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if narrow:
        axes.xaxis.set_minor_locator(NullLocator())
