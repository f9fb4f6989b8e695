"""The receptor against Jahr and Stevens' formula, and against the activation of the models."""

import math

import numpy as np
import pytest
import torch

from llm.common.errors import UserError
from llm.model.activations import nmda
from small.grid.biophysics import K_MG, Receptor

VOLTAGES = np.linspace(-100, 60, 81)


@pytest.mark.parametrize("magnesium", [0.0, 0.1, 1.0, 10.0])
def test_open_probability_is_that_of_jahr_and_stevens(magnesium: float) -> None:
    expected = 1 / (1 + magnesium / 3.57 * np.exp(-0.062 * VOLTAGES))
    receptor = Receptor(magnesium)
    np.testing.assert_allclose(receptor.open_probability(VOLTAGES), expected, rtol=1e-12)
    np.testing.assert_allclose(receptor.current(VOLTAGES), VOLTAGES * expected, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 1.0, 10.0])
def test_the_activation_is_the_current_in_units_of_one_over_beta(alpha: float) -> None:
    receptor = Receptor(alpha * K_MG)
    assert receptor.alpha == pytest.approx(alpha)
    activation = nmda(torch.from_numpy(VOLTAGES * receptor.beta), alpha=alpha).numpy()
    np.testing.assert_allclose(activation / receptor.beta, receptor.current(VOLTAGES), rtol=1e-9, atol=1e-9)


def test_the_block_is_lifted_by_depolarisation() -> None:
    """Known shape: hardly a current at rest, an inward peak between -40 and -10 mV, none at 0, outward above."""
    current = Receptor(1.0).current(VOLTAGES)
    assert -40 < VOLTAGES[current.argmin()] < -10
    assert abs(current[VOLTAGES == -80][0]) < abs(current.min()) / 3
    assert Receptor(1.0).current(np.array([0.0]))[0] == 0 and (current[VOLTAGES > 0] > 0).all()
    assert Receptor(1.0).open_probability(np.array([Receptor(1.0).half_open]))[0] == pytest.approx(0.5)
    assert Receptor(0.0).half_open == -math.inf


def test_extreme_voltages_neither_overflow_nor_vanish() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert Receptor(1.0).open_probability(np.array([-1e5, 1e5])).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("asked", "named"), [({"magnesium": -1.0}, "-1.0 mM"), ({"k_mg": 0.0, "beta": math.nan}, "beta nan")]
)
def test_numbers_that_cannot_be_are_refused(asked: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Receptor(**asked)
