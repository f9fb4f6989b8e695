"""A ladder's estimator against statsmodels, scipy and finite differences, and against simulated truths."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize, stats

from evals.verdict import ladder_estimator as estimator
from evals.verdict.ladder_estimator import EXPONENTS, Losses
from evals.verdict.ladder_lines import fit_line, misfit, over_sizes
from evals.verdict.ladder_simulation import (
    BRANCHES,
    TRUTHS,
    Design,
    Law,
    Seeds,
    Truth,
    measure_coverage,
    simulate,
    true_log_multiplier,
)

BY_NAME = {truth.name: truth for truth in TRUTHS}


def drawn(truth: Truth | str, design: Design, ladders: int = 3, seed: int = 0) -> Losses:
    """Simulated losses."""
    truth = BY_NAME[truth] if isinstance(truth, str) else truth
    return simulate(truth, design, ladders, np.random.default_rng(seed)).losses


# ---- Parts against other implementations -----------------------------------------------------------------------------


def test_pooled_covariance_of_ladders_whose_scatter_does_not_fall():
    """With h = 0 it is the within-size covariance of a one-way analysis of variance."""
    losses = drawn("m = 1.3", Design(5, 3))
    moments = estimator.pool(losses)
    for ladder in range(3):
        scale = np.exp(-moments.fall[ladder] * moments.x)
        sides = zip(losses.base, losses.arm, strict=True)
        trunks = [np.column_stack([base[ladder], (base - arm)[ladder]]) for base, arm in sides]
        expected = sum(2 * np.cov(one, rowvar=False) / s**2 for one, s in zip(trunks, scale, strict=True)) / 10
        np.testing.assert_allclose(moments.covariance[ladder], expected, rtol=1e-9)
        np.testing.assert_allclose(moments.noise[ladder], scale**2 / 3)


def test_fall_of_the_scatter_is_found_and_shrunk():
    many = Seeds(fall=0.3)
    found = estimator.pool(drawn(Truth("", seeds=many), Design(5, 200), 20)).fall
    assert found.mean() == pytest.approx(0.3, abs=0.01)
    few = estimator.pool(drawn(Truth("", seeds=many), Design(5, 2), 400)).fall
    assert 0.05 < few.mean() < 0.25  # between the prior and the truth
    assert few.std() < 0.12  # without the prior: 0.2


@pytest.mark.parametrize("branches", [1, 3])
def test_curve_is_least_squares_at_every_exponent(branches):
    moments = estimator.pool(drawn("m = 1.3", Design(5, 3, branches)))
    curve = estimator.fit_curve(moments)
    for ladder, exponent in ((0, 0), (1, 15), (2, 31)):
        c = EXPONENTS[exponent]
        design = sm.add_constant(-(1 - np.exp(-c * moments.x)) / c)
        for branch in range(branches):
            fit = sm.WLS(moments.base[ladder, :, branch], design, 1 / moments.noise[ladder]).fit()
            assert curve.level[ladder, exponent, branch] == pytest.approx(fit.params[0], rel=1e-9)
            assert curve.slope[ladder, exponent, branch] == pytest.approx(fit.params[1], rel=1e-9)


def test_curve_weighs_exponents_around_the_best_fit():
    """With hardly any noise the weighted exponent is the one that curve_fit finds, and its misfit is unremarkable."""
    x = np.arange(5) * 1.8
    means = 2.0 + 3.0 * np.exp(-0.2 * x)
    generator = np.random.default_rng(0)
    base = [m + 1e-5 * generator.standard_normal((1, 4, 1)) for m in means]
    losses = Losses(x, base, [b - 0.01 + 1e-5 * generator.standard_normal(b.shape) for b in base])
    found = estimator.estimate(losses)
    fitted, _ = optimize.curve_fit(
        lambda x, e, k, c: e + k * np.exp(-c * x), x, [b.mean() for b in base], p0=(1, 3, 0.3)
    )
    step = EXPONENTS[1] / EXPONENTS[0]
    assert fitted[2] / step < found.exponent[0] < fitted[2] * step


@pytest.mark.parametrize("design", [Design(4, 3), BRANCHES])
def test_gradients_are_those_of_the_conversion(design):
    moments = estimator.pool(drawn("m = 1.3", design, 1))
    curve = estimator.fit_curve(moments)
    paired = estimator.convert(moments, curve)
    branches, step = design.branches, 1e-6
    for size in range(design.sizes):
        for column in range(2 * branches):
            kind = "base" if column < branches else "difference"
            moved = getattr(moments, kind).copy()
            moved[0, size, column % branches] += step
            changed = moments._replace(**{kind: moved})
            other = estimator.convert(changed, estimator.fit_curve(changed)).by_exponent
            numeric = (other - paired.by_exponent)[0] / step
            used = EXPONENTS < 0.4  # beyond, a difference is cut off at what the curve leaves
            analytic = paired.gradient[0, used, :, size, column]
            np.testing.assert_allclose(analytic, numeric[used], rtol=2e-3, atol=1e-4)


def test_line_is_weighted_least_squares():
    generator = np.random.default_rng(1)
    x, y, weights = np.arange(5.0) - 2, generator.normal(size=(2, 5)), generator.uniform(1, 5, (2, 5))
    line = fit_line(x, y, weights)
    for ladder in range(2):
        fit = sm.WLS(y[ladder], sm.add_constant(x), weights[ladder]).fit()
        np.testing.assert_allclose(line.on_y[ladder] @ y[ladder], fit.params, rtol=1e-9)
        assert line.residual[ladder] == pytest.approx((weights[ladder] * fit.resid**2).sum())


def test_misfit_is_the_smaller_of_two_f_tests():
    """Against statsmodels' nested tests with the seeds' variance known to be 1: chi square, its limit of many seeds."""
    generator = np.random.default_rng(3)
    x, weights = np.array([-3.0, -1.5, 0.2, 1.8, 2.5]), generator.uniform(1, 5, (10, 5))
    y = generator.normal(0, 1 / np.sqrt(weights))
    found = misfit(x, y, weights, fit_line(x, y, weights), 1e9)
    for ladder in range(10):
        line, parabola = (sm.WLS(y[ladder], np.vander(x, columns), weights[ladder]).fit() for columns in (2, 3))
        residuals = [(weights[ladder] * fit.resid**2).sum() for fit in (line, parabola)]
        smaller = min(stats.chi2.sf(residuals[0], 3), stats.chi2.sf(residuals[0] - residuals[1], 1))
        assert found[ladder] == pytest.approx(min(1.0, 1.5 * smaller), rel=1e-5)


def test_sizes_as_the_sample_are_paule_mandel_and_knapp_hartung():
    """Without an error of the curve: tau² by root finding, statsmodels' scaled covariance of weighted least squares."""
    generator = np.random.default_rng(2)
    x, seeds = np.arange(5.0) - 2, generator.uniform(0.01, 0.05, (20, 5))
    y = 0.3 + generator.normal(0, 0.3, (20, 5))
    found = over_sizes(x, y, seeds, seeds[:, None] * np.eye(5))

    def fit(ladder: int, tau: float):
        return sm.WLS(y[ladder], sm.add_constant(x), 1 / (seeds[ladder] + tau)).fit()

    spread = 0
    for ladder in range(20):
        excess = lambda tau, ladder=ladder: fit(ladder, tau).mse_resid - 1  # noqa: E731
        tau = optimize.brentq(excess, 0, 10) if excess(0) > 0 else 0.0
        spread += tau > 0
        expected = fit(ladder, tau)
        for which, estimate in enumerate((found.mean, found.slope)):
            assert estimate.value[ladder] == pytest.approx(expected.params[which], rel=1e-6)
            low, high = expected.conf_int()[which]
            assert estimate.half()[ladder] == pytest.approx((high - low) / 2, rel=1e-6)
    assert 0 < spread < 20  # both branches were taken


def test_each_size_is_a_t_test_of_its_pairs_over_the_local_slope():
    """With a curve known far better than differences are, and seeds that scatter alike at every size."""
    truth = Truth("", lambda x: np.full_like(x, 1e-3), seeds=Seeds(deviation=1e-4, fall=0.05, shared=0.0))
    losses = drawn(truth, Design(5, 50), 1)
    found = estimator.estimate(losses)
    law, x = truth.base, losses.log_compute
    local = [
        law(np.array(16e6 * 2.5**n * np.exp(-h / 2)), np.array(20 * 16e6 * 2.5**n * np.exp(-h / 2)))
        for h in (-0.005, 0.005)
        for n in range(5)
    ]
    slopes = (np.array(local[5:]) - np.array(local[:5])) / 0.01
    for size in range(5):
        pairs = (losses.base[size] - losses.arm[size])[0, :, 0]
        expected = stats.ttest_1samp(pairs / slopes[size], 0).confidence_interval()
        assert found.size.value[0, size] == pytest.approx(pairs.mean() / slopes[size], rel=0.05)
        assert found.size.half()[0, size] == pytest.approx((expected.high - expected.low) / 2, rel=0.3)
    assert len(x) == 5


# ---- The whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m = 1.3", "m = 2", "ln m fades", "own exponents", "E lower by 0.03"])
@pytest.mark.parametrize("branches", [1, 2])
def test_noiseless_ladders_are_recovered(name, branches):
    quiet = Truth("", BY_NAME[name].log_multiplier, BY_NAME[name].arm, seeds=Seeds(deviation=0.0))
    simulated = simulate(quiet, Design(5, 2, branches), 1, np.random.default_rng(0))
    found = estimator.estimate(simulated.losses)
    np.testing.assert_allclose(found.size.value, simulated.truth, atol=0.01)
    held_out = estimator.hold_out(simulated.losses)
    assert held_out.loss.value[0] == pytest.approx(held_out.measured_loss[0], abs=0.02)


def test_a_batch_gives_what_each_ladder_gives_alone():
    losses = drawn("ln m fades", Design(4, 3, 2), 4)
    together = estimator.estimate(losses)
    for n in range(4):
        alone = estimator.estimate(
            Losses(losses.log_compute, [b[n : n + 1] for b in losses.base], [a[n : n + 1] for a in losses.arm])
        )
        for name in ("size", "mean", "slope", "largest", "beyond"):
            for one, all_of_them in zip(getattr(alone, name)[:2], getattr(together, name)[:2], strict=True):
                np.testing.assert_allclose(one[0], all_of_them[n], rtol=1e-9)


def test_truth_of_an_own_law_is_where_the_baseline_reaches_its_loss():
    truth = BY_NAME["own exponents"]
    x = np.array([0.0, 5.0])
    y = true_log_multiplier(truth, x, np.ones(1))[:, 0]
    parameters = 16e6 * np.exp(x / 2)
    assert truth.arm is not None
    reached = truth.arm(parameters, 20 * parameters)
    moved = parameters * np.exp(y / 2)
    np.testing.assert_allclose(truth.base(moved, 20 * moved), reached)
    assert Law()(np.array(1e9), np.array(2e10)) == pytest.approx(1.7 + 406.4 * 1e9**-0.34 + 410.7 * 2e10**-0.28)


def test_more_branches_than_degrees_of_freedom():
    """Three sizes of two seeds know a covariance of 8 by 8 with three degrees of freedom."""
    simulated = simulate(BY_NAME["m = 1.3"], Design(3, 2, 4), 400, np.random.default_rng(0))
    found = estimator.estimate(simulated.losses)
    covered = int(found.mean.covers(simulated.truth.mean(axis=1)).sum())
    assert stats.binomtest(covered, 400, 0.95).pvalue > 1e-3


def test_unequal_seeds_weigh_as_they_should():
    """A ladder whose sizes have 2, 5, 3 and 4 seeds: ν counts them, a size of more seeds is known better."""
    full = drawn("m = 1.3", Design(4, 5), 200)
    counts = (2, 5, 3, 4)
    losses = Losses(full.log_compute, *([one[:, :n] for one, n in zip(side, counts, strict=True)] for side in full[1:]))
    found = estimator.estimate(losses)
    assert estimator.pool(losses).degrees == sum(counts) - 4
    in_nats = found.difference.degrees
    assert (in_nats < sum(counts) - 4).all()  # the fall of their scatter is not known
    assert found.size.error[:, 1].mean() < 0.8 * found.size.error[:, 0].mean()
    assert stats.binomtest(int(found.mean.covers(np.log(1.3)).sum()), 200, 0.95).pvalue > 1e-3


LINES = ["no effect", "m = 1.3", "ln m fades", "own exponents", "arm twice as noisy"]


@pytest.mark.parametrize("design", [Design(3, 2), Design(5, 3), BRANCHES], ids=str)
@pytest.mark.parametrize("name", [*LINES, "ln m halves per decade"])
def test_intervals_contain_the_truth(name, design):
    """A small version of python -m benchmarks.ladder: 1,000 ladders, whose share has a standard error of 0.7 points."""
    found = measure_coverage(BY_NAME[name], design, 1000, seed=1)
    told = {"each size": np.mean(found.size), "mean": found.mean}
    if name in LINES:
        told |= {"slope": found.slope, "largest": found.largest}
        if found.held_out is not None:
            told |= {"held out": found.held_out}
    for what, share in told.items():
        assert 0.93 - 0.021 <= share <= 0.97 + 0.021, what  # three standard errors beyond what the large one must hold
    assert found.refused < 0.03
    if name == "no effect":
        assert abs(found.shown_mean - 0.05) < 0.01 + 0.021
        assert found.firm_mean < found.shown_mean


def test_intervals_that_take_other_numbers_for_seeds_fail():
    """The check can fail: branches counted as seeds cover too little."""
    simulated = simulate(BY_NAME["m = 1.3"], BRANCHES, 500, np.random.default_rng(0))
    as_seeds = Losses(
        simulated.losses.log_compute,
        *([one.reshape(500, -1, 1) for one in side] for side in simulated.losses[1:]),
    )
    moments = estimator.pool(as_seeds)
    right = estimator.differences(estimator.pool(simulated.losses))
    assert (estimator.differences(moments).half() / right.half()).mean() < 0.85
