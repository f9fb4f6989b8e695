"""Activations by name. To add one, add an entry to `ACTIVATIONS`; if it has parameters, a class to `PARAMETRIC`. From
what the class declares follow the fields of the config, their checks, initial weights, `plan` and the keys in which a
pair may differ.

NMDA_alpha is the current-voltage curve of the NMDA receptor read as an activation: the input is the voltage, the
open probability a sigmoid of it, and alpha = [Mg2+] / K_Mg2+ shifts the block (Kim et al. 2023, Equations 5 to 7):

    NMDA_{alpha,beta}(x) = x / (1 + alpha exp(-beta x)) = x sigmoid(beta x - ln alpha)

The second form is the one computed: the first overflows, and its autograd gradient is NaN for x <= -100.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parametric import HALF, Parametric
from .published_activations import XIELU, PolyNorm


class _NMDAFunction(torch.autograd.Function):
    """y = x p with p = sigmoid(beta x - ln alpha); keeps x alone for the backward pass, as SiLU does.

    Half-precision inputs are computed in float32: near p = 0 an error in beta x - ln alpha is a relative error in y.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, log_alpha: Tensor | float, beta: Tensor | float) -> Tensor:
        wide = x.float() if x.dtype in HALF else x
        return (torch.sigmoid(wide * beta - log_alpha) * wide).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, log_alpha, beta = inputs
        learned = [v for v in (log_alpha, beta) if isinstance(v, Tensor)]
        ctx.save_for_backward(x, *learned)
        ctx.constants = None if learned else (log_alpha, beta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, *learned = ctx.saved_tensors
        log_alpha, beta = learned or ctx.constants
        wide, wide_grad = (x.float(), grad.float()) if x.dtype in HALF else (x, grad)
        p = torch.sigmoid(wide * beta - log_alpha)
        bend = wide * (1 - p)  # x (1 - p), the part of dy/dx that comes from the gate
        grad_x = (wide_grad * p * (1 + beta * bend)).to(x.dtype)
        if not learned:
            return grad_x, None, None
        slope = wide_grad * p * bend  # dy/d(ln alpha) = -x p (1 - p), dy/d(beta) = x^2 p (1 - p)
        return grad_x, -slope.sum().reshape(log_alpha.shape), (slope * wide).sum().reshape(beta.shape)


def _nmda(x: Tensor, log_alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    if torch.jit.is_tracing():  # a saved trace holds no Python function
        return _NMDAFunction.forward(x, log_alpha, beta)
    return _NMDAFunction.apply(x, log_alpha, beta)


def nmda(x: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """NMDA_{alpha,beta}(x), elementwise, any shape and floating dtype; the identity for alpha = 0.

    Raises:
        ValueError: alpha is negative or not finite.
    """
    return _nmda(x, log_of_alpha(alpha), float(beta))


def log_of_alpha(alpha: float) -> float:
    """ln alpha, with ln 0 = -inf (then the gate is open everywhere). ValueError if alpha is negative or not finite."""
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"nmda_alpha must be a finite number >= 0, got {alpha}")
    return math.log(alpha) if alpha > 0 else -math.inf


class NMDA(Parametric):
    """NMDA_{alpha,beta} as a module.

    Args:
        alpha: [Mg2+] / K_Mg2+, dimensionless, >= 0; the papers use 0, 0.01, 0.05, 0.1, 0.5, 1, 5, 10.
        beta: inverse width of the voltage dependence, dimensionless.
        learnable: train ln alpha (so that alpha stays positive) and beta, one number each, of shape (1,): DeepSpeed
            cannot broadcast parameters without a dimension.

    Raises:
        ValueError: alpha is negative or not finite, or zero and learnable (ln 0 has no gradient).
    """

    defaults: ClassVar[dict[str, Any]] = {"alpha": 1.0, "beta": 1.0, "learnable": False}
    in_float32 = True

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        self.initial = {"log_alpha": log_of_alpha(alpha), "beta": float(beta)}
        self.learnable = learnable
        if not learnable:
            return
        if alpha == 0:
            raise ValueError("a learnable nmda_alpha must start above 0: give nmda_alpha > 0 or nmda_learnable false")
        self.log_alpha = nn.Parameter(torch.tensor([self.initial["log_alpha"]]))
        self.beta = nn.Parameter(torch.tensor([self.initial["beta"]]))

    @classmethod
    def problems(cls, **settings: Any) -> list[str]:
        alpha = settings["alpha"]
        if not 0 <= alpha < math.inf:
            return [f"nmda_alpha {alpha} must be a finite number >= 0"]
        return ["a learnable nmda_alpha must start above 0"] if settings["learnable"] and alpha == 0 else []

    @classmethod
    def learned_sizes(cls, **settings: Any) -> list[int]:
        return [1, 1] if settings["learnable"] else []

    @property
    def alpha(self) -> float:
        """alpha now: exp of the learned logarithm, or the fixed value."""
        return self.log_alpha.exp().item() if self.learnable else math.exp(self.initial["log_alpha"])

    def forward(self, x: Tensor) -> Tensor:
        if self.learnable:
            return _nmda(x, self.log_alpha, self.beta)
        return _nmda(x, self.initial["log_alpha"], self.initial["beta"])

    def learned(self) -> dict[str, Tensor]:
        return {"nmda_alpha": self.log_alpha.exp(), "nmda_beta": self.beta} if self.learnable else {}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v:.4g}" for k, v in self.initial.items()) + f", learnable={self.learnable}"


class Swish(Parametric):
    """x sigmoid(beta x + bias), the activation that Ramachandran et al. 2017 found, here with a gate bias.

    NMDA_{alpha,beta} with a learned alpha is the same curve: its -ln alpha is the bias.

    Args:
        beta: slope of the gate; 0 is x / 2 without a bias, infinity ReLU.
        bias: of the gate.
        learned: which of them are trained: "none", "beta", "bias" or "both"; one number each, of shape (1,).

    Raises:
        ValueError: `learned` is none of these.
    """

    defaults: ClassVar[dict[str, Any]] = {"beta": 1.0, "bias": 0.0, "learned": "none"}
    in_float32 = True
    LEARNED: ClassVar[dict[str, tuple[str, ...]]] = {
        "none": (),
        "beta": ("beta",),
        "bias": ("bias",),
        "both": ("beta", "bias"),
    }

    def __init__(self, beta: float = 1.0, bias: float = 0.0, learned: str = "none") -> None:
        super().__init__()
        if problems := self.problems(beta=beta, bias=bias, learned=learned):
            raise ValueError("; ".join(problems))
        self.initial = {"beta": float(beta), "bias": float(bias)}
        self.trained = self.LEARNED[learned]
        for name in self.trained:
            setattr(self, name, nn.Parameter(torch.tensor([self.initial[name]])))

    @classmethod
    def problems(cls, **settings: Any) -> list[str]:
        problems = [
            f"swish_{name} {settings[name]} must be a finite number"
            for name in ("beta", "bias")
            if not math.isfinite(settings[name])
        ]
        if settings["learned"] not in cls.LEARNED:
            problems.append(f"swish_learned {settings['learned']!r} is unknown: give one of {', '.join(cls.LEARNED)}")
        return problems

    @classmethod
    def learned_sizes(cls, **settings: Any) -> list[int]:
        return [1] * len(cls.LEARNED[settings["learned"]])

    def forward(self, x: Tensor) -> Tensor:
        if not self.trained:
            return _nmda(x, -self.initial["bias"], self.initial["beta"])
        beta, bias = (
            getattr(self, name) if name in self.trained else self.of_trained(name) for name in ("beta", "bias")
        )
        return _nmda(x, -bias, beta)

    def of_trained(self, name: str) -> Tensor:
        """A parameter that is not trained, as a tensor like those that are."""
        return torch.full_like(getattr(self, self.trained[0]), self.initial[name], requires_grad=False)

    def learned(self) -> dict[str, Tensor]:
        return {f"swish_{name}": getattr(self, name) for name in self.trained}


class _Elementwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _gelu_sigmoid(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the form of GELU that Kim et al. 2023 compare with."""
    return nmda(x, alpha=1.0, beta=1.702)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_sigmoid": _gelu_sigmoid,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
    "leaky_relu": F.leaky_relu,  # slope 0.01, as in Kim et al. 2023, Section 3.1
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
PARAMETRIC: dict[str, type[Parametric]] = {"nmda": NMDA, "swish": Swish, "xielu": XIELU, "polynorm": PolyNorm}
NAMES = (*ACTIVATIONS, *PARAMETRIC)
IN_FLOAT32 = ("gelu_sigmoid", *(name for name, kind in PARAMETRIC.items() if kind.in_float32))
FIELDS = {f"{name}_{key}": value for name, kind in PARAMETRIC.items() for key, value in kind.defaults.items()}


def settings_of(name: str, config: Any) -> dict[str, Any]:
    """The arguments of the activation called `name` that a config holds."""
    return {key: getattr(config, f"{name}_{key}") for key in PARAMETRIC[name].defaults} if name in PARAMETRIC else {}


def activation(name: str, **settings: Any) -> nn.Module:
    """The activation called `name`; `settings` are arguments of a parametric one, which others leave unread.

    Raises:
        ValueError: no activation has this name.
    """
    if name in PARAMETRIC:
        return PARAMETRIC[name](**settings)
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: give one of {', '.join(NAMES)}")
    return _Elementwise(ACTIVATIONS[name])
