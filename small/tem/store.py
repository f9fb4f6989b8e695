"""Which moments TEM-t's memory keeps: all, those that surprised it, or those whose code is unlike every kept one.

In Whittington et al. 2022, Section 3, memories grow with every step. In a small room most of them say the same again; a
memory that keeps what is new grows with the room, not with the walk. Whether a moment is kept depends on what was kept
before, so moments are asked one after the other, without a gradient; the answer is then a list of times, over which
attention is one product as before.

Dimension letters: B environments, S moments, M memories, K width of a key, Y symbols.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def surprising(symbols: Tensor, ask: Callable[[int, Tensor], Tensor], below: float) -> Tensor:
    """The first moment, and those whose symbol had a probability below `below`, given what was kept before.

    Args:
        symbols: (B, S).
        ask: a moment, and which of those before it are kept (B, moment) -> logits of its symbol (B, Y).

    Returns:
        (B, S) bool.
    """
    kept = torch.zeros_like(symbols, dtype=torch.bool)
    kept[:, 0] = True
    for now in range(1, symbols.shape[1]):
        probability = ask(now, kept[:, :now]).softmax(-1).gather(-1, symbols[:, now, None])[:, 0]
        kept[:, now] = probability < below
    return kept


@torch.no_grad()
def new(keys: Tensor, below: float) -> Tensor:
    """The first moment, and those whose key has a cosine below `below` with every key kept before: (B, S) bool."""
    directions = F.normalize(keys, dim=-1)
    alike = directions @ directions.mT >= below  # (B, S, S)
    kept = torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
    for now in range(keys.shape[1]):
        kept[:, now] = ~(alike[:, now] & kept).any(-1)
    return kept


def times_of(kept: Tensor) -> Tensor:
    """kept (B, S) bool -> when each memory was made, in order (B, M); S where an environment has fewer than another."""
    moments = kept.shape[1]
    times = torch.where(kept, torch.arange(moments, device=kept.device), moments)
    return times.sort(dim=1).values[:, : int(kept.sum(1).max())]


def every_time(moments: Tensor) -> Tensor:
    """`times_of` where all of the moments (B, S) are kept: (B, S)."""
    return torch.arange(moments.shape[1], device=moments.device).expand(len(moments), -1)
