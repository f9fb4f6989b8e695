"""The sections of a study's YAML; each names its own problems."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .tuning import RULES

SET_BY_THE_STUDY = (
    *("seed_everything", "initializer_seed", "trainer.max_steps"),
    *("run.folder", "run.keep_steps", "run.start_from", "model.schedule.cooldown_steps"),
)


@dataclass(frozen=True)
class Tokens:
    """Training tokens of a run, one or several budgets for each size.

    Args:
        per_parameter: times the non-embedding parameters of the baseline at that size.
        absolute: or as such.
        cooldown: share of each budget over which the learning rate falls to zero in a straight line, after a constant
            rate. The smaller budgets then branch off the run of the largest. None: the schedule of the base config,
            and every budget is trained from its first step.
        max_epochs: passes through a store that a budget may take.
    """

    per_parameter: Any = None
    absolute: Any = None
    cooldown: Any = None
    max_epochs: Any = 1.0

    def problems(self) -> list[str]:
        """Return what is wrong with it, a sentence each."""
        problems = []
        if (self.per_parameter is None) == (self.absolute is None):
            problems.append("tokens needs either per_parameter or absolute")
        elif not (budgets := self.budgets()) or sorted(set(budgets)) != budgets:
            problems.append("tokens must be a number above 0, or several that increase")
        if self.cooldown is not None and not (is_number(self.cooldown) and float(self.cooldown) < 1):
            problems.append(f"tokens.cooldown {self.cooldown} must be a share above 0 and below 1")
        if not is_number(self.max_epochs):
            problems.append(f"tokens.max_epochs {self.max_epochs} must be a number above 0")
        return problems

    def budgets(self) -> list[float]:
        """Return the budgets, ascending; none if one of them is not a number above 0."""
        return numbers(self.absolute if self.per_parameter is None else self.per_parameter)

    def of(self, parameters: int) -> list[float]:
        """Return the tokens of each budget for a baseline of so many non-embedding parameters."""
        return [budget * (parameters if self.absolute is None else 1) for budget in self.budgets()]

    def label(self, number: int) -> str:
        """Return the name of a budget: 20x for 20 tokens per parameter, or 5M."""
        budget = self.budgets()[number]
        if self.absolute is None:
            return f"{budget:g}x"
        unit = min(3, int(math.log10(budget)) // 3) if budget >= 1 else 0
        return f"{budget / 1000**unit:g}{('', 'K', 'M', 'B')[unit]}"


@dataclass(frozen=True)
class Tune:
    """A search for one setting, on its own seeds, before the runs that are compared; the same for each arm.

    Args:
        key: dotted config key.
        values: tried at each of `sizes`, at the smallest budget.
        sizes: names.
        seeds: how many for each value.
        rule: how an arm's choice is carried to the other sizes (`tuning.py`).
    """

    key: Any = "model.optimizer.lr"
    values: Any = ()
    sizes: Any = ()
    seeds: Any = 1
    rule: Any = "power_law"

    def problems(self, sizes: Iterable[str]) -> list[str]:
        """Return what is wrong with it, a sentence each."""
        problems = []
        if not isinstance(self.key, str) or "." not in self.key or self.key in SET_BY_THE_STUDY:
            problems.append(f"tune.key {self.key} must be a dotted config key, such as model.optimizer.lr")
        if len(values := numbers(self.values)) < 3 or sorted(set(values)) != values:
            problems.append("tune.values must be at least three numbers above 0 that increase")
        given = self.sizes if isinstance(self.sizes, list) else []
        if not given or (unknown := [size for size in map(str, given) if size not in sizes]):
            problems.append(f"tune.sizes must name some of the sizes{f', not {unknown}' if given else ''}")
        if not isinstance(self.seeds, int) or self.seeds < 1:
            problems.append(f"tune.seeds {self.seeds} must be a count of at least 1")
        if self.rule not in RULES:
            problems.append(f"tune.rule {self.rule} is unknown: give one of {', '.join(RULES)}")
        return problems


@dataclass(frozen=True)
class Resources:
    """What a Slurm job of one run requests: nodes, GPUs and cores per node, and the time limit."""

    nodes: Any = 1
    gpus: Any = 1
    cpus: Any = 8
    time: Any = "24:00:00"

    def problems(self, size: str) -> list[str]:
        """Return what is wrong with it, a sentence each."""
        least = {"nodes": 1, "gpus": 0, "cpus": 1}
        problems = [
            f"slurm.{size}.{name} {getattr(self, name)} must be at least {number}"
            for name, number in least.items()
            if not isinstance(getattr(self, name), int) or getattr(self, name) < number
        ]
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", str(self.time)):
            problems.append(f'slurm.{size}.time {self.time} must be a time of sbatch in quotes, such as "24:00:00"')
        return problems

    @property
    def devices(self) -> int:
        """Processes of a run."""
        return self.nodes * max(1, self.gpus)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number above 0; YAML reads 1e-3 as text."""
    try:
        return not isinstance(value, bool) and 0 < float(value) < math.inf
    except (TypeError, ValueError):
        return False


def numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [float(each) for each in values] if all(map(is_number, values)) else []
