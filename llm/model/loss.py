"""Next-token cross-entropy, in float32, with the two terms that keep logits small: soft-cap and z-loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is left out of the loss


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap), which stays within +- cap (Gemma Team 2024, Gemma 2, Section 2); None: the logits."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def next_token_loss(
    logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None, z_loss: float = 0.0
) -> Tensor:
    """Cross-entropy of ready logits (..., V) and targets (...), -100 left out.

    The sum over the targets divided by `num_items`, or by their own number where it is None.

    Args:
        z_loss: coefficient of (log Z)^2, Z being the sum of the exponentials of a position's logits (Chowdhery et al.
            2022, PaLM, Section 5). It changes the gradient alone: the value stays the cross-entropy, so that runs with
            and without it compare.
    """
    reduction = "mean" if num_items is None else "sum"
    flat, wanted = logits.flatten(0, -2).float(), targets.flatten()
    loss = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction=reduction)
    loss = loss if num_items is None else loss / num_items
    if z_loss == 0:
        return loss
    counted = wanted != IGNORED
    squares = (torch.logsumexp(flat, -1).square() * counted).sum()
    penalty = z_loss * squares / (counted.sum() if num_items is None else num_items)
    return loss + (penalty - penalty.detach())
