"""The choice of a tuned setting, compared with numpy's polynomials."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.study.tuning import best_value, constant, power_law, rounded

VALUES = [2.0e-4, 4.0e-4, 1.0e-3, 1.6e-3, 3.2e-3]


@given(st.floats(math.log(4.1e-4), math.log(1.5e-3)), st.floats(0.01, 10), st.floats(-5, 5))
def test_a_parabola_gives_its_minimum(vertex: float, curvature: float, level: float) -> None:
    """Whatever values surround it, and however the seeds scatter around their mean."""
    losses = {}
    for value in VALUES:
        loss = level + curvature * (math.log(value) - vertex) ** 2
        losses[value] = [loss - 0.25, loss + 0.25]
    best, at_edge = best_value(losses)
    assert not at_edge
    assert math.log(best) == pytest.approx(vertex, abs=1e-6)


@given(st.lists(st.floats(0, 10), min_size=5, max_size=5))
def test_any_losses_give_the_vertex_of_numpys_parabola(means: list[float]) -> None:
    best, at_edge = best_value({value: [mean] for value, mean in zip(VALUES, means, strict=True)})
    place = int(np.argmin(means))
    assert at_edge == (place in (0, 4))
    if at_edge or len({round(mean, 6) for mean in means[place - 1 : place + 2]}) < 2:
        return
    a, b, _ = np.polyfit(np.log(VALUES[place - 1 : place + 2]), means[place - 1 : place + 2], 2)
    assert best == pytest.approx(math.exp(-b / (2 * a)), rel=1e-4)
    assert VALUES[place - 1] <= best <= VALUES[place + 1]


def test_edges_and_divergence() -> None:
    assert best_value({1.0: [1.0], 2.0: [2.0], 4.0: [3.0]}) == (1.0, True)
    assert best_value({1.0: [3.0], 2.0: [2.0], 4.0: [1.0]}) == (4.0, True)
    assert best_value({1.0: [3.0], 2.0: [2.0], 4.0: [math.inf]}) == (2.0, False)
    assert best_value({1.0: [3.0], 2.0: [2.0, math.inf], 4.0: [4.0]}) == (1.0, True)


@given(st.lists(st.tuples(st.floats(1e3, 1e9), st.floats(1e-5, 1)), min_size=2, max_size=6, unique_by=lambda p: p[0]))
def test_the_power_law_is_numpys_line_in_logarithms(points: list[tuple[float, float]]) -> None:
    x, y = np.log(points).T
    if np.ptp(x) < 0.1:
        return
    slope, intercept = np.polyfit(x, y, 1)
    rule = power_law(dict(points))
    for size in (1e4, 1e10):
        assert math.log(rule(size)) == pytest.approx(intercept + slope * math.log(size), abs=1e-6)


def test_one_size_and_the_constant_rule() -> None:
    assert power_law({1e6: 0.01})(1e9) == pytest.approx(0.01)
    assert constant({1e6: 0.01, 1e7: 0.0001})(1e9) == pytest.approx(0.001)
    assert rounded(0.00123456) == 0.00123
