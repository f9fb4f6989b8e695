"""Residual attention streams: queries, keys or values of one layer are added to the next layer's.

Burns et al. 2025, Section 3.2: with a stream of values, V_n = W_n^v X + V_{n-1}; Section 4.1: each head receives the
head of the same index of the layer before. With R_n = W_n X, a layer's own projection, layer n attends with
R_n + w_n C_n, where what arrives, C_n, depends on the source ("previous" is that of the authors' code,
github.com/tfburns/AMICL-and-residual-attention-streams):

    previous      C_n = R_{n-1}                  the raw projection, not the summed one
    accumulated   C_n = R_1 + ... + R_{n-1}      the running sum
    first         C_n = R_1

The first layer receives nothing. Under `completep` the running sum is divided by the relative depth, as a residual
stream is (`parametrization.py`). C_n travels between blocks as an explicit carry, a plain tuple with one tensor for
each stream: ZeRO-3 hooks, activation checkpointing and torch.compile all understand tuples. What a stream carries
belongs to one position, so it moves nothing between positions or documents; and it holds the current tokens only,
never what a key-value cache returns.

Dimension letters: B batch, T time, H heads of this projection (query heads or key-value heads), K width of a head.
"""

import torch
from torch import Tensor, nn

STREAMS = ("queries", "keys", "values")
SOURCES = ("previous", "accumulated", "first")
WEIGHTS = ("fixed", "layer", "head")

Carry = tuple[Tensor, ...] | None  # C_n of each stream, (B, H, T, K), in the order of STREAMS; None at the first layer


class AttentionStream(nn.Module):
    """Adds what arrives from earlier layers to one layer's queries, keys and values.

    Args:
        streams: which of queries, keys, values have a stream.
        source: "previous", "accumulated" or "first".
        weight: w_n: "fixed" at 1, or learned from 1 on, one scalar per "layer" or per "head".
        heads: number of heads of each stream, {"queries": H, "keys": G, "values": G}.
        first_layer: nothing arrives here, so there is no weight to learn.
        accumulated_scale: factor of what arrives from "accumulated", see `parametrization.py`.
    """

    def __init__(
        self,
        streams: tuple[str, ...],
        source: str,
        weight: str,
        heads: dict[str, int],
        first_layer: bool,
        accumulated_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.streams, self.source = streams, source
        self.scale = accumulated_scale if source == "accumulated" else 1.0
        learned = weight != "fixed" and not first_layer
        for name in streams:
            size = heads[name] if weight == "head" else 1
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(size, 1, 1)) if learned else None)

    def forward(self, projections: dict[str, Tensor], carry: Carry) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Projections {"queries": R (B, H, T, K), ...} and C_n -> what this layer attends with, and C_{n+1}."""
        mixed, onward = dict(projections), []
        for index, name in enumerate(self.streams):
            own, weight = projections[name], getattr(self, f"{name}_weight")
            arriving = None if carry is None else carry[index]
            if arriving is not None:
                added = arriving if weight is None else weight.to(own.dtype) * arriving
                mixed[name] = torch.add(own, added, alpha=self.scale)
            onward.append(self._onward(own, arriving, mixed[name], weight))
        return mixed, tuple(onward)

    def learned(self) -> dict[str, Tensor]:
        """What a training run logs of this module: the weight of each stream, of several heads the mean."""
        weights = {f"stream_{name}": getattr(self, f"{name}_weight") for name in self.streams}
        return {name: weight.mean() for name, weight in weights.items() if weight is not None}

    def _onward(self, own: Tensor, arriving: Tensor | None, mixed: Tensor, weight: Tensor | None) -> Tensor:
        if self.source == "previous" or arriving is None:
            return own
        if self.source == "first":
            return arriving
        plain = weight is None and self.scale == 1
        return mixed if plain else own + arriving  # the running sum itself is never weighted
