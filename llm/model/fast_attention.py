"""Causal attention on CPUs a block of queries at a time, over the keys up to its end, with dropout or without.

torch's kernel of CPUs does bfloat16 products at the rate of float32, and with dropout keeps the whole matrix; here they
are batched products of blocks whose scores stay in a CPU's cache. Scores and weights are rounded to bfloat16, as in
eager attention; sums over blocks are in float32. There is one derivative, by autograd alone.

Dimension letters: B batch, T time, H query heads, G key-value heads, K width of a head, R queries of a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import Attention
from .autocast import product_dtype
from .fast_dropout import can_use_bits, keep_factors
from .fast_linear import product
from .fast_rotary import fast_rotate
from .positions import rotate

# Up to this time weights are kept for the backward pass, (T + R) / 2 numbers a query: 288, about as many as q, k, v and
# the result have for heads of 64, 4 K. Beyond they are computed again.
KEPT = 512


def block_rows(time: int) -> int:
    """R: small blocks leave out more keys, large ones make fewer passes over them. Of 64, 128 and 256 these were
    fastest in bfloat16 at times of 192 to 256, and of 1,024 to 4,096 (two cores with 1 MiB of cache each)."""
    return 64 if time <= KEPT else 256


class FastAttention(Attention):
    """`Attention` with those of the fast paths "attention", "dropout" and "rotary" that are on, `fast_paths`."""

    fast_paths: frozenset[str] = frozenset()

    def rotate(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return fast_rotate(x, angles) if "rotary" in self.fast_paths else rotate(x, angles)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        implementation: str,
        cached: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        plain = implementation == "sdpa" and attention_mask is None and not cached and self.is_causal
        if plain and self.use_blocks(query, dropout):
            return causal_attention(query, key, value, self.scaling, dropout), None
        return super().attend(query, key, value, attention_mask, implementation, cached, **kwargs)

    def use_blocks(self, query: Tensor, dropout: float) -> bool:
        """Whether blocks are faster for the query: in bfloat16 always, in float32 where weights are dropped by bits."""
        if query.device.type != "cpu" or "attention" not in self.fast_paths:
            return False
        dtype = product_dtype(query)
        if dropout:
            return "dropout" in self.fast_paths and can_use_bits(query, dropout, dtype)
        return dtype == torch.bfloat16


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    """Causal attention: (B, H, T, K), (B, G, T, K) twice -> (B, T, H, K)."""
    dtype = product_dtype(query)
    query, key, value = (each.to(dtype).contiguous() for each in (query, key, value))  # else each block copies them
    with torch.autocast("cpu", enabled=False):
        return _CausalAttention.apply(query, key, value, scaling, dropout).transpose(1, 2)


def _softmax_of_block(asked: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
    """Weights of queries start to stop: (B, G, H / G R, K), (B, G, T, K) -> (B, G, H / G, R, stop)."""
    scores = product(asked, key[:, :, :stop].mT).unflatten(2, (-1, stop - start))
    later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
    scores[..., start:].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, dim=-1)


class _CausalAttention(torch.autograd.Function):
    """Keeps softmax and factors of each block of queries, or neither."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, p: float) -> Tensor:
        time = query.shape[2]
        ctx.scaling, ctx.dropped, ctx.rows = scaling, p > 0, block_rows(time)
        keeps = any(ctx.needs_input_grad) and (ctx.dropped or time <= KEPT)
        grouped = query.unflatten(1, (key.shape[1], -1))  # (B, G, H / G, T, K)
        out, kept = torch.empty_like(grouped), []
        for start in range(0, time, ctx.rows):
            stop = min(start + ctx.rows, time)
            asked = (grouped[..., start:stop, :] * scaling).flatten(2, 3)  # (B, G, H / G R, K)
            weights = _softmax_of_block(asked, key, start, stop)
            kept += [weights] if keeps else []
            if ctx.dropped:
                factors = keep_factors(weights, p)
                kept += [factors] if keeps else []
                weights = weights * factors
            found = product(weights.flatten(2, 3), value[:, :, :stop])
            out[..., start:stop, :] = found.unflatten(2, (-1, stop - start))
        ctx.save_for_backward(query, key, value, *kept)
        return out.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        groups, time = key.shape[1:3]
        grouped, grad = query.unflatten(1, (groups, -1)), grad.unflatten(1, (groups, -1))
        grad_query = torch.empty_like(grouped)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)  # of no time at all
        for start in reversed(range(0, time, ctx.rows)):  # the last block is over all keys
            stop = min(start + ctx.rows, time)
            asked = (grouped[..., start:stop, :] * ctx.scaling).flatten(2, 3)  # (B, G, H / G R, K)
            factors = kept.pop() if ctx.dropped else None
            weights = kept.pop() if kept else _softmax_of_block(asked, key, start, stop)
            used = (weights if factors is None else weights * factors).flatten(2, 3)
            arriving = grad[..., start:stop, :].flatten(2, 3)
            for_value = product(used.mT, arriving)
            inner = product(arriving, value[:, :, :stop].mT).view(weights.shape)
            inner = inner if factors is None else inner * factors
            inner = torch.ops.aten._softmax_backward_data(inner, weights, -1, weights.dtype).flatten(2, 3)
            found = product(inner, key[:, :, :stop])
            grad_query[..., start:stop, :] = (found * ctx.scaling).unflatten(2, (-1, stop - start))
            for_key = product(inner.mT, asked)
            if stop == time:
                grad_key, grad_value = for_key.float(), for_value.float()
            else:
                grad_key[:, :, :stop] += for_key
                grad_value[:, :, :stop] += for_value
        return grad_query.flatten(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None
