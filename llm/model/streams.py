"""Residual attention streams: queries, keys or values of one layer are added to the next layer's.

Burns et al. 2025, Section 3.2: with a stream of values, V_n = W_n^v X + V_{n-1}; Section 4.1: each head receives the
head of the same index of the layer before. With R_n = W_n X, a layer's own projection, layer n attends with
o_n R_n + w_n C_n. Both factors are 1 unless the config says otherwise. What arrives, C_n, depends on the source
("previous" is that of the authors' code, github.com/tfburns/AMICL-and-residual-attention-streams):

    previous         C_n = R_{n-1}                       the raw projection, not the summed one
    accumulated      C_n = R_1 + ... + R_{n-1}           the running sum
    first            C_n = R_1                           ResFormer with values (Zhou et al. 2024)
    dense            C_n = sum over m < n of a_nm R_m    a learned, at first those of "previous"; DenseFormer has such
                                                         sums of whole layers (Pagliardini et al. 2024)
    dense_by_token   the same with a_nm + d_nm(x)        d linear in the layer's input at that position, at first 0;
                                                         MUDDFormer has an MLP there (Xiao et al. 2025)

With `own` 0 and the source "first", all layers attend with the first layer's values, as in SVFormer (Zhou et al.
2024), and have no projection of their own.

The first layer receives nothing. Under `completep` the running sum is divided by the relative depth, as a residual
stream is (`parametrization.py`). C_n travels between blocks as an explicit carry, a plain tuple with one tensor for
each stream, and for the dense sources with one for each earlier layer and stream: ZeRO-3 hooks, activation
checkpointing and torch.compile all understand tuples. What a stream carries belongs to one position, so it moves
nothing between positions or documents; and it holds the current tokens only, never what a key-value cache returns.

Dimension letters: B batch, T time, D width, H heads of this projection (query heads or key-value heads), K width of a
head, M layers before this one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STREAMS = ("queries", "keys", "values")
SINGLE = ("previous", "accumulated", "first")  # sources of one tensor
DENSE = ("dense", "dense_by_token")  # of one from each earlier layer
SOURCES = ("previous", "accumulated", "first", "dense", "dense_by_token")
WEIGHTS = ("fixed", "layer", "head", "mix")

Carry = tuple[Tensor, ...] | None  # what arrives, (B, H, T, K) each, in the order of STREAMS; None at the first layer


def receives(config: Any, index: int) -> bool:
    """Whether a layer of a model adds what arrives there."""
    layers = getattr(config, "stream_layers", None)
    return bool(getattr(config, "stream", None)) and index > 0 and (layers is None or index in layers)


def lacks_projections(config: Any, index: int) -> tuple[str, ...]:
    """Which of queries, keys and values a layer takes from the first layer alone, so that it has no projection."""
    alone = receives(config, index) and config.stream_own == 0 and config.stream_weight != "mix"
    return tuple(config.stream) if alone else ()


class AttentionStream(nn.Module):
    """Adds what arrives from earlier layers to one layer's queries, keys and values.

    Args:
        streams: which of queries, keys, values have a stream.
        source: see the module.
        weight: w_n is "fixed" at `arriving`, or learned from there on, one scalar per "layer" or per "head"; "mix" also
            learns o_n, one scalar of each per layer.
        heads: number of heads of each stream, {"queries": H, "keys": G, "values": G}.
        index: of this layer; nothing arrives at the first, so that there is no weight to learn.
        width: D, which "dense_by_token" reads.
        own: o_n.
        arriving: w_n; of a dense source, that of the layer before.
        receives: whether this layer adds what arrives, or only passes it on.
        accumulated_scale: factor of what arrives from "accumulated", see `parametrization.py`.
    """

    def __init__(
        self,
        streams: tuple[str, ...],
        source: str,
        weight: str,
        heads: dict[str, int],
        index: int,
        width: int = 0,
        *,
        own: float = 1.0,
        arriving: float = 1.0,
        receives: bool = True,
        accumulated_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.streams, self.source, self.weight, self.index = streams, source, weight, index
        self.own, self.arriving, self.receives = own, arriving, receives and index > 0
        self.scale = accumulated_scale if source == "accumulated" else 1.0
        before = index if source in DENSE else 1  # weights of each head
        for name in streams:
            each = heads[name] if weight == "head" else 1
            shape = (before, each, 1, 1) if source in DENSE else (each, 1, 1)
            self._learn(f"{name}_weight", shape, weight != "fixed")
            self._learn(f"{name}_own", (1, 1, 1), weight == "mix")
            self._learn(f"{name}_by_token", (before * each, width), source == "dense_by_token")

    def _learn(self, name: str, shape: tuple[int, ...], learned: bool) -> None:
        learned = learned and self.receives
        self.register_parameter(name, nn.Parameter(torch.empty(shape)) if learned else None)
        if learned:
            self.reset(name)

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Give a parameter of this module its first values."""
        parameter = getattr(self, name).zero_()
        if name.endswith("_own"):
            parameter.fill_(self.own)
        elif name.endswith("_weight"):  # of a dense source, that of the layer before
            (parameter[-1] if self.source in DENSE else parameter).fill_(self.arriving)

    def forward(
        self, projections: dict[str, Tensor | None], carry: Carry, hidden: Tensor | None = None
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Add what arrives.

        Args:
            projections: {"queries": R (B, H, T, K), ...}; None where this layer has none.
            carry: C_n of each stream; of a dense source R_1 ... R_M of the first, then of the next stream.
            hidden: (B, T, D), the layer's input, which "dense_by_token" reads.

        Returns:
            What this layer attends with, (B, H, T, K) each, and C_{n+1}.
        """
        mixed: dict[str, Tensor] = dict(projections)  # what is None is put in below
        onward: list[Tensor] = []
        each = len(carry) // len(self.streams) if carry else 0
        for number, name in enumerate(self.streams):
            arrived = () if carry is None else carry[number * each : (number + 1) * each]
            own = projections[name]
            added = self._added(name, arrived, hidden) if arrived and self.receives else None
            if added is not None:
                mixed[name] = self._mix(name, own, added)
            onward += self._onward(own, arrived, mixed[name], name)
        return mixed, tuple(onward)

    def learned(self) -> dict[str, Tensor]:
        """What a training run logs of this module: each stream's weights, of several heads the mean; of a dense source
        that of the layer before, and the sum over all."""
        found = {}
        for name in self.streams:
            if (weight := getattr(self, f"{name}_weight")) is not None:
                dense = self.source in DENSE
                found[f"stream_{name}"] = weight[-1].mean() if dense else weight.mean()
                if dense:
                    found[f"stream_{name}_sum"] = weight.sum(0).mean()
            if (own := getattr(self, f"{name}_own")) is not None:
                found[f"stream_{name}_own"] = own.mean()
        return found

    def _added(self, name: str, arrived: tuple[Tensor, ...], hidden: Tensor | None) -> Tensor:
        """w_n C_n."""
        weight = getattr(self, f"{name}_weight")
        if self.source not in DENSE:
            arriving = arrived[0]
            if weight is None:
                return arriving if self.arriving == 1 else self.arriving * arriving
            return weight.to(arriving.dtype) * arriving
        weights = weight.to(arrived[0].dtype)
        by_token = getattr(self, f"{name}_by_token")
        if by_token is not None:
            assert hidden is not None
            slopes = F.linear(hidden, by_token.to(hidden.dtype))  # (B, T, M H)
            slopes = slopes.unflatten(-1, (self.index, -1)).permute(2, 0, 3, 1).unsqueeze(-1)  # (M, B, H or 1, T, 1)
            weights = weights.unsqueeze(1) + slopes.to(weights.dtype)
        total = weights[0] * arrived[0]
        for weight, earlier in zip(weights[1:], arrived[1:], strict=True):
            total = torch.addcmul(total, weight, earlier)
        return total

    def _mix(self, name: str, own: Tensor | None, added: Tensor) -> Tensor:
        learned = getattr(self, f"{name}_own")
        if own is None:
            return added
        if learned is not None:
            return torch.addcmul(added * self.scale, learned.to(own.dtype), own)
        return torch.add(own if self.own == 1 else self.own * own, added, alpha=self.scale)

    def _onward(self, own: Tensor | None, arrived: tuple[Tensor, ...], mixed: Tensor, name: str) -> tuple[Tensor, ...]:
        if self.source == "first" and arrived:
            return arrived
        assert own is not None
        if self.source in DENSE:
            return (*arrived, own)
        if self.source == "previous" or not arrived:
            return (own,)
        # the running sum itself is never weighted
        plain = (
            self.receives and self.own == self.arriving == self.scale == 1 and not any(True for _ in self.parameters())
        )
        return (mixed if plain else own + arrived[0],)
