"""Value embeddings: a second table of token embeddings, added to the values of chosen layers with a learned gate.

Jordan et al. 2024 (modded-nanogpt, github.com/KellerJordan/modded-nanogpt) add such tables to the values of some
layers, after the value residual of Zhou et al. 2024. With T the table, (V, G K), layer n attends with

    V_n + g_n T[ids]                 g_n one learned number of the layer

A table of V G K numbers makes a model larger, and that alone might help. The control has the same parameters and the
same look-ups, but adds them to the embedding E that enters the first layer:

    input    E[ids] + mean(g) T[ids] folded to the width D

A sum of two tables is a table: the control computes what the plain model can compute, and no more, while token ids
reach the values only through the hidden states. (With tied embeddings, E is the head but no longer the whole table of
the input, so a pair of untied models is the stricter one. Two tables also learn faster under Adam than one.)

Dimension letters: B batch, T time, D width, G key-value heads, K width of a head, V vocabulary, N chosen layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLACES = ("none", "values", "input")


def gated_layers(config: Any) -> list[int]:
    """Indices of the layers that have a gate; none where the switch is off."""
    if config.value_embedding == "none":
        return []
    layers = config.value_embedding_layers
    return list(range(config.num_hidden_layers)) if layers is None else list(layers)


class ValueGate(nn.Module):
    """Adds a layer's share of the token values to its values: g (1,), learned from `initial` on."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gate = nn.Parameter(torch.full((1,), initial))

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Give a parameter of this module its first value."""
        getattr(self, name).fill_(self.initial)

    def forward(self, values: Tensor, token_values: Tensor) -> Tensor:
        """Both (B, G, T, K) -> the same."""
        return torch.addcmul(values, self.gate.to(values.dtype), token_values)

    def learned(self) -> dict[str, Tensor]:
        """What a training run logs of this module."""
        return {"value_embedding": self.gate}


class InputGates(ValueGate):
    """The control: adds the mean of the gated token values to the embedding; gates g (N,)."""

    def __init__(self, initial: float, count: int) -> None:
        super().__init__(initial)
        self.gate = nn.Parameter(torch.full((count,), initial))

    def forward(self, values: Tensor, token_values: Tensor) -> Tensor:
        """Embeddings (B, T, D) and token values (B, T, G K) -> embeddings. Where G K is not D, the columns are folded:
        column c is added to column c modulo D."""
        width = values.shape[-1]
        shares = self.gate.mean().to(values.dtype) * token_values.to(values.dtype)
        shares = F.pad(shares, (0, -shares.shape[-1] % width)).unflatten(-1, (-1, width))  # (B, T, G K / D, D)
        return values + shares.sum(-2)

    def learned(self) -> dict[str, Tensor]:
        return {}  # it belongs to no layer
