"""The generative memory of TEM's reference code, which stores what it could not retrieve yet.

Both TensorFlow versions (github.com/djcrw/generalising-structural-knowledge) and the PyTorch version
(github.com/jbakermans/torch_tem) keep, with row vectors,

    M <- clip(decay M + rate (p + p^)^T (p - p^), -1, 1)          p^ is what p's place retrieved from M before
    q = act(1^T g), then q <- act(keep q + q M) for some rounds   act clips to -1 and 1, then is a leaky ReLU

Codes have modules of frequencies, from fast to slow. A slow module drives itself and faster ones: M is 0 from fast to
slow. Module m is retrieved in `rule.steps` - m rounds and then held. PyTorch clips M at every step (the form "matrix");
TensorFlow clips it once for each back-propagation and keeps the steps since then as vectors (the form "sums").

Dimension letters: B environments, S memories, X sensory components, G of places, D = X G, F modules.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .memory import ACTS, Rule, conjunction


class CorrectingMemory:
    """The memory of B environments, in a walk or a part of one.

    Args:
        rule: of this gradient step, see `Rule.at`.
        modules: how many components of a place each module has, from the fastest; they sum to G.
        sensory: X.
        before: M (B, D, D) of what was stored before, 0 from fast to slow; None is an empty memory.
        device: of all tensors.
    """

    def __init__(
        self, rule: Rule, modules: Sequence[int], sensory: int, before: Tensor | None, device: torch.device
    ) -> None:
        self.rule, self.before, self.sensory = rule, before, sensory
        numbers, widths = torch.arange(len(modules), device=device), torch.tensor(modules, device=device)
        of = numbers.repeat_interleave(widths).repeat(sensory)  # (D,), the module of each component
        self.within = of[:, None] >= of  # (D, D): from its own module or a slower one
        self.heard, self.own = of >= numbers[:, None], of == numbers[:, None]  # (F, D)
        self.rounds = (rule.steps - of).clamp(min=1)  # (D,)
        self.plus: list[Tensor] = []  # p + p^ of each memory (B, D), in the form "sums"
        self.minus: list[Tensor] = []  # p - p^
        self._stacked: tuple[Tensor, Tensor] | None = None

    def bind(self, sensory: Tensor, places: Tensor) -> Tensor:
        """x (..., X) and g (..., G) -> what is stored, p (..., D)."""
        return ACTS[self.rule.act](conjunction(sensory, places).flatten(-2))

    def retrieve(self, places: Tensor) -> Tensor:
        """g (B, Q, G) -> p^ (B, Q, D), from all that is stored by now."""
        found = ACTS[self.rule.act](places.repeat(1, 1, self.sensory))
        for number in range(self.rule.steps):
            onward = ACTS[self.rule.act](self.rule.keep * found + self._product(found))
            found = torch.where(self.rounds > number, onward, found)
        return found

    def store(self, stored: Tensor, retrieved: Tensor) -> None:
        """p and p^ of one memory, (B, D)."""
        plus, minus = stored + retrieved, stored - retrieved
        if self.rule.form == "matrix":
            added = self.rule.rate * plus[:, :, None] * minus[:, None] * self.within
            self.before = (added if self.before is None else self.rule.decay * self.before + added).clamp(-1, 1)
            return
        self.plus.append(plus)
        self.minus.append(minus)
        self._stacked = torch.stack(self.plus, 1), torch.stack(self.minus, 1)  # (B, S, D)

    def _shares(self, like: Tensor) -> Tensor:
        ages = torch.arange(len(self.plus) - 1, -1, -1, device=like.device, dtype=like.dtype)
        return self.rule.rate * self.rule.decay**ages  # (S,)

    def _product(self, found: Tensor) -> Tensor | float:
        """q (B, Q, D) -> q M."""
        onward = 0.0 if self.before is None else self.rule.decay ** len(self.plus) * (found @ self.before)
        if self._stacked is None:
            return onward
        plus, minus = self._stacked
        heard = (found[:, :, None] * self.heard).flatten(1, 2)  # (B, Q F, D): what each module hears
        sums = (heard @ plus.mT * self._shares(found)) @ minus
        return onward + (sums.unflatten(1, (found.shape[1], -1)) * self.own).sum(2)

    def after(self) -> Tensor | None:
        """M (B, D, D) of all that is stored by now; None of nothing."""
        if self._stacked is None:
            return self.before
        plus, minus = self._stacked
        added = (plus * self._shares(plus)[:, None]).mT @ minus * self.within
        return (added if self.before is None else self.rule.decay ** len(self.plus) * self.before + added).clamp(-1, 1)


def recall_correcting(
    sensory: Tensor, places: Tensor, rule: Rule, modules: Sequence[int], before: Tensor | None = None,
    queries: Tensor | None = None,
) -> tuple[Tensor, CorrectingMemory]:  # fmt: skip
    """Store what is seen along a walk, and ask after each step for what is at the next place.

    Args:
        sensory: x (B, S, X), of the cells that are stored.
        places: g (B, S + 1, G), of these and of the cell after the last.
        rule, modules: see `CorrectingMemory`.
        before: M (B, D, D); None is an empty memory.
        queries: g (B, S, G) that is asked for after each memory; None is the next place.

    Returns:
        Sensory parts (B, S, X) of the fastest module, summed over its places; and the memory after the walk.
    """
    memory = CorrectingMemory(rule, modules, sensory.shape[-1], before, sensory.device)
    retrieved, rows = memory.retrieve(places[:, :1]), []
    for time in range(sensory.shape[1]):
        memory.store(memory.bind(sensory[:, time], places[:, time]), retrieved[:, 0])
        asked = places[:, time + 1, None]
        asked = asked if queries is None else torch.cat([asked, queries[:, time, None]], dim=1)
        retrieved = memory.retrieve(asked)  # what the next place retrieves is compared to what will be seen there
        rows.append(retrieved[:, -1])
    found = torch.stack(rows, dim=1).unflatten(-1, (sensory.shape[-1], places.shape[-1]))
    return found[..., : modules[0]].sum(-1), memory
