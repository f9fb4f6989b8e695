"""TEM, the Tolman-Eichenbaum Machine: path integration, bound to what is seen in a Hebbian memory.

Whittington et al. 2022, Section 4. Frequency modules and two-hot symbols are those of TEM's reference code, in
TensorFlow (github.com/djcrw/generalising-structural-knowledge) and PyTorch (github.com/jbakermans/torch_tem):

    actions -> codes g_{t+1} = act(g_t W_a) -> places g W_g \\
                                                             conjunctions -> memory -> retrieved -> summed over places
    symbols -> sensory x W_x -------------------------------/                                       -> MLP -> symbols

What the paper writes in Equations 3 to 7 is here, with x and g of norm 1, which the paper leaves open. What its figure
shows as dashed lines (a place inferred from what is seen) is not, nor are the reference code's temporal filters of each
frequency. The codes are those of TEM-t.

Dimension letters: B environments, T cells of a walk, C width of a code, X sensory components, G of places.
"""

import itertools

import torch
from torch import Tensor, nn

from llm.common.errors import UserError
from llm.model.activations import activation
from llm.model.feedforward import FeedForward

from .memory import Rule, recall
from .model import Codes, Prediction
from .settings import MachineSizes
from .store import every_time


class Machine(nn.Module):
    """TEM.

    Raises:
        UserError: there are more symbols than two-hot vectors.
    """

    def __init__(self, actions: int, symbols: int, sizes: MachineSizes, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.codes = Codes(actions, sizes.code, sizes.transition, sizes.modules)
        if sizes.modules:
            self.code_to_place: nn.Module = _Thirds(sizes.modules)
        else:
            self.code_to_place = nn.Linear(sizes.code, sizes.places, bias=False)  # W_g
        if sizes.two_hot:
            self.register_buffer("sensory", two_hot(symbols, sizes.sensory), persistent=False)
        else:
            self.sensory = nn.Parameter(torch.randn(symbols, sizes.sensory))  # W_x
        self.read_out = nn.Sequential(
            FeedForward(sizes.sensory, sizes.neurons, activation("relu")), nn.Linear(sizes.sensory, symbols)
        )

    def forward(self, actions: Tensor, symbols: Tensor) -> Prediction:
        """actions and symbols (B, T): what led to each cell, and what is seen there."""
        codes = self.codes(actions)  # (B, T, C)
        sensory, places = self.bound(symbols, codes)
        # The query of time t + 1 stands in row t, so that it finds strictly earlier memories.
        found = recall(sensory[:, :-1], places[:, :-1], places[:, 1:], self.rule)  # (B, T - 1, X)
        return Prediction(self.read_out(found), codes, None, every_time(symbols[:, :-1]))

    def bound(self, symbols: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What a conjunction is made of, of norm 1: symbols (B, T), codes (B, T, C) -> x (B, T, X), g (B, T, G)."""
        sensory = nn.functional.normalize(self.sensory, dim=-1)[symbols]
        return sensory, nn.functional.normalize(self.code_to_place(codes), dim=-1)


class _Thirds(nn.Module):
    """Of each module, the first third: a fixed W_g."""

    def __init__(self, modules: tuple[int, ...]) -> None:
        super().__init__()
        starts = itertools.accumulate((0, *modules[:-1]))
        self.chosen = [start + n for start, width in zip(starts, modules, strict=True) for n in range(width // 3)]

    def forward(self, codes: Tensor) -> Tensor:
        return codes[..., self.chosen]


def two_hot(symbols: int, width: int) -> Tensor:
    """A vector of two ones for each symbol, (symbols, width), all components as often as may be.

    Raises:
        UserError: there are not as many.
    """
    apart = ((first, (first + by) % width) for by in range(1, width // 2 + 1) for first in range(width))
    pairs = list(dict.fromkeys(tuple(sorted(pair)) for pair in apart))
    if len(pairs) < symbols:
        raise UserError(
            f"{width} sensory components have {len(pairs)} two-hot vectors, and there are {symbols} symbols: give a "
            "greater --sensory"
        )
    return torch.zeros(symbols, width).scatter_(1, torch.tensor(pairs[:symbols]), 1.0)
