"""Steps, tokens and FLOPs until a loss is reached, and what the change costs in time, memory and parameters."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from evals.exported_steps import Curve, ExportedRun
from evals.verdict.pair import Pair
from llm.runs import reading


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


TIMES = ("training time", "tokens per second")


class Cost(NamedTuple):
    """One kind of cost, a value a run: without the change and with it, in the order of the seeds."""

    name: str
    unit: str
    first: list[float]
    second: list[float]

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


def busy_note(pairs: Sequence[Pair]) -> list[str]:
    """Say why `costs` leaves out times, if it does: a list of one sentence or none."""
    busy = [str(run.folder) for pair in pairs for run in pair if run.shared_its_cores]
    why = "other processes used the cores while these runs trained (event busy_machine)"
    return [f"training time and tokens per second are not compared: {why}: {', '.join(busy)}"] if busy else []


def costs(pairs: Sequence[Pair], times: bool = True) -> list[Cost]:
    """Time, throughput, memory, parameters and FLOPs of both sides; without what a run does not report.

    `times`: False leaves out time and throughput, as `busy_note` advises.
    """
    kinds: list[tuple[str, str, Any]] = [
        ("parameters", "", lambda run: run.summary["parameters"]),
        ("FLOPs per token", "", flops_per_token),
        ("training time", "s", lambda run: run.summary["seconds"]),
        ("tokens per second", "", median_rate),
        (
            "peak memory",
            "GB",
            lambda run: run.summary.get("peak_memory_bytes") and run.summary["peak_memory_bytes"] / 1e9,
        ),
    ]
    if not times:
        kinds = [kind for kind in kinds if kind[0] not in TIMES]
    found = []
    for name, unit, of in kinds:
        first, second = ([of(run) for run in side] for side in zip(*pairs, strict=True))
        if all([*first, *second]):
            found.append(Cost(name, unit, first, second))
    return found


def median_rate(run: ExportedRun) -> float | None:
    """The median of the tokens per second that the run logged: steps slowed down by other work count little."""
    rates = [rate for row in run.metrics if (rate := reading.number(row, "tokens_per_second")) is not None]
    return statistics.median(rates) if rates else None
