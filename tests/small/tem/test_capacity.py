"""Capacity against a plain simulation with other random numbers; where a curve falls."""

import math

import numpy as np
import pytest

from small.tem.capacity import REACHED, RULES, Curve, measure, table
from small.tem.memory import SEPARATIONS


def simulated(separation: str, width: int, memories: int, noise: float, trials: int = 600) -> float:
    """Recall of one of so many memories, each trial with a set of its own."""
    random, right = np.random.default_rng(9), 0
    for _ in range(trials):
        codes = random.normal(size=(memories, width))
        codes *= math.sqrt(width) / np.linalg.norm(codes, axis=1, keepdims=True)
        symbols = random.integers(45, size=memories)
        query = codes[0] + noise * random.normal(size=width)
        scores = codes @ query / math.sqrt(width)
        weights = {"linear": scores, "polynomial": scores**3}.get(separation, np.exp(scores - scores.max()))
        right += np.bincount(symbols, weights, 45).argmax() == symbols[0]
    return right / trials


@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_recall_is_that_of_a_plain_simulation(noise: float) -> None:
    curves = {curve.rule: curve for curve in measure([8], 128, 200, noise, 0)}
    assert list(curves) == [*SEPARATIONS, *RULES]
    for separation in SEPARATIONS:
        curve = curves[separation]
        for place in (8, 14, len(curve.memories) - 1):
            expected = simulated(separation, 8, round(curve.memories[place]), noise)
            assert curve.recall[place] == pytest.approx(expected, abs=0.06)
    assert curves["softmax"].recall == curves["exponential"].recall  # a sum of all weights changes no order
    assert curves["softmax"].capacity > 2 * curves["linear"].capacity
    for rule in RULES:  # one memory is always found again, many by the paper's rule not
        assert curves[rule].recall[0] > 0.9 > curves[rule].recall[-1]


def test_a_capacity_is_where_the_curve_falls() -> None:
    assert REACHED == 0.9
    assert Curve("linear", 8, [1, 4, 10], [1.0, 0.95, 0.85]).capacity == pytest.approx(7)
    assert Curve("linear", 8, [1, 4], [0.8, 0.2]).capacity == 1
    falls, holds = Curve("linear", 8, [1, 4, 10], [1.0, 0.95, 0.85]), Curve("softmax", 8, [1, 4], [1.0, 1.0])
    rows = [line.split() for line in table([holds, falls], 64).splitlines()[2:]]
    assert rows == [["softmax", ">", "64"], ["linear", "7"]]
