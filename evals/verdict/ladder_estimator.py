"""Compute multiplier of a change over a ladder of sizes, from paired losses: arrays in, estimates with errors out.

losses -> pooled covariance of trunks -> baseline's curve, averaged over its exponent -> paired differences as compute
-> each size, mean, line, sizes as the sample, held-out largest size

Everything is in natural logarithms: y = ln m, where the baseline's own ladder needs compute m C for the loss that the
arm has at C. Every function takes a batch of ladders of one design, so that the estimator that speaks on a page is the
one that `evals.verdict.ladder_simulation` calibrates.

M ladders, S sizes, n seeds of a size, K branches of a trunk (its token budgets), G exponents of the grid, P outputs
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from evals.verdict.ladder_lines import Estimate, Floats, OfSizes, at, fit_line, misfit, over_sizes, root

FALL, FALL_SD = 0.05, 0.15  # prior of h, the fall of ln sd per ln C: a ladder's few seeds say little of it
EXPONENTS = np.geomspace(0.03, 0.7, 32)  # c of the baseline's curve
EXPONENT, EXPONENT_SD = 0.15, 0.5  # prior of c: lognormal
LARGEST_SHARE = 0.9  # of the loss above the floor that a difference may take: beyond it the logarithm runs away
LEAST_STEEPNESS = 4.0  # standard errors of the baseline's slope: below, a difference is not turned into compute
CURVE_MISFIT, LINE_MISFIT = 0.01, 0.1  # p values below which the curve and the line are given up
LEAST_SD = 1e-8  # nats: below it seeds that agree are rounding
DECADE = float(np.log(10))


class Losses(NamedTuple):
    """Final losses of baseline and arm, in nats per token: for each of S sizes an array (M, n, K).

    log_compute: (S,) ln FLOPs of a size, the mean over its branches.
    """

    log_compute: Floats
    base: Sequence[Floats]
    arm: Sequence[Floats]

    @property
    def seeds(self) -> Floats:
        """(S,) seeds of each size."""
        return np.array([one.shape[1] for one in self.base], dtype=np.float64)

    def without_largest(self) -> "Losses":
        """The ladder of the other S - 1 sizes."""
        return Losses(self.log_compute[:-1], self.base[:-1], self.arm[:-1])


Noise = tuple[Any, Any]  # a variance (M,), and the x of the size that it comes from


class Moments(NamedTuple):
    """Means of the sizes, and the covariance of whole trunks pooled over them."""

    x: Floats  # (S,) ln C minus its mean
    base: Floats  # (M, S, K)
    difference: Floats  # (M, S, K) baseline minus arm: positive where the arm is better
    covariance: Floats  # (M, 2K, 2K) of (base, difference) of one trunk at x = 0
    noise: Floats  # (M, S) variance of a size's mean relative to one trunk at x = 0: φ² / n
    fall: Floats  # (M,) h: sd falls as C^-h
    fall_variance: float  # of h from ladder to ladder
    degrees: float  # ν, of the covariance


class Curve(NamedTuple):
    """Baseline's curve E + K C^-c at each exponent of the grid, as α - g (1 - e^(-cx)) / c of either branch.

    A value at `EXPONENTS[j]` has weight `weight[:, j]`. g is the slope at x = 0 in nats per unit of ln C.
    """

    weight: Floats  # (M, G) sums to 1
    level: Floats  # (M, G, K) α
    slope: Floats  # (M, G, K) g
    on_level: Floats  # (M, G, S) gradient of α on the baseline's means
    on_slope: Floats  # (M, G, S) gradient of g
    misfit: Floats  # (M,) q: least weighted residual per degree of freedom, at least 1
    p_value: Floats  # (M,) of the misfit; 1 with three sizes, through which a curve always passes
    steepness: Floats  # (M,) g over its standard error


class Paired(NamedTuple):
    """Differences as y = ln m, averaged over the exponents of the curve."""

    value: Floats  # (M, S)
    noise: Floats  # (M, S, S) covariance that the trunks' scatter gives them
    spread: Floats  # (M, S, S) covariance over the exponents
    seeds: Floats  # (M, S) what a size's own differences give it of the first
    share: Floats  # (M, S) of the baseline's loss above its floor that the difference takes; of the largest branch
    by_exponent: Floats  # (M, G, S)
    gradient: Floats  # (M, G, S, S, 2K) on the trunks' means (base, difference)


class Estimates(NamedTuple):
    """What a ladder says of one arm; see `estimate`."""

    difference: Estimate  # (M, S) nats, baseline minus arm, mean over branches
    size: Estimate  # (M, S) y
    mean: Estimate  # (M,) plain average of y: of no shape over sizes
    slope: Estimate  # (M,) of the line, per unit of ln C
    largest: Estimate  # (M,) the line's value at the largest size
    beyond: Estimate  # (M,) what as many seeds would show a decade beyond the largest size, by the line
    of_sizes: OfSizes | None  # the second interval; None with three sizes
    line_p_value: Floats  # (M,) of the line's misfit
    curve_p_value: Floats  # (M,) of the baseline curve's misfit
    steepness: Floats  # (M,) the curve's slope over its standard error
    share: Floats  # (M, S) part of the baseline's loss above its floor that the difference takes, the largest branch
    fall: Floats  # (M,) h
    exponent: Floats  # (M,) c of the baseline's curve, the mean over the grid


class HeldOut(NamedTuple):
    """The largest size as the smaller ones predict it, with the seed noise of its own mean in the error."""

    difference: Estimate  # (M,) nats
    loss: Estimate  # (M,) of the arm
    measured_difference: Floats
    measured_loss: Floats


def estimate(losses: Losses) -> Estimates:
    """Estimate every quantity but the held-out ones for each of M ladders: three sizes or more, of two seeds or more.

    The line's weights are of the seeds' variance alone; its variance is pooled from seeds and residual, (ν + Q) over
    (ν + S - 2), so that its interval widens where the sizes scatter about it.
    """
    moments = pool(losses)
    curve = fit_curve(moments)
    paired = convert(moments, curve)
    x, value, degrees, sizes = moments.x, paired.value, moments.degrees, len(moments.x)
    line, pooled = fit_line(x, value, 1 / paired.seeds), degrees + sizes - 2
    scale = (degrees + line.residual) / pooled

    def combined(row: Floats, degrees: float, scale: Floats | float, *more: Noise) -> Estimate:
        noise, spread = (_quadratic(row, matrix) * scale for matrix in (paired.noise, paired.spread))
        parts = [(noise, _centre(row, paired.seeds, x)), *more]
        return _from_parts(moments, np.einsum("ms,ms->m", row, value), parts, spread, degrees)

    each = [combined(np.broadcast_to(row, value.shape), degrees, 1.0) for row in np.eye(sizes)]
    further = x[-1] + DECADE
    beyond = at(line, further)
    there = _seed_noise(moments, curve, np.einsum("ms,ms->m", beyond, value), further)
    return Estimates(
        difference=differences(moments),
        size=Estimate(*(np.stack(parts, axis=1) for parts in zip(*each, strict=True))),
        mean=combined(np.full(value.shape, 1 / sizes), degrees, 1.0),
        slope=combined(line.on_y[:, 1], pooled, scale),
        largest=combined(at(line, x[-1]), pooled, scale),
        beyond=combined(beyond, pooled, scale, (there, further)),
        of_sizes=over_sizes(x, value, paired.seeds, paired.noise + paired.spread) if sizes > 3 else None,
        line_p_value=misfit(x, value, 1 / paired.seeds, line, degrees),
        curve_p_value=curve.p_value,
        steepness=curve.steepness,
        share=paired.share,
        fall=moments.fall,
        exponent=_average(curve.weight, np.broadcast_to(EXPONENTS, curve.weight.shape)),
    )


def differences(moments: Moments) -> Estimate:
    """Estimate each size's difference (M, S) in nats, the mean over its branches; any number of sizes."""
    noise = moments.noise * _part(moments, 1, 1).mean(axis=(1, 2))[:, None]
    return _from_parts(moments, moments.difference.mean(axis=2), [(noise, moments.x)], 0.0, moments.degrees)


def multiplier_given(found: Estimates) -> NDArray[np.bool_]:
    """Return which of M ladders may turn differences into compute: a baseline that falls, on a curve that reaches."""
    steep, fits = found.steepness >= LEAST_STEEPNESS, found.curve_p_value >= CURVE_MISFIT
    return steep & fits & (found.share <= LARGEST_SHARE).all(axis=1)


def hold_out(losses: Losses) -> HeldOut:
    """Predict the largest size of ladders with four or more from the others, by their line and the baseline's curve."""
    smaller = losses.without_largest()
    moments = pool(smaller)
    curve = fit_curve(moments)
    paired = convert(moments, curve)
    line = fit_line(moments.x, paired.value, 1 / paired.seeds)
    x = float(losses.log_compute[-1] - smaller.log_compute.mean())
    degrees = moments.degrees + len(moments.x) - 2
    scale = (moments.degrees + line.residual) / degrees
    row = at(line, x)
    y = np.einsum("mgs,ms->mg", paired.by_exponent, row)  # the line's value at each exponent
    above = curve.slope.mean(axis=2) * np.exp(-EXPONENTS * x) / EXPONENTS  # (M, G) of the baseline's loss there
    difference = -above * np.expm1(-EXPONENTS * y)
    on_y = above * EXPONENTS * np.exp(-EXPONENTS * y)
    branches = moments.base.shape[2]
    on_pair = np.einsum("mg,ms,mgsjk->mgjk", on_y, row, paired.gradient)
    on_curve = np.zeros_like(on_pair)
    on_curve[..., :branches] = (difference / curve.slope.mean(axis=2))[..., None, None] * curve.on_slope[..., None]
    on_curve[..., :branches] /= branches
    on_loss = np.zeros_like(on_pair)
    run = -np.expm1(-EXPONENTS * x) / EXPONENTS
    on_loss[..., :branches] = (curve.on_level - run[:, None] * curve.on_slope)[..., None] / branches
    loss = curve.level.mean(axis=2) - curve.slope.mean(axis=2) * run - difference
    noise = np.exp(-2 * moments.fall * x) / losses.seeds[-1]  # φ² / n of the largest size
    both, arm = _part(moments, 1, 1), _part(moments, 0, 0) - _part(moments, 0, 1) - _part(moments, 1, 0)
    predicted = []
    for values, gradient, own in (
        (difference, on_pair + on_curve, both),
        (loss, on_loss - on_pair - on_curve, arm + both),
    ):
        seeds, spread = _covariance(moments, curve, values[..., None], gradient[:, :, None])
        parts = [
            (seeds[:, 0, 0] * scale, _centre(row, paired.seeds, moments.x)),
            (noise * own.mean(axis=(1, 2)), x),
        ]
        value = _average(curve.weight, values)
        predicted.append(_from_parts(moments, value, parts, spread[:, 0, 0] * scale, degrees))
    base, arm_loss = (side[-1].mean(axis=(1, 2)) for side in (losses.base, losses.arm))
    return HeldOut(predicted[0], predicted[1], base - arm_loss, arm_loss)


# ---- Pair and yardstick ----------------------------------------------------------------------------------------------


def pool(losses: Losses) -> Moments:
    """Return the sizes' means and the trunks' covariance, pooled over sizes after division by φ = C^-h."""
    x = losses.log_compute - losses.log_compute.mean()
    trunks = [np.concatenate([base, base - arm], axis=2) for base, arm in zip(losses.base, losses.arm, strict=True)]
    means = np.stack([trunk.mean(axis=1) for trunk in trunks], axis=1)  # (M, S, 2K)
    residuals = [trunk - trunk.mean(axis=1, keepdims=True) for trunk in trunks]
    branches = means.shape[2] // 2
    fall, fall_variance = _fall(x, residuals, branches)
    scale = np.exp(-2 * fall[:, None] * x)  # φ²
    degrees = float((losses.seeds - 1).sum())
    scatter = sum(np.einsum("mni,mnj->mij", r, r) / scale[:, i, None, None] for i, r in enumerate(residuals))
    covariance = scatter / degrees + LEAST_SD**2 * np.eye(2 * branches)
    return Moments(
        x, means[..., :branches], means[..., branches:], covariance, scale / losses.seeds, fall, fall_variance, degrees
    )


def _fall(x: Floats, residuals: Sequence[Floats], branches: int) -> tuple[Floats, float]:
    """Return h (M,) and its sampling variance: minus half the slope of log variances over ln C, shrunk to its prior.

    The log of a variance of k degrees of freedom has mean ψ(k/2) - ln(k/2) and variance ψ'(k/2). Base's and
    difference's are averaged, and counted as one: they are correlated.
    """
    degrees = np.array([residual.shape[1] - 1 for residual in residuals], dtype=np.float64)
    logs = np.zeros((len(residuals[0]), len(x)))
    for part in (slice(0, branches), slice(branches, None)):
        sums = np.stack([(r[..., part].mean(axis=2) ** 2).sum(axis=1) for r in residuals], axis=1)
        logs += np.log(sums / degrees + LEAST_SD**2) / 2
    logs -= special.digamma(degrees / 2) - np.log(degrees / 2)
    weights, information = fall_weights(x, degrees)
    precision = information + 1 / FALL_SD**2
    return (logs @ weights + FALL / FALL_SD**2) / precision, information / precision**2


def fall_weights(x: Floats, degrees: Floats) -> tuple[Floats, float]:
    """Return the weights of log variances (S,) of so many degrees of freedom in h, times the information they give."""
    weights = 1 / special.polygamma(1, degrees / 2)
    centred = x - (weights * x).sum() / weights.sum()
    return -2 * weights * centred, float(4 * (weights * centred**2).sum())


def fit_curve(moments: Moments) -> Curve:
    """Fit the baseline's curve at each exponent, and weigh the exponents by how well it fits.

    At a given c the curve is a line in u = (1 - e^(-cx)) / c. Weights: the marginal likelihood of Student form with the
    variance q times the seeds', over flat α and g, times the prior of c; none where the floor E = α - g / c would be
    negative or the curve rise. With branches the residual is that of their mean: a trunk counts once.
    """
    x, precision = moments.x, 1 / moments.noise
    degrees, sizes = moments.degrees, len(x)
    u = -np.expm1(-EXPONENTS[:, None] * x) / EXPONENTS[:, None]  # (G, S)
    total = precision.sum(axis=1)[:, None]
    centre = precision @ u.T / total  # (M, G)
    centred = u - centre[..., None]  # (M, G, S)
    square = np.einsum("ms,mgs->mg", precision, centred**2)
    on_slope = -precision[:, None] * centred / square[..., None]
    on_level = precision[:, None] / total[..., None] + on_slope * centre[..., None]
    slope, level = on_slope @ moments.base, on_level @ moments.base  # (M, G, K)
    branches = moments.base.shape[2]
    variance = (_part(moments, 0, 0).sum(axis=(1, 2)) / branches**2)[:, None]
    mean, g, alpha = moments.base.mean(axis=2), slope.mean(axis=2), level.mean(axis=2)
    rest = mean[:, None] - alpha[..., None] + g[..., None] * u
    residual = np.einsum("ms,mgs->mg", precision, rest**2) / variance
    least, free = residual.min(axis=1), sizes - 3
    misfit = np.maximum(1.0, least / free) if free else np.ones(len(least))
    logs = -(degrees + sizes - 2) / 2 * np.log1p(residual / (degrees * misfit[:, None])) - np.log(total * square) / 2
    logs = logs - (np.log(EXPONENTS / EXPONENT) / EXPONENT_SD) ** 2 / 2
    allowed = (g > 0) & (alpha >= g / EXPONENTS)
    allowed |= ~allowed.any(axis=1, keepdims=True)
    logs = np.where(allowed, logs, -np.inf)
    weight = np.exp(logs - logs.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    p_value = stats.f.sf(least / free, free, degrees) if free else np.ones(len(least))
    steepness = _average(weight, g * np.sqrt(square / variance))
    return Curve(weight, level, slope, on_level, on_slope, misfit, p_value, steepness)


def _part(moments: Moments, row: int, column: int) -> Floats:
    """Return a block (M, K, K) of the trunks' covariance: 0 is the baseline, 1 the difference."""
    branches = moments.base.shape[2]
    return moments.covariance[:, row * branches :, column * branches :][:, :branches, :branches]


# ---- Differences as compute ------------------------------------------------------------------------------------------


def convert(moments: Moments, curve: Curve) -> Paired:
    """Turn paired differences into y = ln m, and propagate the errors of differences and curve.

    With R the baseline's loss above its floor, y = -(1/c) ln(1 - d/R), the mean over branches.
    """
    c = EXPONENTS[:, None, None]  # (G, S, K)
    above = curve.slope[:, :, None] * np.exp(-c * moments.x[:, None]) / c  # R (M, G, S, K)
    difference = moments.difference[:, None]
    part = np.clip(difference / above, None, (1 + LARGEST_SHARE) / 2)
    by_exponent = -(np.log1p(-part) / c).mean(axis=3)
    branches = above.shape[3]
    on_difference = 1 / (c * above * (1 - part) * branches)
    on_slope = -part / (c * curve.slope[:, :, None] * (1 - part) * branches)
    sizes = len(moments.x)
    gradient = np.zeros((*by_exponent.shape, sizes, 2 * branches))  # of y of a size on the trunks' means of any
    gradient[..., :branches] = on_slope[..., None, :] * curve.on_slope[:, :, None, :, None]
    own = np.arange(sizes)
    gradient[:, :, own, own, branches:] = on_difference
    seeds = np.einsum("mgsk,mkl,mgsl,ms->mgs", on_difference, _part(moments, 1, 1), on_difference, moments.noise)
    value, seeds = _average(curve.weight, by_exponent), _average(curve.weight, seeds)
    noise, spread = _covariance(moments, curve, by_exponent, gradient)
    share = _average(curve.weight, difference / above).max(axis=2)
    return Paired(value, noise, spread, seeds, share, by_exponent, gradient)


def _covariance(moments: Moments, curve: Curve, values: Floats, gradient: Floats) -> tuple[Floats, Floats]:
    """Return two covariances (M, P, P) of outputs (M, G, P) with gradient (M, G, P, S, 2K) on the trunks' means.

    The mean over exponents of what the trunks' scatter gives, and the spread over exponents. The baseline's own block
    of the scatter is q times what the seeds say: what the curve misses is an error of the curve.
    """
    ladders, exponents, outputs = values.shape
    branches = moments.base.shape[2]
    covariance = moments.covariance.copy()
    covariance[:, :branches, :branches] *= curve.misfit[:, None, None]
    errors = gradient @ root(covariance)[:, None, None] * np.sqrt(moments.noise)[:, None, None, :, None]
    errors = errors.reshape(ladders, exponents, outputs, -1)
    spread = values - _average(curve.weight, values)[:, None]
    weight = curve.weight[..., None, None]
    within = (weight * (errors @ errors.swapaxes(2, 3))).sum(axis=1)
    return within, np.einsum("mg,mgp,mgq->mpq", curve.weight, spread, spread)


def _from_parts(
    moments: Moments, value: Floats, parts: Sequence[Noise], spread: Floats | float, degrees: float
) -> Estimate:
    """Return an estimate whose variance is made of parts of seeds' noise and of the spread over exponents.

    Degrees of freedom by Satterthwaite (1946): more for the spread, which has no sampling error (m = 2 is covered in
    94 to 97%, without this in 95 to 99%). Fewer for what is not known of h: its error times x is one of the log of a
    standard error. Satterthwaite would count that twice; the ends of six sizes of two seeds are covered in 91 to 95%
    without it, 94 to 97% with once, 97 to 99% with twice.
    """
    noise = sum(variance for variance, _ in parts)
    x = sum(variance * x for variance, x in parts) / noise
    variance = noise + spread
    freedom = 1 / (1 / degrees + x**2 * moments.fall_variance) * (variance / noise) ** 2
    return Estimate(value, np.sqrt(variance), freedom)


def _quadratic(row: Floats, matrix: Floats) -> Floats:
    return np.einsum("ms,mst,mt->m", row, matrix, row)


def _centre(row: Floats, seeds: Floats, x: Floats) -> Floats:
    """Return the x (M,) at which the noise of a linear combination of sizes lies: their mean by share of variance."""
    share = row**2 * seeds
    return share @ x / share.sum(axis=1)


def _seed_noise(moments: Moments, curve: Curve, y: Floats, x: float) -> Floats:
    """Return the variance (M,) of y that seeds alone would give a size at x, as many as the largest size has."""
    above = curve.slope.mean(axis=2) * np.exp(-EXPONENTS * x) / EXPONENTS
    on_difference = _average(curve.weight, (np.exp(EXPONENTS * y[:, None]) / (EXPONENTS * above)) ** 2)
    trunk = _part(moments, 1, 1).mean(axis=(1, 2))
    return on_difference * trunk * moments.noise[:, -1] * np.exp(-2 * moments.fall * (x - moments.x[-1]))


def _average(weight: Floats, values: Floats) -> Floats:
    """Return the mean over exponents (axis 1) with weights (M, G)."""
    return np.einsum("mg,mg...->m...", weight, values)
