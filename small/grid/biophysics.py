"""The NMDA receptor's current-voltage curve, in millimolar and millivolt: what alpha and beta of the activation are.

Kim et al. 2023, Section 2.3 and Appendix A.2. One Mg2+ ion blocks the pore, and its dissociation constant grows
with the voltage, K_D = K_Mg exp(beta V) (Eq. S6), so that the share of open channels and the current through them are

    p(V) = 1 / (1 + [Mg2+] / K_Mg exp(-beta V))        Eq. S7, alpha = [Mg2+] / K_Mg
    I_norm(V) = (V - V_r) p(V), V_r = 0 mV             Eq. S8, S9

The paper leaves K_Mg and beta open. The defaults are those of Jahr and Stevens (1990), the fit that most models of
neurons use: p(V) = 1 / (1 + [Mg2+] / 3.57 mM exp(-0.062 V / mV)).
"""

import math
from dataclasses import dataclass

import numpy as np

from ..experiment.options import raise_problems

K_MG = 3.57  # mM
BETA = 0.062  # 1 / mV
PHYSIOLOGICAL = 1.0  # mM of magnesium in cerebrospinal fluid, about


@dataclass(frozen=True)
class Receptor:
    """Receptors in a magnesium concentration.

    Args:
        magnesium: [Mg2+], mM, 0 or more.
        k_mg: dissociation constant at 0 mV, mM.
        beta: 1 / mV.

    Raises:
        UserError: a number that cannot be.
    """

    magnesium: float = PHYSIOLOGICAL
    k_mg: float = K_MG
    beta: float = BETA

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.magnesium < math.inf:
            problems.append(f"magnesium {self.magnesium} mM must be a finite number of at least 0")
        for name, unit in (("k_mg", "mM"), ("beta", "per mV")):
            if not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name} {getattr(self, name)} {unit} must be a finite number above 0")
        raise_problems(problems)

    @property
    def alpha(self) -> float:
        """[Mg2+] / K_Mg, dimensionless: the activation's alpha."""
        return self.magnesium / self.k_mg

    def open_probability(self, voltage: np.ndarray) -> np.ndarray:
        """Share of open channels at voltages in mV, Eq. S7."""
        exponent = math.log(self.alpha) - self.beta * np.asarray(voltage, float) if self.alpha else -np.inf
        return np.exp(-np.logaddexp(0, exponent)) * np.ones_like(np.asarray(voltage, float))

    def current(self, voltage: np.ndarray) -> np.ndarray:
        """Current over the greatest conductance, mV, at voltages in mV, Eq. S9; inward is negative."""
        return np.asarray(voltage, float) * self.open_probability(voltage)

    @property
    def half_open(self) -> float:
        """Voltage at which half of the channels are open, mV: ln alpha / beta; -inf without magnesium."""
        return math.log(self.alpha) / self.beta if self.alpha else -math.inf
