"""RMSNorm in few passes against torch's own."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import nn

from llm.model.fast_norm import FastRMSNorm


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([1e-5, 0.1]),
    st.sampled_from([1e-3, 1.0, 50.0]),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradients(shape: list[int], dtype: torch.dtype, eps: float, scale: float) -> None:
    x = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    ours, exact = FastRMSNorm(shape[-1], eps, dtype=dtype), nn.RMSNorm(shape[-1], eps, dtype=torch.float64)
    with torch.no_grad():
        exact.weight.copy_(ours.weight.normal_())
    wide = x.detach().double().requires_grad_()
    found, expected = ours(x), exact(wide)
    direction = torch.randn(shape).to(dtype)
    assert found.dtype == dtype
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, expected.to(dtype), **loose)
    largest = (wide.square().mean(-1) + eps).rsqrt().max()  # of r
    terms = (direction.double().abs().max() * exact.weight.abs().max() * largest).item()  # which cancel for width 1
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), (x, ours.weight)),
        torch.autograd.grad((expected * direction.double()).sum(), (wide, exact.weight)),
        strict=True,
    ):
        size = max(other.abs().max().item(), terms)
        torch.testing.assert_close(one, other.to(dtype), rtol=loose["rtol"], atol=loose["atol"] * size)
