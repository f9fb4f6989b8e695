"""Normalisations by name.

Dimension letters: N positions, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .fast_paths import fast


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) times a weight (Zhang and Sennrich 2019, Eq. 4), in float32 or wider inside.

    On CPUs torch makes it of a dozen passes over memory, and keeps two more tensors for the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and fast("norm") and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """With r = (mean(x^2) + eps)^(-1/2), n = x r, arriving g: dx = r (g w - n mean(g w n)), dw = sum over N of g n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        r = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        n = x * r
        product = grad * n
        with torch.autocast(x.device.type, enabled=False):
            mean = (product @ weight.to(n.dtype)).div_(x.shape[-1])[..., None]
        for_x = (grad.to(n.dtype) * weight).addcmul_(n, mean, value=-1).mul_(r)
        return for_x.to(x.dtype), product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype), None


NORMS: dict[str, type[nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}


def norm(name: str, width: int, eps: float) -> nn.Module:
    """The normalisation over the last dimension called `name` ("rmsnorm" or "layernorm").

    Raises:
        ValueError: no normalisation has this name.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}: give one of {', '.join(NORMS)}")
    return NORMS[name](width, eps=eps)
