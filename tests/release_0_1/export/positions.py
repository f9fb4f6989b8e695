"""Rotary positions (RoPE). Learned positions are an embedding table of the decoder.

Dimension letters: B batch, T time, H heads, K width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fast_paths import fast


def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/K) for i < K/2, float32 (Su et al. 2024, Eq. 15). Always float32: a bfloat16 cast costs 0.36 in
    the cosine at position 2,048."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return 1.0 / (theta**exponents)  # (K/2,)


def rotary_angles(
    position_ids: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, each (B, 1, T, K), ready to multiply (B, H, T, K) queries and keys.

    Computed in each forward pass, in float32, with autocast off: a buffer of angles would be lost when
    `from_pretrained` builds the model on the meta device.
    """
    with torch.autocast(position_ids.device.type, enabled=False):
        half = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, K/2)
        angles = torch.cat((half, half), dim=-1)  # (B, 1, T, K)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + K/2) of queries or keys x (B, H, T, K) by their position's angles; in x's dtype."""
    if fast("rotary") and not torch.compiler.is_compiling():
        return _Rotation.apply(x, *angles)
    cos, sin = angles  # a compiler fuses this form
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back by the same angles. Two passes over x, where autograd's own form makes five."""

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
