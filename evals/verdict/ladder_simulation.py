"""Simulated ladders of sizes with a known truth: what `evals.verdict.ladder_estimator` is calibrated on.

a truth and a design -> losses of many ladders -> estimates -> how often intervals contain the truth

The baseline is that of Chinchilla (Hoffmann et al. 2022): L = E + A N^-0.34 + B D^-0.28 at 20 tokens per parameter,
from 16M parameters on, 2.5 times as many parameters and 6.25 times the compute at every further size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evals.verdict.ladder_estimator import DECADE, Losses

Floats = NDArray[np.float64]

AT_ONCE = 500  # ladders: the gradients of 500 are about 100 MB
SMALLEST, STEP, TOKENS = 16e6, 2.5, 20.0  # parameters, their ratio from size to size, tokens per parameter
LOG_STEP = 2 * math.log(STEP)  # of compute
MIDDLE = 2 * LOG_STEP  # ln C of the third size over the first: where lines of ln m are centred


class Design(NamedTuple):
    """A ladder's shape: sizes, seeds of each, token budgets that branch off one trunk."""

    sizes: int
    seeds: int
    branches: int = 1

    def __str__(self) -> str:
        return f"{self.sizes} x {self.seeds}" + (f", {self.branches} branches" if self.branches > 1 else "")


@dataclass(frozen=True)
class Law:
    """L = E + A N^-a + B D^-b, nats per token."""

    floor: float = 1.7
    of_parameters: float = 406.4
    of_tokens: float = 410.7
    alpha: float = 0.34
    beta: float = 0.28

    def __call__(self, parameters: Floats, tokens: Floats) -> Floats:
        """Return the loss after so many tokens."""
        return self.floor + self.of_parameters * parameters**-self.alpha + self.of_tokens * tokens**-self.beta


@dataclass(frozen=True)
class Seeds:
    """How the losses of single runs scatter."""

    deviation: float = 0.03  # of a run, nats, at the smallest size
    fall: float = 0.1  # it falls as C^-fall
    shared: float = 0.5  # part of the variance that baseline and arm of a seed have in common
    arm: float = 1.0  # the arm's own deviation over the baseline's
    heavy: bool = False  # Student's t with 3 degrees of freedom in place of a normal
    spiked: float = 0.0  # share of runs that end 5 deviations higher
    one_number: float = 0.0  # part of an arm's own variance that a seed number has at every size
    offset: float = 0.0  # deviation of ln m from size to size that all seeds share, as unequal tuning gives


@dataclass(frozen=True)
class Truth:
    """A true effect: `log_multiplier` of ln C over the first size's, or the arm's own law.

    holds: "line" where ln m is a line in ln C, "shape" where it is not, "fails" where the estimator's assumptions
    do not hold.
    """

    name: str
    log_multiplier: Callable[[Floats], Floats] = field(default=lambda x: np.zeros_like(x))
    arm: Law | None = None
    base: Law = field(default_factory=Law)
    seeds: Seeds = field(default_factory=Seeds)
    holds: str = "line"


def _constant(multiplier: float) -> Callable[[Floats], Floats]:
    return lambda x: np.full_like(x, math.log(multiplier))


def _line(slope: float) -> Callable[[Floats], Floats]:
    return lambda x: math.log(1.3) + slope * (x - MIDDLE)


CONSTANT = _constant(1.3)
TRUTHS = (
    Truth("no effect"),
    Truth("m = 1.3", CONSTANT),
    Truth("m = 2", _constant(2.0)),
    Truth("ln m fades", _line(-0.04)),
    Truth("ln m grows", _line(0.04)),
    Truth("own exponents", arm=Law(of_parameters=406.4 * 1.41, of_tokens=410.7 * 1.38, alpha=0.36, beta=0.297)),
    Truth("heavy tails (t3)", CONSTANT, seeds=Seeds(heavy=True)),
    Truth("arm twice as noisy", CONSTANT, seeds=Seeds(arm=2.0)),
    Truth("nothing shared in a pair", CONSTANT, seeds=Seeds(shared=0.0)),
    Truth("E lower by 0.03", arm=Law(floor=1.67), holds="shape"),
    Truth("ln m halves per decade", lambda x: math.log(1.5) * 0.5 ** (x / DECADE), holds="shape"),
    Truth("offsets of sizes, 0.05", CONSTANT, seeds=Seeds(offset=0.05), holds="fails"),
    Truth("offsets of sizes, 0.1", CONSTANT, seeds=Seeds(offset=0.1), holds="fails"),
    Truth("one seed number at all sizes", CONSTANT, seeds=Seeds(one_number=0.3), holds="fails"),
    Truth("seed sd grows as C^0.1", CONSTANT, seeds=Seeds(fall=-0.1), holds="fails"),
    Truth("curve misfits quiet seeds", CONSTANT, base=Law(of_parameters=406.4 * 600, alpha=0.7, beta=0.2),
          seeds=Seeds(deviation=0.01), holds="fails"),
    Truth("5% of runs spiked", CONSTANT, seeds=Seeds(spiked=0.05), holds="fails"),
)  # fmt: skip
DESIGNS = tuple(Design(sizes, seeds) for sizes in (3, 4, 5, 6) for seeds in (2, 3, 5))
BRANCHES = Design(5, 3, 3)


class Ladders(NamedTuple):
    """Simulated losses, the true ln m (M, S) of every size, and that a decade beyond the largest."""

    losses: Losses
    truth: Floats
    beyond: Floats


# ---- Losses ----------------------------------------------------------------------------------------------------------


def simulate(truth: Truth, design: Design, ladders: int, generator: np.random.Generator) -> Ladders:
    """Draw ladders. Branch k has 2^k times the tokens of the first; a trunk shares half of a run's variance."""
    seeds = truth.seeds
    parameters = SMALLEST * STEP ** np.arange(design.sizes)[:, None]  # (S, 1)
    tokens = TOKENS * parameters * 2.0 ** np.arange(design.branches)  # (S, K)
    x = 2 * np.log(parameters[:, 0] / SMALLEST)
    y = true_log_multiplier(truth, x, 2.0 ** np.arange(design.branches))  # (S, K)
    offsets = seeds.offset * generator.standard_normal((ladders, design.sizes, 1))
    moved = np.exp((y + offsets) / 2)  # (M, S, K): compute grows as parameters times tokens
    base = truth.base(parameters, tokens)
    arm = truth.base(parameters * moved, tokens * moved)
    numbers = generator.standard_normal((2, ladders, design.seeds, 1))
    losses = []
    for size in range(design.sizes):
        deviation = seeds.deviation * math.exp(-seeds.fall * x[size])
        shape = (ladders, design.seeds, design.branches)
        common = _runs(generator, seeds, shape) * math.sqrt(seeds.shared)
        sides = []
        for side, (mean, factor) in enumerate(((base[None, size], 1.0), (arm[:, size], seeds.arm))):
            own = _runs(generator, seeds, shape)
            own = math.sqrt(1 - seeds.one_number) * own + math.sqrt(seeds.one_number) * numbers[side]
            own *= factor * math.sqrt(1 - seeds.shared)
            spikes = 5 * (generator.random(shape) < seeds.spiked)
            sides.append(np.reshape(mean, (-1, 1, design.branches)) + deviation * (common + own + spikes))
        losses.append(sides)
    log_compute = x + math.log(6 * TOKENS) + 2 * math.log(SMALLEST) + np.log(2.0) * (design.branches - 1) / 2
    beyond = true_log_multiplier(truth, x[-1:] + DECADE, 2.0 ** np.arange(design.branches)).mean()
    return Ladders(
        Losses(log_compute, [base for base, _ in losses], [arm for _, arm in losses]),
        np.broadcast_to(y.mean(axis=1), (ladders, design.sizes)),
        np.full(ladders, beyond),
    )


def _runs(generator: np.random.Generator, seeds: Seeds, shape: tuple[int, int, int]) -> Floats:
    """Return deviations of unit variance; branches of a trunk have half of it in common."""

    def draw(shape: tuple[int, ...]) -> Floats:
        if seeds.heavy:
            return generator.standard_t(3, shape) / math.sqrt(3)
        return generator.standard_normal(shape)

    if shape[2] == 1:
        return draw(shape)
    return (draw((*shape[:2], 1)) + draw(shape)) / math.sqrt(2)


def true_log_multiplier(truth: Truth, x: Floats, budgets: Floats) -> Floats:
    """Return ln m (S, K) at ln C over the first size's, for budgets in units of 20 tokens per parameter."""
    if truth.arm is None:
        return np.repeat(truth.log_multiplier(x)[:, None], len(budgets), axis=1)
    parameters = SMALLEST * np.exp(x / 2)[:, None]
    tokens = TOKENS * parameters * budgets
    reached = truth.arm(parameters, tokens)
    low, high = np.full_like(reached, -20.0), np.full_like(reached, 20.0)
    for _ in range(60):  # the baseline's loss falls with compute
        middle = (low + high) / 2
        above = truth.base(parameters * np.exp(middle / 2), tokens * np.exp(middle / 2)) > reached
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2
