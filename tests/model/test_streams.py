"""Residual streams against a model written out with matrix products, and the pair's common start."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model import DecoderForCausalLM

from .switches import EVERY, STYLES, SWITCHES, make_config, make_model, tokens


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

    def turn(x: Tensor) -> Tensor:  # (heads, T, K): pairs (i, i + K/2) as complex numbers
        angles = torch.outer(
            torch.arange(time), c.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        )
        z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], -1)

    def act(x: Tensor) -> Tensor:
        if c.hidden_act == "nmda":
            i = model.model.layers[0].feedforward.act
            alpha, beta = (i.alpha, i.beta.item()) if c.nmda_learnable else (c.nmda_alpha, c.nmda_beta)
            return x / (1 + alpha * torch.exp(-beta * x))
        return F.silu(x) if c.hidden_act == "silu" else F.gelu(x, approximate="tanh")

    hidden = w["model.embed_tokens.weight"][ids]
    if c.position == "learned":
        hidden = hidden + w["model.embed_positions.weight"][:time]
    raw: dict[str, list[Tensor]] = {"queries": [], "keys": [], "values": []}
    for n in range(c.num_hidden_layers):
        layer = f"model.layers.{n}."
        x = norm(hidden, layer + "attention_norm")
        now = {}
        for name, letter, count in (("queries", "q", heads), ("keys", "k", groups), ("values", "v", groups)):
            own = linear(x, f"{layer}attention.{letter}_proj").view(time, count, width).transpose(0, 1)
            earlier = {"previous": raw[name][-1:], "accumulated": raw[name], "first": raw[name][:1]}[c.stream_source]
            weight = w.get(f"{layer}attention.stream.{name}_weight", torch.ones(()))
            share = 1 / deeper if c.stream_source == "accumulated" else 1.0
            now[name] = own + share * weight * sum(earlier) if name in c.stream and n else own
            raw[name].append(own)
        if c.position == "rope":
            now["queries"], now["keys"] = turn(now["queries"]), turn(now["keys"])
        out = []
        for h in range(heads):
            g = h // (heads // groups)
            scores = now["queries"][h] @ now["keys"][g].T * base_scale
            scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ now["values"][g])
        hidden = hidden + linear(torch.cat(out, -1), layer + "attention.o_proj") / deeper
        x = norm(hidden, layer + "feedforward_norm")
        up = linear(x, layer + "feedforward.up_proj")
        inside = act(linear(x, layer + "feedforward.gate_proj")) * up if c.feedforward == "gated" else act(up)
        hidden = hidden + linear(inside, layer + "feedforward.down_proj") / deeper
    head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    return (norm(hidden, "model.norm") / wider @ w[head].T)[:, : c.unpadded_vocab_size]


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
    off = {"stream": [], "stream_source": "accumulated", "stream_weight": "head", "nmda_alpha": 7.0}
    results = []
    for settings in ({}, off):
        model = make_model(style, **settings)
        loss = model(ids := tokens(2, 20), labels=ids).loss
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
