"""The decoder with every switch, written out for one row of ids from the papers' equations; no shared code but the
weights.

Dimension letters: T time, D width, N copies of the residual stream.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model import DecoderConfig, DecoderForCausalLM

Weights = dict[str, Tensor]
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


def reference_norm(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def reference_linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[name + ".weight"].T + w.get(name + ".bias", torch.zeros(()))


def reference_read(c: DecoderConfig, w: Weights, name: str, copies: list[Tensor]) -> tuple[Tensor, list[Tensor], list]:
    """What a layer reads (T, D) of the copies (T, D) each, the mixed copies, and the factors of what they are given."""
    if "hyper" not in c.residual:
        return copies[0], copies, [1.0]
    n, static, scale = c.residual_expansion, w[f"{name}.static"], w[f"{name}.scale"]
    if c.residual == "hyper":  # Zhu et al. 2024, Equations 8 to 11
        rows = []
        for copy, first in zip(copies, static.view(n, n + 2), strict=True):
            small = torch.tanh(reference_norm(copy, 1e-6) @ w[f"{name}.weight"].T)
            rows.append(first + torch.cat([scale[0] * small[:, :-1], scale[1] * small[:, -1:]], 1))
        read = sum(row[:, :1] * copy for row, copy in zip(rows, copies, strict=True))
        mixed = [sum(row[:, 1 + m : 2 + m] * x for row, x in zip(rows, copies, strict=True)) for m in range(n)]
        return read, mixed, [row[:, -1:] for row in rows]
    small = reference_norm(torch.cat(copies, 1), 1e-6) @ w[f"{name}.weight"].T  # Xie et al. 2025, Equations 7 and 8
    parts = zip(scale, small.split([n, n * n, n], 1), static.split([n, n * n, n]), strict=True)
    q, r, p = (factor * part + first for factor, part, first in parts)
    mix = r.view(-1, n, n).exp()
    for _ in range(20):
        mix = mix / mix.sum(1, keepdim=True)
        mix = mix / mix.sum(2, keepdim=True)
    read = sum(q[:, k : k + 1].sigmoid() * copies[k] for k in range(n))
    mixed = [sum(mix[:, m, k, None] * copies[k] for k in range(n)) for m in range(n)]
    return read, mixed, [2 * p[:, m : m + 1].sigmoid() for m in range(n)]


def reference_attention(
    model: DecoderForCausalLM, layer: str, x: Tensor, raw: dict[str, list[Tensor]], token_values: Tensor | None
) -> Tensor:
    """Attention's output of one layer for its normed input (T, D); `raw` gathers the projections of all layers."""
    c, w, n = model.config, dict(model.named_parameters()), int(layer.split(".")[2])
    time, heads, groups, width = len(x), c.num_attention_heads, c.num_key_value_heads, c.head_dim
    deeper, scale = 1.0, c.softmax_scale or width**-0.5
    if c.parametrization == "completep":
        deeper = c.num_hidden_layers / c.base_num_hidden_layers
        scale = (c.softmax_scale or c.base_head_dim**-0.5) * c.base_head_dim / width
    now = {}
    for name, letter, count in (("queries", "q", heads), ("keys", "k", groups), ("values", "v", groups)):
        if f"{layer}attention.{letter}_proj.weight" in w:
            own = reference_linear(x, w, f"{layer}attention.{letter}_proj").view(time, count, width).transpose(0, 1)
        else:
            own = torch.zeros(count, time, width)
        receives = raw[name] and name in c.stream and n in (c.stream_layers or range(1, 99))
        now[name] = (
            reference_mix(f"{layer}attention.stream.{name}", model, x, own, raw[name], deeper) if receives else own
        )
        raw[name].append(own)
    if (gate := w.get(f"{layer}attention.value_gate.gate")) is not None:
        now["values"] = now["values"] + gate * token_values.view(time, groups, width).transpose(0, 1)
    for name, letter in (("queries", "q"), ("keys", "k")) if c.qk_norm else ():
        now[name] = reference_norm(now[name], c.norm_eps) * w[f"{layer}attention.{letter}_norm.weight"]
    if c.position == "rope":
        now |= {name: reference_rope(now[name], c.rope_parameters["rope_theta"]) for name in ("queries", "keys")}
    out = []
    for h in range(heads):
        g = h // (heads // groups)
        scores = now["queries"][h] @ now["keys"][g].T * scale
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ now["values"][g])
    return reference_linear(torch.cat(out, -1), w, layer + "attention.o_proj") / deeper


def reference_feedforward(model: DecoderForCausalLM, layer: str, x: Tensor) -> Tensor:
    c, w = model.config, dict(model.named_parameters())
    deeper = c.num_hidden_layers / c.base_num_hidden_layers if c.parametrization == "completep" else 1.0
    up = reference_linear(x, w, layer + "feedforward.up_proj")
    gated = c.feedforward == "gated"
    inside = reference_act(reference_linear(x, w, layer + "feedforward.gate_proj") if gated else up, layer, model, w)
    return reference_linear(inside * up if gated else inside, w, layer + "feedforward.down_proj") / deeper


def reference_embedding(model: DecoderForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What enters the first layer (T, D), and the token values (T, G K)."""
    c, w = model.config, dict(model.named_parameters())
    hidden = w["model.embed_tokens.weight"][ids]
    token_values = w["model.embed_values.weight"][ids] if c.value_embedding != "none" else None
    if c.value_embedding == "input":
        gates = w["model.input_gates.gate"]
        for start in range(0, token_values.shape[1], c.hidden_size):
            part = token_values[:, start : start + c.hidden_size] * gates.sum() / len(gates)
            hidden = torch.cat([hidden[:, : part.shape[1]] + part, hidden[:, part.shape[1] :]], 1)
    if c.position == "learned":
        hidden = hidden + w["model.embed_positions.weight"][: len(ids)]
    return hidden, token_values


def reference_logits(model: DecoderForCausalLM, ids: Tensor) -> Tensor:
    """The decoder for one row of ids, Section 3.2 of Burns et al. 2025 written out."""
    c, w = model.config, dict(model.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        if c.norm == "layernorm":
            return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], c.norm_eps)
        return reference_norm(x, c.norm_eps) * w[name + ".weight"]

    hidden, token_values = reference_embedding(model, ids)
    outputs = [hidden]
    copies = [hidden] * (c.residual_expansion if "hyper" in c.residual else 1)
    raw: dict[str, list[Tensor]] = {"queries": [], "keys": [], "values": []}
    for n in range(c.num_hidden_layers):
        layer = f"model.layers.{n}."
        kinds: dict[str, Callable[[Tensor], Tensor]] = {
            "attention": lambda x, layer=layer: reference_attention(model, layer, x, raw, token_values),
            "feedforward": lambda x, layer=layer: reference_feedforward(model, layer, x),
        }
        for kind, function in kinds.items():
            read, copies, factors = reference_read(c, w, f"{layer}{kind}_connection", copies)
            changed = function(norm(read, f"{layer}{kind}_norm"))
            copies = [copy + factor * changed for copy, factor in zip(copies, factors, strict=True)]
        if c.residual == "dense":
            outputs.append(copies[0])
            weights = w[f"model.depth_averages.{n}.weight"].flatten()
            copies = [sum(a * output for a, output in zip(weights, outputs, strict=True))]
    wider = c.hidden_size / c.base_hidden_size if c.parametrization == "completep" else 1.0
    head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    logits = (norm(sum(copies) / len(copies), "model.norm") / wider @ w[head].T)[:, : c.unpadded_vocab_size]
    cap = c.final_logit_softcapping
    return cap * torch.tanh(logits / cap) if cap else logits
