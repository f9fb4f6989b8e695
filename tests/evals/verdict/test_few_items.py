"""Two to ten items: no p value below that of a test of signs, no interval without width, few false verdicts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evals.verdict.power import power_of_mean
from evals.verdict.statistics import hierarchical_bootstrap, paired_effect

FEW = st.integers(2, 10)


def sign_test(items: int) -> float:
    """The p value where all items differ alike."""
    return float(stats.binomtest(items, items, 0.5).pvalue)


@settings(derandomize=True, max_examples=40)
@given(FEW, st.integers(1, 4), st.sampled_from([0.8, 0.95, 0.99]), st.sampled_from([-1.0, 0.3, 1.0]), st.booleans())
def test_items_that_all_differ_alike(items, seeds, level, difference, rounded):
    """p of the signs; the interval of a share (Clopper and Pearson), as scipy has it, from q to 1 -> 1 - 2 q."""
    first = np.random.default_rng(items).normal(2, 1, (seeds, items)) if rounded else np.zeros((seeds, items))
    found = paired_effect(first, first + difference, level=level)
    share = stats.binomtest(0, items).proportion_ci(level, "exact")  # that go the other way
    assert found.difference == pytest.approx(difference)
    assert found.p_value == pytest.approx(sign_test(items))
    towards_zero = found.low if difference > 0 else found.high
    expected = difference * (1 - 2 * share.high)
    if sign_test(items) < 1 - level:
        assert towards_zero == pytest.approx(expected)
    else:
        assert towards_zero * np.sign(difference) == pytest.approx(min(0.0, expected * np.sign(difference)), abs=1e-9)
    assert found.high - found.low > 0.05 * abs(difference)
    drawn = hierarchical_bootstrap(first, first + difference, level=level, resamples=199)
    assert drawn[1] - drawn[0] > 0.05 * abs(difference)


@settings(derandomize=True, max_examples=40)
@given(FEW, st.integers(1, 4), st.sampled_from(["one sign", "answers", "same answers"]), st.integers(0, 2**32 - 1))
def test_none_is_surer_than_signs(items, seeds, kind, seed):
    """scipy's exact test of all signs that the items' weighted differences could have had."""
    random = np.random.default_rng(seed)
    differences = np.abs(random.normal(1, 1e-3, (seeds, items)))
    if kind != "one sign":
        differences = random.choice([-1.0, 0.0, 1.0, 1.0], (seeds, items))
    if kind == "same answers":
        differences = np.tile(differences[:1], (seeds, 1))
    weights = random.uniform(1, 9, items)
    found = paired_effect(np.zeros((seeds, items)), differences, weights)
    of_items = differences.mean(axis=0) * weights
    exact = stats.permutation_test((of_items,), np.mean, permutation_type="samples", n_resamples=2**items)
    assert found.p_value >= min(1.0, exact.pvalue) * (1 - 1e-9)
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    assert found.low <= found.difference <= found.high


def differences_of(kind: str, random: np.random.Generator, seeds: int, items: int) -> np.ndarray:
    """(S, N) differences of a pair whose models do not truly differ."""
    if kind == "answers":
        return random.choice([-1.0, 0.0, 1.0], (seeds, items), p=[0.3, 0.4, 0.3])
    if kind == "same answers":  # in every seed
        return np.tile(random.choice([-1.0, 1.0], items), (seeds, 1))
    if kind == "unanimous":  # every item is on the side that the first is on, by chance alone
        return np.full((seeds, items), random.choice([-1.0, 1.0])) * (random.random(items) < 0.7)
    shared, single = random.standard_t(4, items), random.standard_t(4, (seeds, items))
    return shared + single if seeds > 1 else single


@pytest.mark.parametrize(("kind", "seeds"), [*itertools.product(("answers", "losses"), (1, 3)), ("same answers", 2)])
def test_null_pairs_of_few_items(kind, seeds):
    random = np.random.default_rng(seeds)
    wrong = []
    for pair in range(270):
        items = 2 + pair % 9
        found = paired_effect(np.zeros((seeds, items)), differences_of(kind, random, seeds, items), resamples=999)
        wrong.append(not found.low <= 0 <= found.high)
    assert np.mean(wrong) <= 0.06


@pytest.mark.parametrize("seeds", [1, 3])
def test_unanimous_null_pairs_of_few_items(seeds):
    """Up to five items that differ are never called different; of six on, p is what the signs give, no less."""
    random = np.random.default_rng(seeds)
    for pair in range(90):
        items = 2 + pair % 9
        differences = differences_of("unanimous", random, seeds, items)
        found = paired_effect(np.zeros((seeds, items)), differences, resamples=999)
        differing = int(differences.any(axis=0).sum())
        assert differing > 5 or found.low <= 0 <= found.high
        assert found.p_value >= (sign_test(differing) if differing else 1.0) * (1 - 1e-9)


def test_a_plan_promises_nothing_of_so_few():
    assert power_of_mean(100.0, 1, 5, 0.0, 1.0, 0.05) == 0
    assert power_of_mean(100.0, 1, 6, 0.0, 1.0, 0.05) > 0.99
