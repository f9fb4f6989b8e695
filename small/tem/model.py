"""TEM-t: a transformer whose positions are integrated from actions, and whose memory is of this environment alone.

Whittington et al. 2022, Section 3; we know of no public code of TEM-t:

    actions -> codes e_{t+1} = act(e_t W_a) -> queries = keys = e W_e \\
                                                                      attention to earlier times -> MLP -> symbols
    symbols -> values = x W_x ----------------------------------------/

A query is of the present code, keys and values are of strictly earlier times. So what a head retrieves is what was seen
where the code was alike, and as nothing but W_a and W_e knows of space, what they learn holds in every environment.

**Spectral control.** Free W_a grow or shrink a code with the number of steps. With the identity as act, W_a is the
exponential of a skew-symmetric matrix, which is orthogonal: all of its eigenvalues lie on the unit circle. With ReLU,
W_a is free. In both, a code is scaled to the norm sqrt(C) after every step, against rounding, or against W_a.

The attention function and the activations are those of the language models (`llm.model`).

Dimension letters: B environments, T cells of a walk, M memories, C width of a code, K of queries and keys, V of values,
A actions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.activations import activation
from llm.model.feedforward import FeedForward

from ..recurrence import path_integration
from .memory import attention
from .settings import TransformerSizes
from .store import every_time, new, surprising, times_of


class Prediction(NamedTuple):
    """Of every time but the first."""

    logits: Tensor  # (B, T - 1, symbols)
    codes: Tensor  # (B, T, C), of every time
    weights: Tensor | None  # (B, T - 1, M): of time t + 1 (a row) to the memories of times 0 to t; None of TEM
    times: Tensor  # (B, M): when each memory was made; T - 1 is no memory


class Carry(NamedTuple):
    """State of walks that are longer than a back-propagation; a model updates it in place, without gradients.

    A walk that begins is `fresh`: its code is the model's first one, its memory is empty.
    """

    code: Tensor  # (B, C), of the time at which the next part begins
    fresh: Tensor  # (B,) bool
    memory: dict[str, Tensor]  # what the model's memory holds, see there


class TemTransformer(nn.Module):
    """The transformer."""

    def __init__(self, actions: int, symbols: int, sizes: TransformerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.codes = Codes(actions, sizes.code, sizes.transition)
        self.code_to_key = nn.Linear(sizes.code, sizes.keys, bias=False)  # W_e
        self.symbol_to_value = nn.Embedding(symbols, sizes.values)  # W_x
        self.read_out = nn.Sequential(
            FeedForward(sizes.values, sizes.neurons, activation("relu")), nn.Linear(sizes.values, symbols)
        )

    def carry(self, environments: int, longest: int) -> Carry:
        """Return the state of fresh walks of up to `longest` steps.

        Its memory are keys and values (B, longest, K or V), and how many there are (B,).
        """
        weight, sizes = self.code_to_key.weight, self.sizes
        memory = {
            "keys": weight.new_zeros(environments, longest, sizes.keys),
            "values": weight.new_zeros(environments, longest, sizes.values),
            "count": torch.zeros(environments, dtype=torch.long, device=weight.device),
        }
        return fresh_carry(weight.new_zeros(environments, sizes.code), memory)

    def forward(self, actions: Tensor, symbols: Tensor, carry: Carry | None = None) -> Prediction:
        """actions and symbols (B, T): what led to each cell, and what is seen there.

        With a `carry`, a part of walks that continues from it; the next part begins at the last cell of this one.
        """
        codes = self.codes(actions, carry)
        keys = self.code_to_key(codes)  # (B, T, K)
        values = self.symbol_to_value(symbols[:, :-1])  # (B, T - 1, V)
        kept_keys, times = keys[:, :-1], every_time(symbols[:, :-1])
        if self.sizes.store != "all":
            times = times_of(self._kept(kept_keys, values, symbols[:, :-1]))  # (B, M)
            kept_keys, values = _at(times, kept_keys), _at(times, values)  # (B, M, K), (B, M, V)
        own = kept_keys, values
        if carry is not None:
            kept_keys, values, times = _after_carried(carry, kept_keys, values, times)
        # The query of time t + 1 stands in row t, so that the causal mask is "strictly earlier".
        found, weights = attention(self, keys[:, 1:], kept_keys, values, self.sizes.separation, times)
        if carry is not None:
            _carry_on(carry, codes, *own)
        return Prediction(self.read_out(found), codes, weights, times)

    def _kept(self, keys: Tensor, values: Tensor, symbols: Tensor) -> Tensor:
        """Which moments the memory keeps: (B, T - 1, K), (B, T - 1, V), (B, T - 1) -> (B, T - 1) bool."""
        if self.sizes.store == "new":
            return new(keys, self.sizes.below)

        def ask(now: int, kept: Tensor) -> Tensor:
            found, _ = attention(
                self, keys[:, now, None], keys[:, :now], values[:, :now], self.sizes.separation, (~kept).long()
            )
            return self.read_out(found)[:, 0]

        return surprising(symbols, ask, self.sizes.below)


def fresh_carry(code: Tensor, memory: dict[str, Tensor]) -> Carry:
    """Return the state of walks that all begin."""
    return Carry(code, torch.ones(len(code), dtype=torch.bool, device=code.device), memory)


def _after_carried(carry: Carry, keys: Tensor, values: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put the carried memories before those of this part: keys (B, M + S, K), values, and times (B, M + S)."""
    carry.memory["count"].masked_fill_(carry.fresh, 0)
    count, moments = carry.memory["count"], keys.shape[1]
    most = int(count.max())
    there = torch.arange(most, device=count.device) < count[:, None]  # (B, M)
    found = [
        torch.cat([carry.memory[name][:, :most].clone(), own], 1) for name, own in (("keys", keys), ("values", values))
    ]
    return *found, torch.cat([torch.where(there, 0, moments), times], 1)  # type: ignore[return-value]


@torch.no_grad()
def _carry_on(carry: Carry, codes: Tensor, keys: Tensor, values: Tensor) -> None:
    """Add the memories of this part to the carried ones, and go on from its last code."""
    count = carry.memory["count"]
    rows = torch.arange(len(count), device=count.device)[:, None]
    at = count[:, None] + torch.arange(keys.shape[1], device=count.device)
    for name, own in (("keys", keys), ("values", values)):
        carry.memory[name][rows, at] = own
    count += keys.shape[1]
    carry.code.copy_(codes[:, -1])
    carry.fresh.fill_(False)


def _at(times: Tensor, of: Tensor) -> Tensor:
    """Of the moments (B, S, N), those at `times` (B, M): (B, M, N); the last one for a time S."""
    return of.gather(1, times.clamp(max=of.shape[1] - 1)[..., None].expand(-1, -1, of.shape[-1]))


class Codes(nn.Module):
    """Position codes of one first code for all environments.

    In float32 under autocast too: a code is made of thousands of steps.

    Args:
        actions, width: A, C.
        transition: "identity" or "relu".
        modules: widths of parts that sum to C and move on by themselves; () is one part.
    """

    def __init__(self, actions: int, width: int, transition: str, modules: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(width))
        self.generators = nn.Parameter(torch.randn(actions, width, width) * 0.3 * width**-0.5)
        self.register_buffer("within", torch.block_diag(*(torch.ones(n, n) for n in modules or (width,))), False)
        self.orthogonal = transition == "identity"
        self.act = activation(transition)

    within: Tensor  # (C, C): 1 where two components are of one module

    def transitions(self) -> Tensor:
        """W_a, (A, C, C)."""
        generators = self.generators.float() * self.within
        if self.orthogonal:
            return torch.linalg.matrix_exp(generators - generators.mT)
        return torch.eye(len(self.start), device=self.start.device) + generators

    def forward(self, actions: Tensor, carry: "Carry | None" = None) -> Tensor:
        """actions (B, T) -> codes (B, T, C), of norm sqrt(C); a walk that is not fresh begins with its carried code."""
        with torch.autocast(actions.device.type, enabled=False):
            first = _scaled(self.act(self.start.float())).expand(len(actions), -1)
            if carry is not None:
                first = torch.where(carry.fresh.clone()[:, None], first, carry.code)
            transitions = self.transitions().flatten(0, 1)
            return path_integration(first, actions, transitions, lambda _, moved: _scaled(self.act(moved)))


def _scaled(codes: Tensor) -> Tensor:
    return F.normalize(codes, dim=-1) * codes.shape[-1] ** 0.5
