"""To and from transformers' LlamaForCausalLM and GPT2LMHeadModel, where no switch is on that those lack; from Mistral,
Qwen2 and Qwen3 too, which are Llamas with other biases and norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from .config import DecoderConfig
from .parametrization import Scales, scales

if TYPE_CHECKING:
    from torch import nn

# Names inside the model: ours -> theirs. `{i}` is the layer; names apply to `.weight` and `.bias` alike.
LLAMA_NAMES = {
    "model.embed_tokens": "model.embed_tokens",
    "model.layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "model.layers.{i}.attention.q_proj": "model.layers.{i}.self_attn.q_proj",
    "model.layers.{i}.attention.k_proj": "model.layers.{i}.self_attn.k_proj",
    "model.layers.{i}.attention.v_proj": "model.layers.{i}.self_attn.v_proj",
    "model.layers.{i}.attention.o_proj": "model.layers.{i}.self_attn.o_proj",
    "model.layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "model.layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "model.layers.{i}.feedforward_norm": "model.layers.{i}.post_attention_layernorm",
    "model.layers.{i}.feedforward.gate_proj": "model.layers.{i}.mlp.gate_proj",
    "model.layers.{i}.feedforward.up_proj": "model.layers.{i}.mlp.up_proj",
    "model.layers.{i}.feedforward.down_proj": "model.layers.{i}.mlp.down_proj",
    "model.norm": "model.norm",
    "lm_head": "lm_head",
}
GPT2_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
    "model.layers.{i}.attention.o_proj": "transformer.h.{i}.attn.c_proj",
    "model.layers.{i}.feedforward_norm": "transformer.h.{i}.ln_2",
    "model.layers.{i}.feedforward.up_proj": "transformer.h.{i}.mlp.c_fc",
    "model.layers.{i}.feedforward.down_proj": "transformer.h.{i}.mlp.c_proj",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
# GPT-2 keeps query, key and value in one matrix, and every projection (Conv1D) transposed. c_proj is square in the
# attention: a transpose forgotten there changes no shape.
GPT2_FUSED = {"transformer.h.{i}.attn.c_attn": [f"model.layers.{{i}}.attention.{p}_proj" for p in "qkv"]}
GPT2_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# Activation names: theirs -> ours.
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "identity",
}
TO_HF_ACTIVATION = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}


def config_from_hf(hf: PretrainedConfig) -> DecoderConfig:
    """The DecoderConfig of a Llama, Mistral, Qwen2, Qwen3 or GPT-2.

    Raises:
        ValueError: another config class, or a setting that this decoder does not have.
    """
    if hf.model_type in LIKE_LLAMA:
        if set(getattr(hf, "layer_types", None) or ()) - {"full_attention"} or getattr(hf, "sliding_window", None):
            raise ValueError(f"this {hf.model_type} attends in a sliding window: not supported")
        parts = {"head_dim": None, "mlp_bias": False, "attention_bias": hf.model_type == "qwen2"}
        fields = {name: getattr(hf, name, parts.get(name)) for name in LLAMA_FIELDS}
        act = _activation_from_hf(hf.hidden_act)
        norms = {"norm_eps": hf.rms_norm_eps, "qk_norm": hf.model_type == "qwen3"}
        return DecoderConfig.llama(**fields, **norms, hidden_act=act)
    if not isinstance(hf, GPT2Config):
        raise ValueError(f"{type(hf).__name__} cannot be converted: give a Llama, Mistral, Qwen2, Qwen3 or GPT-2")
    if not hf.scale_attn_weights or hf.scale_attn_by_inverse_layer_idx or hf.add_cross_attention:
        raise ValueError("this GPT-2 scales its attention by layer, not at all, or has cross-attention: not supported")
    return DecoderConfig.gpt2(
        **_same_fields(hf, GPT2_FIELDS),
        intermediate_size=hf.n_inner or 4 * hf.n_embd,
        max_position_embeddings=hf.n_positions,
        norm_eps=hf.layer_norm_epsilon,
        hidden_act=_activation_from_hf(hf.activation_function),
        attention_dropout=hf.attn_pdrop,
        residual_dropout=hf.resid_pdrop,
        embedding_dropout=hf.embd_pdrop,
    )


LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
LLAMA_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_parameters attention_bias mlp_bias attention_dropout tie_word_embeddings "
    "initializer_range pad_token_id bos_token_id eos_token_id"
).split()
GPT2_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads tie_word_embeddings initializer_range "
    "pad_token_id bos_token_id eos_token_id"
).split()


def _same_fields(config: PretrainedConfig, names: list[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _activation_from_hf(name: str) -> str:
    if name not in HF_ACTIVATIONS:
        raise ValueError(f"activation {name!r} has no counterpart here: {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[name]


def model_to_hf(config: DecoderConfig) -> PreTrainedModel:
    """An untrained LlamaForCausalLM or GPT2LMHeadModel of the same sizes and parts.

    Raises:
        ValueError: parts or switches that neither has, all named.
    """
    c = config
    on = [name for name in ("softmax_scale", "final_logit_softcapping", "stream", "qk_norm") if getattr(c, name)]
    for name, off in (("value_embedding", "none"), ("residual", "plain")):
        if getattr(c, name) != off:
            on.append(f"{name}={getattr(c, name)}")
    if c.hidden_act not in TO_HF_ACTIVATION:
        on.append(f"hidden_act={c.hidden_act}")
    if c.unpadded_vocab_size != c.vocab_size:
        on.append("unpadded_vocab_size")
    if scales(c) != Scales():
        on.append(f"parametrization={c.parametrization}")
    if on:
        raise ValueError(f"transformers has no model with {', '.join(on)}: only plain models can be converted")
    parts = (c.norm, c.position, c.feedforward)
    if parts == ("rmsnorm", "rope", "gated") and c.residual_dropout == c.embedding_dropout == 0:
        act = TO_HF_ACTIVATION[c.hidden_act]
        return LlamaForCausalLM(
            LlamaConfig(**_same_fields(c, LLAMA_FIELDS), rms_norm_eps=c.norm_eps, hidden_act=act, use_cache=c.use_cache)
        )
    plain_heads = c.num_key_value_heads == c.num_attention_heads and c.head_dim * c.num_attention_heads == c.hidden_size
    if parts == ("layernorm", "learned", "plain") and c.attention_bias and c.mlp_bias and plain_heads:
        return GPT2LMHeadModel(
            GPT2Config(
                **_same_fields(c, GPT2_FIELDS),
                n_positions=c.max_position_embeddings,
                n_inner=c.intermediate_size,
                layer_norm_epsilon=c.norm_eps,
                activation_function=TO_HF_ACTIVATION[c.hidden_act],
                attn_pdrop=c.attention_dropout,
                resid_pdrop=c.residual_dropout,
                embd_pdrop=c.embedding_dropout,
                use_cache=c.use_cache,
            )
        )
    raise ValueError(f"the parts {parts} with these heads, biases and dropouts are neither Llama's nor GPT-2's")


def weights_from_hf(hf_model: PreTrainedModel) -> dict[str, Tensor]:
    """A state dict of ours with the weights of a LlamaForCausalLM or GPT2LMHeadModel (copies)."""
    theirs = hf_model.state_dict()
    return {ours: _read(theirs, name, part, transposed) for ours, name, part, transposed in _table(hf_model)}


def weights_to_hf(model: nn.Module, hf_model: PreTrainedModel) -> dict[str, Tensor]:
    """A state dict for `hf_model` with our weights (copies)."""
    ours = model.state_dict()
    parts: dict[str, dict[int, Tensor]] = {}
    for our_name, their_name, part, transposed in _table(hf_model):
        tensor = ours[our_name].t() if transposed else ours[our_name]
        parts.setdefault(their_name, {})[part] = tensor
    return {name: torch.cat([found[k] for k in sorted(found)], dim=-1).clone() for name, found in parts.items()}


def _read(theirs: dict[str, Tensor], name: str, part: int, transposed: bool) -> Tensor:
    tensor = theirs[name]
    if "c_attn" in name:
        tensor = tensor.chunk(3, dim=-1)[part]
    return (tensor.t() if transposed else tensor).clone()


def _table(hf_model: PreTrainedModel) -> list[tuple[str, str, int, bool]]:
    """(our name, their name, which part of a fused tensor, transposed) for each tensor of `hf_model`."""
    llama = hf_model.config.model_type in LIKE_LLAMA
    names = LLAMA_NAMES if llama else GPT2_NAMES
    pairs = [(ours, theirs, 0) for ours, theirs in names.items()]
    if not llama:
        pairs += [(ours, theirs, part) for theirs, all_ours in GPT2_FUSED.items() for part, ours in enumerate(all_ours)]
    existing, rows = hf_model.state_dict(), []
    for ours, theirs, part in pairs:
        layers = range(hf_model.config.num_hidden_layers) if "{i}" in ours else range(1)
        for i in layers:
            for kind in ("weight", "bias"):
                name = f"{theirs.format(i=i)}.{kind}"
                if name in existing:
                    transposed = not llama and name.endswith(GPT2_TRANSPOSED)
                    rows.append((f"{ours.format(i=i)}.{kind}", name, part, transposed))
    return rows
