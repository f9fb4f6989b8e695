"""Runs that differ in their seeds alone, as one group."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from scipy import stats


class Facts(Protocol):
    """A run with its `facts`: all that the runs of a group share."""

    @property
    def facts(self) -> dict[str, Any]: ...


Run = TypeVar("Run", bound=Facts)


def grouped(runs: Sequence[Run], without: str | None = None) -> list[list[Run]]:
    """Group the runs of equal facts, or whose facts differ in `without` alone, in the order of the first of each."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple((name, v) for name, v in run.facts.items() if name != without), []).append(run)
    return list(groups.values())


def differences(groups: Sequence[Sequence[Facts]], known: Collection[str | None]) -> list[str]:
    """Name each group by every fact in which the groups differ, but for those that are `known`."""
    facts = [group[0].facts for group in groups]
    differ = [name for name in facts[0] if name not in known and len({str(each[name]) for each in facts}) > 1]
    return [", ".join(f"{name} {word(each[name])}" for name in differ) for each in facts]


def word(value: Any) -> str:
    """Return a value as it stands in the name of a folder or of a group."""
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(value) or "none" if isinstance(value, tuple) else str(value)


def mean_and_deviation(values: Sequence[float], decimals: int = 3) -> str:
    """Format a mean and the standard deviation of the values themselves (divided by their number)."""
    mean = f"{np.mean(values):.{decimals}f}"
    return f"{mean} ± {np.std(values):.{decimals}f}" if len(values) > 1 else mean


def half_interval(values: np.ndarray) -> np.ndarray:
    """Return half of the mean's 95% interval over two or more seeds, by Student's t: (seeds, ...) -> (...)."""
    count = len(values)
    return np.asarray(stats.t.ppf(0.975, count - 1) * values.std(0, ddof=1) / count**0.5)
