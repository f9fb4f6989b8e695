"""Small models with every switch, for the tests of this folder."""

from typing import Any

import torch

from llm.model import DecoderConfig, DecoderForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that every part shows in the logits
}
STYLES: dict[str, Any] = {"llama": DecoderConfig.llama, "gpt2": DecoderConfig.gpt2}
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1, "stream": ["values"]},
    "wide_heads": {"head_dim": 20},
    "nmda": {"hidden_act": "nmda", "nmda_alpha": 10.0},
    "nmda_learnable": {"hidden_act": "nmda", "nmda_alpha": 0.5, "nmda_beta": 1.3, "nmda_learnable": True},
    "softmax_scale": {"softmax_scale": 1.0},
    "padded_vocabulary": {"unpadded_vocab_size": 50},
    "queries": {"stream": ["queries"]},
    "keys": {"stream": ["keys"]},
    "values": {"stream": ["values"]},
    "values_gqa": {"stream": ["values"], "num_key_value_heads": 2},
    "all_accumulated": {"stream": ["queries", "keys", "values"], "stream_source": "accumulated"},
    "all_first": {"stream": ["values", "queries", "keys"], "stream_source": "first", "num_key_value_heads": 2},
    "values_per_layer": {"stream": ["values"], "stream_weight": "layer"},
    "all_per_head": {
        "stream": ["queries", "keys", "values"],
        "stream_weight": "head",
        "stream_source": "accumulated",
        "num_key_value_heads": 2,
    },
    "resformer": {
        "stream": ["values"],
        "stream_source": "first",
        "stream_weight": "mix",
        "stream_own": 0.5,
        "stream_arriving": 0.5,
    },
    "svformer": {"stream": ["values"], "stream_source": "first", "stream_own": 0.0, "num_key_value_heads": 2},
    "from_zero": {"stream": ["values", "keys"], "stream_weight": "head", "stream_arriving": 0.0},
    "some_layers": {"stream": ["queries", "values"], "stream_source": "accumulated", "stream_layers": [2]},
    "own_factors": {"stream": ["keys"], "stream_source": "accumulated", "stream_own": 0.5, "stream_arriving": 0.25},
    "dense": {"stream": ["values", "queries"], "stream_source": "dense", "stream_weight": "layer"},
    "dense_by_token": {
        "stream": ["queries", "keys", "values"],
        "stream_source": "dense_by_token",
        "stream_weight": "head",
        "num_key_value_heads": 2,
    },
    "dense_mix": {
        "stream": ["values"],
        "stream_source": "dense_by_token",
        "stream_weight": "mix",
        "stream_layers": [2],
    },
    "value_embedding": {"value_embedding": "values", "num_key_value_heads": 2},
    "value_embedding_stream": {
        "value_embedding": "values",
        "value_embedding_layers": [0, 2],
        "value_embedding_gate": 0.5,
        "stream": ["values"],
        "stream_source": "first",
        "stream_own": 0.0,
    },
    "value_embedding_input": {"value_embedding": "input", "num_key_value_heads": 2, "head_dim": 28},
    "dense_residual": {"residual": "dense"},
    "hyper": {"residual": "hyper", "stream": ["values"], "value_embedding": "values"},
    "hyper_two": {"residual": "hyper", "residual_expansion": 2, "qk_norm": True},
    "hyper_manifold": {"residual": "hyper-manifold", "residual_expansion": 3},
    "soft_cap": {"final_logit_softcapping": 3.0, "unpadded_vocab_size": 50},
    "qk_norm": {"qk_norm": True, "stream": ["queries", "keys"], "num_key_value_heads": 2},
    "relu2": {"hidden_act": "relu2"},
    "swish": {"hidden_act": "swish", "swish_learned": "both", "swish_beta": 0.7, "swish_bias": 0.2},
    "xielu": {"hidden_act": "xielu"},
    "polynorm": {"hidden_act": "polynorm"},
    "completep": {
        "parametrization": "completep",
        "base_hidden_size": 24,
        "base_num_hidden_layers": 2,
        "base_head_dim": 4,
        "stream": ["queries", "values"],
        "stream_source": "accumulated",
    },
    "completep_learned": {
        "parametrization": "completep",
        "base_hidden_size": 32,
        "base_num_hidden_layers": 1,
        "base_head_dim": 12,
        "softmax_scale": 0.5,
        "stream": ["values"],
        "stream_source": "accumulated",
        "stream_weight": "head",
        "tie_word_embeddings": True,
    },
}
AWAY = ("stream", "depth_averages", "connection")  # names of parameters that all start alike
EVERY = [(style, switch) for style in STYLES for switch in SWITCHES]


def make_config(style: str, switch: str = "plain", **settings: Any) -> DecoderConfig:
    return STYLES[style](**(SIZES | SWITCHES[switch] | settings))


def make_model(style: str, switch: str = "plain", **settings: Any) -> DecoderForCausalLM:
    model = DecoderForCausalLM(make_config(style, switch, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # learned weights away from where they start
            if any(part in name for part in AWAY) or name.endswith(("bias", "gate")):
                size = 0.1 if "connection" in name else 0.3  # six of those in a row, each of them on all that is there
                parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def tokens(batch: int, time: int, seed: int = 0, high: int = 50) -> torch.Tensor:
    return torch.randint(high, (batch, time), generator=torch.Generator().manual_seed(seed))
