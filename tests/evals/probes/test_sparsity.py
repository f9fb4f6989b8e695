"""The Gini index against the double sum of Eq. S13, and the FFN's activity tapped at another place of each model."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from evals.probes import sparsity
from llm.common import plots
from llm.common.errors import UserError
from llm.model.activations import ACTIVATIONS, nmda
from llm.model.config import DecoderConfig
from llm.model.decoder import DecoderForCausalLM

VOCABULARY = 30


def double_sum(x: np.ndarray) -> float:
    """Eq. S13, term by term."""
    count = len(x)
    return sum(abs(float(a) - float(b)) for a in x for b in x) / (2 * count**2 * (math.fsum(x) / count))


# ---- The index -------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-6)


@given(arrays(np.float64, st.integers(1, 12), elements=numbers))
def test_index_equals_the_double_sum_of_the_magnitudes(x):
    found = sparsity.gini(torch.tensor(x)).item()
    assert found == pytest.approx(double_sum(np.abs(x)) if x.any() else 0.0, abs=1e-9)
    assert 0 <= found <= 1 - 1 / len(x) + 1e-12
    assert sparsity.gini(torch.tensor(-3 * x)).item() == pytest.approx(found, abs=1e-9)


@given(arrays(np.float64, st.integers(1, 12), elements=numbers).filter(lambda x: abs(x.mean()) > 1e-3))
def test_signed_index_is_the_paper_s(x):
    assert sparsity.gini(torch.tensor(x), signed=True).item() == pytest.approx(double_sum(x), rel=1e-6, abs=1e-9)


def test_signed_index_has_no_bound():
    x = torch.tensor([-1.0, 3.0, -1.5])
    assert sparsity.gini(x, signed=True) > 1 > sparsity.gini(x)
    assert sparsity.gini(torch.tensor([-1.0, 1.0]), signed=True) == math.inf
    assert sparsity.gini(-x.abs(), signed=True) == -sparsity.gini(x)


@pytest.mark.parametrize("count", [1, 2, 7, 2048])
def test_index_of_known_activities_is_exact(count):
    one = torch.zeros(count)
    one[count // 2] = -0.37
    assert sparsity.gini(one) == pytest.approx(1 - 1 / count, abs=1e-7)
    for value in (0.0, 0.1, -123.456):
        assert sparsity.gini(torch.full((count,), value)) == 0
        assert sparsity.gini(torch.full((count,), value), signed=True) == 0
    # Of the numbers 1 to K it is (K^2 - 1) / (3 K) over K + 1, half of the mean difference over the mean.
    assert sparsity.gini(torch.arange(1.0, count + 1)) == pytest.approx((count - 1) / (3 * count), abs=1e-6)


def test_index_is_of_the_last_dimension_and_wide():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50)
    found = sparsity.gini(x)
    assert found.shape == (2, 3) and found.dtype == torch.float32
    np.testing.assert_allclose(found, [[double_sum(row.abs().numpy()) for row in rows] for rows in x], rtol=1e-5)
    for kind in (torch.bfloat16, torch.float16):
        half = sparsity.gini(x.to(kind))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, sparsity.gini(x.to(kind).float()))
    assert sparsity.gini(x.double()).dtype == torch.float64


def test_index_rises_with_alpha_as_in_figure_s13a():
    """On normal inputs it does from 0.1 on; before, it falls by 0.02 from that of the identity."""
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_alpha = {alpha: sparsity.gini(nmda(x, alpha)).mean().item() for alpha in (0.0, 0.1, 0.5, 1.0, 5.0, 10.0)}
    assert by_alpha[0.0] == pytest.approx(math.sqrt(2) - 1, abs=0.01)  # of |normal| numbers
    rising = [by_alpha[alpha] for alpha in (0.1, 0.5, 1.0, 5.0, 10.0)]
    assert (np.diff(rising) > 0.03).all()
    gelu = ACTIVATIONS["gelu"](x)
    assert by_alpha[1.0] < sparsity.gini(gelu).mean() < by_alpha[10.0]  # the dashed line of the figure
    assert sparsity.gini(gelu, signed=True).mean() > 1  # why magnitudes are the default


# ---- Models ----------------------------------------------------------------------------------------------------------


def make(family: str, seed: int = 0, dropout: float = 0.0):
    torch.manual_seed(seed)
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
        rates = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **rates)).eval()
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 32}
    sizes |= {"vocab_size": VOCABULARY, "initializer_range": 0.5, "intermediate_size": 40}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if family == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval()
    if family == "ours plain":
        return DecoderForCausalLM(DecoderConfig.gpt2(**sizes, hidden_act="nmda", nmda_alpha=5.0)).eval()
    return DecoderForCausalLM(DecoderConfig.llama(**sizes, hidden_act="nmda", stream=["values"])).eval()


def activity(model, family: str, ids) -> list[torch.Tensor]:
    """The activity of each layer, from the outputs of the modules that make it: not from what reads it."""
    made: dict[str, list] = {"act": [], "up": []}
    ends = {"gpt2": (".mlp.act", "-"), "neox": (".mlp.act", "-"), "ours plain": ("feedforward.act", "-")}
    act, up = ends.get(family, (("mlp.act_fn", "feedforward.act"), "up_proj"))
    hooks = []
    for name, module in model.named_modules():
        for kind, end in (("act", act), ("up", up)):
            if name.endswith(end):
                hooks.append(module.register_forward_hook(lambda _, __, out, kind=kind: made[kind].append(out)))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return [a * u for a, u in zip(made["act"], made["up"], strict=True)] if made["up"] else made["act"]


def hooks_of(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "ours plain", "ours gated"])
def test_ffn_index_is_the_mean_over_tokens_of_each_layer(family, monkeypatch):
    model = make(family)
    batches = [torch.randint(VOCABULARY, shape) for shape in ((2, 9), (1, 3))]  # a token counts the same in either
    per_layer = [[], [], []]
    for ids in batches:
        for layer, values in enumerate(activity(model, family, ids)):
            per_layer[layer] += [double_sum(token.abs().numpy()) for token in values.flatten(0, 1)]
    expected = [np.mean(values) for values in per_layer]
    found = sparsity.ffn_gini(model, iter(batches))
    assert all(isinstance(value, float) for value in found)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(set(found)) == 3 and hooks_of(model) == 0
    monkeypatch.setattr(sparsity, "CHUNK", 100)  # two tokens at once
    np.testing.assert_allclose(sparsity.ffn_gini(model, batches), expected, rtol=1e-5)


def test_signed_ffn_index_is_the_paper_s():
    model = make("gpt2")
    ids = torch.randint(VOCABULARY, (2, 9))
    expected = [np.mean([double_sum(t.numpy()) for t in x.flatten(0, 1)]) for x in activity(model, "gpt2", ids)]
    np.testing.assert_allclose(sparsity.ffn_gini(model, [ids], signed=True), expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_model_in_our_decoder_is_as_sparse(family):
    model = make(family)
    batches = [torch.randint(VOCABULARY, (2, 9))]
    ours = sparsity.ffn_gini(DecoderForCausalLM.from_hf(model), batches)
    np.testing.assert_allclose(ours, sparsity.ffn_gini(model, batches), rtol=1e-5)


def test_a_half_precision_model_has_its_index_in_float32():
    model = make("llama").bfloat16()
    ids = torch.randint(VOCABULARY, (2, 9))
    expected = [
        np.mean([double_sum(token.abs().float().numpy()) for token in values.flatten(0, 1)])
        for values in activity(model, "llama", ids)
    ]
    np.testing.assert_allclose(sparsity.ffn_gini(model, [ids]), expected, rtol=1e-5)


def test_dropout_training_modes_and_random_state_are_left_alone():
    model = make("gpt2", dropout=0.5)
    batches = [torch.randint(VOCABULARY, (2, 9))]
    still = sparsity.ffn_gini(model, batches)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert sparsity.ffn_gini(model, batches) == still
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_hooks_go_and_modes_come_back_after_an_error():
    model = make("llama").train()

    def failing():
        yield torch.randint(VOCABULARY, (1, 4))
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk"):
        sparsity.ffn_gini(model, failing())
    assert hooks_of(model) == 0 and all(module.training for module in model.modules())


def test_what_cannot_be_measured_is_refused_in_a_sentence():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    other = OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=16, **sizes))
    with pytest.raises(UserError, match=r"0 feed-forward projections .* 2 layers"):
        sparsity.ffn_gini(other, [torch.zeros(1, 4, dtype=torch.long)])
    with pytest.raises(UserError, match="at least one batch"):
        sparsity.ffn_gini(make("llama"), [])


# ---- Figure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "models"), [(1, 1), (2, 2), (12, 6), (40, 3)])
def test_the_figure_has_a_line_a_model(layers, models):
    values = {f"run {i}": (np.arange(layers) / 50 + i / 100).tolist() for i in range(models)}
    figure = sparsity.draw_gini(values)
    assert plots.as_png(figure).startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == models
    assert [line.get_color() for line in axes.lines[:2]] == list(plots.COLOURS[:models])
    for line, (name, heights) in zip(axes.lines, values.items(), strict=True):
        assert line.get_label() == name and list(line.get_ydata()) == heights
        assert list(line.get_xdata()) == list(range(layers))
    assert 1 <= len(axes.get_xticks()) <= 8 and all(tick in range(layers) for tick in axes.get_xticks())
