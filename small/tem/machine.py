"""TEM, the Tolman-Eichenbaum Machine: path integration, bound to what is seen in a Hebbian memory.

Whittington et al. 2022, Section 4. Frequency modules and two-hot symbols are those of TEM's reference code, in
TensorFlow (github.com/djcrw/generalising-structural-knowledge) and PyTorch (github.com/jbakermans/torch_tem):

    actions -> codes g_{t+1} = act(g_t W_a) -> places g W_g \\
                                                             conjunctions -> memory -> retrieved -> summed over places
    symbols -> sensory x W_x -------------------------------/                                       -> MLP -> symbols

What the paper writes in Equations 3 to 7 is here, with x and g of norm 1, which the paper leaves open; or, by the rule
"code", the generative memory of the reference code (`correcting`). What the paper's figure shows as dashed lines (a
place inferred from what is seen) is not, nor are the reference code's temporal filters of each frequency. The codes are
those of TEM-t.

Dimension letters: B environments, T cells of a walk, C width of a code, X sensory components, G of places.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from llm.common.errors import UserError
from llm.model.activations import activation
from llm.model.feedforward import FeedForward

from .correcting import recall_correcting
from .memory import Rule, memory_after, recall
from .model import Carry, Codes, Prediction, fresh_carry
from .settings import MachineSizes
from .store import every_time


class Machine(nn.Module):
    """TEM.

    Raises:
        UserError: there are more symbols than two-hot vectors.
    """

    def __init__(self, actions: int, symbols: int, sizes: MachineSizes, rule: Rule) -> None:
        super().__init__()
        self.rule, self.sizes = rule, sizes
        self.updates = 0  # gradient steps so far, on which the rule may depend
        self.modules_of_places = [width // 3 for width in sizes.modules] or [sizes.places]
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

    def carry(self, environments: int, longest: int) -> Carry:
        """Return the state of fresh walks; its memory is the matrix M (B, X G, X G), however long they are."""
        start = self.codes.start
        width = self.sizes.sensory * sum(self.modules_of_places)
        memory = {"matrix": start.new_zeros(environments, width, width)}
        return fresh_carry(start.new_zeros(environments, self.sizes.code), memory)

    def forward(self, actions: Tensor, symbols: Tensor, carry: Carry | None = None) -> Prediction:
        """actions and symbols (B, T): what led to each cell, and what is seen there.

        With a `carry`, a part of walks that continues from it; the next part begins at the last cell of this one.
        """
        codes = self.codes(actions, carry)  # (B, T, C)
        sensory, places = self.bound(symbols, codes)
        before = None if carry is None else carry.memory["matrix"] * ~carry.fresh[:, None, None]
        found, after = self._recall(sensory[:, :-1], places, before)  # (B, T - 1, X)
        if carry is not None:
            with torch.no_grad():
                carry.memory["matrix"].copy_(after())
                carry.code.copy_(codes[:, -1])
                carry.fresh.fill_(False)
        return Prediction(self.read_out(found), codes, None, every_time(symbols[:, :-1]))

    def _recall(self, sensory: Tensor, places: Tensor, before: Tensor | None) -> tuple[Tensor, Callable[[], Tensor]]:
        """x (B, T - 1, X), g (B, T, G), M -> what is retrieved (B, T - 1, X), and how to make M after the walk."""
        rule = self.rule.at(self.updates)
        if rule.corrects:
            found, memory = recall_correcting(sensory, places, rule, self.modules_of_places, before)
            return found, memory.after  # type: ignore[return-value]
        # The query of time t + 1 stands in row t, so that it finds strictly earlier memories.
        found = recall(sensory, places[:, :-1], places[:, 1:], rule, before)
        return found, partial(memory_after, sensory, places[:, :-1], rule, before)  # type: ignore[arg-type]

    def bound(self, symbols: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What a conjunction is made of: symbols (B, T), codes (B, T, C) -> x (B, T, X), of norm 1, and g (B, T, G).

        The norm of g is 1, or, where the memory corrects, its components are clipped to -1 and 1 and have half the size
        of the codes': the deviation with which the reference code's begin.
        """
        sensory = nn.functional.normalize(self.sensory, dim=-1)[symbols]
        places = self.code_to_place(codes)
        if self.rule.corrects:
            return sensory, (places / 2).clamp(-1, 1)
        return sensory, nn.functional.normalize(places, dim=-1)


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
