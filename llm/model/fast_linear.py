"""Linear layers, whose float32 products on x86 CPUs are oneDNN's, and whose bfloat16 products are of float32 where the
CPU has no instructions for bfloat16.

torch gives float32 products to MKL, which on AMD's CPUs leaves half of AVX-512 unused; bfloat16 goes to oneDNN already.
Both round as float32 does. The product is the one that torch.compile calls on CPUs for weights that stay; for trained
ones it has no such call, so that in compiled code it is an operator of our own.

On a CPU that oneDNN has no bfloat16 kernels for (AVX2 alone), torch multiplies bfloat16 8 times as slowly as float32.
There both factors are converted, multiplied and summed in float32, and the result is rounded: what a kernel of bfloat16
does as well, so that formats and what is kept for the backward pass stay the same.

Dimension letters: N positions, I width in, O width out.
"""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import product_dtype

PART = 4096  # rows or columns of a large matrix at once
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
HAS_BFLOAT16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
CONVERTED = 1024  # columns of a product whose factors are converted at once: a copy in float32 stays small


class FastLinear(nn.Linear):
    """`nn.Linear`, with one derivative: x (..., I) -> (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if x.device.type != "cpu" or not x.numel():
        return F.linear(x, weight, bias)
    dtype = product_dtype(x)
    if use_onednn(x) and dtype == weight.dtype == torch.float32:
        return _Linear.apply(x, weight, bias)
    if multiply_in_float32(x.device, dtype):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)  # as autocast does
        with torch.autocast("cpu", enabled=False):
            return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def multiply_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this type are those of float32, rounded."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not HAS_BFLOAT16


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, batched or not; call it with autocast off."""
    if not multiply_in_float32(a.device, a.dtype):
        return a @ b
    return (a.float() @ b.float()).to(a.dtype)


def use_onednn(x: Tensor) -> bool:
    """Whether oneDNN can multiply x and another float32 matrix."""
    return HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


# ---- Products that are not differentiated; by oneDNN where `onednn` says so ------------------------------------------


def matmul(a: Tensor, b: Tensor, onednn: bool) -> Tensor:
    """a @ b of two matrices."""
    return _product(a, b.t()) if onednn else product(a, b)


def outer_sum(a: Tensor, b: Tensor, onednn: bool) -> Tensor:
    """a.t() @ b, the sum of N outer products: (N, O), (N, I) -> (O, I)."""
    if not onednn:
        return product(a.t(), b)
    if a.shape[1] > b.shape[1]:  # oneDNN is faster where a row of the result is long
        return _product(b.t(), a.t()).t()
    return _product(a.t(), b.t())


def matmul_into(out: Tensor, a: Tensor, b: Tensor, onednn: bool) -> None:
    """out = a @ b of matrices.

    For a product that is made again and again: to get 64 MB from the system takes a CPU as long as to fill them.
    """
    if multiply_in_float32(a.device, a.dtype):
        wide = a.float()
        for columns in _parts(b.shape[1], CONVERTED):
            out[:, columns] = wide @ b[:, columns].float()
        return
    if not onednn:
        torch.mm(a, b, out=out)
        return
    for columns in _parts(b.shape[1]):
        for rows in _parts(len(a)):
            out[rows, columns] = _product(a[rows], b[:, columns].t())


def empty_sum(b: Tensor, rows: int, onednn: bool) -> Tensor:
    """Memory for `add_outer_sum` with b (N, I): (rows, I) float32, in the order that suits the product."""
    if onednn:
        return b.new_empty(b.shape[1], rows).t()
    return b.new_empty(rows, b.shape[1], dtype=torch.float32)


def add_outer_sum(total: Tensor, a: Tensor, b: Tensor, first: bool, onednn: bool) -> None:
    """total += a.t() @ b in float32, or total = a.t() @ b at first: (N, O), (N, I) -> (O, I).

    On a CPU in parts that stay in its caches: whole, to add takes half as long as to multiply.
    """
    if a.dtype == torch.float32 and not onednn:
        total.addmm_(a.t(), b, beta=0 if first else 1)
        return
    write = Tensor.copy_ if first else Tensor.add_
    if a.device.type != "cpu":
        write(total, a.t() @ b)
        return
    for columns in _parts(a.shape[1]):
        part = a[:, columns]
        # oneDNN is faster where a row of the result is long
        found = _product(b.t(), part.contiguous().t()).t() if onednn else product(part.t(), b)
        write(total[columns], found.float())


def _parts(size: int, part: int = PART) -> Iterator[slice]:
    return (slice(start, start + part) for start in range(0, size, part))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, for `_Linear`."""
    if x.dtype == torch.bfloat16:
        return _converted_product(x, weight, bias)
    if torch.compiler.is_compiling():
        return _opaque_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _converted_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide, out = x.float(), x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows in _parts(weight.shape[0], CONVERTED):
        out[..., rows] = F.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
    return out


# Each copy of this file, an exported model's too, has operators of its own name, whatever its folder is called.
@torch.library.custom_op(f"hippoformer_{sha256(__name__.encode()).hexdigest()[:16]}::product", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, arriving = (each.reshape(-1, each.shape[-1]) for each in (x, grad))  # (N, I), (N, O)
        return (
            _product(grad, weight.t()) if for_x else None,
            outer_sum(arriving, rows, onednn=x.dtype == torch.float32) if for_weight else None,
            arriving.sum(0) if for_bias else None,
        )
