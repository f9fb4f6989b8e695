"""Capacity against a plain simulation with other random numbers; where a curve falls."""

import math

import numpy as np
import pytest

from small.tem.capacity import EQUAL_SUM, MACHINES, REACHED, Curve, capacity_table, measure_capacity
from small.tem.settings import SEPARATIONS


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


def simulated_machine(name: str, width: int, memories: int, trials: int = 200) -> float:
    """Recall of TEM's memory matrix, by the reference's rule or the paper's, from places of one small sum."""
    random, right, code = np.random.default_rng(3), 0, name == "TEM, code"
    decay, rate, keep, steps = (0.9999, 0.5, 0.8, 5) if code else (1, 1, 0, 1)
    act = {
        "TEM, code": lambda p: np.where(np.clip(p, -1, 1) > 0, np.clip(p, -1, 1), 0.01 * np.clip(p, -1, 1)),
        "TEM, paper": lambda p: np.maximum(p, 0), "TEM, linear": lambda p: p,
    }[name]  # fmt: skip
    for _ in range(trials):
        places = random.normal(size=(memories, width))
        places -= places.mean(1, keepdims=True)
        places /= np.linalg.norm(places, axis=1, keepdims=True)
        places += EQUAL_SUM / math.sqrt(width)
        places /= np.linalg.norm(places, axis=1, keepdims=True)
        if code:
            places = np.clip(places * math.sqrt(width) / 2, -1, 1)
        symbols, memory = random.integers(45, size=memories), np.zeros((45 * width, 45 * width))

        def retrieved(place: np.ndarray, memory: np.ndarray) -> np.ndarray:
            found = np.outer(np.ones(45), place).ravel()
            found = act(found) if code else found
            for _ in range(steps):
                found = act(keep * found + found @ memory)
            return found

        for place, symbol in zip(places, symbols, strict=True):
            p = np.outer(np.eye(45)[symbol], place).ravel()
            p = act(p) if code else p
            p_hat = retrieved(place, memory) if code else 0.0
            memory = decay * memory + rate * np.outer(p + p_hat, p - p_hat)
        asked = random.integers(memories)
        right += retrieved(places[asked], memory).reshape(45, width).sum(1).argmax() == symbols[asked]
    return right / trials


@pytest.mark.parametrize("name", MACHINES)
def test_recall_of_tem_is_that_of_its_matrix(name: str) -> None:
    (curve,) = (curve for curve in measure_capacity([4], 24, 400, 0.0, 0) if curve.rule == name)
    for place in (4, 9, len(curve.memories) - 1):
        expected = simulated_machine(name, 4, round(curve.memories[place]))
        assert curve.recall[place] == pytest.approx(expected, abs=0.11)


@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_recall_is_that_of_a_plain_simulation(noise: float) -> None:
    curves = {curve.rule: curve for curve in measure_capacity([8], 128, 200, noise, 0)}
    assert list(curves) == [*SEPARATIONS, *MACHINES]
    for separation in SEPARATIONS:
        curve = curves[separation]
        for place in (8, 14, len(curve.memories) - 1):
            expected = simulated(separation, 8, round(curve.memories[place]), noise)
            assert curve.recall[place] == pytest.approx(expected, abs=0.06)
    assert curves["softmax"].recall == curves["exponential"].recall  # a sum of all weights changes no order
    assert curves["softmax"].capacity > 2 * curves["linear"].capacity
    bridge = np.subtract(curves["TEM, linear"].recall, curves["linear"].recall)
    assert np.abs(bridge).max() < 0.1 and curves["linear"].recall[-1] < 0.6  # Equation 11


def test_a_capacity_is_where_the_curve_falls() -> None:
    assert REACHED == 0.9
    assert Curve("linear", 8, [1, 4, 10], [1.0, 0.95, 0.85]).capacity == pytest.approx(7)
    assert Curve("linear", 8, [1, 4], [0.8, 0.2]).capacity == 1
    falls, holds = Curve("linear", 8, [1, 4, 10], [1.0, 0.95, 0.85]), Curve("softmax", 8, [1, 4], [1.0, 1.0])
    rows = [line.split() for line in capacity_table([holds, falls], 64).splitlines()[2:]]
    assert rows == [["softmax", ">", "64"], ["linear", "7"]]
