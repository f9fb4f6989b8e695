"""Output head and next-token cross-entropy in one, in float32, without ever holding all logits.

Dimension letters: N predicted positions (B T), D width, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._triton import has_triton

from .autocast import product_dtype
from .fast_linear import FastLinear, add_outer_sum, empty_sum, matmul, matmul_into, use_onednn
from .loss import IGNORED

CHUNK_BYTES = 2**26  # logits held at once, or as much as the gradient of the weight, which is held anyway
WIDE_ELEMENTS = 2**18  # of them in float32 at once on a CPU: 1 MiB stays in a core's cache from pass to pass


class FastOutputHead(FastLinear):
    """`nn.Linear` from hidden states (B, T, D) to logits (B, T, V); given targets (B, T), the loss instead.

    `num_items`, `vocabulary`, `soft_cap`, `z_loss` and `compiled_loss`: see `fused_linear_cross_entropy`.
    """

    fuses_loss = True
    fast_paths: frozenset[str] = frozenset()
    compiled_loss = False

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        num_items: Tensor | int | None = None,
        vocabulary: int | None = None,
        soft_cap: float | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        onednn = "matmul" in self.fast_paths
        if targets is None:
            return super().forward(x) if onednn else F.linear(x, self.weight, self.bias)
        how = self.compiled_loss, vocabulary, onednn, soft_cap, z_loss
        return fused_linear_cross_entropy(x, self.weight, targets, num_items, *how)


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items: Tensor | int | None,
    compiled: bool = False,
    vocabulary: int | None = None,
    onednn: bool = True,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`next_token_loss(soft_capped(hidden @ weight[:vocabulary].T), targets, num_items)`, some positions at a time.

    The gradient is made together with the loss, while a chunk's logits are at hand, so they are neither kept nor
    computed twice (the idea of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024). Matrix products run in
    autocast's dtype where autocast is on, the softmax in float32.

    Args:
        hidden: (..., D). weight: (V or more, D). targets: (...), -100 left out.
        num_items: what the sum is divided by; None is the number of targets.
        compiled: torch.compile what turns logits to gradients: three passes over memory instead of nine. Always on a
            GPU that Triton can use, where the nine would take longer than all logits at once.
        vocabulary: V; None is all rows of the weight.
        onednn: float32 products by oneDNN where it is there.
        soft_cap, z_loss: see `loss.py`; the value is the cross-entropy alone here too.
    """
    vocabulary = weight.shape[0] if vocabulary is None else vocabulary
    compiled = compiled or (hidden.is_cuda and has_triton())
    dtype, grad = product_dtype(hidden), torch.is_grad_enabled()
    how = dtype, grad, compiled, onednn, soft_cap, z_loss
    total = _SummedLoss.apply(hidden.flatten(0, -2), weight, targets.flatten(), vocabulary, *how)
    return total / ((targets != IGNORED).sum() if num_items is None else num_items)


def chunk_rows(vocabulary: int, width: int, element_size: int) -> int:
    """Positions of a chunk. Each chunk adds to the whole gradient of the weight, (V, D) in float32, which would take
    longer than the products of a few positions."""
    return max(1, CHUNK_BYTES // (element_size * vocabulary), 4 * width // element_size)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocabulary: int,
        dtype: torch.dtype,
        grad: bool,
        compiled: bool,
        onednn: bool,
        soft_cap: float | None,
        z_loss: float,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(dtype), weight[:vocabulary].to(dtype)
            onednn = onednn and use_onednn(h)
            total = torch.zeros((), dtype=torch.float32, device=h.device)
            in_place = _compiled_softmax_minus_target() if compiled else _softmax_minus_target_in_place
            rows = min(len(h), chunk_rows(vocabulary, w.shape[1], w.element_size()))
            logits = h.new_empty(rows, vocabulary)
            grad_h = torch.empty_like(h) if grad else None
            grad_w = empty_sum(h, len(weight), onednn) if grad else None
            for start in range(0, len(h), max(rows, 1)):
                chunk = slice(start, start + rows)
                p = logits[: len(h[chunk])]
                matmul_into(p, h[chunk], w.t(), onednn)
                total += in_place(p, targets[chunk], soft_cap, z_loss)
                if grad:
                    grad_h[chunk] = matmul(p, w, onednn)
                    add_outer_sum(grad_w[:vocabulary], p, h[chunk], start == 0, onednn)
        if grad:
            grad_w[vocabulary if len(h) else 0 :] = 0
            ctx.save_for_backward(grad_h, grad_w)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """In place, so that autograd refuses a second backward pass."""
        grad_h, grad_w = ctx.saved_tensors
        hidden, weight = ctx.dtypes
        grad_h = grad_h.to(hidden).mul_(grad)
        # Where oneDNN has it the other way round (`empty_sum`), this is also the copy in the weight's own order.
        grad_w = (
            grad_w.mul_(grad) if grad_w.is_contiguous() else torch.mul(grad_w, grad, out=grad_w.new_empty(grad_w.shape))
        )
        return grad_h, grad_w.to(weight), *[None] * 8


def _softmax_minus_target_in_place(logits: Tensor, targets: Tensor, soft_cap: float | None, z_loss: float) -> Tensor:
    """Turn logits (N, V) into d loss / d logits, rounded to their dtype; returns the summed loss in float32."""
    rows = max(1, WIDE_ELEMENTS // logits.shape[1] if logits.device.type == "cpu" else len(logits))
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        gradient, loss = _softmax_minus_target(part, wanted, soft_cap, z_loss)
        total += loss
        part.copy_(gradient)  # float32 logits were turned in place
    return total


def _softmax_minus_target(
    logits: Tensor, targets: Tensor, soft_cap: float | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    """d loss / d logits (N, V) in float32 and the summed loss; rows without a target are zero in both.

    One exponential for both, in place: on a CPU this part is bound by memory.
    """
    wide, slope = logits.float(), None
    counted = (targets != IGNORED).float()[:, None]
    index = targets.clamp(min=0)[:, None]
    if soft_cap is not None:
        slope = 1 - wide.div_(soft_cap).tanh_().square()
        wide.mul_(soft_cap)
    largest = wide.amax(-1, keepdim=True)
    wide.sub_(largest)
    picked = wide.gather(1, index)
    total = wide.exp_().sum(-1, keepdim=True)
    loss = ((total.log() - picked) * counted).sum()
    share = counted / total
    if z_loss:  # d (log Z)^2 = 2 log Z times the softmax
        share = share * (1 + 2 * z_loss * (total.log() + largest))
    gradient = wide.mul_(share)
    gradient.scatter_add_(1, index, -counted)
    return gradient if slope is None else gradient.mul_(slope), loss


@cache
def _compiled_softmax_minus_target() -> Callable[[Tensor, Tensor, float | None, float], Tensor]:
    return torch.compile(_fusible_softmax_minus_target)


def _fusible_softmax_minus_target(logits: Tensor, targets: Tensor, soft_cap: float | None, z_loss: float) -> Tensor:
    """`_softmax_minus_target_in_place` as a compiler likes it: no scatter, and only the last pass in place."""
    wide = logits.float() if soft_cap is None else soft_cap * torch.tanh(logits.float() / soft_cap)
    counted = (targets != IGNORED).float()[:, None]
    index = targets.clamp(min=0)[:, None]
    largest = wide.amax(-1, keepdim=True)
    shifted = wide - largest
    exponential = shifted.exp()
    total = exponential.sum(-1, keepdim=True)
    loss = ((total.log() - shifted.gather(1, index)) * counted).sum()
    share = counted / total
    if z_loss:
        share = share * (1 + 2 * z_loss * (total.log() + largest))
    gradient = exponential * share
    wanted = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = torch.where(wanted, gradient - counted, gradient)
    logits.copy_(gradient if soft_cap is None else gradient * (1 - (wide / soft_cap).square()))
    return loss
