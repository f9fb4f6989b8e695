"""Activations against float64 definitions and torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import XIELUActivation

from llm.model.activations import NAMES, NMDA, activation, nmda

ALPHAS = [0.0, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0]
EXTREMES = torch.cat([torch.logspace(-6, 4, 400), -torch.logspace(-6, 4, 400), torch.zeros(1)])


def literal(x: torch.Tensor, alpha: float, beta: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x / (1 + alpha exp(-beta x)) and its derivative by hand, float64, with the limits where exp overflows."""
    x = x.double()
    p = torch.zeros_like(x) if alpha else torch.ones_like(x)
    fine = beta * x > -700 if alpha else torch.zeros_like(x, dtype=torch.bool)
    p[fine] = 1 / (1 + alpha * torch.exp(-beta * x[fine]))
    return x * p, p + beta * x * p * (1 - p)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.702])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nmda_values_and_gradients_are_those_of_float64(alpha: float, beta: float, dtype: torch.dtype) -> None:
    x = EXTREMES.to(dtype).requires_grad_()
    y = nmda(x, alpha, beta)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    value, slope = literal(x.detach(), alpha, beta)
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(y.double(), value, **tolerance)
    torch.testing.assert_close(gradient.double(), slope, **tolerance)


@given(st.floats(-1e4, 1e4), st.floats(0, 100), st.floats(0.01, 10))
@settings(max_examples=300, deadline=None)
def test_nmda_is_finite_everywhere(x: float, alpha: float, beta: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        point = torch.tensor(x, dtype=dtype, requires_grad=True)
        y = nmda(point, alpha, beta)
        (gradient,) = torch.autograd.grad(y, point)
        assert torch.isfinite(y) and torch.isfinite(gradient)


def test_nmda_one_one_is_silu_and_zero_is_identity() -> None:
    x = EXTREMES.clone().requires_grad_()
    ours, theirs = nmda(x), F.silu(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
    assert torch.equal(nmda(x, alpha=0.0), x)


@pytest.mark.parametrize("learnable", [False, True])
def test_nmda_saves_one_tensor(learnable: bool) -> None:
    saved = []
    module = NMDA(10.0, learnable=learnable)
    x = torch.randn(7, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    assert [t.shape for t in saved if t.numel() > 1] == [x.shape]


def test_learnable_nmda_gradients_are_those_of_autograd_in_float64() -> None:
    module = NMDA(5.0, 1.5, learnable=True).double()
    x = torch.linspace(-8, 8, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, a, b: torch.func.functional_call(module, {"log_alpha": a, "beta": b}, x),
        (x, module.log_alpha, module.beta),
    )
    assert torch.autograd.gradgradcheck(module, (x,))


def test_learnable_alpha_stays_positive() -> None:
    """A plain alpha would cross zero: the loss falls as alpha does, without end."""
    module = NMDA(1.0, learnable=True)
    optimizer = torch.optim.SGD([module.log_alpha], lr=0.5)
    seen = [module.alpha]
    for _ in range(40):
        optimizer.zero_grad()
        (-module(torch.linspace(0.5, 3, 50)).sum()).backward()  # for x > 0 the output grows as alpha falls
        optimizer.step()
        seen.append(module.alpha)
    assert seen == sorted(seen, reverse=True)
    assert 0 < seen[-1] < 0.01


def test_nmda_refuses_what_has_no_meaning() -> None:
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="nmda_alpha"):
            NMDA(alpha)
    with pytest.raises(ValueError, match="above 0"):
        NMDA(0.0, learnable=True)
    with pytest.raises(ValueError, match="silu"):
        activation("swishy")


@pytest.mark.parametrize("name", NAMES)
def test_named_activations_are_torchs(name: str) -> None:
    reference = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": F.relu,
        "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
        "swish": lambda x: x * torch.sigmoid(0.7 * x),
        "xielu": XIELUActivation(dtype=torch.float32),
        "polynorm": polynorm,
        "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "identity": lambda x: x,
        "nmda": lambda x: x / (1 + 3.0 * torch.exp(-0.7 * x)),
    }[name]
    given = {"nmda": {"alpha": 3.0, "beta": 0.7}, "swish": {"beta": 0.7}}.get(name, {})
    x = torch.linspace(-6, 6, 200)
    torch.testing.assert_close(activation(name, **given)(x), reference(x), rtol=1e-5, atol=1e-6)


def polynorm(x: torch.Tensor) -> torch.Tensor:
    """At first weights, from the definition of Zhuo et al. 2025."""
    return sum(F.rms_norm(x**n, x.shape[-1:], eps=1e-6) for n in (1, 2, 3)) / 3


LEARNED = {
    "swish beta": ("swish", {"learned": "beta"}),
    "swish bias": ("swish", {"learned": "bias", "bias": 0.3}),
    "swish both": ("swish", {"learned": "both", "beta": 0.7, "bias": -1.0}),
    "xielu": ("xielu", {"positive": 0.5, "negative": 1.1}),
    "polynorm": ("polynorm", {}),
}


@pytest.mark.parametrize("case", LEARNED)
def test_gradients_of_learned_activations_are_those_of_finite_differences(case: str) -> None:
    name, given = LEARNED[case]
    module = activation(name, **given).double()
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.linspace(-4, 4.2, 24, dtype=torch.float64).reshape(4, 6).requires_grad_()  # not at the joint, 0

    def called(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(called, (x, *parameters))
    assert torch.autograd.gradgradcheck(called, (x, *parameters))


@pytest.mark.parametrize("case", LEARNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_activations_keep_their_input_alone_and_stay_finite(case: str, dtype: torch.dtype) -> None:
    name, given = LEARNED[case]
    module, saved = activation(name, **given), []
    x = EXTREMES.detach()[EXTREMES.abs() <= 300].to(dtype).reshape(1, -1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x)
    assert [t.shape for t in saved if t.numel() > 3] == [x.shape]
    y.float().sum().backward()
    assert y.dtype == dtype and torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_xielu_is_transformers_with_gradients_of_its_parameters() -> None:
    ours, theirs = activation("xielu"), XIELUActivation(dtype=torch.float32)
    x, same = (torch.linspace(-5, 5, 64).requires_grad_() for _ in range(2))
    ours(x).square().sum().backward()
    theirs(same).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    for mine, other in ((ours.positive, theirs.alpha_p), (ours.negative, theirs.alpha_n)):
        torch.testing.assert_close(mine.grad.reshape(()), other.grad.reshape(()), rtol=1e-4, atol=1e-4)


def test_learned_activations_refuse_what_has_no_meaning() -> None:
    for name, settings_given, said in (
        ("swish", {"learned": "all"}, "swish_learned 'all'"),
        ("swish", {"beta": math.nan}, "swish_beta"),
        ("xielu", {"positive": 0.0}, "xielu_positive"),
        ("xielu", {"negative": 0.5}, "xielu_negative"),
    ):
        with pytest.raises(ValueError, match=said):
            activation(name, **settings_given)


def test_nmda_under_vmap_and_compile() -> None:
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.vmap(lambda row: nmda(row, 10.0))(x), nmda(x, 10.0))
    compiled = torch.compile(lambda t: nmda(t, 10.0), fullgraph=True, backend="aot_eager")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    nmda(other, 10.0).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
