"""Intervals and tests against scipy and statsmodels, and how often they err where nothing differs."""

import tracemalloc
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as contingency_mcnemar
from statsmodels.stats.multitest import multipletests

from evals.verdict.statistics import critical, hierarchical_bootstrap, holm, mcnemar, paired_effect, variance_parts
from llm.common.errors import UserError

SEEDS = st.integers(0, 2**32 - 1)
quick = partial(settings, deadline=None, derandomize=True)


def documents(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences of mean zero with heavy tails, noisier where the document is short, and its predicted tokens."""
    tokens = random.lognormal(5.3, 0.5, count).clip(20, 1024).round()
    return 0.05 * random.standard_t(4, count) * np.sqrt(200 / tokens), tokens


def answers(random: np.random.Generator, count: int, discordance: float, effect: float = 0.0) -> np.ndarray:
    """(2, N) right or wrong of two models that disagree on a share of the items; the second is better by `effect`."""
    kind = random.choice(4, count, p=[0.3, 0.7 - discordance, (discordance - effect) / 2, (discordance + effect) / 2])
    return np.array([np.isin(kind, (0, 2)), np.isin(kind, (0, 3))]).astype(float)


# ---- One seed: the bootstrap over items ------------------------------------------------------------------------------


@quick(max_examples=12)
@given(SEEDS, st.integers(30, 400), st.booleans(), st.sampled_from([0.8, 0.95, 0.99]))
def test_one_seed_is_scipys_bootstrap_widened_for_few_items(seed, items, weighted, level):
    random = np.random.default_rng(seed)
    differences, tokens = documents(random, items)
    base = random.normal(2, 1, items)
    found = paired_effect(base, base + differences, tokens if weighted else None, level)
    weights = tokens if weighted else np.ones(items)
    # Hesterberg (2015): the percentile interval at the level that makes it as wide as Student's.
    widened = 1 - 2 * stats.norm.sf(np.sqrt(items / (items - 1)) * stats.t.isf((1 - level) / 2, items - 1))
    reference = stats.bootstrap(
        (differences, weights),
        lambda d, w, axis: np.sum(d * w, axis=axis) / np.sum(w, axis=axis),
        paired=True,
        confidence_level=widened,
        method="percentile",
        rng=np.random.default_rng(seed + 1),
    )
    assert found.difference == pytest.approx(np.average(differences, weights=weights), abs=1e-12)
    # Two draws of 9,999: a quantile of either has the deviation sqrt(p (1 - p) / 9,999) / density, here of a normal.
    tail = (1 - widened) / 2
    chance = np.sqrt(2 * tail * (1 - tail) / 9999) / stats.norm.pdf(stats.norm.isf(tail))
    error, (low, high) = reference.standard_error, reference.confidence_interval
    assert found.low == pytest.approx(low, abs=6 * chance * error)
    assert found.high == pytest.approx(high, abs=6 * chance * error)
    assert (found.seeds, found.items, found.level) == (1, items, level)


def test_one_seed_of_many_items_is_near_the_paired_t_test():
    random = np.random.default_rng(0)
    first, second = random.normal(0, 1, (2, 2000))
    reference = stats.ttest_rel(second + 0.05, first)
    found = paired_effect(first, second + 0.05)
    low, high = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)  # a tenth of the standard error
    assert found.p_value == pytest.approx(reference.pvalue, abs=0.02)


def test_memory_stays_bounded_for_many_items():
    differences = np.random.default_rng(0).normal(0, 1, 10_000)
    tracemalloc.start()
    paired_effect(np.zeros(10_000), differences, np.ones(10_000), resamples=999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6  # all resamples at once are 240 MB of indices, weights and products


def test_so_few_items_that_no_resample_lies_far_enough_out():
    first, second = np.array([1.0, 2.0, 4.0]), np.array([1.5, 1.6, 4.7])
    reference = stats.ttest_rel(second, first)
    found = paired_effect(first, second)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(reference.pvalue)


# ---- Several seeds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_where_seeds_dominate_it_is_the_paired_t_test_of_their_means(seeds):
    random = np.random.default_rng(seeds)
    first = random.normal(2, 1, (seeds, 5000))
    second = first + random.normal(0.01, 0.01, (seeds, 1)) + random.normal(0, 0.01, (seeds, 5000))
    reference = stats.ttest_rel(second.mean(axis=1), first.mean(axis=1))
    found = paired_effect(first, second)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=0.01, abs=1e-4)
    assert found.p_value == pytest.approx(reference.pvalue, rel=0.02)


def test_equal_seeds_are_one_seed_of_items():
    first, second = np.random.default_rng(0).normal(0, 1, (2, 60))
    reference = stats.ttest_rel(second, first)
    found = paired_effect([first] * 3, [second] * 3)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(reference.pvalue)


@quick(max_examples=20)
@given(SEEDS, st.integers(2, 5), st.integers(0, 3))
def test_counts_that_agree_by_chance_are_no_certainty(seed, seeds, net):
    """The same net count in every seed, of other items in each: about what the items alone say, and never sure."""
    random = np.random.default_rng(seed)
    row = np.repeat([1.0, -1.0, 0.0], [20 + net, 20, 160 - net])
    differences = np.stack([random.permutation(row) for _ in range(seeds)])
    found = paired_effect(np.zeros_like(differences), differences)
    assert found.difference == pytest.approx(net / 200)
    items = stats.ttest_1samp(differences.ravel(), 0.0)
    assert found.p_value >= items.pvalue - 1e-9 and found.low < 0 < found.high
    assert net or found.p_value == 1


@pytest.mark.parametrize(("seeds", "items"), [(2, 50), (3, 200), (5, 50)])
def test_answers_of_equal_models_are_seldom_called_different(seeds, items):
    """Null pairs of right and wrong answers, whose counts are often equal."""
    random = np.random.default_rng(0)
    p_values = np.array([paired_effect(*(random.random((2, seeds, items)) < 0.5)).p_value for _ in range(1500)])
    assert (p_values < 0.05).mean() < 0.07 and (p_values < 0.001).mean() < 0.005


@quick(max_examples=5)
@given(SEEDS, st.integers(2, 5), st.integers(3, 12))
def test_parts_of_the_variance_are_those_of_a_two_way_analysis(seed, seeds, items):
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    random = np.random.default_rng(seed)
    differences = random.normal(0, 1, (seeds, items)) + random.normal(0, 1, items) + random.normal(0, 1, (seeds, 1))
    row, column = np.indices(differences.shape)
    frame = pandas.DataFrame({"d": differences.ravel(), "seed": row.ravel(), "item": column.ravel()})
    squares = anova_lm(ols("d ~ C(seed) + C(item)", frame).fit())["mean_sq"]
    parts = variance_parts(differences, np.ones(items))
    assert parts.seeds == pytest.approx(squares["C(seed)"] / (seeds * items))
    shared = (squares["C(item)"] - squares["Residual"]) / (seeds * items)
    assert parts.items == pytest.approx(max(0.0, shared), abs=1e-9)


@pytest.mark.parametrize(
    ("seeds", "alpha", "least", "most"),
    [
        *((2, 0.05, 2.9, 7.05), (3, 0.05, 4.0, 5.75), *((seeds, 0.05, 4.4, 5.4) for seeds in range(4, 11))),
        *((2, 0.01, 0.36, 2.85), (3, 0.01, 0.65, 1.8), *((seeds, 0.01, 0.79, 1.5) for seeds in range(4, 11))),
    ],
)
def test_critical_values_err_as_often_as_is_said(seeds, alpha, least, most):
    """Integrated over the estimated variance, for every ratio of the items' part to the seeds'."""
    levels = (np.arange(20_000) + 0.5) / 20_000
    estimated = stats.chi2.ppf(levels, seeds - 1) / (seeds - 1)  # the true one is 1
    errs = []
    for of_items in [0.0, *np.logspace(-3.5, 3, 40)]:
        limit = critical(alpha, estimated / (estimated + of_items), seeds, 10**6) * np.sqrt(estimated + of_items)
        errs.append(200 * stats.norm.sf(limit / np.sqrt(1 + of_items)).mean())
    assert min(errs) >= least
    assert max(errs) <= most
    assert errs[0] == pytest.approx(100 * alpha, rel=0.02)
    assert errs[-1] == pytest.approx(100 * alpha, rel=0.05)


# ---- What holds for both ---------------------------------------------------------------------------------------------


@quick(max_examples=60)
@given(SEEDS, st.integers(1, 5), st.integers(2, 60), st.sampled_from([0.5, 0.9, 0.95, 0.99]), st.booleans())
def test_properties(seed, seeds, items, level, binary):
    random = np.random.default_rng(seed)
    first, second = random.normal(0, 1, (2, seeds, items))
    second += random.normal(0, 0.5)
    if binary:
        first, second = np.sign(first), np.sign(second)
    weights = random.uniform(1, 9, items)
    measure = partial(paired_effect, level=level, resamples=999)
    found = measure(first, second, weights)
    assert found.low <= found.difference <= found.high
    assert (found.p_value < 1 - level) == (not found.low <= 0 <= found.high)
    swapped = measure(second, first, weights)
    expected = (-found.difference, -found.high, -found.low, found.p_value)
    assert swapped[:4] == pytest.approx(expected, abs=1e-9)
    scaled = measure(3 * first, 3 * second, 7 * weights)
    assert scaled[:4] == pytest.approx((*(3 * value for value in found[:3]), found.p_value), abs=1e-9)
    order = random.permutation(seeds)
    if seeds > 1:
        assert measure(first[order], second[order], weights) == pytest.approx(found)
    shifted = random.normal(0, 1, (seeds, items)).round(3)
    assert measure(first + shifted, second + shifted, weights)[:4] == pytest.approx(found[:4], abs=1e-9)


@pytest.mark.parametrize("seeds", [1, 3])
def test_no_difference_anywhere(seeds):
    values = np.random.default_rng(0).normal(2, 1, (seeds, 50))
    assert paired_effect(values, values)[:4] == (0.0, 0.0, 0.0, 1.0)
    same = paired_effect(values, values + 1)  # by the same everywhere
    other_way = stats.binomtest(0, 50).proportion_ci(0.95, "exact").high  # of all items, where none of 50 does
    assert same[:3] == pytest.approx((1.0, 1 - 2 * other_way, 1.0))
    assert same.p_value < 0.01


def test_as_many_gained_as_lost_is_no_difference():
    differences = np.repeat([0.0, 1.0, -1.0], [90, 5, 5])
    for weights in (None, np.full(100, 0.1)):
        assert paired_effect(np.zeros(100), differences, weights).p_value == 1.0


@pytest.mark.parametrize(
    ("sides", "weights", "words"),
    [
        (([[1.0]], [[2.0]]), None, "at least two items, and there are 1; measure more"),
        (([1.0, 2.0], [1.0, 2.0, 3.0]), None, "give the same items and seeds"),
        (([1.0, np.nan], [1.0, 2.0]), None, "not a finite number; measure both sides again"),
        (([1.0, 2.0], [1.0, 3.0]), [1.0, 0.0], "weights of 2 items must be as many positive numbers"),
        (([1.0, 2.0], [1.0, 3.0]), [1.0], "weights of 2 items must be as many positive numbers"),
    ],
)
def test_refused(sides, weights, words):
    with pytest.raises(UserError, match=words):
        paired_effect(*sides, weights)


# ---- Where nothing differs, and where something does -----------------------------------------------------------------


def false_verdicts(draw, pairs: int = 500, **options) -> float:
    """Share of `pairs` drawn without a true difference whose interval leaves out zero."""
    effects = [paired_effect(*draw(), **options) for _ in range(pairs)]
    return float(np.mean([not effect.low <= 0 <= effect.high for effect in effects]))


@pytest.mark.parametrize("count", [60, 200])
def test_null_pairs_of_losses(count):
    random = np.random.default_rng(0)

    def draw():
        differences, tokens = documents(random, count)
        base = random.normal(2, 0.5, count)
        return base, base + differences, tokens

    assert 0.03 <= false_verdicts(draw, resamples=499) <= 0.07


@pytest.mark.parametrize(("count", "discordance"), [(100, 0.3), (200, 0.15)])
def test_null_pairs_of_answers(count, discordance):
    random = np.random.default_rng(1)
    assert 0.03 <= false_verdicts(lambda: answers(random, count, discordance), resamples=499) <= 0.07


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    ("of_seeds", "shared", "single"),
    [(0.1, 0.3, 0.3), (0.0, 0.0, 0.5), (0.0, 0.4, 0.4), (0.03, 0.2, 0.4)],
    ids=["seeds dominate", "items only", "items shared by seeds", "all alike"],
)
def test_null_pairs_of_several_seeds(seeds, of_seeds, shared, single):
    random = np.random.default_rng(2)
    count = 150

    def draw():
        differences = (
            random.normal(0, of_seeds, (seeds, 1))
            + shared * random.standard_t(4, count) / np.sqrt(2)
            + single * random.standard_t(4, (seeds, count)) / np.sqrt(2)
        )
        return np.zeros((seeds, count)), differences, random.lognormal(5.3, 0.4, count)

    assert 0.03 <= false_verdicts(draw) <= 0.07


def test_null_pairs_of_answers_with_three_seeds():
    random = np.random.default_rng(3)

    def draw():
        drawn = [answers(random, 300, 0.2, float(np.clip(random.normal(0, 0.03), -0.1, 0.1))) for _ in range(3)]
        return np.stack([d[0] for d in drawn]), np.stack([d[1] for d in drawn])

    assert 0.03 <= false_verdicts(draw) <= 0.07


def test_a_difference_of_four_standard_errors_is_found():
    random = np.random.default_rng(4)
    found = {"losses": 0, "answers": 0, "seeds": 0}
    for _ in range(100):
        differences, tokens = documents(random, 300)
        error = np.sqrt(np.sum((tokens * differences) ** 2)) / tokens.sum()
        found["losses"] += paired_effect(np.zeros(300), differences - 4 * error, tokens, resamples=499).high < 0
        effect = 4 * np.sqrt(0.2 / 400)
        found["answers"] += paired_effect(*answers(random, 400, 0.2, effect), resamples=499).low > 0
        of_seeds = random.normal(0, 0.01, (10, 1)) + 4 * 0.01 / np.sqrt(10)
        found["seeds"] += paired_effect(np.zeros((10, 50)), of_seeds + random.normal(0, 1e-3, (10, 50))).low > 0
    # Of a normal estimate 97.9%, of Student's with nine degrees of freedom 94.6%.
    assert found["losses"] >= 93 and found["answers"] >= 93 and found["seeds"] >= 87, found


# ---- Counts, and many tests ------------------------------------------------------------------------------------------


@quick(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=80))
def test_mcnemar(pairs):
    first, second = np.array(pairs, dtype=bool).reshape(-1, 2).T
    table = [
        [np.sum(a == first) and np.sum((first == a) & (second == b)) for b in (True, False)] for a in (True, False)
    ]
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (table[0][1], table[1][0])
    expected = contingency_mcnemar(table, exact=True).pvalue if table[0][1] + table[1][0] else 1.0
    assert found.p_value == pytest.approx(expected)


def test_mcnemar_of_different_items():
    with pytest.raises(UserError, match="give the same items"):
        mcnemar([True, False], [True])


@quick(max_examples=100)
@given(st.dictionaries(st.integers(0, 99), st.floats(0, 1), max_size=12))
def test_holm(p_values):
    found = holm(p_values)
    assert list(found) == list(p_values)
    if p_values:
        with patch("gc.collect"):  # statsmodels calls it each time
            expected = multipletests(list(p_values.values()), method="holm")[1]
        assert list(found.values()) == pytest.approx(list(expected))


# ---- The hierarchical bootstrap --------------------------------------------------------------------------------------


def test_the_hierarchical_bootstrap_draws_seeds_and_items():
    """Against a loop that draws both with replacement, one pair of draws at a time."""
    numbers = np.random.default_rng(3)
    first, weights = np.zeros((5, 60)), numbers.uniform(1, 9, 60)
    second = 0.2 + 0.3 * numbers.standard_normal((5, 1)) + numbers.standard_normal((5, 60))
    drawn = []
    for _ in range(4000):
        seeds, items = numbers.integers(5, size=5), numbers.integers(60, size=60)
        drawn.append(np.average(second[np.ix_(seeds, items)], axis=1, weights=weights[items]).mean())
    expected = np.quantile(drawn, (0.05, 0.95))
    found = hierarchical_bootstrap(first, second, weights, level=0.9, resamples=4000)
    assert found == pytest.approx(expected, abs=0.06 * (expected[1] - expected[0]))


def test_three_seeds_cannot_be_resampled():
    """Where seeds dominate it errs in the quarter of null pairs whose seeds agree in sign; no verdict rests on it."""
    numbers = np.random.default_rng(4)
    wrong = 0
    for _ in range(300):
        second = numbers.standard_normal((3, 1)) + 0.1 * numbers.standard_normal((3, 100))
        low, high = hierarchical_bootstrap(np.zeros((3, 100)), second, resamples=400)
        wrong += not low <= 0 <= high
    assert 0.18 < wrong / 300 < 0.34
