"""What is compared in the small experiments: an activation, and residual attention streams."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from llm.common.errors import UserError
from llm.model.activations import NAMES, activation
from llm.model.block import Block
from llm.model.fast_paths import enable_fast_paths
from llm.model.feedforward import FeedForward
from llm.model.streams import SINGLE, STREAMS, AttentionStream

from .experiment.options import raise_problems

DEFAULTS = {"nmda": 1.0, "leaky_relu": 0.01}  # alpha (SiLU); slope below 0 (Kim et al. 2023, Section 3.1)
TITLES = {"nmda": "NMDA α =", "leaky_relu": "LeakyReLU", "gelu": "GELU"}


class Act(NamedTuple):
    """An activation: its name, and NMDA's alpha or LeakyReLU's slope; None for the others."""

    name: str
    number: float | None

    @classmethod
    def parse(cls, text: str) -> "Act":
        """nmda:ALPHA, leaky_relu:SLOPE, or another name of `llm.model`; UserError where that names none."""
        name, colon, number = text.partition(":")
        try:
            if name not in NAMES or (colon and name not in DEFAULTS) or not math.isfinite(float(number or 0)):
                raise ValueError
            found = cls(name, float(number or DEFAULTS[name]) if name in DEFAULTS else None)
            found.module()
        except ValueError:
            raise UserError(
                f"activation {text!r} is unknown: give nmda:ALPHA (0 or more), leaky_relu:SLOPE, or one of "
                f"{', '.join(sorted(set(NAMES) - DEFAULTS.keys()))}"
            ) from None
        return found

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}:{self.number:.12g}"

    def module(self) -> nn.Module:
        """The activation itself."""
        if self.name == "leaky_relu":
            return nn.LeakyReLU(DEFAULTS[self.name] if self.number is None else self.number)
        return activation(self.name, **({} if self.number is None else {"alpha": self.number}))

    @property
    def title(self) -> str:
        """In a legend or a table."""
        title = TITLES.get(self.name, self.name)
        return title if self.number is None else f"{title} {self.number:.12g}"


@dataclass(frozen=True)
class Variant:
    """What is compared; one model has one name.

    Args:
        act: activation of the feed-forward network, as `Act.parse` takes it.
        streams, source: residual attention streams, as in the language models.

    Raises:
        UserError: names that are not known, all of them.
    """

    act: str = "nmda:1"
    streams: tuple[str, ...] = ()
    source: str = "previous"

    def __post_init__(self) -> None:
        known = [("source", self.source, SINGLE), *(("stream", stream, STREAMS) for stream in self.streams)]
        problems = [
            f"{what} {value!r} is unknown: give {', '.join(names)}"
            for what, value, names in [*known, *self.choices()]
            if value not in names
        ]
        try:
            object.__setattr__(self, "act", str(Act.parse(self.act)))
        except UserError as error:
            problems.append(str(error))
        raise_problems(problems)
        object.__setattr__(self, "streams", tuple(stream for stream in STREAMS if stream in self.streams))
        if not self.streams:
            object.__setattr__(self, "source", "previous")

    def choices(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Field, value and known values of what an experiment adds."""
        return []

    @property
    def activation(self) -> Act:
        """What `act` names."""
        return Act.parse(self.act)

    def stream(self, heads: int, layer: int) -> AttentionStream | None:
        """The streams of a layer, numbered from 0; None without any."""
        if not self.streams:
            return None
        return AttentionStream(self.streams, self.source, "fixed", dict.fromkeys(self.streams, heads), layer)


def enable_fast_parts(model: nn.Module) -> None:
    """Switch the fast paths on in the parts of a model that are those of the language models."""
    for part in model.modules():
        if isinstance(part, Block | FeedForward | nn.RMSNorm):
            enable_fast_paths(part)
