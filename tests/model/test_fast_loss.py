"""The chunked loss against torch's cross-entropy on whole logits: value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.model import fast_loss as losses
from llm.model.loss import next_token_loss, soft_capped


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 24),
    vocabulary=st.integers(2, 50),
    chunk=st.integers(1, 1000),
    wide=st.integers(1, 1000),
    ignored=st.floats(0, 0.9),
    items=st.none() | st.integers(1, 500),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    cap=st.sampled_from([None, 2.0, 30.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_value_and_gradients(
    rows: int,
    width: int,
    vocabulary: int,
    chunk: int,
    wide: int,
    ignored: float,
    items: int | None,
    scale: float,
    cap: float | None,
    z_loss: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(2, rows, width, generator=generator)).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (2, rows), generator=generator)
    targets[torch.rand(2, rows, generator=generator) < ignored] = -100
    targets[0, 0] = 0  # at least one
    logits = hidden @ weight.T
    whole = reference(logits.double(), targets, items, cap, 0.0)
    expected = reference(logits.double(), targets, items, cap, z_loss)
    before = losses.chunk_rows, losses.WIDE_ELEMENTS
    losses.chunk_rows, losses.WIDE_ELEMENTS = lambda *_: max(1, chunk // vocabulary), wide
    try:
        found = losses.fused_linear_cross_entropy(hidden, weight, targets, items, soft_cap=cap, z_loss=z_loss)
    finally:
        losses.chunk_rows, losses.WIDE_ELEMENTS = before
    torch.testing.assert_close(found.double(), whole, rtol=1e-5, atol=1e-5)  # the value has no z-loss
    ready = next_token_loss(soft_capped(logits, cap), targets, items, z_loss)
    torch.testing.assert_close(ready.double(), whole, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True) for loss in (expected, found, ready)
    ]
    for each in gradients[1:]:
        for a, b in zip(each, gradients[0], strict=True):
            least = max(
                scale, float(b.abs().max()) if z_loss else 0.0
            )  # a z-loss adds up large gradients of each logit
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * least)


def reference(
    logits: torch.Tensor, targets: torch.Tensor, items: int | None, cap: float | None, z_loss: float
) -> torch.Tensor:
    logits = cap * torch.tanh(logits / cap) if cap else logits
    kept = logits[targets != -100]
    denominator = kept.exp().sum(-1).log() if kept.abs().max() < 300 else torch.logsumexp(kept, -1)
    each = denominator - kept[torch.arange(len(kept)), targets[targets != -100]] + z_loss * denominator**2
    return each.sum() / (items or len(kept))


@given(st.integers(1, 200_000), st.integers(1, 5_000), st.sampled_from([2, 4]))
def test_a_chunk_is_small_or_no_larger_than_the_gradient_of_the_weight(vocabulary: int, width: int, size: int) -> None:
    logits = losses.chunk_rows(vocabulary, width, size) * vocabulary * size
    assert logits <= max(2**26, 4 * vocabulary * width, size * vocabulary)


@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN's products", "torch's products"])
def test_rows_of_the_weight_that_pad_it_get_no_gradient(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_rows", lambda *_: 5)
    empty = losses.empty_sum
    monkeypatch.setattr(losses, "empty_sum", lambda *sizes: empty(*sizes).fill_(torch.nan))
    hidden, weight, targets = torch.randn(12, 4), torch.randn(9, 4, requires_grad=True), torch.randint(7, (12,))
    found = losses.fused_linear_cross_entropy(hidden, weight, targets, None, vocabulary=7, onednn=onednn)
    expected = F.cross_entropy(hidden @ weight[:7].T, targets)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(each, weight) for each in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
        assert not one[7:].any()


def test_gradients_are_given_once() -> None:
    """They are multiplied in place: a second backward pass would find other ones, and is refused."""
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = losses.fused_linear_cross_entropy(hidden.bfloat16(), weight, torch.randint(9, (5,)), None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_of_no_rows_at_all() -> None:
    hidden, weight = torch.randn(2, 0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    losses.fused_linear_cross_entropy(hidden, weight, torch.zeros(2, 0, dtype=torch.long), 1).backward()
    assert hidden.grad is not None and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(("cap", "z_loss"), [(None, 0.0), (2.0, 0.01)], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype: torch.dtype, cap: float | None, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_rows", lambda *_: 20)  # the last has 8
    hidden = torch.randn(48, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(300, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(300, (48,))
    targets[::5] = -100
    results = []
    for compiled in (False, True):
        loss = losses.fused_linear_cross_entropy(hidden, weight, targets, None, compiled, soft_cap=cap, z_loss=z_loss)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_without_gradients_and_in_bfloat16() -> None:
    hidden, weight = torch.randn(3, 20, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(64, (3, 20))
    exact = losses.fused_linear_cross_entropy(hidden, weight, targets, None)
    with torch.no_grad():
        assert torch.equal(losses.fused_linear_cross_entropy(hidden, weight, targets, None), exact)
    with torch.autocast("cpu", torch.bfloat16):
        rough = losses.fused_linear_cross_entropy(hidden, weight, targets, None)
        plain = F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, plain, rtol=1e-3, atol=1e-3)
    gradients = torch.autograd.grad(rough, (hidden, weight))
    references = torch.autograd.grad(exact, (hidden, weight))
    for a, b in zip(gradients, references, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_no_tensor_as_large_as_all_logits_is_kept() -> None:
    saved: list[int] = []
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        losses.fused_linear_cross_entropy(hidden, weight, torch.randint(500, (64,)), 64)
    assert max(saved) <= 500 * 8 < 64 * 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ignored_is_zero_over_the_batch(dtype: torch.dtype) -> None:
    hidden, weight = (
        torch.randn(4, 8, dtype=dtype, requires_grad=True),
        torch.randn(9, 8, dtype=dtype, requires_grad=True),
    )
    loss = losses.fused_linear_cross_entropy(hidden, weight, torch.full((4,), -100), 7)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None and (hidden.grad == 0).all()
    assert weight.grad is not None and weight.grad.dtype == dtype and (weight.grad == 0).all()
