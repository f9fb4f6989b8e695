"""Next-token cross-entropy, in float32."""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is left out of the loss


def next_token_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of ready logits (..., V) and targets (...), -100 left out.

    The sum over the targets divided by `num_items`, or by their own number where it is None.
    """
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    return loss if num_items is None else loss / num_items
