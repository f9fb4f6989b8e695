"""What the number of a setting must be, and the table for a run's config. Imports no torch.

The classes that hold a config's settings read the table, and so does `llm/train/options.py`, before they are imported.
A limit that follows from another setting, such as a multiple of it, stands in the class.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """What a value must be, in words and as a function."""

    text: str
    holds: Callable[[Any], bool]

    def or_else(self, text: str) -> "Limit":
        """Return the same limit whose sentence goes on with `text`."""
        return self._replace(text=self.text + text)


POSITIVE = Limit("a finite number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Limit("a finite number of at least 0", lambda value: 0 <= value < math.inf)
BELOW_ONE = Limit("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Limit("between 0 and 1", lambda value: 0 <= value <= 1)
INSIDE = Limit("between 0 and 1", lambda value: 0 < value < 1)


def at_least(least: float) -> Limit:
    """Return the limit of a number that is at least `least`."""
    return Limit(f"at least {least}", lambda value: value >= least)


def between(least: float, most: float) -> Limit:
    """Return the limit of a number from `least` to `most`, both allowed."""
    return Limit(f"{least} to {most}", lambda value: least <= value <= most)


MOST_WORKERS = 256  # loading processes of a rank
LONGEST = 1e7  # seconds, 116 days: collectives count in an integer of 64 bits, in nanoseconds

COUNT = at_least(1)
LIMITS: dict[str, Limit] = {
    "data.batch_size": COUNT,
    "data.context": COUNT,
    "data.micro_batch_size": COUNT,
    "data.validate_every": COUNT,
    "data.validation_rows": COUNT,
    "data.workers": between(0, MOST_WORKERS),
    "model.gradient_clip": POSITIVE.or_else(", or null for none"),
    "model.z_loss": BELOW_ONE.or_else("; 0 is none, 1e-4 is usual"),
    "model.activation_checkpointing": at_least(0).or_else(": true, false, or every n-th block"),
    "model.optimizer.lr": POSITIVE,
    "model.optimizer.betas": BELOW_ONE,
    "model.optimizer.eps": POSITIVE,
    "model.optimizer.weight_decay": NOT_NEGATIVE,
    "model.optimizer.muon_lr": POSITIVE.or_else(", or null for lr"),
    "model.optimizer.muon_momentum": BELOW_ONE,
    "model.schedule.warmup_steps": at_least(0),
    "model.schedule.cooldown_steps": at_least(0),
    "model.schedule.min_lr_ratio": SHARE,
    "strategy.stage": Limit("1, 2 or 3", lambda value: value in (1, 2, 3)),
    "strategy.bucket_elements": COUNT,
    "strategy.timeout": Limit(f"above 0 and at most {LONGEST:,.0f} seconds", lambda value: 0 < value <= LONGEST),
    "run.checkpoint_every": COUNT,
    "run.keep_checkpoints": COUNT,
    "run.keep_every": COUNT,
    "run.keep_steps": COUNT,
    "run.max_consecutive_skips": COUNT,
    "run.spike_threshold": Limit("above 0", lambda value: value > 0),
    "evaluation.threads": COUNT,
    "evaluation.nice": between(0, 19),
    "evaluation.every": COUNT,
}


def config_problems(part: str, value_of: Callable[[str], Any]) -> list[str]:
    """One sentence for each number of a part ("data", "model.optimizer") that is out of its limit.

    Args:
        part: of the config; "" for all parts.
        value_of: the value of a setting by its name, in all parts by its key; None where it is not given.
    """
    found = []
    for key, limit in LIMITS.items():
        if part and key.rpartition(".")[0] != part:
            continue
        value = value_of(key.removeprefix(f"{part}."))
        numbers = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(limit.holds(number) for number in numbers):
            found.append(f"{key} {value} must be {limit.text}")
    return found
