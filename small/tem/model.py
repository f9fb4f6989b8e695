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

    def forward(self, actions: Tensor, symbols: Tensor) -> Prediction:
        """actions and symbols (B, T): what led to each cell, and what is seen there."""
        codes = self.codes(actions)
        keys = self.code_to_key(codes)  # (B, T, K)
        values = self.symbol_to_value(symbols[:, :-1])  # (B, T - 1, V)
        kept_keys, times = keys[:, :-1], every_time(symbols[:, :-1])
        if self.sizes.store != "all":
            times = times_of(self._kept(kept_keys, values, symbols[:, :-1]))  # (B, M)
            kept_keys, values = _at(times, kept_keys), _at(times, values)  # (B, M, K), (B, M, V)
        # The query of time t + 1 stands in row t, so that the causal mask is "strictly earlier".
        found, weights = attention(self, keys[:, 1:], kept_keys, values, self.sizes.separation, times)
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

    def forward(self, actions: Tensor) -> Tensor:
        """actions (B, T) -> codes (B, T, C), of norm sqrt(C)."""
        with torch.autocast(actions.device.type, enabled=False):
            first = _scaled(self.act(self.start.float())).expand(len(actions), -1)
            transitions = self.transitions().flatten(0, 1)
            return path_integration(first, actions, transitions, lambda _, moved: _scaled(self.act(moved)))


def _scaled(codes: Tensor) -> Tensor:
    return F.normalize(codes, dim=-1) * codes.shape[-1] ** 0.5
