"""Sizes that follow from others, and settings of a decoder that contradict each other.

Imports no torch: the options of `fit` are checked by these functions before it is imported.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from .parametrization import parametrization_problems


def fill_sizes(config: Any) -> None:
    """Set the sizes that are None to what `DecoderConfig` says of them."""
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    if config.head_dim is None and config.num_attention_heads > 0:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if config.intermediate_size is None:
        wanted = 4 * config.hidden_size if config.feedforward == "plain" else 8 * config.hidden_size // 3
        config.intermediate_size = -(-wanted // 64) * 64
    if config.unpadded_vocab_size is None:
        config.unpadded_vocab_size = config.vocab_size


def contradictions(config: Any, dense: Container[str], hyper: Container[str]) -> list[str]:
    """One sentence for each setting that contradicts another.

    Args:
        config: whose sizes are at least 1, those that follow from others set.
        dense: names of the stream sources that learn their weights (`DENSE` in `streams.py`).
        hyper: names of the residual forms with several copies (`CONNECTIONS` in `residual.py`).
    """
    return [
        *_of_sizes(config),
        *(_of_streams(config, dense) if config.stream else []),
        *_of_value_embeddings(config),
        *_of_residual(config, hyper),
        *parametrization_problems(config),
    ]


def _of_sizes(config: Any) -> list[str]:
    heads, groups, problems = config.num_attention_heads, config.num_key_value_heads, list[str]()
    if config.hidden_size % heads and config.head_dim * heads == config.hidden_size // heads * heads:
        problems.append(
            f"num_attention_heads {heads} does not divide hidden_size {config.hidden_size}: change one of them or "
            "give head_dim"
        )
    if heads % groups:
        problems.append(f"num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    if config.position == "rope" and config.head_dim % 2:
        problems.append(f"head_dim {config.head_dim} is odd: rope turns pairs, give an even head_dim")
    if config.unpadded_vocab_size > config.vocab_size:
        problems.append(
            f"unpadded_vocab_size {config.unpadded_vocab_size} is larger than vocab_size {config.vocab_size}: "
            "vocab_size counts the padding too"
        )
    return problems


def _of_streams(config: Any, dense: Container[str]) -> list[str]:
    source, weight, layers = config.stream_source, config.stream_weight, config.stream_layers
    own, depth, problems = config.stream_own, config.num_hidden_layers, list[str]()
    if source in dense and weight == "fixed":
        problems.append(f"stream_source {source} learns its weights: give stream_weight layer, head or mix")
    if own == 0 and weight != "mix" and source != "first":
        problems.append(
            f"stream_own 0 leaves no projection for stream_source {source}: give first, or stream_weight mix"
        )
    if layers is not None and not all(0 < index < depth for index in layers):
        problems.append(f"stream_layers {list(layers)} must be layers from 1 to {depth - 1}: layer 0 receives nothing")
    return problems


def _of_value_embeddings(config: Any) -> list[str]:
    layers, depth = config.value_embedding_layers, config.num_hidden_layers
    if config.value_embedding == "none" or layers is None:
        return []
    if not layers or len(set(layers)) < len(layers) or not all(0 <= index < depth for index in layers):
        return [
            f"value_embedding_layers {list(layers)} must be different layers from 0 to {depth - 1}, or unset for all"
        ]
    return []


def _of_residual(config: Any, hyper: Container[str]) -> list[str]:
    if config.residual in hyper and config.residual_expansion < 2:
        return [f"residual_expansion {config.residual_expansion} must be at least 2 with residual {config.residual}"]
    return []
