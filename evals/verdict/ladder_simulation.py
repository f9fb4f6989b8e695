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

from evals.verdict.ladder_estimator import DECADE, LINE_MISFIT, Losses, estimate, hold_out, multiplier_given
from evals.verdict.ladder_lines import Floats

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

    kind: "line" where ln m is a line in ln C, "shape" where it is not, "fails" where the estimator's assumptions do not
    hold; "effect" for the table of power.
    """

    name: str
    log_multiplier: Callable[[Floats], Floats] = field(default=lambda x: np.zeros_like(x))
    arm: Law | None = None
    base: Law = field(default_factory=Law)
    seeds: Seeds = field(default_factory=Seeds)
    kind: str = "line"


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
    Truth("seed sd the same at all sizes", CONSTANT, seeds=Seeds(fall=0.0)),
    Truth("5% of runs spiked", CONSTANT, seeds=Seeds(spiked=0.05)),
    Truth("E lower by 0.03", arm=Law(floor=1.67), kind="shape"),
    Truth("ln m halves per decade", lambda x: math.log(1.5) * 0.5 ** (x / DECADE), kind="shape"),
    Truth("offsets of sizes, 0.05", CONSTANT, seeds=Seeds(offset=0.05), kind="fails"),
    Truth("offsets of sizes, 0.1", CONSTANT, seeds=Seeds(offset=0.1), kind="fails"),
    Truth("one seed number at all sizes", CONSTANT, seeds=Seeds(one_number=0.3), kind="fails"),
    Truth("seed sd grows as C^0.1", CONSTANT, seeds=Seeds(fall=-0.1), kind="fails"),
    Truth("curve misfits quiet seeds", CONSTANT, base=Law(of_parameters=406.4 * 600, of_tokens=80, alpha=0.7, beta=0.2),
          seeds=Seeds(deviation=0.01), kind="fails"),
    Truth("exponent c = 0.05, m = 2", _constant(2.0), base=Law(of_parameters=8, of_tokens=8, alpha=0.1, beta=0.1),
          kind="fails"),
    Truth("exponent c = 0.35, m = 2", _constant(2.0), base=Law(of_parameters=1e5, of_tokens=3e5, alpha=0.7, beta=0.7),
          kind="fails"),
)  # fmt: skip
EFFECTS = tuple(
    Truth(f"m = {multiplier}, seed sd {deviation}", _constant(multiplier), seeds=Seeds(deviation), kind="effect")
    for deviation, multipliers in ((0.03, (1.05, 1.1, 1.2)), (0.1, (1.2, 1.4)))
    for multiplier in multipliers
)
DESIGNS = tuple(Design(sizes, seeds) for sizes in (3, 4, 5, 6) for seeds in (2, 3, 5))
BRANCHES = Design(5, 3, 3)


class Ladders(NamedTuple):
    """Simulated losses, the true ln m (M, S) of every size, and what as many seeds measure a decade beyond (M,)."""

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
    return Ladders(
        Losses(log_compute, [base for base, _ in losses], [arm for _, arm in losses]),
        np.broadcast_to(y.mean(axis=1), (ladders, design.sizes)),
        _beyond(truth, design, x[-1] + DECADE, ladders, generator),
    )


def _beyond(truth: Truth, design: Design, x: float, ladders: int, generator: np.random.Generator) -> Floats:
    """Return the ln m that the seeds of a size at x would measure: the truth, and their noise over the local slope."""
    budgets, seeds = 2.0 ** np.arange(design.branches), truth.seeds
    parameters = SMALLEST * math.exp(x / 2) * np.exp(np.array([-0.005, 0.005]) / 2)[:, None]
    losses = truth.base(parameters, TOKENS * parameters * budgets)
    deviation = seeds.deviation * math.exp(-seeds.fall * x) * math.sqrt((1 - seeds.shared) * (1 + seeds.arm**2))
    shape = (ladders, design.seeds, design.branches)
    noise = deviation * _runs(generator, seeds, shape).mean(axis=1) / ((losses[0] - losses[1]) / 0.01)
    return true_log_multiplier(truth, np.array([x]), budgets).mean() + noise.mean(axis=1)


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


# ---- Coverage --------------------------------------------------------------------------------------------------------


class Coverage(NamedTuple):
    """How a truth fared in one design: shares of its ladders, but for the first of those with a compute multiplier.

    The slope of a truth that is no line is that of the least-squares line through its sizes. None: no such estimate.
    """

    refused: float  # no compute multiplier
    size: tuple[float, ...] | None  # the interval by seeds contains the truth: of each size
    mean: float | None
    slope: float | None
    largest: float | None
    beyond: float | None  # a decade beyond the largest size, what is measured there
    held_out: float | None  # the measured difference of the largest size
    held_out_loss: float | None
    mean_by_sizes: float | None
    slope_by_sizes: float | None
    shown_mean: float | None  # the interval by seeds leaves out zero
    shown_slope: float | None
    shown_either: float | None
    firm_mean: float | None
    firm_slope: float | None
    misfit: float | None  # the line's p value is below 0.1
    largest_if_line: float | None  # coverage of the largest size in ladders whose line is not given up
    half_width: float | None  # of the mean, median


def measure_coverage(truth: Truth, design: Design, ladders: int, seed: int = 0) -> Coverage:
    """Simulate so many ladders and count what their intervals contain."""
    generator = np.random.default_rng([seed, *design])
    parts = []
    for start in range(0, ladders, AT_ONCE):
        parts.append(_outcomes(simulate(truth, design, min(AT_ONCE, ladders - start), generator)))
    outcomes = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    given = outcomes.pop("given")
    if not given.any():
        return Coverage(refused=1.0, **dict.fromkeys(Coverage._fields[1:]))
    half = float(np.median(outcomes.pop("half_width")[given]))
    line = given & ~outcomes["misfit"]
    shares = {key: values[given].mean(axis=0) for key, values in outcomes.items()}
    size = tuple(float(share) for share in shares.pop("size"))
    rest = {name: float(shares[name]) if name in shares else None for name in Coverage._fields[2:-2]}
    refused, largest = float(1 - given.mean()), float(outcomes["largest"][line].mean())
    return Coverage(refused, size, **rest, largest_if_line=largest, half_width=half)


def _outcomes(simulated: Ladders) -> dict[str, NDArray]:
    """Return what each ladder's intervals contain, by the names of `Coverage`."""
    losses, truth = simulated.losses, simulated.truth
    found = estimate(losses)
    x = losses.log_compute - losses.log_compute.mean()
    slope, mean = truth @ x / (x @ x), truth.mean(axis=1)
    shown = {"mean": ~found.mean.covers(0.0), "slope": ~found.slope.covers(0.0)}
    outcomes = {
        "given": multiplier_given(found),
        "size": found.size.covers(truth),
        "mean": found.mean.covers(mean),
        "slope": found.slope.covers(slope),
        "largest": found.largest.covers(truth[:, -1]),
        "beyond": found.beyond.covers(simulated.beyond),
        "shown_mean": shown["mean"],
        "shown_slope": shown["slope"],
        "shown_either": shown["mean"] | shown["slope"],
        "firm_mean": np.zeros(len(truth)),
        "firm_slope": np.zeros(len(truth)),
        "misfit": found.line_p_value < LINE_MISFIT,
        "half_width": found.mean.half(),
    }
    if found.of_sizes is None:
        return outcomes
    held_out, of_sizes = hold_out(losses), found.of_sizes
    return outcomes | {
        "held_out": held_out.difference.covers(held_out.measured_difference),
        "held_out_loss": held_out.loss.covers(held_out.measured_loss),
        "mean_by_sizes": of_sizes.mean.covers(mean),
        "slope_by_sizes": of_sizes.slope.covers(slope),
        **{
            f"firm_{name}": shown[name] & ~second.covers(0.0) & (np.sign(second.value) == np.sign(first.value))
            for name, first, second in (
                ("mean", found.mean, of_sizes.mean),
                ("slope", found.slope, of_sizes.slope),
            )
        },
    }
