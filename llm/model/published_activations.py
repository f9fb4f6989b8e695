"""Activations with learned parameters that others published, to compare NMDA with.

Half-precision inputs are computed in float32. Each keeps its input alone for the backward pass, as SiLU does.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parametric import HALF, Parametric


class _XIELUFunction(torch.autograd.Function):
    """xIELU from x and its two positive coefficients; keeps x alone for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        wide = x.float() if x.dtype in HALF else x
        below = wide.clamp(max=0)
        curve = torch.where(wide > 0, positive * wide * wide, negative * (torch.expm1(below) - below))
        return (curve + XIELU.BETA * wide).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, positive, negative = ctx.saved_tensors
        wide, wide_grad = (x.float(), grad.float()) if x.dtype in HALF else (x, grad)
        above, below = wide.clamp(min=0), wide.clamp(max=0)
        bend = torch.expm1(below)  # 0 for x > 0
        grad_x = wide_grad * (2 * positive * above + negative * bend + XIELU.BETA)
        of_positive = (wide_grad * above * above).sum().reshape(positive.shape)
        of_negative = (wide_grad * (bend - below)).sum().reshape(negative.shape)
        return grad_x.to(x.dtype), of_positive, of_negative


class XIELU(Parametric):
    """Expanded integral of the exponential linear unit (Huang and Schlag 2024, Equation 9), both coefficients learned:

        positive x^2 + x / 2  for x > 0,    negative (exp(x) - 1 - x) + x / 2  else

    with positive = softplus(p) and negative = 1/2 + softplus(n), so that the slope goes below zero on the left.

    Args:
        positive: first value, above 0.
        negative: first value, above 1/2.

    Raises:
        ValueError: a first value is out of this range.
    """

    defaults: ClassVar[dict[str, Any]] = {"positive": 0.8, "negative": 0.8}
    in_float32 = True
    BETA: ClassVar[float] = 0.5  # slope at 0

    def __init__(self, positive: float = 0.8, negative: float = 0.8) -> None:
        super().__init__()
        if problems := self.problems(positive=positive, negative=negative):
            raise ValueError("; ".join(problems))
        self.initial = {
            "positive": math.log(math.expm1(positive)),
            "negative": math.log(math.expm1(negative - self.BETA)),
        }
        self.positive, self.negative = (nn.Parameter(torch.tensor([value])) for value in self.initial.values())

    @classmethod
    def problems(cls, **settings: Any) -> list[str]:
        return [
            f"xielu_{name} {settings[name]} must be a finite number above {least:g}"
            for name, least in (("positive", 0.0), ("negative", cls.BETA))
            if not least < settings[name] < math.inf
        ]

    @classmethod
    def learned_sizes(cls, **settings: Any) -> list[int]:
        return [1, 1]

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """What x^2 is multiplied with, and what exp(x) - 1 - x is."""
        return F.softplus(self.positive), self.BETA + F.softplus(self.negative)

    def forward(self, x: Tensor) -> Tensor:
        positive, negative = self.coefficients()
        if torch.jit.is_tracing():
            return _XIELUFunction.forward(x, positive, negative)
        return _XIELUFunction.apply(x, positive, negative)

    def learned(self) -> dict[str, Tensor]:
        return dict(zip(("xielu_positive", "xielu_negative"), self.coefficients(), strict=True))


class _PolyNormFunction(torch.autograd.Function):
    """PolyNorm from x (..., F), three weights and a bias; keeps x alone for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = x.float() if x.dtype in HALF else x
        powers = (_normalised(wide**n)[0] for n in (1, 2, 3))
        return (sum(w * power for w, power in zip(weight, powers, strict=True)) + bias).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_shape = bias.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        wide, wide_grad = (x.float(), grad.float()) if x.dtype in HALF else (x, grad)
        grad_x, of_weight = torch.zeros_like(wide), []
        for n, w in zip((1, 2, 3), weight, strict=True):
            power, inverse = _normalised(wide**n)
            along = (wide_grad * power).mean(-1, keepdim=True)
            grad_x = grad_x + w * n * wide ** (n - 1) * inverse * (wide_grad - power * along)
            of_weight.append((wide_grad * power).sum())
        return grad_x.to(x.dtype), torch.stack(of_weight), wide_grad.sum().reshape(ctx.bias_shape)


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., F) over its root mean square, and the inverse of that, (..., 1)."""
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + PolyNorm.EPS)
    return x * inverse, inverse


class PolyNorm(Parametric):
    """w_1 x / rms(x) + w_2 x^2 / rms(x^2) + w_3 x^3 / rms(x^3) + b over the last dimension (Zhuo et al. 2025).

    All weights start at 1/3, the bias at 0, and all are learned.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    in_float32 = True
    EPS: ClassVar[float] = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.initial = {"weight": 1 / 3, "bias": 0.0}
        self.weight = nn.Parameter(torch.full((3,), self.initial["weight"]))
        self.bias = nn.Parameter(torch.zeros(1))

    @classmethod
    def learned_sizes(cls, **settings: Any) -> list[int]:
        return [3, 1]

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            return _PolyNormFunction.forward(x, self.weight, self.bias)
        return _PolyNormFunction.apply(x, self.weight, self.bias)

    def learned(self) -> dict[str, Tensor]:
        return {f"polynorm_{n + 1}": weight for n, weight in enumerate(self.weight)}
