"""Dropout on CPUs, where torch draws a random number of its own kind for every element and is slower at it than at the
rest of a block; and causal attention with it, a block of queries at a time.

An element is kept where its bits are not below p: 15 bits in bfloat16, 31 in float32, so that the probability is p to
2^-16 or 2^-32. They are torch's generator's, 64 at a time, so a seed gives the same numbers again and a recomputed
block draws what it drew before. On other devices, and in compiled code, all of this is torch's own.

In bfloat16 scores and weights are rounded to it, as in eager attention; sums over blocks are in float32. There is one
derivative, by autograd alone.

Dimension letters: B batch, T time, H query heads, G key-value heads, K width of a head, R queries of a block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import product_dtype

ROWS = 64  # of a block of queries: its scores stay in a CPU's cache, and the keys after it are not looked at
WHOLE = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # integers of the same size


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`, which draws other elements from the same seed."""
    if not training or p == 0:
        return x
    return x * keep_factors(x, p) if by_bits(x, p, x.dtype) else F.dropout(x, p)


def by_bits(x: Tensor, p: float, dtype: torch.dtype) -> bool:
    """Whether the bits of this file are for what is made of x in this dtype."""
    return x.device.type == "cpu" and dtype in WHOLE and p < 1 and not torch.compiler.is_compiling()


def keep_factors(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in the shape and dtype of x."""
    whole = WHOLE[x.dtype]
    size = whole.itemsize
    bits = torch.empty(-(-x.numel() * size // 8), dtype=torch.int64).random_(-(2**63), None).view(whole)[: x.numel()]
    factor = torch.tensor(1 / (1 - p), dtype=x.dtype).view(whole).item()
    # Without a comparison, whose booleans are slow to turn to numbers: -1 (all bits) where dropped, else 0.
    top = 2 ** (8 * size - 1)
    dropped = bits.bitwise_and_(top - 1).sub_(round(p * top)).bitwise_right_shift_(8 * size - 1)
    return dropped.bitwise_and_(factor).bitwise_xor_(factor).view(x.dtype).view(x.shape)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, p: float) -> Tensor:
    """Causal attention with dropout of its weights on a CPU: (B, H, T, K), (B, G, T, K) twice -> (B, T, H, K)."""
    query, key, value = (each.to(product_dtype(query)) for each in (query, key, value))  # after RoPE two are float32
    with torch.autocast("cpu", enabled=False):
        return _CausalAttention.apply(query, key, value, scaling, p).transpose(1, 2)


class _CausalAttention(torch.autograd.Function):
    """Keeps softmax and factors of each block of queries, over the keys up to its end."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, p: float) -> Tensor:
        time = query.shape[2]
        grouped = query.unflatten(1, (key.shape[1], -1))  # (B, G, H / G, T, K)
        out, kept = torch.empty_like(grouped), []
        for start in range(0, time, ROWS):
            stop = min(start + ROWS, time)
            asked = (grouped[..., start:stop, :] * scaling).flatten(2, 3)  # (B, G, H / G R, K)
            scores = (asked @ key[:, :, :stop].mT).unflatten(2, (-1, stop - start))  # (B, G, H / G, R, stop)
            later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[..., start:].masked_fill_(later, -torch.inf)
            weights = torch.softmax(scores, dim=-1)
            factors = keep_factors(weights, p)
            found = (weights * factors).flatten(2, 3) @ value[:, :, :stop]
            out[..., start:stop, :] = found.unflatten(2, (-1, stop - start))
            kept += [weights, factors]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scaling = scaling
        return out.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        groups = key.shape[1]
        grouped, grad = query.unflatten(1, (groups, -1)), grad.unflatten(1, (groups, -1))
        grad_query = torch.empty_like(grouped)
        grad_key, grad_value = (torch.zeros_like(each, dtype=torch.float32) for each in (key, value))
        for block, start in enumerate(range(0, query.shape[2], ROWS)):
            weights, factors = kept[2 * block : 2 * block + 2]
            stop = start + weights.shape[-2]
            arriving = grad[..., start:stop, :].flatten(2, 3)  # (B, G, H / G R, K)
            grad_value[:, :, :stop] += (weights * factors).flatten(2, 3).mT @ arriving
            inner = (arriving @ value[:, :, :stop].mT).view(weights.shape) * factors
            inner = torch.ops.aten._softmax_backward_data(inner, weights, -1, weights.dtype).flatten(2, 3)
            found = inner @ key[:, :, :stop]
            grad_query[..., start:stop, :] = (found * ctx.scaling).unflatten(2, (-1, stop - start))
            grad_key[:, :, :stop] += inner.mT @ (grouped[..., start:stop, :] * ctx.scaling).flatten(2, 3)
        return grad_query.flatten(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None
