"""Documents that belong together: means by group, what they are worth, and a test for groups that are not named.

values and a label an item -> one value a group -> the statistics of groups in place of items

The chunks of one book differ between two models alike. As independent documents, 50 books of 20 chunks with an
intra-class correlation of 0.3 make 43% of null pairs look different.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from llm.common.errors import UserError

Floats = NDArray[np.float64]

LAGS = 4  # neighbours up to so many places apart
FEWEST = 20  # items for the test of neighbours
SKEWED = 0.2  # skewness over the root of the number of values
ASYMMETRY = 0.05  # level of the test that the values are not symmetric
SKEWED_FROM = 30  # values: of fewer the skewness is not known, and a verdict is about these alone anyway
ALPHA = 0.01  # of that test: one comparison in a hundred is warned of by chance


class Grouped(NamedTuple):
    """Differences by group: (S, G) of S seeds and G groups, the groups' weights (G,) with mean 1."""

    differences: Floats
    shares: Floats


class Neighbours(NamedTuple):
    """Mean correlation of differences up to `LAGS` places apart; the p value that it is not positive."""

    correlation: float
    p_value: float


def by_group(differences: Floats, shares: Floats, groups: ArrayLike) -> Grouped:
    """Weighted mean of each group's differences; the weighted mean over groups is that over items.

    Args:
        differences: (S, N). shares: (N,), positive. groups: (N,) labels.

    Raises:
        UserError: not a label an item, or a single group.
    """
    labels = np.asarray(groups)
    if labels.shape != shares.shape:
        raise UserError(f"{len(labels)} groups are named for {len(shares)} items; measure both sides again")
    _, place = np.unique(labels, return_inverse=True)
    count = int(place.max()) + 1
    if count < 2:
        raise UserError("all items are of one group, and an interval needs at least two; measure more of them")
    weights = np.bincount(place, shares)
    sums = np.stack([np.bincount(place, row * shares, count) for row in differences])
    return Grouped(sums / weights, weights / weights.mean())


def robust_variance(differences: Floats, shares: Floats) -> tuple[float, float]:
    """Variance of a weighted mean of independent values of any variance, and its degrees of freedom.

    Residuals are enlarged so that the variance is unbiased where all have one variance (Bell and McCaffrey 2002, Bias
    reduction in standard errors for linear regression with multi-stage samples). The degrees of freedom are those of as
    many groups of equal weight as are worth these, (sum w)^2 / sum w^2 (Kish 1965), less one. Of equal weights that is
    s^2 / G with G - 1.

    Args:
        differences: (G,), one a group. shares: (G,), positive.
    """
    pi = shares / shares.sum()
    squares = float((pi**2).sum())
    factors = pi**2 / (1 - 2 * pi + squares)  # E r_g^2 = sigma^2 (1 - 2 pi_g + sum pi^2)
    variance = float((factors * (differences - pi @ differences) ** 2).sum())
    return variance, max(1.0, 1 / squares - 1)


def skewness_note(differences: Floats, shares: Floats, what: str) -> str:
    """Warn that a mean of skewed values is surer than it should be; "" where it is not. differences: (S, N).

    The error of an interval's level grows with the skewness over the root of the number (Hall 1992, The bootstrap and
    Edgeworth expansion). One outlier of a symmetric distribution with heavy tails gives as large a value, and costs
    no coverage, so a test of mean against median has to reject symmetry too. 3,000 null pairs each: 30 values from t(4)
    have 4.5% false verdicts and 4% warnings (without the test 15%), 30 to 200 log-normal ones 7 to 11% and about 75%.
    """
    mean = differences.mean(axis=0)
    residuals = shares * (mean - np.average(mean, weights=shares))
    if len(residuals) < SKEWED_FROM or not residuals.any():
        return ""
    size = abs(float(stats.skew(residuals))) / float(np.sqrt(len(residuals)))
    if size <= SKEWED or not asymmetric(residuals):
        return ""
    return (
        f"Warning: the differences in {what} are skewed, and few for that: without a true difference its 95% interval "
        "may leave out zero in more than 5% of cases (simulated: up to 12%)."
    )


def asymmetric(values: Floats) -> bool:
    """Whether mean and median differ by more than chance, for any symmetric distribution with a variance.

    The test of Miao, Gel and Gastwirth (2006, A new test of symmetry about an unknown median): (mean - median) over
    J = sqrt(pi / 2) mean |x - median|, times sqrt(n), has variance pi / 2 - 1 under normality; J resists outliers.
    """
    median = float(np.median(values))
    spread = float(np.sqrt(np.pi / 2) * np.abs(values - median).mean())
    statistic = np.sqrt(len(values)) * abs(float(values.mean()) - median) / spread
    return bool(statistic > stats.norm.isf(ASYMMETRY / 2) * np.sqrt(np.pi / 2 - 1))


def effective_number(differences: Floats, shares: Floats, groups: ArrayLike) -> float:
    """How many independent items of these weights give as sure a mean as these in their groups; N at the most.

    N times the variance of the mean if all items were independent, over its variance by group (Kish 1965, the inverse
    of the design effect). Args: as `by_group`; the mean over seeds counts.
    """
    mean = differences.mean(axis=0, keepdims=True)
    grouped = by_group(mean, shares, groups)
    alone, _ = robust_variance(mean[0], shares)
    together, _ = robust_variance(grouped.differences[0], grouped.shares)
    items = float(mean.shape[1])
    return items if together <= alone else items * alone / together


def neighbours(differences: Sequence[float] | Floats) -> Neighbours | None:
    """Whether items that stand close together differ alike: one-sided, on normal scores of the ranks.

    Items of different groups are as likely to be alike as any; those of one group stand side by side in a store. Under
    independence the autocorrelation of n values at any lag has about mean -1 / n and variance 1 / n (Bartlett 1946).
    None for fewer than `FEWEST` items, or if all are equal.
    """
    values = np.asarray(differences, dtype=np.float64)
    items = len(values)
    if items < FEWEST or np.ptp(values) == 0:
        return None
    scores = stats.norm.ppf((stats.rankdata(values) - 0.5) / items)
    scores -= scores.mean()
    at_lags = [float(scores[:-lag] @ scores[lag:]) for lag in range(1, LAGS + 1)]
    correlation = float(np.mean(at_lags)) / float(scores @ scores)
    z = (correlation + 1 / items) * np.sqrt(LAGS * items)
    return Neighbours(correlation, float(stats.norm.sf(z)))


def neighbour_note(differences: Floats, what: str) -> str:
    """Warn that neighbouring items differ alike and name the remedy; "" where they do not. differences: (S, N)."""
    found = neighbours(differences.mean(axis=0))
    if found is None or found.p_value >= ALPHA:
        return ""
    p_value = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    return (
        f"Warning: neighbouring documents differ alike in {what} (correlation {found.correlation:.2f}, {p_value}), as "
        "chunks of one text do, and the interval takes them as independent, which is then too narrow: name what they "
        "are chunks of with `python -m llm prepare --group-by`."
    )
