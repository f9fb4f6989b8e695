"""Random numbers: their distribution, and that they belong to (seed, purpose, index) alone."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy import stats

from small.draws import Draws, normal

CPU = torch.device("cpu")


def test_normal_numbers_are_normal_and_do_not_depend_on_each_other() -> None:
    drawn = Draws(CPU, 3, "test").normal(1_000_000).numpy()
    assert drawn.dtype == np.float32
    assert stats.kstest(drawn, "norm").pvalue > 1e-5
    beyond = np.abs(drawn[np.abs(drawn) > 3])
    assert stats.kstest(beyond, stats.truncnorm(3, np.inf).cdf).pvalue > 1e-5
    first, second = drawn.reshape(2, -1)  # of one radius and one angle
    for one, other in ((first, second), (first**2, second**2), (drawn[1:], drawn[:-1])):
        assert stats.pearsonr(one, other).pvalue > 1e-5


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 2**40))
def test_normal_is_the_transform_of_box_and_muller(rows: int, columns: int, seed: int) -> None:
    bits = Draws(CPU, seed, "test").bits(rows * columns)
    radius, angle = (bits.numpy().astype(np.int64) % 2**24) / 2**24
    complex_ones = np.sqrt(-2 * np.log(radius + 2.0**-25)) * np.exp(2j * np.pi * angle)
    expected = np.concatenate([complex_ones.real, complex_ones.imag])[: rows * columns].reshape(rows, columns)
    np.testing.assert_allclose(normal(bits, rows, columns).numpy(), expected, atol=5e-6)


def test_all_bits_are_used_and_the_extremes_are_finite() -> None:
    bits = Draws(CPU, 0, "test").bits(100_000)
    for bit in range(24):
        assert stats.binomtest(int((bits >> bit & 1).sum()), bits.numel()).pvalue > 1e-5
    extremes = torch.tensor([[0, -1, 0xFFFFFF], [0, -1, 0xFFFFFF]], dtype=torch.int32)
    drawn = normal(extremes, 6)
    assert drawn.isfinite().all() and drawn.abs().max() == pytest.approx(5.887, abs=1e-3)


def test_uniform_numbers_are_uniform() -> None:
    drawn = Draws(CPU, 3, "test").uniform(1000, 100)
    assert drawn.dtype == torch.float64 and drawn.shape == (1000, 100)
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-5


def test_they_belong_to_seed_purpose_and_index() -> None:
    drawn = Draws(CPU, 3, "test", 4).normal(50)
    assert torch.equal(drawn, Draws(CPU, 3, "test", 4).normal(50))
    for other in (Draws(CPU, 2, "test", 4), Draws(CPU, 3, "tests", 4), Draws(CPU, 3, "test", 5)):
        assert not torch.isclose(drawn, other.normal(50)).any()
