"""Steps, tokens and FLOPs until a loss is reached, and what the change costs: size, memory, measured time."""

import math
import re
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.exported_steps import Curve, ExportedRun
from evals.verdict.pair import Pair, Pairs
from evals.verdict.statistics import student_interval
from llm.common.errors import UserError
from llm.common.files import read_json


class Reached(NamedTuple):
    """When a run's validation loss first came down to a target.

    tokens, steps: None where it never did. at_most: its first measurement is below the target already, so that it was
    reached then or before. flops: None too where the run does not say how many a token takes.
    """

    steps: float | None
    tokens: float | None
    flops: float | None
    at_most: bool = False


class Saving(NamedTuple):
    """One pair at one target: either run's way there."""

    target: float
    first: Reached
    second: Reached

    @property
    def ratio(self) -> float | None:
        """Tokens of the second over tokens of the first; None where either is not known exactly."""
        for reached in (self.first, self.second):
            if reached.tokens is None or reached.at_most:
                return None
        assert self.first.tokens and self.second.tokens
        return self.second.tokens / self.first.tokens


def first_at(curve: Curve, target: float) -> float | None:
    """Where a curve first comes down to `target`, between two measurements on the line that joins them.

    None where it never does; its first measurement where that is below already.
    """
    before: tuple[float, float] | None = None
    for at, value in zip(*curve, strict=True):
        if value <= target:
            if before is None:
                return at
            gone, height = before
            return gone + (at - gone) * (height - target) / (height - value)
        before = at, value
    return None


def reached(run: ExportedRun, target: float) -> Reached:
    """When the run's validation loss first was `target` nats per token."""
    curve = run.curve("validation_loss")
    tokens = first_at(curve, target)
    per_token = flops_per_token(run)
    return Reached(
        first_at(run.curve("validation_loss", over="step"), target),
        tokens,
        None if tokens is None or per_token is None else tokens * per_token,
        curve.values[0] < target,
    )


def saving(pair: Pair, target: float | None = None) -> Saving:
    """Both runs' way to `target`; without one to the final loss of that run whose final loss is the higher."""
    if target is None:
        target = max(run.curve("validation_loss").values[-1] for run in pair)
    return Saving(target, reached(pair.first, target), reached(pair.second, target))


def flops_per_token(run: ExportedRun) -> float | None:
    """Model FLOPs of training for one token, as run.json says them (see `llm.train.flops`); None in an older one."""
    return run.record.get("flops_per_token")


# ---- Cost ------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """One kind of cost: values without the change and with it that belong together, of each seed or each round.

    interval: of `percent`, in words, where rounds were measured.
    """

    name: str
    unit: str
    first: list[float]
    second: list[float]
    interval: str = ""

    @property
    def ratios(self) -> list[float]:
        """Second over first, a value a pair."""
        return [other / one for one, other in zip(self.first, self.second, strict=True)]

    @property
    def means(self) -> tuple[float, float]:
        """The geometric mean of either side, whose ratio is that of the ratios."""
        return statistics.geometric_mean(self.first), statistics.geometric_mean(self.second)

    @property
    def percent(self) -> float:
        """What the second side needs more than the first, in percent."""
        first, second = self.means
        return 100 * (second / first - 1)


def in_percent(value: float) -> str:
    """A share more or less in percent: "+1.4%"; a zero has no minus."""
    return f"{round(value, 1) + 0.0:+.1f}%"


def busy_runs(pairs: Sequence[Pair]) -> tuple[list[ExportedRun], list[ExportedRun]]:
    """The runs of either side whose cores other processes used."""
    first, second = ([run for run in side if run.shared_its_cores] for side in zip(*pairs, strict=True))
    return first, second


def time_note(pairs: Sequence[Pair]) -> str:
    """Say why training times are no cost: two runs are two moments of a machine."""
    busy = [str(run.folder) for side in busy_runs(pairs) for run in side]
    others = f"; other processes used the cores of {', '.join(busy)} (event busy_machine)" if busy else ""
    return (
        "Training time is not compared, since the runs did not train side by side: measure it with `python -m llm "
        f"bench --json FILE` and pass `--bench FILE`{others}."
    )


def costs(pairs: Sequence[Pair], step_time: Cost | None = None) -> list[Cost]:
    """Parameters, FLOPs and memory of both sides, without what a run does not report, and the measured `step_time`."""
    kinds: list[tuple[str, str, Any]] = [
        ("parameters", "", lambda run: run.summary["parameters"]),
        ("FLOPs per token", "", flops_per_token),
        (
            "peak memory",
            "GB",
            lambda run: run.summary.get("peak_memory_bytes") and run.summary["peak_memory_bytes"] / 1e9,
        ),
    ]
    found = []
    for name, unit, of in kinds:
        first, second = ([of(run) for run in side] for side in zip(*pairs, strict=True))
        if all([*first, *second]):
            found.append(Cost(name, unit, first, second))
    return [*found, *([step_time] if step_time else [])]


def read_step_time(bench: Path, pairs: Pairs, level: float) -> Cost:
    """The time of a step as `llm bench --json` measured it, both sides in each round; in s per million tokens.

    Raises:
        UserError: the file is not of llm bench, or has no two rounds of a contender that either side is named after.
    """
    try:
        rates = {
            str(name): [float(rate) for rate in each] for name, each in read_json(bench)["tokens_per_second"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{bench} is not of llm bench: give the file that its --json wrote") from error
    sides = []
    for name in pairs.names:
        words = {name, *re.split(r"[-_. ]", name)}
        if len(named := sorted(words & rates.keys())) != 1 or len(rates[named[0]]) < 2:
            raise UserError(
                f"{bench} has no two rounds of {name}: run python -m llm bench with --contenders that the runs are "
                f"named after and --rounds 2 or more (it has {', '.join(rates)})"
            )
        sides.append([1e6 / rate for rate in rates[named[0]]])
    logs = np.log(sides[1]) - np.log(sides[0])
    of_mean = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    found = student_interval(float(logs.mean()), of_mean, len(logs) - 1, level).mapped(
        lambda log: 100 * math.expm1(log)
    )
    interval = f"{100 * level:g}% interval {in_percent(found.low)} to {in_percent(found.high)}"
    return Cost("step time", "s per million tokens", sides[0], sides[1], interval)


def validation_spacing(pairs: Sequence[Pair]) -> float | None:
    """Tokens between two validations of any run, at most; None where each was validated once."""
    gaps = [
        after - before
        for pair in pairs
        for run in pair
        for before, after in pairwise(run.curve("validation_loss").tokens)
    ]
    return max(gaps, default=None)
