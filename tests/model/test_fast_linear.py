"""Products by oneDNN against torch's own in float64, and where they are taken."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from llm.model import fast_linear as ours

SIZES = st.integers(1, 70)
pytestmark = pytest.mark.skipif(not ours.HAS_ONEDNN, reason="this torch has no oneDNN and MKL")


@given(st.lists(SIZES, max_size=2), SIZES, SIZES, st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_value_and_gradients(before: list[int], width: int, out: int, bias: bool, turned: bool) -> None:
    layer = ours.FastLinear(width, out, bias)
    x = torch.randn(width, *before).movedim(0, -1) if turned else torch.randn(*before, width)
    x.requires_grad_()
    parts = [x, *layer.parameters()]
    exact = [part.detach().double().requires_grad_() for part in parts]
    found, expected = layer(x), F.linear(*exact)
    direction = torch.randn(found.shape)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), parts),
        torch.autograd.grad((expected * direction).sum(), exact),
        strict=True,
    ):
        rounding = found[..., 0].numel() * torch.finfo(torch.float32).eps  # of a sum over all rows
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=max(1e-4, rounding))


@given(SIZES, SIZES, SIZES)
@settings(max_examples=30, deadline=None)
def test_bare_products(rows: int, width: int, out: int) -> None:
    a, b = torch.randn(rows, width), torch.randn(rows, out)
    torch.testing.assert_close(ours.matmul(a.t(), b, True), a.t() @ b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.outer_sum(a, b, True), a.t() @ b, rtol=1e-4, atol=1e-4)


@given(SIZES, SIZES, SIZES, st.integers(1, 80), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_products_by_parts(rows: int, width: int, out: int, part: int, dtype: torch.dtype) -> None:
    a, b, c = torch.randn(rows, out).to(dtype), torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2 * rows**0.5}
    expected = a.double().t() @ b.double()
    whole, ours.PART = ours.PART, part
    onednn = ours.use_onednn(a)
    try:
        total = ours.empty_sum(b, out + 2, onednn)
        total.fill_(torch.nan)
        ours.add_outer_sum(total[:out], a, b, True, onednn)
        torch.testing.assert_close(total[:out].double(), expected, **close)
        ours.add_outer_sum(total[:out], a, b, False, onednn)
        torch.testing.assert_close(total[:out].double(), 2 * expected, **close)
        ours.matmul_into(found := torch.full_like(a, torch.nan), b, c.t(), onednn)
    finally:
        ours.PART = whole
    assert total.dtype == torch.float32 and total[out:].isnan().all()
    torch.testing.assert_close(found.double(), b.double() @ c.double().t(), **close)


def test_of_expanded_tensors() -> None:
    """A sum's gradient, and rows that are the same in memory."""
    for width, out in ((8, 16), (16, 8)):
        layer, row = ours.FastLinear(width, out), torch.randn(1, width)
        expected = torch.autograd.grad(F.linear(row.expand(5, -1), layer.weight, layer.bias).sum(), layer.parameters())
        found = torch.autograd.grad(layer(row.expand(5, -1)).sum(), layer.parameters())
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("out", [3, 2 * ours.CONVERTED + 5])
def test_without_instructions_for_bfloat16_products_are_those_of_float32_rounded(
    out: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradients; formats and what is kept are those of torch's own product."""
    monkeypatch.setattr(ours, "HAS_BFLOAT16", False)
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, x = ours.FastLinear(7, out).to(dtype), torch.randn(2, 5, 7, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        found = layer(x)
        plain = F.linear(x, layer.weight, layer.bias)
    wide = [each.detach().bfloat16().float().requires_grad_() for each in (x, layer.weight, layer.bias)]
    expected = F.linear(*wide)
    assert found.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(found, plain, rtol=2**-6, atol=1e-2)

    arriving = torch.randn(2, 5, out).bfloat16()
    ours_too = torch.autograd.grad(found, (x, layer.weight, layer.bias), arriving)
    for grad, other in zip(ours_too, torch.autograd.grad(expected, wide, arriving.float()), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, other.bfloat16().to(dtype), rtol=2**-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_products_that_are_not_differentiated(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "HAS_BFLOAT16", False)
    a, b = torch.randn(shape).bfloat16(), torch.randn(*shape[:-2], 6, 5).bfloat16()
    expected = a.float() @ b.float()
    assert torch.equal(ours.product(a, b), expected.bfloat16())
    assert torch.equal(ours.product(a.float(), b.float()), expected)
    if len(shape) == 2:
        out = torch.empty(4, 5, dtype=torch.bfloat16)
        ours.matmul_into(out, a, b, onednn=False)
        assert torch.equal(out, expected.bfloat16())
        assert torch.equal(ours.outer_sum(a, a, onednn=False), (a.float().t() @ a.float()).bfloat16())


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_where_it_is_taken(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "HAS_BFLOAT16", has_bfloat16)
    taken: list[int] = []
    product = ours._product
    monkeypatch.setattr(ours, "_product", lambda *parts: taken.append(1) or product(*parts))
    layer, x = ours.FastLinear(8, 8), torch.randn(3, 8)

    def takes(layer: torch.nn.Module = layer, x: torch.Tensor = x) -> bool:
        taken.clear()
        layer(x)
        return bool(taken)

    assert takes()
    with torch.autocast("cpu", torch.bfloat16):
        assert takes() != has_bfloat16
    assert not takes(ours.FastLinear(8, 8).double(), x.double())
    assert takes(ours.FastLinear(8, 8).bfloat16(), x.bfloat16()) != has_bfloat16
    assert not takes(x=torch.randn(0, 8))
    assert not takes(ours.FastLinear(8, 8, device="meta"), x.to("meta"))
