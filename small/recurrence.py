"""Path integration: a code of where one is, moved on by actions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def path_integration(
    code: Tensor, actions: Tensor, transitions: Tensor, act: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """e_{t+1} = act(e_t, e_t W_a), for walkers with actions of their own.

    Args:
        code: (B, C), of the first time.
        actions: (B, T), what led to each time; the first is not read.
        transitions: (A C, C), W_a of each action under the last.
        act: code and moved code (B, C) -> the next code.

    Returns:
        Codes of all times, (B, T, C).
    """
    width = code.shape[-1]
    chosen = F.one_hot(actions, len(transitions) // width).to(code.dtype)  # (B, T, A)
    codes = [code]
    for step in range(1, actions.shape[1]):
        # One product for the actions of all walkers: e_t stands in the rows of its action.
        code = act(code, (chosen[:, step, :, None] * code[:, None]).flatten(1) @ transitions)
        codes.append(code)
    return torch.stack(codes, dim=1)
