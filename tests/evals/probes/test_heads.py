"""Head scores: heads that are known exactly, and real models against slow loops over their attention."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from evals.probes import heads
from llm.common import plots
from llm.common.errors import UserError
from llm.model.config import DecoderConfig
from llm.model.decoder import DecoderForCausalLM

VOCABULARY = 40


class Known(nn.Module):
    """Layer 0: previous token, induction. Layer 1: all tokens so far alike, the token itself. Its loss is known."""

    device = torch.device("cpu")

    def __init__(self, context: int | None = None, chance: tuple[float, float] = (0.1, 0.9), attention: str = "eager"):
        super().__init__()
        self.config = SimpleNamespace(
            num_hidden_layers=2, num_attention_heads=2, _attn_implementation=attention, max_position_embeddings=context
        )
        self.chance = chance

    def forward(self, input_ids, output_attentions, use_cache):
        assert output_attentions and not self.training
        length = input_ids.shape[1]
        own = torch.eye(length)
        previous = torch.diag(torch.ones(length - 1), -1)
        previous[0, 0] = 1
        alike = torch.tril(torch.ones(length, length)) / torch.arange(1, length + 1)[:, None]
        layers = [[], []]
        for row in input_ids.tolist():
            induction = torch.zeros(length, length)
            for t, token in enumerate(row):
                earlier = [p for p in range(t) if row[p] == token]
                induction[t, earlier[-1] + 1 if earlier else t] = 1
            layers[0].append(torch.stack([previous, induction]))
            layers[1].append(torch.stack([alike, own]))
        return SimpleNamespace(attentions=tuple(map(torch.stack, layers)), logits=self.logits(input_ids))

    def logits(self, input_ids):
        """The next token has the chance of its copy; the first token of a copy next to none."""
        odd = input_ids.shape[1] % 2
        copy = input_ids.shape[1] // 2
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for b, row in enumerate(input_ids.tolist()):
            for t, following in enumerate(row[1:]):
                place = t + 1 - odd
                p = 1e-9 if place in (0, copy) else self.chance[place > copy]
                logits[b, t] = np.log((1 - p) / (VOCABULARY - 1))
                logits[b, t, following] = np.log(p)
        return logits


@pytest.mark.parametrize("first_token", [None, 0, 39])
def test_scores_of_known_heads_are_exact(first_token):
    length, sequences = 12, 3
    scores = heads.head_scores(Known(), VOCABULARY, sequences, length, first_token=first_token)
    start = first_token is not None
    total = 2 * length + start
    alike_prefix = np.mean([1 / (t + 1) for t in range(total - length, total)])
    alike_previous = np.mean([1 / (t + 1) for t in range(1, total)])
    assert scores.prefix_matching[0] == [0.0, 1.0] and scores.prefix_matching[1][1] == 0.0
    assert scores.prefix_matching[1][0] == pytest.approx(alike_prefix, rel=1e-6)
    # An induction head stands on the last token of the first copy and looks nowhere back; no previous-token attention.
    assert scores.previous_token[0] == [1.0, 0.0] and scores.previous_token[1][1] == 0.0
    assert scores.previous_token[1][0] == pytest.approx(alike_previous, rel=1e-6)
    assert scores.loss_first == pytest.approx(-np.log(0.1), rel=1e-5)
    assert scores.loss_second == pytest.approx(-np.log(0.9), rel=1e-5)
    assert scores.length == length


def make(family: str, seed: int = 0, context: int = 64, dropout: float = 0.0):
    """A random model whose attention is far from even."""
    torch.manual_seed(seed)
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": context, "initializer_range": 1.0}
        config = GPT2Config(vocab_size=VOCABULARY, attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, **sizes)
        model = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 32, "max_position_embeddings": context, "initializer_range": 1.0}
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
        else:
            model = DecoderForCausalLM(
                DecoderConfig(vocab_size=64, unpadded_vocab_size=VOCABULARY, stream=["values"], **sizes)
            )
    model.set_attn_implementation("eager")
    return model.eval()


def shown(model, *arguments, **options):
    """Scores, and the ids that the model was shown."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    scores = heads.head_scores(model, *arguments, **options)
    hook.remove()
    return scores, seen


@pytest.mark.parametrize("family", ["gpt2", "llama", "ours"])
@pytest.mark.parametrize("first_token", [None, 3])
def test_scores_of_real_models_equal_slow_loops(family, first_token):
    model = make(family)
    scores, seen = shown(model, VOCABULARY, 4, 9, first_token=first_token)
    rows = torch.cat(seen).tolist()
    prefix, previous, first, second = [], [], [], []
    for row in rows:
        start = 0 if first_token is None else 1
        assert row[:start] == [3][:start] and row[start : start + 9] == row[start + 9 :]
        assert len(set(row)) == 9 + start and max(row) < VOCABULARY
        with torch.no_grad():
            out = model(torch.tensor([row]), output_attentions=True)
        for target, pairs in (
            (prefix, [(t, row.index(row[t]) + 1) for t in range(len(row)) if row.index(row[t]) < t]),
            (previous, [(t, t - 1) for t in range(1, len(row))]),
        ):
            target.append(
                [[np.mean([head[t, s].item() for t, s in pairs]) for head in layer[0]] for layer in out.attentions]
            )
        nats = [-out.logits[0, t - 1].double().log_softmax(-1)[row[t]].item() for t in range(1, len(row))]
        first.append(np.mean([nats[t - 1] for t in range(start + 1, start + 9)]))
        second.append(np.mean([nats[t - 1] for t in range(start + 10, start + 18)]))
    assert len({tuple(row) for row in rows}) == 4
    np.testing.assert_allclose(scores.prefix_matching, np.mean(prefix, axis=0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(scores.previous_token, np.mean(previous, axis=0), rtol=1e-5, atol=1e-9)
    assert np.ptp(scores.prefix_matching) > 0.02  # the heads do differ
    assert scores.loss_first == pytest.approx(np.mean(first), rel=1e-5)
    assert scores.loss_second == pytest.approx(np.mean(second), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    vocabulary=st.integers(4, VOCABULARY),
    sequences=st.integers(1, 5),
    length=st.integers(3, 60),
    seed=st.integers(0, 2**40),
    first_token=st.none() | st.integers(0, VOCABULARY - 1),
    context=st.integers(7, 70),
)
def test_scores_are_shares_and_the_length_fits(vocabulary, sequences, length, seed, first_token, context):
    model = make("gpt2", context=context)
    scores, seen = shown(model, vocabulary, sequences, length, seed, first_token)
    ids = torch.cat(seen)
    spare = vocabulary - (first_token is not None and first_token < vocabulary)
    assert scores.length == min(length, spare, (context - 1) // 2)
    trained = heads.head_scores(model, vocabulary, 1, length, seed, first_token, context=max(7, context - 20))
    assert trained.length == min(length, spare, (max(7, context - 20) - 1) // 2)  # of more positions
    assert ids.shape == (sequences, 2 * scores.length + (first_token is not None))
    assert ids[:, -scores.length :].max() < vocabulary
    for values in (scores.prefix_matching, scores.previous_token):
        assert np.shape(values) == (2, 4) and np.min(values) >= 0 and np.max(values) <= 1


def test_ids_are_drawn_alike_and_depend_on_the_seed_alone():
    model = Known()
    draw = [torch.cat(shown(model, 10, 200, 5, seed=seed)[1]) for seed in (0, 0, 1)]
    assert draw[0].equal(draw[1]) and not draw[0].equal(draw[2])
    counts = np.bincount(draw[0][:, :5].flatten().numpy(), minlength=10)
    assert counts.min() > 60 and counts.max() < 140  # 100 expected of 200 x 5 draws; 4 standard deviations are 28


def test_batches_change_nothing_but_the_rows_at_once(monkeypatch):
    model = make("llama")
    whole, seen = shown(model, VOCABULARY, 5, 9)
    assert [len(rows) for rows in seen] == [5]
    per_row = 2 * 4 * 18**2 + 2 * 18 * VOCABULARY  # attention of 2 layers of 4 heads, two arrays of logits
    monkeypatch.setattr(heads, "BUDGET", 3 * per_row - 1)
    parts, seen = shown(model, VOCABULARY, 5, 9)
    assert [len(rows) for rows in seen] == [2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    monkeypatch.setattr(heads, "BUDGET", 1)
    assert [len(rows) for rows in shown(model, VOCABULARY, 5, 9)[1]] == [1] * 5


def test_dropout_training_modes_and_random_state_are_left_alone():
    model = make("gpt2", dropout=0.5)
    still = heads.head_scores(model, VOCABULARY, 3, 9)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert heads.head_scores(model, VOCABULARY, 3, 9) == still
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_training_modes_come_back_after_an_error():
    model = make("gpt2").train()
    with pytest.raises(IndexError):
        heads.head_scores(model, VOCABULARY + 1000, 3, 9)
    assert all(module.training for module in model.modules())


def test_a_half_precision_model_is_summed_in_wide_numbers():
    model = make("llama").bfloat16()
    scores, seen = shown(model, VOCABULARY, 3, 9)
    (ids,) = seen
    with torch.no_grad():
        out = model(ids, output_attentions=True)  # the same batch: its rounding is the same
    attention = torch.stack(out.attentions).double()  # (L, B, H, T, T)
    expected = torch.stack([attention[..., t, t - 8] for t in range(9, 18)]).mean(dim=(0, 2))
    np.testing.assert_allclose(scores.prefix_matching, expected, rtol=1e-9)
    nats = -out.logits[:, 9:-1].double().log_softmax(-1).gather(-1, ids[:, 10:, None])
    assert out.logits.dtype == torch.bfloat16 and scores.loss_second == pytest.approx(nats.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Known(attention="sdpa"), {}, "attn_implementation='eager'"),
        (Known(context=6), {}, "a context of 7"),
        (Known(), {"length": 2}, "3 tokens"),
        (Known(), {"vocabulary": 3, "first_token": 0}, "as many ids"),
        (Known(), {"sequences": 0}, "give at least one"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(model, options, words):
    with pytest.raises(UserError, match=words) as error:
        heads.head_scores(model, **({"vocabulary": VOCABULARY} | options))
    assert "\n" not in str(error.value)
    heads.head_scores(Known(context=7), VOCABULARY)


def test_a_model_without_attention_weights_is_refused(monkeypatch):
    blind = SimpleNamespace(attentions=(None, None), logits=torch.zeros(16, 100, VOCABULARY))
    monkeypatch.setattr(Known, "forward", lambda self, **_: blind)
    with pytest.raises(UserError, match="eager"):
        heads.head_scores(Known(), VOCABULARY, length=VOCABULARY)
    model = make("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="eager"):
        heads.head_scores(model, VOCABULARY)


# ---- Figures ---------------------------------------------------------------------------------------------------------


def random_scores(layers: int, count: int, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).beta(0.4, 4, (layers, count)).tolist()


@pytest.mark.parametrize("shape", [(16, 32), (4, 4), (12, 12), (24, 16), (2, 16), (2, 1), (1, 1)])
@pytest.mark.parametrize("models", [1, 2, 3])
def test_heat_maps_share_one_scale_and_frame_the_strongest_head(shape, models):
    scores = {f"run-{i}-of-a-rather-long-name-for-a-panel": random_scores(*shape, i) for i in range(models)}
    figure = heads.draw_heads(scores, "prefix matching")
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == models == len(figure.axes) - 1  # and the colour bar
    top = max(np.max(values) for values in scores.values())
    for axes, (name, values) in zip(panels, scores.items(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), values)
        assert axes.images[0].get_clim() == (0, top)
        layer, head = np.unravel_index(np.argmax(values), shape)
        (frame,) = axes.patches
        assert frame.get_center() == pytest.approx((head, layer))
        assert f"layer {layer}, head {head}: {np.max(values):.2g}" in axes.get_title()
        assert axes.get_title().replace("\n", "").startswith(name)
        for ticks, count in ((axes.get_xticks(), shape[1]), (axes.get_yticks(), shape[0])):
            assert 1 <= len(ticks) <= 8 and all(tick in range(count) for tick in ticks)
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in panels]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert figure.get_size_inches()[0] <= 4.6


def test_the_scale_of_a_heat_map_goes_to_the_least_that_is_asked_for():
    noise = heads.draw_heads({"a": [[0.01, 0.02]], "b": [[0.015, 0.0]]}, "t", least=0.1)
    assert [axes.images[0].get_clim() for axes in noise.axes if axes.images] == [(0, 0.1)] * 2
    strong = heads.draw_heads({"a": [[0.01, 0.6]]}, "t", least=0.1)
    assert strong.axes[0].images[0].get_clim() == (0, 0.6)


@pytest.mark.parametrize("length", [3, 50])
def test_chance_is_the_score_of_attention_to_all_tokens_alike(length):
    """Against a matrix of uniform causal attention."""
    tokens = 2 * length
    attention = np.tril(np.ones((tokens, tokens))) / np.arange(1, tokens + 1)[:, None]
    found = heads.chance_levels(length)
    second = np.arange(length, tokens)
    assert found["prefix_matching"] == pytest.approx(attention[second, second - length + 1].mean())
    later = np.arange(1, tokens)
    assert found["previous_token"] == pytest.approx(attention[later, later - 1].mean())


def test_heat_maps_of_zeros_and_of_models_of_different_size_are_drawn():
    zeros = heads.draw_heads({"a": [[0.0, 0.0]], "b": random_scores(3, 5)}, "t")
    assert plots.as_png(zeros).startswith(b"\x89PNG")
    flat = heads.draw_heads({"a": [[0.0, 0.0]]}, "t")
    svg = plots.as_svg(flat, "heads")
    assert "nan" not in svg and "head 0: 0<" in svg
    assert flat.axes[0].images[0].get_clim() == (0, 1)
