"""The joint fit against exact laws, against a straightforward scipy fit, and its errors against simulated ladders."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from evals.verdict import scaling_law
from evals.verdict.ladder import points
from evals.verdict.ladder_simulation import TRUTHS, Design, Law, Seeds, Truth
from llm.common.errors import UserError

from .test_ladder import ladder_of

BY_NAME = {truth.name: truth for truth in TRUTHS}
ARMS = ("classic", "values", "null")


def fit(truth: Truth, design: Design, seed: int = 0) -> scaling_law.JointFit:
    return scaling_law.fit_jointly(points(ladder_of(truth, design, seed)), ARMS)


def quiet(truth: Truth) -> Truth:
    return replace(truth, seeds=Seeds(deviation=0.0))


def test_parameters_and_tokens_are_recovered_exactly():
    arm = Law(of_parameters=380.0, of_tokens=390.0)
    found = fit(quiet(Truth("", arm=arm)), Design(4, 2, 3))
    assert found.terms == ("N", "D")
    assert found.floor.value == pytest.approx(1.7, abs=1e-4)
    assert [found.exponents[term].value for term in "ND"] == pytest.approx([0.34, 0.28], abs=1e-4)
    assert found.coefficients["classic"] == pytest.approx({"N": 406.4, "D": 410.7}, rel=1e-3)
    np.testing.assert_allclose(found.residuals[np.abs(found.residuals) > 1e-6], [])


def test_compute_alone_is_recovered_exactly():
    """One budget per size, exponents of N and D alike: E + K C^-c with c half of them."""
    base = Law(of_parameters=300.0, of_tokens=300.0, alpha=0.3, beta=0.3)
    found = fit(quiet(Truth("", lambda x: np.full_like(x, np.log(1.3)), base=base)), Design(4, 2))
    assert found.terms == ("C",)
    assert found.floor.value == pytest.approx(1.7, abs=1e-5)
    assert found.exponents["C"].value == pytest.approx(0.15, abs=1e-5)
    for multipliers in (found.log_multipliers, found.shared_multipliers):
        assert [m.value for m in multipliers["values"]] == pytest.approx([np.log(1.3)] * 4, abs=1e-4)
        assert [m.value for m in multipliers["null"]] == pytest.approx([0.0] * 4, abs=1e-4)


@pytest.mark.parametrize("design", [Design(4, 3), Design(4, 2, 2)], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_a_straightforward_fit_finds_no_better_one(design, own):
    """Huber's loss written out, minimised from several starts without gradients or projection."""
    data = points(ladder_of(BY_NAME["m = 1.3"], design))
    logs = np.log(np.stack([data.parameters, data.tokens], 1)) if design.branches > 1 else np.log(data.compute)[:, None]
    law = scaling_law.fit_law(data, logs, len(ARMS), own)
    delta, centred, terms = scaling_law._delta(data), logs - logs.mean(axis=0), logs.shape[1]

    def objective(theta: np.ndarray) -> float:
        coefficients = theta[1 : 1 + 3 * terms].reshape(terms, 3)
        exponents = np.broadcast_to(theta[1 + 3 * terms :].reshape(terms, -1), (terms, 3))
        fitted = np.exp(theta[0]) + sum(
            np.exp(coefficients[n, data.arm] - exponents[n, data.arm] * centred[:, n]) for n in range(terms)
        )
        rest = np.abs(np.log(fitted) - np.log(data.loss))
        return np.where(rest <= delta, rest**2 / 2, delta * (rest - delta / 2)).sum() / delta**2

    number = 1 + 3 * terms + terms * (3 if own else 1)
    generator, found = np.random.default_rng(0), []
    for _ in range(4):
        start = np.concatenate(
            [[np.log(1.5)], generator.normal(0, 0.5, 3 * terms), np.full(number - 1 - 3 * terms, 0.2)]
        )
        found.append(optimize.minimize(objective, start, method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 10**6}))
    best = min(found, key=lambda one: one.fun)
    assert law.objective / delta**2 <= best.fun * (1 + 1e-6)
    assert law.theta[0] == pytest.approx(np.exp(best.x[0]), rel=0.02)
    assert law.theta[1 + 3 * terms :] == pytest.approx(best.x[1 + 3 * terms :], rel=0.05)


def test_gradient_of_the_law():
    data = points(ladder_of(BY_NAME["m = 1.3"], Design(4, 2, 2)))
    logs = np.log(np.stack([data.parameters, data.tokens], 1))
    for own in (False, True):
        law = scaling_law.fit_law(data, logs, 3, own)
        _, gradient = law.loss(data.arm, logs)
        for n in range(len(law.theta)):
            moved = law.theta.copy()
            moved[n] += 1e-6
            numeric = (replace(law, theta=moved).loss(data.arm, logs)[0] - law.loss(data.arm, logs)[0]) / 1e-6
            np.testing.assert_allclose(gradient[:, n], numeric, atol=1e-4)


def test_floor_of_zero_is_a_bound():
    found = fit(Truth("", base=Law(floor=0.0), seeds=Seeds(deviation=0.05)), Design(3, 2))
    assert found.floor.value >= 0 and np.isfinite(found.residuals).all()


@pytest.mark.parametrize("name", ["no effect", "ln m fades"])
def test_own_exponents_contain_the_truth_and_are_told_apart(name):
    truth, design, ladders = BY_NAME[name], Design(5, 3), 40
    fits = [fit(truth, design, seed) for seed in range(ladders)]
    x = 2 * np.log(2.5) * np.arange(5)
    expected = truth.log_multiplier(x)
    for size in (0, 2, 4):
        covered = sum(
            f.log_multipliers["values"][size].low < expected[size] < f.log_multipliers["values"][size].high
            for f in fits
        )
        assert stats.binomtest(covered, ladders, 0.95).pvalue > 1e-3
    apart = sum(f.own_p_values["values"] < 0.05 for f in fits)
    if name == "no effect":
        assert stats.binomtest(apart, ladders, 0.05).pvalue > 1e-3
    else:
        assert apart > 0.3 * ladders
        missed = [f.shared_multipliers["values"][4].low > expected[4] for f in fits]
        assert np.mean(missed) > 0.9  # one exponent for both arms cannot fade


def test_what_cannot_be_fitted_is_refused():
    data = points(ladder_of(BY_NAME["no effect"], Design(2, 2)))
    with pytest.raises(UserError, match="needs three sizes"):
        scaling_law.fit_jointly(data, ARMS)
    data = points(ladder_of(BY_NAME["no effect"], Design(3, 2)))
    with pytest.raises(UserError, match="size number 1 of the ladder has one seed; train a second one there"):
        scaling_law.fit_jointly(data._replace(pair=np.where(data.size == 0, 0, data.pair)), ARMS)
    with pytest.raises(UserError, match="is not a positive number"):
        scaling_law.fit_jointly(data._replace(loss=np.full_like(data.loss, np.nan)), ARMS)
