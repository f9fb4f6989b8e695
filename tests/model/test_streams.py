"""Residual streams against a model written out with matrix products, and the pair's common start."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model import DecoderForCausalLM

from .switches import EVERY, STYLES, SWITCHES, make_config, make_model, tokens

ACT_PARAMETERS = ("beta", "bias", "positive", "negative", "weight")


def reference_act(x: Tensor, layer: str, model: DecoderForCausalLM, w: dict[str, Tensor]) -> Tensor:
    c = model.config
    if c.hidden_act == "nmda":
        i = model.model.layers[0].feedforward.act
        alpha, beta = (i.alpha, i.beta.item()) if c.nmda_learnable else (c.nmda_alpha, c.nmda_beta)
        return x / (1 + alpha * torch.exp(-beta * x))
    learned = {name: w.get(f"{layer}feedforward.act.{name}") for name in ACT_PARAMETERS}
    if c.hidden_act == "swish":
        return x * torch.sigmoid(learned["beta"] * x + learned["bias"])
    if c.hidden_act == "xielu":
        left, right = 0.5 + F.softplus(learned["negative"]), F.softplus(learned["positive"])
        return torch.where(x > 0, right * x**2, left * (torch.exp(x) - 1 - x)) + x / 2
    if c.hidden_act == "polynorm":
        powers = [x**n * (x ** (2 * n)).mean(-1, keepdim=True).add(1e-6).rsqrt() for n in (1, 2, 3)]
        return sum(w * power for w, power in zip(learned["weight"], powers, strict=True)) + learned["bias"]
    acts = {"silu": F.silu, "relu2": lambda x: F.relu(x) ** 2}
    return acts.get(c.hidden_act, lambda x: F.gelu(x, approximate="tanh"))(x)


def reference_mix(
    here: str, model: DecoderForCausalLM, x: Tensor, own: Tensor, raw: list[Tensor], deeper: float
) -> Tensor:
    """What a layer attends with: its own projection and those of the earlier layers, (heads, T, K) each."""
    c, w = model.config, dict(model.named_parameters())
    kept = {"previous": slice(-1, None), "first": slice(1)}.get(c.stream_source, slice(None))
    weights = w.get(f"{here}_weight", torch.tensor(c.stream_arriving))
    if "dense" not in c.stream_source:
        weights = weights.expand(len(raw), *weights.shape)
    if f"{here}_by_token" in w:  # rows are (earlier layer, head)
        weights = weights + torch.stack([x @ row for row in w[f"{here}_by_token"]]).view(len(raw), -1, len(x), 1)
    share = 1 / deeper if c.stream_source == "accumulated" else 1.0
    arriving = [a * r for a, r in zip(weights, raw, strict=True)][kept]
    return w.get(f"{here}_own", c.stream_own) * own + share * sum(arriving)


def reference_rope(x: Tensor, theta: float) -> Tensor:
    """RoPE of (heads, T, K): pairs (i, i + K/2) as complex numbers."""
    _, time, width = x.shape
    angles = torch.outer(torch.arange(time), theta ** -(torch.arange(0, width, 2) / width))
    z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def reference_logits(model: DecoderForCausalLM, ids: Tensor) -> Tensor:
    """The decoder for one row of ids, Section 3.2 of the paper written out; no shared code but the weights."""
    c, w = model.config, dict(model.named_parameters())
    time, heads, groups, width = len(ids), c.num_attention_heads, c.num_key_value_heads, c.head_dim
    wider = deeper = 1.0  # than the base, Table 1 of Dey et al. 2025
    base_scale = c.softmax_scale or width**-0.5
    if c.parametrization == "completep":
        wider, deeper = c.hidden_size / c.base_hidden_size, c.num_hidden_layers / c.base_num_hidden_layers
        base_scale = (c.softmax_scale or c.base_head_dim**-0.5) * c.base_head_dim / width

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[name + ".weight"].T + w.get(name + ".bias", torch.zeros(()))

    def norm(x: Tensor, name: str) -> Tensor:
        if c.norm == "layernorm":
            return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], c.norm_eps)
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name + ".weight"]

    hidden = w["model.embed_tokens.weight"][ids]
    token_values = w["model.embed_values.weight"][ids] if c.value_embedding != "none" else None
    if c.value_embedding == "input":
        for gate in w["model.input_gates.gate"]:
            for start in range(0, groups * width, c.hidden_size):
                part = token_values[:, start : start + c.hidden_size] * gate / len(w["model.input_gates.gate"])
                hidden = torch.cat([hidden[:, : part.shape[1]] + part, hidden[:, part.shape[1] :]], 1)
    if c.position == "learned":
        hidden = hidden + w["model.embed_positions.weight"][:time]
    raw: dict[str, list[Tensor]] = {"queries": [], "keys": [], "values": []}
    for n in range(c.num_hidden_layers):
        layer = f"model.layers.{n}."
        x = norm(hidden, layer + "attention_norm")
        now = {}
        for name, letter, count in (("queries", "q", heads), ("keys", "k", groups), ("values", "v", groups)):
            if f"{layer}attention.{letter}_proj.weight" in w:
                own = linear(x, f"{layer}attention.{letter}_proj").view(time, count, width).transpose(0, 1)
            else:
                own = torch.zeros(count, time, width)
            receives = name in c.stream and n in (c.stream_layers or range(1, 99))
            now[name] = (
                reference_mix(f"{layer}attention.stream.{name}", model, x, own, raw[name], deeper) if receives else own
            )
            raw[name].append(own)
        if (gate := w.get(f"{layer}attention.value_gate.gate")) is not None:
            now["values"] = now["values"] + gate * token_values.view(time, groups, width).transpose(0, 1)
        for name, letter in (("queries", "q"), ("keys", "k")) if c.qk_norm else ():
            size = now[name].square().mean(-1, keepdim=True) + c.norm_eps
            now[name] = now[name] / size.sqrt() * w[f"{layer}attention.{letter}_norm.weight"]
        if c.position == "rope":
            now["queries"], now["keys"] = (
                reference_rope(now[name], c.rope_parameters["rope_theta"]) for name in ("queries", "keys")
            )
        out = []
        for h in range(heads):
            g = h // (heads // groups)
            scores = now["queries"][h] @ now["keys"][g].T * base_scale
            scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ now["values"][g])
        hidden = hidden + linear(torch.cat(out, -1), layer + "attention.o_proj") / deeper
        x = norm(hidden, layer + "feedforward_norm")
        up = linear(x, layer + "feedforward.up_proj")
        gate = linear(x, layer + "feedforward.gate_proj") if c.feedforward == "gated" else up
        inside = reference_act(gate, layer, model, w)
        inside = inside * up if c.feedforward == "gated" else inside
        hidden = hidden + linear(inside, layer + "feedforward.down_proj") / deeper
    head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    logits = (norm(hidden, "model.norm") / wider @ w[head].T)[:, : c.unpadded_vocab_size]
    cap = c.final_logit_softcapping
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize(("style", "switch"), EVERY)
def test_logits_and_gradients_equal_the_written_out_model(style: str, switch: str) -> None:
    model = make_model(style, switch)
    ids = tokens(1, 17)
    ours, theirs = model(ids).logits[0, :, : model.config.unpadded_vocab_size], reference_logits(model, ids[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    if model.config.nmda_learnable:
        return  # the reference reads alpha as a number
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for name, a, b in zip(
        names,
        torch.autograd.grad((ours * weights).sum(), parameters),
        torch.autograd.grad((theirs * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1.0, b.abs().max().item()), msg=name)


@pytest.mark.parametrize("style", STYLES)
def test_streams_change_the_model(style: str) -> None:
    ids = tokens(1, 12)
    logits = {switch: make_model(style, switch)(ids).logits for switch in ("plain", "queries", "keys", "values")}
    plain = logits.pop("plain")
    assert all((other - plain).abs().max() > 1e-3 for other in logits.values())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("switch", [switch for switch in SWITCHES if switch != "plain"])
def test_a_pair_starts_equal_in_all_it_shares(style: str, switch: str) -> None:
    alike = {key: value for key, value in SWITCHES[switch].items() if key.startswith(("param", "base_", "tie_"))}
    a, b = (
        dict(DecoderForCausalLM(make_config(style, name, initializer_seed=3, **alike)).named_parameters())
        for name in ("plain", switch)
    )
    shared = [name for name in a if name in b and a[name].shape == b[name].shape]
    assert all("_proj" in name for name in a.keys() - set(shared))  # other head counts reshape the projections
    assert len(shared) > len(a) // 2
    assert all(torch.equal(a[name], b[name]) for name in shared)
    other = dict(DecoderForCausalLM(make_config(style, switch, initializer_seed=4)).named_parameters())
    matrices = [name for name in shared if a[name].ndim == 2]
    assert not any(torch.equal(b[name], other[name]) for name in matrices)


@pytest.mark.parametrize("style", STYLES)
def test_a_switch_that_is_off_changes_nothing(style: str) -> None:
    """Loss and gradients bitwise those of the plain model, whatever the settings of a switch that is off."""
    off = {"stream": [], "stream_source": "accumulated", "stream_weight": "head", "stream_own": 0.0, "nmda_alpha": 7.0}
    off |= {"stream_arriving": 3.0, "swish_beta": 2.0, "xielu_positive": 1.0}
    off |= {"value_embedding_layers": [1], "value_embedding_gate": 0.0}
    results = []
    for settings in ({}, off):
        model = make_model(style, **settings)
        loss = model(ids := tokens(2, 20), labels=ids).loss
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
