"""The setting that an arm trains with, from the runs that tried it: at each tuned size the best value, then a rule.

Stages: final validation losses of the tuning runs -> their mean over seeds for each value -> the minimum of a parabola
in ln value through the best and its neighbours -> a rule from the tuned sizes to any size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

Losses = Mapping[float, Sequence[float]]  # value -> final validation loss of each seed; infinite if a run diverged


def best_value(losses: Losses) -> tuple[float, bool]:
    """Return the best value at one size, and whether it is at an edge of the values tried.

    At an edge it is the value itself, and a better one may lie beyond.
    """
    values = sorted(losses)
    means = [statistics.fmean(losses[value]) for value in values]
    place = min(range(len(values)), key=means.__getitem__)
    if place in (0, len(values) - 1):
        return values[place], True
    x, y = [math.log(value) for value in values[place - 1 : place + 2]], means[place - 1 : place + 2]
    if math.isinf(max(y)):  # a neighbour diverged
        return values[place], False
    # Newton's divided differences; the neighbours are not below the middle, so the parabola opens upwards or is flat.
    first, second = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (second - first) / (x[2] - x[0])
    if curvature <= 0:
        return values[place], False
    return math.exp((x[0] + x[1]) / 2 - first / (2 * curvature)), False


def power_law(best: Mapping[float, float]) -> Callable[[float], float]:
    """Return value = c N^k, fitted to ln value by least squares; constant if one size was tuned.

    Args:
        best: N, the non-embedding parameters of each tuned size -> its best value.
    """
    if len(best) < 2:
        return constant(best)
    fit = statistics.linear_regression([math.log(size) for size in best], [math.log(value) for value in best.values()])
    return lambda size: math.exp(fit.intercept + fit.slope * math.log(size))


def constant(best: Mapping[float, float]) -> Callable[[float], float]:
    """Return the geometric mean of the tuned sizes' values, at every size."""
    mean = statistics.geometric_mean(best.values())
    return lambda size: mean


RULES = {"power_law": power_law, "constant": constant}


def rounded(value: float) -> float:
    """Return a value to three digits, as the runs train with it."""
    return float(f"{value:.3g}")
