"""Rotary positions (RoPE). Learned positions are an embedding table of the decoder.

Dimension letters: B batch, T time, H heads, K width of a head.
"""

import torch
from torch import Tensor


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
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
