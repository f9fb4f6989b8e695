"""The verdict on a ladder of sizes: does a change help, by how much compute, and does that hold as models grow?

final losses by arm, size, seed and token budget -> paired with the baseline -> `ladder_estimator` -> what may be
claimed of each arm, what is refused and why

A compute multiplier m: the baseline, made larger along its own ladder, needs m times an arm's compute for the arm's
loss. All estimates are ln m; m = 1.14 is 12% less compute. Every claim has two intervals: one takes the seeds as the
sample and holds for these sizes as they were trained and tuned, the other takes the sizes as the sample. A claim is
firm if both exclude zero on one side.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from evals.verdict import ladder_estimator, scaling_law
from evals.verdict.ladder_estimator import CURVE_MISFIT, LEAST_STEEPNESS, LINE_MISFIT, Estimate, Losses
from evals.verdict.statistics import Interval, holm, student_interval
from llm.common.errors import UserError

LEVEL = 0.95
SAME_RATIO = 0.01  # of the budgets' logs from size to size


class Run(NamedTuple):
    """The final loss of one run, or of one branch of a trunk: nats per token, nan if it diverged.

    seed: of the pair, another at every size; a null arm has the number of the baseline run that it is compared with.
    """

    arm: str
    size: str
    seed: int
    tokens: float
    loss: float


@dataclass(frozen=True)
class Size:
    """A size of the baseline: parameters without embeddings; tokens and training FLOPs of each budget, ascending."""

    name: str
    parameters: float
    tokens: tuple[float, ...]
    flops: tuple[float, ...]

    @property
    def log_compute(self) -> float:
        """Mean ln FLOPs over the budgets."""
        return float(np.log(self.flops).mean())


@dataclass(frozen=True)
class Ladder:
    """Losses of a baseline and other arms over sizes, seeds and budgets. `null`: the arm without a change."""

    baseline: str
    arms: tuple[str, ...]
    sizes: tuple[Size, ...]
    losses: Mapping[tuple[str, str, int], tuple[float, ...]]  # (arm, size, seed) -> a loss for each budget
    null: str | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """The arms that carry a change."""
        return tuple(arm for arm in self.arms if arm != self.null)


def make_ladder(runs: Iterable[Run], sizes: Sequence[Size], baseline: str, null: str | None = None) -> Ladder:
    """Sort runs into a ladder, its sizes by compute.

    Raises:
        UserError: a run of an unknown size or budget, or given twice; a trunk without one of its budgets; no run of the
            baseline or the null arm; sizes whose budgets do not stand in one ratio.
    """
    known = {size.name: size for size in sizes}
    found: dict[tuple[str, str, int], dict[float, float]] = {}
    for run in runs:
        if run.size not in known or run.tokens not in known[run.size].tokens:
            raise UserError(
                f"{run.arm} has a run of size {run.size}, {run.tokens:g} tokens: declare that size and budget"
            )
        budgets = found.setdefault((run.arm, run.size, run.seed), {})
        if run.tokens in budgets:
            raise UserError(f"{run.arm}, size {run.size}, seed {run.seed}, {run.tokens:g} tokens is given twice")
        budgets[run.tokens] = float(run.loss)
    arms = tuple(dict.fromkeys(arm for arm, _, _ in found))
    for name in (baseline, *([null] if null else [])):
        if name not in arms:
            raise UserError(f"no run is of the arm {name}: give its runs, or name another arm")
    for (arm, name, seed), budgets in found.items():
        if lacking := [tokens for tokens in known[name].tokens if tokens not in budgets]:
            raise UserError(f"{arm}, size {name}, seed {seed} lacks its run of {lacking[0]:g} tokens; train it")
    ordered = tuple(sorted(sizes, key=lambda size: size.log_compute))
    steps = [np.diff(np.log(size.flops)) for size in ordered]
    if any(len(one) != len(steps[0]) or np.abs(one - steps[0]).max(initial=0.0) > SAME_RATIO for one in steps):
        raise UserError("the token budgets of the sizes do not stand in one ratio: give every size the same multiples")
    losses = {key: tuple(budgets[t] for t in known[key[1]].tokens) for key, budgets in found.items()}
    return Ladder(baseline, tuple(arm for arm in arms if arm != baseline), ordered, losses, null)


# ---- What is found out -----------------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """Something that this ladder cannot say: a code for programs, one sentence for readers."""

    code: str
    sentence: str


class Claim(NamedTuple):
    """An estimate with both intervals. `by_sizes`: None with three sizes."""

    by_seeds: Interval
    by_sizes: Interval | None

    @property
    def shown(self) -> int:
        """1 or -1 where the interval by seeds lies on that side of zero, else 0."""
        return self.by_seeds.shown

    @property
    def firm(self) -> bool:
        """Whether both intervals exclude zero on the same side."""
        return bool(self.shown) and self.by_sizes is not None and self.by_sizes.shown == self.shown


class AtSize(NamedTuple):
    """One size: arm minus baseline in nats per token, and ln m. `adjusted`: p value after Holm's correction."""

    size: Size
    seeds: int
    difference: Interval
    log_multiplier: Interval | None
    adjusted: float = 1.0
    level: float = LEVEL

    @property
    def shown(self) -> bool:
        """Whether the corrected p value of the difference and the interval of what is claimed both leave out zero."""
        claimed = self.log_multiplier or self.difference
        return bool(claimed.shown) and self.adjusted < 1 - self.level

    @property
    def differs(self) -> bool:
        """Whether a difference in nats is shown, whatever it is in compute."""
        return bool(self.difference.shown) and self.adjusted < 1 - self.level


class HeldOut(NamedTuple):
    """The largest size as the smaller ones predict it, and as it was measured; nats per token."""

    size: Size
    difference: Interval
    measured_difference: float
    loss: Interval
    measured_loss: float

    @property
    def predicted(self) -> bool:
        """Whether the prediction intervals contain both measured values."""
        return (
            self.difference.low <= self.measured_difference <= self.difference.high
            and self.loss.low <= self.measured_loss <= self.loss.high
        )


@dataclass(frozen=True)
class ArmVerdict:
    """What a ladder says of one arm; None where it is refused, with the reason in `refusals`."""

    arm: str
    sizes: tuple[AtSize, ...]
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    mean: Claim | None = None  # ln m, plain average over sizes
    slope: Claim | None = None  # of ln m per unit of ln C
    largest: Claim | None = None  # ln m by the line
    beyond: Interval | None = None  # prediction a decade of compute beyond the largest size, for as many seeds
    beyond_compute: float | None = None  # FLOPs
    held_out: HeldOut | None = None
    line_p_value: float | None = None
    curve_p_value: float | None = None
    exponent: float | None = None  # c of the baseline's curve
    fall: float | None = None  # of the seeds' standard deviation, C^-fall

    @property
    def line(self) -> bool:
        """Whether ln m may be read as a line in ln C."""
        return self.line_p_value is not None and self.line_p_value >= LINE_MISFIT

    @property
    def shown(self) -> bool:
        """Whether the mean shows a difference, or a size after Holm's correction."""
        return bool(self.mean and self.mean.shown) or any(at.shown for at in self.sizes)


@dataclass(frozen=True)
class LadderVerdict:
    """What a ladder says of every arm, and the joint fit; `joint` is None where it could not be fitted."""

    ladder: Ladder
    level: float
    arms: dict[str, ArmVerdict]
    joint: scaling_law.JointFit | None = field(default=None, repr=False)

    @property
    def null(self) -> ArmVerdict | None:
        """The verdict on the null arm, if there is one."""
        return self.arms[self.ladder.null] if self.ladder.null else None


def judge(ladder: Ladder, level: float = LEVEL) -> LadderVerdict:
    """Judge every arm against the baseline. Holm's correction runs over sizes and arms, the null arm's apart."""
    arms = {arm: judge_arm(ladder, arm, level) for arm in ladder.arms}
    for family in (ladder.changed, (ladder.null,)):
        p_values = {(a, n): at.difference.p_value for a in family if a for n, at in enumerate(arms[a].sizes)}
        adjusted = holm(p_values)
        for arm in filter(None, family):
            sizes = tuple(at._replace(adjusted=adjusted[arm, n]) for n, at in enumerate(arms[arm].sizes))
            arms[arm] = replace(arms[arm], sizes=sizes)
    try:
        joint = scaling_law.fit_jointly(points(ladder), (ladder.baseline, *ladder.arms), level)
    except UserError:
        joint = None
    return LadderVerdict(ladder, level, arms, joint)


def judge_arm(ladder: Ladder, arm: str, level: float = LEVEL) -> ArmVerdict:
    """Judge one arm: estimate all that its pairs allow, refuse the rest."""
    seeds, notes = _pairs(ladder, arm)
    if alone := [size.name for size in ladder.sizes if len(seeds[size.name]) < 2]:
        count = len(seeds[alone[0]])
        sentence = (
            f"size {alone[0]} has {count} finished pair{'s' * (count != 1)} of {arm} and {ladder.baseline}, and an "
            "interval needs two seeds: train another seed there"
        )
        return ArmVerdict(arm, (), (Refusal("one_seed", sentence),), notes)
    losses = _losses(ladder, arm, seeds)
    if len(ladder.sizes) < 3:
        moments = ladder_estimator.pool(losses)
        sentence = f"three sizes are needed, and the study has {len(ladder.sizes)}: train more sizes"
        sizes = _in_nats(ladder, seeds, ladder_estimator.differences(moments), level)
        return ArmVerdict(arm, sizes, (Refusal("few_sizes", sentence),), notes)
    found = ladder_estimator.estimate(losses)
    sizes = _in_nats(ladder, seeds, found.difference, level)
    plain: dict[str, Any] = {
        "curve_p_value": float(found.curve_p_value[0]),
        "exponent": float(found.exponent[0]),
        "fall": float(found.fall[0]),
    }
    if not ladder_estimator.multiplier_given(found)[0]:
        return ArmVerdict(arm, sizes, (_no_multiplier(ladder, found),), notes, **plain)
    sizes = tuple(at._replace(log_multiplier=_interval(found.size, level, n)) for n, at in enumerate(sizes))
    of_sizes = found.of_sizes
    line_p_value = float(found.line_p_value[0])
    verdict = ArmVerdict(
        arm, sizes, _limits(ladder, line_p_value), notes,
        mean=Claim(_interval(found.mean, level), of_sizes and _interval(of_sizes.mean, level)),
        held_out=_held_out(ladder, losses, level) if len(ladder.sizes) > 3 else None,
        line_p_value=line_p_value, **plain,
    )  # fmt: skip
    if not verdict.line:
        return verdict
    return replace(
        verdict,
        slope=Claim(_interval(found.slope, level), of_sizes and _interval(of_sizes.slope, level)),
        largest=Claim(_interval(found.largest, level), of_sizes and _interval(of_sizes.largest, level)),
        beyond=_interval(found.beyond, level),
        beyond_compute=10 * math.exp(ladder.sizes[-1].log_compute),
    )


def points(ladder: Ladder) -> scaling_law.Points:
    """Return every finite loss as a point of the joint fit; runs of one size and seed are a pair of any arms."""
    arms = (ladder.baseline, *ladder.arms)
    rows: list[tuple[float, ...]] = []
    pairs: dict[tuple[str, int], int] = {}
    for (arm, name, seed), losses in ladder.losses.items():
        number = next(n for n, size in enumerate(ladder.sizes) if size.name == name)
        size, pair = ladder.sizes[number], pairs.setdefault((name, seed), len(pairs))
        rows += [
            (arms.index(arm), number, pair, size.parameters, tokens, flops, loss)
            for tokens, flops, loss in zip(size.tokens, size.flops, losses, strict=True)
            if math.isfinite(loss)
        ]
    if not rows:
        raise UserError("no run of the ladder has a finite loss: train its runs")
    columns = np.array(rows, dtype=np.float64).T
    return scaling_law.Points(*columns[:3].astype(np.int64), *columns[3:])


# ---- From a ladder to arrays and back --------------------------------------------------------------------------------


def _pairs(ladder: Ladder, arm: str) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Return the seeds of each size that both sides finished, and a sentence on every pair that is left out."""
    seeds: dict[str, list[int]] = {size.name: [] for size in ladder.sizes}
    notes = []
    for name, found in seeds.items():
        trained = {seed for side, size, seed in ladder.losses if size == name and side in (arm, ladder.baseline)}
        for seed in sorted(trained):
            sides = {side: ladder.losses.get((side, name, seed)) for side in (ladder.baseline, arm)}
            lacking = [side for side, losses in sides.items() if losses is None]
            diverged = [side for side, losses in sides.items() if losses and not np.isfinite(losses).all()]
            if lacking:
                notes.append(f"Size {name}, seed {seed}: {lacking[0]} has no finished run; the pair is left out.")
            elif diverged:
                notes.append(
                    f"Size {name}, seed {seed}: {' and '.join(diverged)} diverged; the pair is left out, and all "
                    "intervals are of pairs that converge."
                )
            else:
                found.append(seed)
    every = [seed for found in seeds.values() for seed in found]
    if repeated := sorted({seed for seed in every if every.count(seed) > 1}):
        notes.append(
            f"Several sizes have seeds in common ({', '.join(map(str, repeated))}), which may share their luck; the "
            "interval of the mean is then too narrow: give every size its own seeds."
        )
    return seeds, tuple(notes)


def _losses(ladder: Ladder, arm: str, seeds: Mapping[str, Sequence[int]]) -> Losses:
    """Return one ladder's losses as a batch of one."""
    sides = [
        [np.array([[ladder.losses[side, size.name, seed] for seed in seeds[size.name]]]) for size in ladder.sizes]
        for side in (ladder.baseline, arm)
    ]
    return Losses(np.array([size.log_compute for size in ladder.sizes]), *sides)


def _interval(estimate: Estimate, level: float, *index: int) -> Interval:
    """Return the interval of the first ladder's estimate."""
    parts = np.broadcast_arrays(estimate.value, estimate.error, estimate.degrees)
    value, error, degrees = (float(part[(0, *index)]) for part in parts)
    return student_interval(value, error, degrees, level)


def _in_nats(
    ladder: Ladder, seeds: Mapping[str, Sequence[int]], difference: Estimate, level: float
) -> tuple[AtSize, ...]:
    """Return each size's difference as arm minus baseline, as everywhere in `evals.verdict`."""
    flipped = difference._replace(value=-difference.value)
    return tuple(
        AtSize(size, len(seeds[size.name]), _interval(flipped, level, n), None, level=level)
        for n, size in enumerate(ladder.sizes)
    )


def _no_multiplier(ladder: Ladder, found: ladder_estimator.Estimates) -> Refusal:
    """Return why differences cannot be turned into compute."""
    base = ladder.baseline
    if found.steepness[0] < LEAST_STEEPNESS:
        return Refusal(
            "flat_baseline",
            f"the loss of {base} falls by {found.steepness[0]:.1f} standard errors over these sizes, and "
            f"{LEAST_STEEPNESS:g} are needed to turn differences into compute: add seeds, or sizes further apart",
        )
    if found.curve_p_value[0] < CURVE_MISFIT:
        return Refusal(
            "curve_misfit",
            f"the losses of {base} do not lie on one curve E + K C^-c (p = {found.curve_p_value[0]:.2g}), so "
            "differences stay in nats: check that every size was tuned alike",
        )
    worst = int(np.argmax(found.share[0]))
    return Refusal(
        "beyond_curve",
        f"at size {ladder.sizes[worst].name} the difference takes {found.share[0, worst]:.0%} of what the loss of "
        f"{base} lies above its floor, where a curve through these sizes says nothing: add larger sizes of {base}",
    )


def _limits(ladder: Ladder, line_p_value: float) -> tuple[Refusal, ...]:
    """Return what the number of sizes and the line's misfit forbid."""
    refusals = []
    if len(ladder.sizes) < 4:
        why = "nothing is held out and nothing is firm with three sizes: train a fourth size"
        refusals.append(Refusal("three_sizes", why))
    if line_p_value < LINE_MISFIT:
        why = (
            f"the sizes do not lie on a line in log compute (p = {line_p_value:.2g}), so there is no slope and no "
            "extrapolation: read them one by one"
        )
        refusals.append(Refusal("line_misfit", why))
    return tuple(refusals)


def _held_out(ladder: Ladder, losses: Losses, level: float) -> HeldOut:
    found = ladder_estimator.hold_out(losses)
    difference = found.difference._replace(value=-found.difference.value)
    measured, loss = -float(found.measured_difference[0]), float(found.measured_loss[0])
    return HeldOut(ladder.sizes[-1], _interval(difference, level), measured, _interval(found.loss, level), loss)
