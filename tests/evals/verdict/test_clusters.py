"""Groups of documents: against loops, scipy and statsmodels, and how often equal models are called different."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.tsa.stattools import acf

from evals.verdict.clusters import (
    LAGS,
    asymmetric,
    by_group,
    effective_number,
    neighbour_note,
    neighbours,
    robust_variance,
    skewness_note,
)
from evals.verdict.measurements import joined_groups
from evals.verdict.statistics import Spread, critical, hierarchical_bootstrap, paired_effect, variance_parts
from llm.common.errors import UserError

SEEDS = st.integers(0, 2**32 - 1)
quick = partial(settings, deadline=None, derandomize=True, max_examples=20)


def null_pair(random, groups, per, correlation, seeds=1, of_seeds=0.0, spread=0.0):
    """Differences (S, N) of mean 0 and the labels (N,); `spread`: of the logarithm of a group's size."""
    counts = np.maximum(1, np.round(per * random.lognormal(-(spread**2) / 2, spread, groups))).astype(int)
    labels = np.repeat(np.arange(groups), counts)
    shared = random.standard_normal(groups)[labels]
    single = random.standard_normal((seeds, len(labels)))
    differences = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * single
    return differences + of_seeds * random.standard_normal((seeds, 1)), labels


@quick()
@given(SEEDS, st.integers(1, 3), st.integers(2, 9))
def test_the_mean_over_groups_is_that_over_items(seed, seeds, groups):
    random = np.random.default_rng(seed)
    items = groups + int(random.integers(30))
    labels = random.permutation(np.append(np.arange(groups), random.integers(groups, size=items - groups)))
    differences, shares = random.normal(0, 1, (seeds, items)), random.uniform(1, 9, items)
    found = by_group(differences, shares, [f"book {label}" for label in labels])
    weights = np.array([shares[labels == label].sum() for label in range(groups)])
    assert found.shares == pytest.approx(weights / weights.mean())
    for row, got in zip(differences, found.differences, strict=True):
        means = [np.average(row[labels == n], weights=shares[labels == n]) for n in range(groups)]
        assert got == pytest.approx(means)
        assert np.average(got, weights=found.shares) == pytest.approx(np.average(row, weights=shares))


@quick()
@given(SEEDS, st.integers(2, 30))
def test_the_variance_is_unbiased_for_groups_of_one_variance(seed, groups):
    """E V of independent values of variance 1 is the sum of V over basis vectors: V is a quadratic form."""
    shares = np.random.default_rng(seed).uniform(0.2, 5, groups)
    expected = sum(robust_variance(one, shares)[0] for one in np.eye(groups))
    assert expected == pytest.approx(float((shares**2).sum() / shares.sum() ** 2))


def test_groups_of_equal_weight_are_students_t():
    random = np.random.default_rng(0)
    differences = random.normal(0.2, 1, 40)
    reference = stats.ttest_1samp(np.repeat(differences, 5).reshape(40, 5).mean(axis=1), 0)
    found = paired_effect(np.zeros(200), np.repeat(differences, 5), groups=np.repeat(np.arange(40), 5))
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(reference.pvalue)
    assert (found.items, found.groups, found.independent) == (200, 40, 40)
    assert found.effective == pytest.approx(40, rel=0.05)  # five times the same is one


def test_items_that_are_their_own_groups_are_worth_themselves():
    random = np.random.default_rng(1)
    differences, shares = random.normal(0, 1, (1, 60)), random.uniform(1, 3, 60)
    assert effective_number(differences, shares, np.arange(60)) == pytest.approx(60)
    pairs = np.repeat(np.arange(30), 2)
    opposed = np.tile([1.0, -1.0], 30)[None] + 0.01 * differences
    assert effective_number(opposed, np.ones(60), pairs) == 60  # no more than there are


@pytest.mark.parametrize(
    ("groups", "per", "correlation", "spread"),
    [(200, 5, 0.1, 0.0), (50, 20, 0.3, 0.0), (50, 20, 0.3, 0.8), (12, 20, 0.3, 0)],
)
def test_null_pairs_of_groups(groups, per, correlation, spread):
    random = np.random.default_rng(2)
    wrong = 0
    for _ in range(600):
        differences, labels = null_pair(random, groups, per, correlation, spread=spread)
        found = paired_effect(np.zeros_like(differences), differences, random.uniform(1, 3, len(labels)), groups=labels)
        wrong += not found.low <= 0 <= found.high
    assert 0.03 <= wrong / 600 <= 0.07  # as independent items 11 to 43%


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_null_pairs_of_groups_and_seeds(seeds):
    random = np.random.default_rng(3)
    wrong = 0
    for _ in range(500):
        differences, labels = null_pair(random, 50, 10, 0.3, seeds, of_seeds=0.1)
        found = paired_effect(np.zeros_like(differences), differences, groups=labels)
        wrong += not found.low <= 0 <= found.high
    assert 0.025 <= wrong / 500 <= 0.07


def test_several_seeds_of_groups_are_those_of_the_groups_means():
    differences, labels = null_pair(np.random.default_rng(4), 30, 4, 0.5, seeds=3, of_seeds=0.2)
    shares = np.random.default_rng(5).uniform(1, 3, len(labels))
    grouped = by_group(differences, shares, labels)
    zeros = np.zeros_like(differences)
    found = paired_effect(zeros, differences, shares, groups=labels)
    alone = paired_effect(np.zeros_like(grouped.differences), grouped.differences, grouped.shares)
    assert found[:4] == pytest.approx(alone[:4])
    low, high = hierarchical_bootstrap(zeros, differences, shares, groups=labels)
    assert (low, high) == pytest.approx(
        hierarchical_bootstrap(np.zeros_like(grouped.differences), grouped.differences, grouped.shares)
    )


def test_five_groups_prove_nothing():
    found = paired_effect(np.zeros(100), np.ones(100) + np.arange(100) / 1e3, groups=np.repeat(np.arange(5), 20))
    assert found.low <= 0 <= found.high and found.p_value == pytest.approx(2 / 2**5)


@pytest.mark.parametrize(("labels", "words"), [([1] * 9, "needs at least two"), ([1, 2], "2 groups are named for 9")])
def test_what_is_no_grouping_is_refused(labels, words):
    with pytest.raises(UserError, match=words):
        paired_effect(np.zeros(9), np.ones(9), groups=labels)


# ---- Other runs ------------------------------------------------------------------------------------------------------


def test_the_spread_of_other_runs_is_a_part_of_the_variance():
    """As the interval of several seeds whose parts these are."""
    differences = np.random.default_rng(6).normal(0.05, 0.2, 300)
    found = paired_effect(np.zeros(300), differences, spread=Spread(0.02, 4))
    items, runs = differences.var(ddof=1) / 300, 2 * 0.02**2
    half = float(critical(0.05, runs / (items + runs), 4, 300)) * np.sqrt(items + runs)
    assert (found.low, found.high) == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert found.spread == Spread(0.02, 4)


@pytest.mark.parametrize("others", [1, 3])
def test_null_pairs_whose_seed_noise_is_known_from_other_runs(others):
    random = np.random.default_rng(7)
    wrong = 0
    for _ in range(800):
        runs = 0.05 * random.standard_normal(2 + others)
        differences = runs[1] - runs[0] + 0.3 * random.standard_normal(100)
        spread = Spread(float(np.std([runs[0], *runs[2:]], ddof=1)), 1 + others)
        found = paired_effect(np.zeros(100), differences, spread=spread)
        wrong += not found.low <= 0 <= found.high
    assert 0.02 <= wrong / 800 <= 0.07  # without: 40%


# ---- Neighbours and skewness -----------------------------------------------------------------------------------------


@quick()
@given(SEEDS, st.integers(20, 200))
def test_the_correlation_of_neighbours_is_statsmodels_autocorrelation(seed, items):
    values = np.random.default_rng(seed).standard_t(3, items)
    scores = stats.norm.ppf((stats.rankdata(values) - 0.5) / items)
    expected = acf(scores, nlags=LAGS, fft=False)[1:].mean()
    found = neighbours(values)
    assert found is not None and found.correlation == pytest.approx(expected)
    assert found.p_value == pytest.approx(stats.norm.sf((expected + 1 / items) * np.sqrt(LAGS * items)))
    assert neighbours(np.exp(values)) == pytest.approx(found)  # ranks alone count


def test_neighbours_of_one_group_are_warned_of_and_independent_ones_hardly_ever():
    random = np.random.default_rng(8)
    shares = {"alone": 0, "groups": 0}
    for _ in range(400):
        shares["alone"] += neighbour_note(random.standard_t(4, (1, 300)), "the loss") != ""
        shares["groups"] += neighbour_note(null_pair(random, 50, 20, 0.3)[0], "the loss") != ""
    assert shares["alone"] <= 12 and shares["groups"] >= 395  # 1% of 400, and all
    told = neighbour_note(null_pair(random, 50, 20, 0.3)[0], "the loss")
    assert "differ alike in the loss (correlation 0." in told and "`python -m llm prepare --group-by`" in told
    assert neighbours(np.zeros(50)) is None and neighbours(np.arange(19.0)) is None


def test_skewed_differences_are_warned_of():
    random = np.random.default_rng(9)
    ones = np.ones(100)
    assert "are skewed" in skewness_note(random.lognormal(0, 1.5, (1, 100)), ones, "the loss")
    assert skewness_note(random.normal(0, 1, (1, 100)), ones, "the loss") == ""
    assert skewness_note(random.lognormal(0, 1.5, (1, 20)), np.ones(20), "the loss") == ""  # too few to know


@pytest.mark.parametrize(
    ("draw", "items", "least", "most"),
    [
        (lambda r, n: r.standard_t(4, n), 30, 0, 8),  # symmetric: 4.5% false verdicts
        (lambda r, n: r.standard_t(3, n), 100, 0, 8),  # 4.9%
        (lambda r, n: r.exponential(size=n), 500, 0, 3),  # 5.4%
        (lambda r, n: r.lognormal(0, 1, n), 50, 80, 100),  # 10.2%
        (lambda r, n: r.lognormal(0, 1.5, n), 200, 90, 100),  # 12.1%
    ],
    ids=["t(4), 30", "t(3), 100", "exponential, 500", "log-normal, 50", "log-normal of 1.5, 200"],
)
def test_the_warning_of_skewness_comes_where_coverage_suffers(draw, items, least, most):
    random = np.random.default_rng(10)
    ones = np.ones(items)
    warned = [skewness_note(draw(random, items)[None], ones, "the loss") != "" for _ in range(400)]
    assert least <= 100 * np.mean(warned) <= most


def test_mean_against_median_errs_as_often_as_it_should():
    """Of 500 normal values in 5% of cases; of skewed ones it rejects symmetry."""
    random = np.random.default_rng(11)
    wrong = np.mean([asymmetric(random.standard_normal(500)) for _ in range(1000)])
    assert 0.03 <= wrong <= 0.07
    assert asymmetric(random.lognormal(0, 1, 100)) and asymmetric(-random.lognormal(0, 1, 100))


# ---- Several sets of items -------------------------------------------------------------------------------------------


def test_groups_of_several_sets_stay_apart():
    assert joined_groups([None, None], [3, 2]) is None
    found = joined_groups([np.array([7, 7, 9]), None, np.array([7, 8, 7])], [3, 2, 3])
    assert found.tolist() == [0, 0, 1, 3, 4, 5, 6, 5]


def test_groups_change_no_part_of_the_variance_by_seed():
    differences, labels = null_pair(np.random.default_rng(10), 20, 3, 0.4, seeds=3, of_seeds=0.3)
    grouped = by_group(differences, np.ones(len(labels)), labels)
    whole, parts = variance_parts(differences, np.ones(len(labels))), variance_parts(*grouped)
    assert parts.seeds == pytest.approx(whole.seeds) and parts.items > whole.items
