"""Attention by blocks of queries on CPUs against torch's attention and a plain one with the same factors."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from llm.model import DecoderConfig, DecoderForCausalLM
from llm.model import fast_attention as ours
from llm.model.attention import Attention, eager_attention
from llm.model.fast_paths import FAST_PATHS, enable_fast_paths


def drawn(batch: int, heads: int, groups: int, time: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(batch, n, time, 8).to(dtype).requires_grad_() for n in (heads, groups, groups)]


@given(
    st.integers(1, 3),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(1, 200) | st.integers(510, 530),
    st.sampled_from([0.0, 0.4]),
)
@settings(max_examples=30, deadline=None)
def test_attention_and_its_gradients_are_those_of_the_whole_matrix(batch, heads, time, p) -> None:
    """With the factors that the blocks drew, put together to one matrix."""
    query, key, value = drawn(batch, *heads, time, torch.float32)
    factors = torch.full((batch, heads[1], heads[0] // heads[1], time, time), float(p == 0))
    before, done = ours.keep_factors, []

    def keep(x: torch.Tensor, p: float) -> torch.Tensor:
        made = before(x, p)
        start = sum(done)
        done.append(x.shape[-2])
        factors[..., start : start + x.shape[-2], : x.shape[-1]] = made
        return made

    ours.keep_factors = keep
    try:
        found = ours.causal_attention(query, key, value, 0.3, p)
    finally:
        ours.keep_factors = before
    repeated = [each.repeat_interleave(heads[0] // heads[1], dim=1) for each in (key, value)]
    scores = (query @ repeated[0].mT * 0.3).masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -torch.inf)
    expected = (scores.softmax(-1) * factors.flatten(1, 2)) @ repeated[1]
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    if p == 0:
        flash = F.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.3)
        torch.testing.assert_close(found, flash.transpose(1, 2), rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), (query, key, value)),
        torch.autograd.grad((expected.transpose(1, 2) * direction).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("time", [500, 700])  # weights kept, and computed again
@pytest.mark.parametrize("scaling", [0.35, 1.0])
def test_attention_in_bfloat16_is_as_near_to_float32_as_eager_attention(scaling: float, time: int) -> None:
    """Forward and gradients, relative to their size; eager attention rounds scores and weights too."""
    results = {}
    for name, dtype in (("wide", torch.float32), ("ours", torch.bfloat16), ("eager", torch.bfloat16)):
        parts = [each.detach().to(dtype).requires_grad_() for each in drawn(2, 4, 2, time, torch.float32)]
        if name == "ours":
            found = ours.causal_attention(*parts, scaling, 0.0)
        else:
            later = torch.full((time, time), -torch.inf, dtype=dtype).triu(1)[None, None]
            found = eager_attention(torch.nn.Identity(), *parts, later, scaling)[0]
        assert found.dtype == dtype
        direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results[name] = [found, *torch.autograd.grad((found * direction).sum(), parts)]
    for exact, own, eager in zip(results["wide"], results["ours"], results["eager"], strict=True):
        far, eager_far = ((each.float() - exact).norm() / exact.norm() for each in (own, eager))
        assert far < max(1.3 * eager_far, 0.006)


@pytest.mark.parametrize("stream", [[], ["values"], ["queries", "keys"]], ids=str)
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_model_trains_with_it_under_autocast(position: str, stream: list[str]) -> None:
    """With RoPE and without, gradients are near those without autocast."""
    config = DecoderConfig.llama(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, position=position, attention_dropout=0.2, stream=stream, initializer_range=0.2,
    )  # fmt: skip
    model, ids, gradients = DecoderForCausalLM(config).train(), torch.randint(50, (2, 90)), []
    model.enable_fast_paths()
    before = ours.keep_factors
    ours.keep_factors = lambda x, p: torch.full_like(x, 1.25)  # so that both draw the same
    try:
        for half in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                model(input_ids=ids, shift_labels=ids, num_items_in_batch=180).loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    finally:
        ours.keep_factors = before
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_cached_token_sees_all_before_it_in_training_mode_too() -> None:
    config = DecoderConfig.llama(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=1e-12, initializer_range=0.2,
    )  # fmt: skip
    model, ids = DecoderForCausalLM(config).train(), torch.randint(50, (2, 9))
    model.enable_fast_paths()
    whole = model(input_ids=ids, use_cache=False).logits
    first = model(input_ids=ids[:, :8], use_cache=True)
    last = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(last[:, 0], whole[:, 8], rtol=1e-4, atol=1e-4)


def test_where_a_layer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(
        "llm.model.fast_attention.causal_attention",
        lambda query, *_: taken.append(1) or query.transpose(1, 2),
    )
    inputs = {"carry": None, "angles": None, "attention_mask": None, "past_key_values": None, "implementation": "sdpa"}

    def takes(dropout: float, dtype: torch.dtype, train: bool = True, off: str = "", **others: torch.Tensor) -> bool:
        taken.clear()
        attention = Attention(16, 2, 2, 8, dropout=dropout).to(dtype).train(train)
        enable_fast_paths(attention, (name for name in FAST_PATHS if name != off))
        attention(torch.randn(2, 5, 16, dtype=dtype), **inputs | others)
        return bool(taken)

    assert takes(0.1, torch.float32) and takes(0.1, torch.bfloat16) and takes(0.0, torch.bfloat16)
    assert takes(0.1, torch.bfloat16, train=False)
    assert not takes(0.0, torch.float32) and not takes(0.1, torch.float32, train=False)
    packed = torch.zeros(2, 1, 5, 5)
    assert not takes(0.1, torch.float32, attention_mask=packed)
    assert not takes(0.0, torch.bfloat16, attention_mask=packed.bfloat16())
    for off in ("attention", "dropout"):
        assert not takes(0.1, torch.float32, off=off) and takes(0.0, torch.bfloat16, off=off) == (off == "dropout")
