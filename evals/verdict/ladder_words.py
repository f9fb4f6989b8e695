"""A ladder's verdict in words and as a record: one sentence per arm that says no more than the intervals do."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from evals.verdict.ladder import ArmVerdict, AtSize, Claim, Ladder, LadderVerdict
from evals.verdict.statistics import Interval

MOST = 100  # factor of compute, beyond which no number is given: the baseline was never trained so far


def sentence(verdict: LadderVerdict, arm: str) -> str:
    """The verdict on one arm: its compute, whether that changes with size, and what the null arm shows."""
    ladder, found, percent = verdict.ladder, verdict.arms[arm], f"{100 * verdict.level:g}% interval"
    if not found.sizes:
        return f"There is no verdict on {arm} against {ladder.baseline}: {found.refusals[0].sentence}."
    if found.mean is None:
        sizes = ", ".join(f"{_nats(at)} at {_size(at)}" for at in found.sizes)
        parts = [
            f"{arm} minus {ladder.baseline} in nats per token ({percent}): {sizes}",
            f"no compute multiplier: {found.refusals[0].sentence}",
        ]
    elif not found.line:
        shown = ", ".join(_one_size(at) for at in found.sizes if at.shown)
        rest = ", ".join(_one_size(at) for at in found.sizes if not at.shown)
        parts = [
            f"the sizes do not lie on a line in log compute (p = {found.line_p_value:.2g}), so {arm} against "
            f"{ladder.baseline} is read size by size ({percent}, Holm's correction)",
            *([f"shown: {shown}"] if shown else []),
            *([f"not shown: {rest}"] if rest else []),
        ]
    else:
        assert found.slope is not None
        parts = [_compute(ladder, found, found.mean, percent)]
        if not _is_open(found.mean.by_seeds):
            parts.append(_slope(found.mean, found.slope))
    if arm != ladder.null:
        parts.append(_null(verdict))
    return "; ".join(parts) + "."


def overview(verdict: LadderVerdict) -> str:
    """Which of many arms differ from the baseline, the largest difference first, and what the null arm shows."""
    ladder, sentences, named = verdict.ladder, list[str](), set[str]()
    for word, sign in (("lower", -1), ("higher", 1)):
        found: dict[str, float] = {}
        for arm in ladder.changed:
            sizes = verdict.arms[arm].sizes
            at = [each for each in sizes if each.differs and sign * each.difference.value > 0]
            where = "" if len(at) == len(sizes) else f" (at {', '.join(each.size.name for each in at)})"
            if at:
                named.add(arm)
                found[arm + where] = -statistics.fmean(abs(each.difference.value) for each in at)
        if found:
            names = ", ".join(sorted(found, key=found.__getitem__))
            count = f"{len(found)} of {len(ladder.changed)} arms"
            sentences.append(f"a {word} loss than that of {ladder.baseline} is shown for {count}: {names}")
    if len(named) < len(ladder.changed):
        sentences.append("for the others, no difference is shown" if named else "no arm is shown to differ")
    return " ".join(f"{each[0].upper()}{each[1:]}." for each in [*sentences, _null(verdict)])


def at_equal_cost(verdict: LadderVerdict, arm: str, ratio: Interval) -> str:
    """The mean adjusted for the cost of a step, arm over baseline, as `bench` measures it; empty without a mean."""
    found, base = verdict.arms[arm], verdict.ladder.baseline
    if found.mean is None:
        return ""
    adjusted = adjusted_for_cost(found.mean.by_seeds, ratio, verdict.level)
    step = f"a step takes {ratio.value:.3g} times as long, {ratio.low:.3g} to {ratio.high:.3g}"
    interval = f"{100 * verdict.level:g}% interval {bounds(adjusted)}"
    if not adjusted.shown:
        return f"At the measured cost ({step}), no difference in time between {arm} and {base} is shown ({interval})."
    return f"At the measured cost ({step}), {arm} needs {in_compute(adjusted.value)} time than {base} ({interval})."


def extrapolation(verdict: LadderVerdict, arm: str) -> str:
    """The prediction a decade of compute beyond the largest size; empty without a line, or where it says nothing."""
    found = verdict.arms[arm]
    if found.beyond is None or found.beyond_compute is None or _is_open(found.beyond):
        return ""
    return (
        f"Extrapolated: if ln m stays on its line, {arm} needs {in_compute(found.beyond.value)} compute at "
        f"{found.beyond_compute:.1e} FLOPs, a decade beyond the largest size ({100 * verdict.level:g}% prediction "
        f"interval {bounds(found.beyond)}, for {found.sizes[-1].seeds} seeds)."
    )


def held_out(verdict: LadderVerdict, arm: str) -> str:
    """The largest size as the smaller ones predict it; empty with three sizes or without a compute multiplier."""
    found = verdict.arms[arm].held_out
    if found is None:
        return ""
    compared = [
        f"{what} {measured:.4f}, predicted {value.value:.4f} ({value.low:.4f} to {value.high:.4f})"
        for what, measured, value in (
            (f"{arm} minus {verdict.ladder.baseline}", found.measured_difference, found.difference),
            (f"loss of {arm}", found.measured_loss, found.loss),
        )
    ]
    return (
        f"Held out, size {found.size.name} is {'' if found.predicted else 'not '}as the smaller sizes predict it, in "
        f"nats per token: {'; '.join(compared)}."
    )


def in_compute(log_multiplier: float) -> str:
    """ln m as what the arm needs: "12% less", "5% more"; from a factor of 2 up as "3.1 times", beyond 100 as "over"."""
    if abs(log_multiplier) > math.log(MOST):
        return "over 99% less" if log_multiplier > 0 else f"over {MOST} times"
    if log_multiplier < -math.log(2):
        return f"{math.exp(-log_multiplier):.1f} times"
    share = 100 * abs(math.expm1(-log_multiplier))
    digits = 0 if share >= 9.5 else 1
    return f"{share:.{digits}f}% {'less' if log_multiplier >= 0 else 'more'}"


def bounds(log_multiplier: Interval) -> str:
    """An interval of ln m as compute: "7 to 16%" on one side of zero as its value is, else "5% more to 10% less"."""
    low, high = in_compute(log_multiplier.low), in_compute(log_multiplier.high)
    for side in (" less", " more"):
        if low.endswith(side) and high.endswith(side):
            least, most = sorted((low, high), key=lambda text: float(text.removeprefix("over ").split("%")[0]))
            return f"{least.removesuffix('%' + side)} to {most.removesuffix(side)}"
    return f"{low} to {high}"


def adjusted_for_cost(log_multiplier: Interval, ratio: Interval, level: float = 0.95) -> Interval:
    """ln of the multiplier in cost: compute multiplier over the arm's cost per FLOP relative to the baseline's.

    `ratio`: the arm's step time over the baseline's, with an interval of the same level from independent measurements.
    The two intervals are combined by MOVER (Zou and Donner 2008): squares of the distances to the bounds add up. The p
    value is that of a normal variable with this interval.
    """
    cost = ratio.mapped(math.log)
    value = log_multiplier.value - cost.value
    low = value - math.hypot(log_multiplier.value - log_multiplier.low, cost.high - cost.value)
    high = value + math.hypot(log_multiplier.high - log_multiplier.value, cost.value - cost.low)
    half = value - low if value > 0 else high - value
    quantile = stats.norm.isf((1 - level) / 2)
    p_value = float(2 * stats.norm.sf(quantile * abs(value) / half)) if half else float(value == 0)
    return Interval(value, low, high, p_value)


def record(value: Any) -> Any:
    """A result as JSON takes it: named tuples and dataclasses become objects, arrays lists, keys text."""
    if dataclasses.is_dataclass(value):
        return {field.name: record(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: record(part) for key, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {" ".join(map(str, key)) if isinstance(key, tuple) else key: record(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [record(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return record(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Parts of the sentence -------------------------------------------------------------------------------------------


def _compute(ladder: Ladder, found: ArmVerdict, mean: Claim, percent: str) -> str:
    over = f"over {_count(ladder.sizes[0].parameters)} to {_count(ladder.sizes[-1].parameters)} parameters"
    seeds = mean.by_seeds
    if not mean.shown:
        text = (
            f"no difference in compute between {found.arm} and {ladder.baseline} is shown {over}: "
            f"{in_compute(seeds.value)}, {percent} {bounds(seeds)}"
        )
        differing = ", ".join(f"{_nats(at)} at {_size(at)}" for at in found.sizes if at.differs)
        return f"{text}; in nats per token, a difference is shown: {differing}" if differing else text
    return (
        f"{found.arm} needs {in_compute(seeds.value)} compute than {ladder.baseline} ({percent} {bounds(seeds)}) {over}"
        + _by_seeds_alone(mean, bounds)
    )


def _is_open(log_multiplier: Interval) -> bool:
    """Whether an interval reaches beyond a factor of `MOST` both ways, and so says nothing of compute."""
    return min(-log_multiplier.low, log_multiplier.high) > math.log(MOST)


def _slope(mean: Claim, slope: Claim) -> str:
    what = {1: "the gain", -1: "the extra compute", 0: "the compute multiplier"}[mean.shown]
    seeds = slope.by_seeds
    numbers = f"(slope of ln m over ln C {_decimal(seeds.value)}, {_plain(seeds)})"
    if not slope.shown:
        return f"that {what} grows or shrinks with size is not shown {numbers}"
    grows = slope.shown * (mean.shown or 1) > 0
    return f"{what} {'grows' if grows else 'shrinks'} with size {numbers}" + _by_seeds_alone(slope, _plain)


def _by_seeds_alone(claim: Claim, form: Any) -> str:
    """What a claim that is not firm rests on."""
    if claim.firm:
        return ""
    if claim.by_sizes is None:
        return ", by seeds alone (three sizes are too few to be a sample)"
    return f", by seeds alone (with the sizes as the sample {form(claim.by_sizes)})"


def _null(verdict: LadderVerdict) -> str:
    null = verdict.null
    if null is None:
        return "there is no null arm, so what differs without a change is not known"
    if not null.sizes:
        return f"the null arm says nothing: {null.refusals[0].sentence}"
    if not null.shown:
        return "the null arm shows nothing"
    shown = [f"{_nats(at)} nats per token at {_size(at)}" for at in null.sizes if at.shown]
    if null.mean is not None and null.mean.shown:
        shown.append(f"{in_compute(null.mean.by_seeds.value)} compute ({bounds(null.mean.by_seeds)})")
    return f"the null arm, which carries no change, shows a difference too: {', '.join(shown)}"


def _one_size(at: AtSize) -> str:
    assert at.log_multiplier is not None
    return f"{in_compute(at.log_multiplier.value)} compute ({bounds(at.log_multiplier)}) at {_size(at)}"


def _nats(at: AtSize) -> str:
    return f"{at.difference.value:+.4f} ({at.difference.low:+.4f} to {at.difference.high:+.4f})"


def _size(at: AtSize) -> str:
    return _count(at.size.parameters)


def _plain(interval: Interval) -> str:
    return f"{_decimal(interval.low)} to {_decimal(interval.high)}"


def _decimal(value: float) -> str:
    """Two decimals, more for a value that would look like zero."""
    return f"{value:.2f}" if abs(value) >= 0.005 or value == 0 else f"{value:.1g}"


def _count(parameters: float) -> str:
    """Parameters in units of a thousand, million or billion: "3.1M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:g}"
