"""Rotary positions in two passes over the queries, where autograd's own form makes five.

Dimension letters: B batch, T time, H heads, K width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .positions import rotate


def fast_rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate`, with one derivative: x (B, H, T, K) by each position's angles; in x's dtype."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain form
        return rotate(x, angles)
    return _Rotation.apply(x, *angles)


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    sin = sin[..., :half]
    wide = x.to(cos.dtype)
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin, value=-direction)
    out[..., half:].addcmul_(wide[..., :half], sin, value=direction)
    return out.to(x.dtype)
