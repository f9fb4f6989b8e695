"""Joint fit of all arms' losses over a ladder of sizes: a second opinion next to `evals.verdict.ladder`.

L = E + A_arm N^-a + B_arm D^-b, or E + K_arm C^-c where every size has one token budget: one floor E for all arms, and
exponents that they share or that each has of its own. Huber's loss on the log of the loss (Hoffmann et al. 2022).

exponents on a grid, coefficients by non-negative least squares (variable projection: Golub and Pereyra 1973) -> all
parameters together from the best of them -> errors from whole pairs of trunks

No verdict rests on it: `evals.verdict.ladder_estimator` needs no shape for single sizes and their mean.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from evals.verdict.statistics import Interval, student_interval
from llm.common.errors import UserError

Floats = NDArray[np.float64]

GRID = np.geomspace(0.03, 1.0, 12)  # exponents that the search starts from
TUNING = 1.345  # Huber 1964: 95% efficient for normal errors
LEAST_DELTA = 1e-6  # of log loss: seeds that agree
REACH = 20.0  # of ln m: what lies beyond is not reached


class Points(NamedTuple):
    """Final losses of P runs or branches; arm 0 is the baseline.

    pair: number of the runs that share size and seed, of any arm, with all their branches.
    """

    arm: NDArray[np.int64]  # (P,)
    size: NDArray[np.int64]
    pair: NDArray[np.int64]
    parameters: Floats
    tokens: Floats
    compute: Floats
    loss: Floats


@dataclass(frozen=True)
class Law:
    """A fitted law. `theta`: E, then A ln-coefficients of each of F terms, then exponents of each term.

    owners: exponents of a term: 1 where all arms share them, else as many as arms.
    """

    theta: Floats
    covariance: Floats
    centre: Floats  # (F,) of the logs of N and D, or of C
    arms: int
    owners: int
    degrees: float
    objective: float  # half the sum of Huber's loss

    @property
    def exponents(self) -> Floats:
        """(F, owners)."""
        return self.theta[1 + self.arms * len(self.centre) :].reshape(len(self.centre), self.owners)

    def loss(self, arm: NDArray[np.int64], logs: Floats) -> tuple[Floats, Floats]:
        """Return losses (P,) of arms (P,) at logs (P, F) and their gradient (P, parameters)."""
        return _loss(self.theta, arm, logs, self.centre, self.arms, self.owners)

    def error(self, gradient: Floats) -> float:
        """Return the standard error of a value with this gradient on the parameters."""
        return math.sqrt(max(0.0, float(gradient @ self.covariance @ gradient)))


@dataclass(frozen=True)
class JointFit:
    """The law with shared exponents, and what each arm's own exponents say."""

    terms: tuple[str, ...]  # ("N", "D") or ("C",)
    arms: tuple[str, ...]
    floor: Interval
    exponents: dict[str, Interval]  # by term: shared by all arms
    coefficients: dict[str, dict[str, float]]  # arm -> term -> A, B or K
    own_exponents: dict[str, dict[str, Interval]]  # arm -> term
    own_p_values: dict[str, float]  # arm -> test of its exponents against the baseline's
    log_multipliers: dict[str, tuple[Interval | None, ...]]  # arm -> by size, at its largest budget; own exponents
    shared_multipliers: dict[str, tuple[Interval | None, ...]]  # the same with shared exponents
    residuals: Floats  # (P,) ln of measured over fitted loss, shared exponents
    shared: Law
    own: Law


def fit_jointly(points: Points, names: Sequence[str], level: float = 0.95) -> JointFit:
    """Fit all arms together.

    Raises:
        UserError: fewer than three sizes or than two seeds of a size, or a loss that is not positive and finite.
    """
    _check(points)
    budgets = max(len(np.unique(points.tokens[points.size == size])) for size in np.unique(points.size))
    terms = ("N", "D") if budgets > 1 else ("C",)
    logs = np.log(np.stack([points.parameters, points.tokens] if budgets > 1 else [points.compute], axis=1))
    arms = len(names)
    shared = fit_law(points, logs, arms, own=False)
    own = fit_law(points, logs, arms, own=True)
    first = 1 + arms * len(terms)

    def interval(law: Law, index: int) -> Interval:
        return student_interval(
            law.theta[index], float(np.sqrt(max(0.0, law.covariance[index, index]))), law.degrees, level
        )

    coefficients = np.exp(shared.theta[1:first].reshape(len(terms), arms) + shared.exponents * shared.centre[:, None])
    path = _path(points, budgets)
    multipliers = [
        {name: _multipliers(law, arm, points, logs, path, level) for arm, name in enumerate(names) if arm}
        for law in (own, shared)
    ]
    return JointFit(
        terms=terms,
        arms=tuple(names),
        floor=interval(shared, 0),
        exponents={term: interval(shared, first + n) for n, term in enumerate(terms)},
        coefficients={
            name: dict(zip(terms, map(float, coefficients[:, n]), strict=True)) for n, name in enumerate(names)
        },
        own_exponents={
            name: {term: interval(own, first + n * arms + arm) for n, term in enumerate(terms)}
            for arm, name in enumerate(names)
        },
        own_p_values={name: _same_exponents(own, arm) for arm, name in enumerate(names) if arm},
        log_multipliers=multipliers[0],
        shared_multipliers=multipliers[1],
        residuals=np.log(points.loss / shared.loss(points.arm, logs)[0]),
        shared=shared,
        own=own,
    )


def _check(points: Points) -> None:
    if not (np.isfinite(points.loss) & (points.loss > 0)).all():
        raise UserError("a loss of the ladder is not a positive number; leave out the pair of a run that diverged")
    if len(np.unique(points.size)) < 3:
        raise UserError("a joint fit needs three sizes; train more sizes")
    for size in np.unique(points.size):
        if len(np.unique(points.pair[points.size == size])) < 2:
            raise UserError(f"size number {size + 1} of the ladder has one seed; train a second one there")


# ---- The fit ---------------------------------------------------------------------------------------------------------


def fit_law(points: Points, logs: Floats, arms: int, own: bool, delta: float | None = None) -> Law:
    """Fit one law to losses at logs (P, F) of size or compute; `own`: exponents of every arm for itself.

    `delta`: of log loss, where Huber's loss turns from square to linear (1.345 standard deviations over seeds). The
    0.001 of Hoffmann et al. 2022 suits runs without seeds; with them it would be the least absolute deviation.
    """
    centre = logs.mean(axis=0)
    owners = arms if own else 1
    delta = _delta(points) if delta is None else delta
    start = _projected(points, logs - centre, arms)
    if own:
        first = 1 + arms * len(centre)
        start = np.concatenate([start[:first], np.repeat(start[first:], arms)])
    log_loss = np.log(points.loss)

    def residuals(theta: Floats) -> Floats:
        return np.log(_loss(theta, points.arm, logs, centre, arms, owners)[0]) - log_loss

    def jacobian(theta: Floats) -> Floats:
        fitted, gradient = _loss(theta, points.arm, logs, centre, arms, owners)
        return gradient / fitted[:, None]

    lower = np.full(len(start), -np.inf)
    lower[0], lower[1 + arms * len(centre) :] = 0.0, 1e-3
    found = optimize.least_squares(
        residuals, np.maximum(start, lower + 1e-9), jacobian, (lower, np.inf), loss="huber", f_scale=delta,
        x_scale="jac", ftol=1e-13, xtol=1e-13, gtol=1e-13, max_nfev=2000,
    )  # fmt: skip
    covariance = _clustered(points, -residuals(found.x), jacobian(found.x), delta, free=found.x > lower + 1e-6)
    degrees = len(np.unique(points.pair)) - len(np.unique(points.size))
    return Law(found.x, covariance, centre, arms, owners, degrees, float(found.cost))


def _delta(points: Points) -> float:
    """Return 1.345 standard deviations of log losses over seeds."""
    cells: dict[tuple[int, int, float], list[int]] = {}
    for n, key in enumerate(zip(points.arm, points.size, points.tokens, strict=True)):
        cells.setdefault(key, []).append(n)
    log_loss = np.log(points.loss)
    scatter = [(log_loss[cell] - log_loss[cell].mean(), len(cell) - 1) for cell in cells.values()]
    degrees = sum(free for _, free in scatter)
    return max(LEAST_DELTA, TUNING * float(np.sqrt(sum((rest**2).sum() for rest, _ in scatter) / degrees)))


def _projected(points: Points, logs: Floats, arms: int) -> Floats:
    """Return E, ln coefficients and shared exponents: the best of a grid, at each the linear coefficients that fit."""
    terms = logs.shape[1]
    own = points.arm[:, None] == np.arange(arms)  # (P, arms)

    def coefficients(exponents: Sequence[float]) -> tuple[float, Floats]:
        powers = np.exp(-np.asarray(exponents) * logs)  # (P, F)
        columns = [np.ones((len(logs), 1)), *(own * powers[:, n, None] for n in range(terms))]
        design = np.concatenate(columns, axis=1) / points.loss[:, None]  # the log of the loss, to first order
        found, residual = optimize.nnls(design, np.ones(len(logs)))
        return residual, found

    best = min(itertools.product(GRID, repeat=terms), key=lambda exponents: coefficients(exponents)[0])
    if terms == 1:
        near = optimize.minimize_scalar(lambda c: coefficients([c])[0], bounds=(best[0] / 2, best[0] * 2))
        best = (float(near.x),)
    found = coefficients(best)[1]
    return np.concatenate([found[:1], np.log(np.maximum(found[1:], 1e-6)), best])


def _loss(
    theta: Floats, arm: NDArray[np.int64], logs: Floats, centre: Floats, arms: int, owners: int
) -> tuple[Floats, Floats]:
    """Return losses (P,) and their gradient (P, parameters)."""
    terms = len(centre)
    loss = np.full(len(logs), theta[0])
    gradient = np.zeros((len(logs), len(theta)))
    gradient[:, 0] = 1.0
    rows = np.arange(len(logs))
    for n in range(terms):
        coefficient = 1 + n * arms + arm
        exponent = 1 + terms * arms + n * owners + (arm if owners > 1 else 0 * arm)
        away = logs[:, n] - centre[n]
        term = np.exp(np.clip(theta[coefficient] - theta[exponent] * away, -50, 50))
        loss = loss + term
        gradient[rows, coefficient] += term
        gradient[rows, exponent] -= term * away
    return loss, gradient


def _clustered(points: Points, rest: Floats, jacobian: Floats, delta: float, free: NDArray[np.bool_]) -> Floats:
    """Return the sandwich covariance of Huber's estimate with pairs as clusters, within their size.

    It is the limit of the bootstrap that draws pairs with replacement within each size, times n / (n - 1). A parameter
    at its bound has none.
    """
    scores = np.clip(rest, -delta, delta)[:, None] * jacobian[:, free]
    inside = (np.abs(rest) <= delta)[:, None] * jacobian[:, free]
    bread = np.linalg.pinv(inside.T @ jacobian[:, free], hermitian=True)
    meat = np.zeros_like(bread)
    for size in np.unique(points.size):
        pairs = np.unique(points.pair[points.size == size])
        sums = np.stack([scores[points.pair == pair].sum(axis=0) for pair in pairs])
        meat += np.cov(sums, rowvar=False).reshape(meat.shape) * len(pairs)
    covariance = np.zeros((len(free), len(free)))
    covariance[np.ix_(free, free)] = bread @ meat @ bread
    return covariance


# ---- What it says ----------------------------------------------------------------------------------------------------


def _same_exponents(law: Law, arm: int) -> float:
    """Return the p value of Wald's test that an arm's exponents are the baseline's, with F's distribution."""
    terms = len(law.centre)
    first = 1 + law.arms * terms
    contrast = np.zeros((terms, len(law.theta)))
    for n in range(terms):
        contrast[n, first + n * law.arms + arm], contrast[n, first + n * law.arms] = 1.0, -1.0
    apart = contrast @ law.theta
    spread = contrast @ law.covariance @ contrast.T
    return float(stats.f.sf(apart @ np.linalg.pinv(spread, hermitian=True) @ apart / terms, terms, law.degrees))


def _path(points: Points, budgets: int) -> Floats:
    """Return by how much the baseline's ln N and ln D, or ln C, grow per unit of ln C from size to size."""
    if budgets == 1:
        return np.ones(1)
    base = points.arm == 0
    share = float(np.polyfit(np.log(points.compute[base]), np.log(points.parameters[base]), 1)[0])
    return np.array([share, 1 - share])


def _multipliers(
    law: Law, arm: int, points: Points, logs: Floats, path: Floats, level: float
) -> tuple[Interval | None, ...]:
    """Return ln m of an arm at each size's largest budget; None where the baseline's law never reaches its loss."""
    found: list[Interval | None] = []
    for size in np.unique(points.size):
        here = np.flatnonzero((points.size == size) & (points.arm == 0))
        at = logs[here[np.argmax(points.tokens[here])]][None]
        reached, on_arm = law.loss(np.array([arm]), at)

        def above(y: float, at: Floats = at, reached: Floats = reached) -> float:
            return float((law.loss(np.zeros(1, dtype=np.int64), at + y * path)[0] - reached)[0])

        if above(REACH) > 0 or above(-REACH) < 0:
            found.append(None)
            continue
        y = optimize.brentq(above, -REACH, REACH, xtol=1e-12)
        slope = (above(y + 1e-5) - above(y - 1e-5)) / 2e-5
        gradient = (on_arm - law.loss(np.zeros(1, dtype=np.int64), at + y * path)[1])[0] / slope
        found.append(
            student_interval(y, float(np.sqrt(max(0.0, gradient @ law.covariance @ gradient))), law.degrees, level)
        )
    return tuple(found)
