"""Paired differences with intervals, and tests that keep their level; differences are second minus first.

values of S seeds x N items for both sides -> differences -> an interval and a p value that agree

The items (documents, questions) are a sample, and so are the seeds: with one seed the interval speaks of the two
models at hand, with several of the change. scipy is imported here, so this module where it is needed.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from evals.verdict.clusters import by_group, effective_number, robust_variance
from llm.common.errors import UserError

Key = TypeVar("Key", bound=Hashable)
Floats = NDArray[np.float64]
LowHighP = tuple[float, float, float]

AT_ONCE = 2_000_000  # resampled values held at a time: 16 MB an array
EQUAL = 1e-12  # variances of equal means are rounding: below this part of what single values give
FEW = 16  # items, of which all signs are tried: 65,536 sums
FLAT = 1e-6  # an interval whose width is no more of its middle is rounding
SMALLEST_P = 1e-100  # scipy's quantiles end near 1e-300


class Effect(NamedTuple):
    """A paired difference with its interval. `p_value` < 1 - `level` just where the interval leaves out zero.

    groups: how many groups the items are of, None where each stands alone. effective: how many independent items they
    are worth. spread: what of the interval is the runs' own, where one seed has it from other runs.
    """

    difference: float
    low: float
    high: float
    p_value: float
    level: float
    seeds: int
    items: int
    groups: int | None = None
    effective: float | None = None
    spread: "Spread | None" = None

    @property
    def independent(self) -> int:
        """How many independent parts the items are of: their groups, or the items."""
        return self.items if self.groups is None else self.groups


class Spread(NamedTuple):
    """How far runs of one config that differ in initial weights or seed alone lie apart: standard deviation of a
    measure over so many runs, in the measure's unit."""

    deviation: float
    runs: int


class Interval(NamedTuple):
    """A value with its interval. `p_value` < 1 - level just where the interval leaves out zero."""

    value: float
    low: float
    high: float
    p_value: float

    @property
    def shown(self) -> int:
        """1 or -1: the side of zero on which the whole interval lies; 0 where it contains zero."""
        return int(self.low > 0) - int(self.high < 0)

    def mapped(self, function: Callable[[float], float]) -> "Interval":
        """The interval of a monotonic function of the value."""
        low, high = sorted((function(self.low), function(self.high)))
        return Interval(function(self.value), low, high, self.p_value)


class McNemar(NamedTuple):
    """How many items only the first and only the second had right, and whether that is chance."""

    only_first: int
    only_second: int
    p_value: float


class VarianceComponents(NamedTuple):
    """What the variance of the mean over S seeds and N items is made of."""

    seeds: float  # of the seeds' own means: what differs from seed to seed, for all items or for single ones
    items: float  # what single items add in all seeds alike


# ---- The paired difference -------------------------------------------------------------------------------------------


def paired_effect(
    first: ArrayLike,
    second: ArrayLike,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
    groups: ArrayLike | None = None,
    spread: Spread | None = None,
) -> Effect:
    """The mean of second minus first over items (weighted) and seeds, with an interval.

    One seed: the paired bootstrap over items; `_over_groups` where they have groups, `_with_spread` where the spread of
    other runs is known. Several: `_over_seeds`, of groups where there are any. `resamples` and `seed` are of the
    bootstrap alone. None is surer than `_no_surer_than_signs` says.

    Args:
        first: (S, N) values of the baseline, or (N,); column i is one item, row s one seed.
        second: the same of the changed side, for the same items and seeds.
        weights: (N,) positive, such as predicted tokens per document: sum_i w_i d_i / sum_i w_i, whose denominator
            is resampled with its numerator.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        groups: (N,) labels of what the items are parts of, as the book of a chunk; groups are independent, items not.
        spread: of runs of the first side's config, for one seed: what other initial weights change.

    Raises:
        UserError: fewer than two items or groups, sides of different shape, values that are not finite, weights that
            are not positive.
    """
    differences, shares = _checked(first, second, weights)
    seeds, items = differences.shape
    estimate = _mean(differences, shares)
    number = effective = None
    if groups is not None:
        effective = effective_number(differences, shares, groups)
        differences, shares = by_group(differences, shares, groups)
        number = len(shares)
    spread = spread if seeds == 1 else None
    if not differences.any() and spread is None:
        return Effect(0.0, 0.0, 0.0, 1.0, level, seeds, items, number, effective)
    if seeds > 1:
        low, high, p_value = _over_seeds(differences, shares, level)
    elif spread is not None:
        low, high, p_value = _with_spread(differences[0], shares, spread, level)
    elif groups is not None:
        low, high, p_value = _over_groups(differences[0], shares, level)
    else:
        low, high, p_value = _over_items(differences[0], None if weights is None else shares, level, resamples, seed)
    low, high, p_value = _no_surer_than_signs(differences, shares, low, high, p_value, level)
    return Effect(estimate, low, high, p_value, level, seeds, items, number, effective, spread)


def _checked(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats]:
    """Differences (S, N) and weights (N,) with mean 1."""
    one, two = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (first, second))
    if one.shape != two.shape or one.ndim != 2:
        raise UserError(
            f"the two sides hold {one.shape} and {two.shape} values (seeds, items); give the same items and seeds"
        )
    if one.shape[0] < 1 or one.shape[1] < 2:
        raise UserError(f"an interval needs at least two items, and there are {one.shape[1]}; measure more of them")
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise UserError("a measured value is not a finite number; measure both sides again")
    shares = np.ones(one.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if shares.shape != (one.shape[1],) or not (np.isfinite(shares).all() and (shares > 0).all()):
        raise UserError(f"the weights of {one.shape[1]} items must be as many positive numbers; measure both again")
    return two - one, shares / shares.mean()


def _no_surer_than_signs(
    differences: Floats, shares: Floats, low: float, high: float, p_value: float, level: float
) -> LowHighP:
    """Low, high and p value, none of them surer than the signs of the items' differences allow.

    A spread that is estimated from few items may be far too small, and where all differ by the same it is zero. The
    test that flips their signs (Fisher 1935, The design of experiments) is exact there. Of the N items that differ (in
    the mean over seeds) it allows a p value of 2 / 2^N at the least, when all have one sign: two items prove nothing,
    five are too few for 5%. An interval without width is given that of a share: at most 1 - (alpha / 2)^(1 / N) of all
    items go the other way by as much (Clopper and Pearson 1934). It leaves out zero just where this test does.
    """
    alpha, estimate = 1 - level, _mean(differences, shares)
    counted = differences.mean(axis=0) * shares
    differing = counted[np.abs(counted) > EQUAL * np.abs(differences).max()]
    items = max(1, len(differing))
    if high - low <= FLAT * abs(estimate):
        other_way = 1 - (alpha / 2) ** (1 / items)
        low, high = sorted((estimate, estimate * (1 - 2 * other_way)))
        p_value = max(SMALLEST_P, 2.0 ** (1 - items))
    elif len(differing) <= FEW:
        p_value = max(p_value, _flipped(differing))
    return (low, high, p_value) if p_value < alpha else (min(low, 0.0), max(high, 0.0), p_value)


def _flipped(values: Floats) -> float:
    """The share of all ways to choose the values' signs whose sum is as far from zero as theirs, or farther."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return float((np.abs(sums) >= abs(values.sum()) - EQUAL * np.abs(values).sum()).mean())


def _mean(differences: Floats, shares: Floats) -> float:
    return float((differences * shares).sum() / (len(differences) * shares.sum()))


def _over_items(differences: Floats, shares: Floats | None, level: float, resamples: int, seed: int) -> LowHighP:
    """Low, high and p value of the percentile bootstrap over items (Efron 1979), expanded for few items.

    The percentiles are those of a normal variable with 1 / N, not 1 / (N - 1), that give Student's quantile (Hesterberg
    2015, What teachers should know about the bootstrap): else 50 items give too short an interval. BCa was
    tried and is worse here: 2,000 null pairs each of weighted losses from t(3) (50 and 200 documents) had 8.8 and 6.9%
    false verdicts with BCa, 5.7 and 5.8% with this; 100 answers, of which the models disagree on 5%, 8.9 and 4.2%. Very
    skewed differences (log-normal) give 9.6% at 200 documents and 7.2% at 500, with BCa 9.3 and 7.3%.
    """
    items = len(differences)
    widening = math.sqrt(items / (items - 1))
    tail = float(stats.norm.cdf(widening * stats.t.ppf((1 - level) / 2, items - 1)))
    rank = math.floor(tail * (resamples + 1))  # of the value that `low` is, counted from 1
    if rank < 1:  # items so few, or resamples, that none lies far enough out: Student's interval
        kept = np.ones(items) if shares is None else shares
        estimate = _mean(differences[None], kept)
        residuals = (differences - estimate) * kept / items
        variance = float((residuals**2).sum()) * widening**2
        return _student(estimate, VarianceComponents(0.0, variance), items, items, level)
    drawn = stats.bootstrap(
        (differences,) if shares is None else (differences * shares, shares),
        np.mean if shares is None else _ratio,
        n_resamples=resamples,
        batch=max(1, AT_ONCE // items),
        paired=shares is not None,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    drawn.sort()
    beyond = 1 + min(np.searchsorted(drawn, 0.0, side="right"), resamples - np.searchsorted(drawn, 0.0, side="left"))
    quantile = stats.norm.ppf(min(0.5, beyond / (resamples + 1))) / widening
    return float(drawn[rank - 1]), float(drawn[-rank]), float(2 * stats.t.cdf(quantile, items - 1))


def _ratio(products: Floats, shares: Floats, axis: int = -1) -> Floats:
    return products.sum(axis=axis) / shares.sum(axis=axis)


def _over_groups(differences: Floats, shares: Floats, level: float) -> LowHighP:
    """Low, high and p value of a mean over groups: Student's interval, robust to groups of any size and variance.

    Of null pairs of 12 to 200 groups 4 to 6% are called different (docs/null_pairs.csv). Of 8 to 50 groups, sizes of
    log-normal spread 1: 5.0 to 5.5%; with plain variances and G - 1 degrees of freedom 7 to 10%, with Satterthwaite's
    degrees 2 to 3%, with a bootstrap over groups 6 to 8%.
    """
    variance, degrees = robust_variance(differences, shares)
    found = student_interval(_mean(differences[None], shares), math.sqrt(variance), degrees, level)
    return found.low, found.high, found.p_value


def _with_spread(differences: Floats, shares: Floats, spread: Spread, level: float) -> LowHighP:
    """Low, high and p value of one pair's mean that also covers what another run of either side would have given.

    Two runs that differ in nothing but their initial weights differ by a variance of twice `spread`, known with one
    degree of freedom less than there are runs. So the interval is that of several seeds, of which this is one.
    """
    variance, degrees = robust_variance(differences, shares)
    parts = VarianceComponents(2 * spread.deviation**2, variance)
    return _student(_mean(differences[None], shares), parts, spread.runs, degrees + 1, level)


# ---- Several seeds ---------------------------------------------------------------------------------------------------


def _over_seeds(differences: Floats, shares: Floats, level: float) -> LowHighP:
    """Low, high and p value of a mean over several seeds and many items.

    d_si = effect + seed_s + item_i + rest_si. The mean's variance is the sum of `variance_parts`; the seeds' part is
    known with S - 1 degrees of freedom only. Drawing the few seeds with replacement, as the hierarchical bootstrap
    does, gives them no variance where they happen to agree: three seeds agree in sign in a quarter of null pairs, and
    all of these are called different. So the interval is the root of that sum times a quantile between Student's of
    S - 1 and of N - 1 degrees of freedom (`critical`). Without item_i it is the paired t interval of the seeds' means.
    Using the least variance that single items imply was tried, and gains next to nothing if the level is kept.
    """
    seeds, items = differences.shape
    return _student(_mean(differences, shares), variance_parts(differences, shares), seeds, items, level)


def _student(estimate: float, parts: VarianceComponents, seeds: int, items: float, level: float) -> LowHighP:
    """Low, high and p value: estimate ± critical value x standard error, and the level at which that touches zero."""
    variance = parts.seeds + parts.items
    if variance <= 0:  # every item differs by the same, in each seed
        return estimate, estimate, SMALLEST_P
    share, error = parts.seeds / variance, math.sqrt(variance)

    def beyond(log_p: float) -> float:
        return float(critical(math.exp(log_p), share, seeds, items)) - abs(estimate) / error

    least = math.log(SMALLEST_P)
    p_value = SMALLEST_P if beyond(least) <= 0 else math.exp(optimize.brentq(beyond, least, 0.0, xtol=1e-12))
    half = float(critical(1 - level, share, seeds, items)) * error
    return estimate - half, estimate + half, min(1.0, p_value)


def critical(alpha: float, share: ArrayLike, seeds: int, items: float) -> Floats:
    """The quantile, in standard errors, that a mean over seeds and items exceeds by chance with probability `alpha`.

    `share`: of the seeds in the estimated variance, 0 to 1, of any shape. Cochran and Cox (Experimental Designs, 1950)
    weigh the two quantiles by the share itself, which at a level of 5% errs in as little as 2.2% of cases
    for 2 seeds and 2.9% for 3; Satterthwaite's degrees of freedom err in up to 12.8 and 7.8%. With this power of the
    share it is 2.9 to 7.0% for 2 seeds, 4.0 to 5.7% for 3 and 4.4 to 5.4% from 4 on, whatever the true share is; at a
    level of 1%, 0.4 to 2.8%, 0.6 to 1.8% and 0.8 to 1.5%. The tests integrate these anew.
    """
    of_items, of_seeds = -special.stdtrit(items - 1, alpha / 2), -special.stdtrit(seeds - 1, alpha / 2)
    weight = np.asarray(share, dtype=np.float64) ** (2 - 1.5 / seeds)
    return (1 - weight) * of_items + weight * of_seeds


def hierarchical_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 1999,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> tuple[float, float]:
    """Low and high of the percentile bootstrap that draws seeds and items with replacement (Owen 2007, the pigeonhole).

    Shown beside the interval of `paired_effect`, and no verdict rests on it: where the seeds' spread outweighs the
    items' it leaves out zero in 24% of null pairs of three seeds, 16% of five and 12% of ten. Arguments as there.
    """
    differences, shares = _checked(first, second, weights)
    if groups is not None:
        differences, shares = by_group(differences, shares, groups)
    seeds, items = differences.shape
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, some := max(1, AT_ONCE // items)):
        count = min(some, resamples - start)
        times = generator.multinomial(items, np.full(items, 1 / items), size=count)  # (count, N)
        means = (times @ (differences * shares).T) / (times @ shares)[:, None]  # (count, S)
        chosen = generator.integers(seeds, size=(count, seeds))
        drawn.append(np.take_along_axis(means, chosen, axis=1).mean(axis=1))
    low, high = np.quantile(np.concatenate(drawn), ((1 - level) / 2, (1 + level) / 2))
    return _no_surer_than_signs(differences, shares, float(low), float(high), 0.0, level)[:2]


def variance_parts(differences: Floats, shares: Floats) -> VarianceComponents:
    """Seeds' and items' parts of the variance of the weighted mean, from differences (S, N) and weights (N,).

    Two-way analysis of variance of the residuals w_i (d_si - mean_s) / sum w. The variance of the items' means over
    seeds holds the single values' too; these are in the seeds' part already and taken off, down to zero at the least.
    Counts of answers may be the same in every seed by chance, though other items make them up. Then the seeds' part is
    what the single values alone give it, which is more than nearly equal counts would: of null pairs of 20 to 2,000
    answers 0.05 to 5.0% have p < 0.05 with 2 seeds and 2.6 to 5.8% with 3 and 5 (without this up to 11.1 and 5.8%).
    """
    seeds, items = differences.shape
    means = (differences * shares).sum(axis=1) / shares.sum()
    residuals = (differences - means[:, None]) * shares / shares.sum()
    shared = residuals.mean(axis=0)
    correction = items / (items - 1)
    both = float((shared**2).sum()) * correction
    single = float(((residuals - shared) ** 2).sum()) * correction / (seeds - 1)
    of_seeds, least = float(means.var(ddof=1)) / seeds, single / seeds
    return VarianceComponents(least if of_seeds < EQUAL * least else of_seeds, max(0.0, both - least))


def student_interval(value: float, error: float, degrees: float, level: float = 0.95) -> Interval:
    """Value ± Student's quantile x standard error, with the p value of the test that the truth is zero."""
    half = float(stats.t.isf((1 - level) / 2, degrees)) * error
    p_value = float(2 * stats.t.sf(abs(value) / error, degrees)) if error > 0 else (1.0 if value == 0 else SMALLEST_P)
    return Interval(float(value), float(value - half), float(value + half), p_value)


# ---- Counts, and many tests ------------------------------------------------------------------------------------------


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """McNemar's test (1947), exact: are the items that only one side has right as often either's? (N,) booleans.

    p = 1 where the two never disagree. Raises UserError where the two have not as many items.
    """
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != two.shape or one.ndim != 1:
        raise UserError(f"the two sides hold {one.shape} and {two.shape} answers; give the same items")
    only_first, only_second = int((one & ~two).sum()), int((two & ~one).sum())
    disagreed = only_first + only_second
    p_value = float(stats.binomtest(only_first, disagreed).pvalue) if disagreed else 1.0
    return McNemar(only_first, only_second, p_value)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """p values corrected for their number (Holm 1979): below 5%, at most one in twenty families errs at all.

    The keys keep their order. Sorted upwards, the n-th is multiplied by how many are left and is no smaller than
    the one before, nor above 1.
    """
    adjusted, largest = {}, 0.0
    for done, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}
