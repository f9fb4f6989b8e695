"""How many numbers a decoder trains, part by part, from its config alone.

Dimension letters: D width, F width inside the FFN, H query heads, G key-value heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

from ..model import DecoderConfig
from ..model.activations import PARAMETRIC, settings_of
from ..model.residual import CONNECTIONS
from ..model.streams import DENSE, lacks_projections, receives
from ..model.value_embeddings import gated_layers


def stream_widths(config: DecoderConfig) -> list[int]:
    """H K or G K of each residual stream."""
    c = config
    heads = {"queries": c.num_attention_heads, "keys": c.num_key_value_heads, "values": c.num_key_value_heads}
    return [heads[name] * c.head_dim for name in c.stream]


def ffn_matrices(config: DecoderConfig) -> list[int]:
    """Numbers in each matrix of one FFN."""
    return [config.hidden_size * config.intermediate_size] * (3 if config.feedforward == "gated" else 2)


def block_matrices(config: DecoderConfig, index: int = 0) -> list[int]:
    """Numbers in each matrix of block `index`: q, k, v, o and the FFN's, those that weigh streams by token, and
    hyper-connections'."""
    c = config
    queries, keys = (
        c.hidden_size * c.num_attention_heads * c.head_dim,
        c.hidden_size * c.num_key_value_heads * c.head_dim,
    )
    projections = {"queries": queries, "keys": keys, "values": keys}
    for name in lacks_projections(c, index):
        del projections[name]
    by_token = [index * c.hidden_size * heads for heads in _weight_heads(c, index)]
    by_token = by_token if c.stream_source == "dense_by_token" else []
    return [*projections.values(), queries, *ffn_matrices(c), *by_token, *connection_matrices(c)]


def connection_matrices(config: DecoderConfig) -> list[int]:
    """Numbers in the matrix of each hyper-connection of a block."""
    rows, columns = _connection(config)[1]
    return [rows * columns] * 2 if rows else []


def _connection(config: DecoderConfig) -> tuple[int, tuple[int, int], int]:
    """Shapes of a hyper-connection's parameters; zeros where there is none."""
    kind = CONNECTIONS.get(config.residual)
    return (0, (0, 0), 0) if kind is None else kind.sizes(config.residual_expansion, config.hidden_size)


def _weight_heads(config: DecoderConfig, index: int) -> list[int]:
    """How many heads have a weight of their own, for each stream that block `index` adds with a learned weight."""
    c = config
    if c.stream_weight == "fixed" or not receives(c, index):
        return []
    return [width // c.head_dim if c.stream_weight == "head" else 1 for width in stream_widths(c)]


def block_vectors(config: DecoderConfig, index: int) -> list[int]:
    """Numbers in each other parameter of block `index`: norms, biases, stream weights, a learned activation's."""
    c = config
    sizes = 2 * norm_vectors(c) + ([c.head_dim] * 2 if c.qk_norm else [])
    if c.attention_bias:
        queries, keys = c.head_dim * c.num_attention_heads, c.head_dim * c.num_key_value_heads
        biases = {"queries": queries, "keys": keys, "values": keys}
        sizes += [size for name, size in biases.items() if name not in lacks_projections(c, index)] + [c.hidden_size]
    if c.mlp_bias:
        sizes += [c.intermediate_size] * (len(ffn_matrices(c)) - 1) + [c.hidden_size]
    weights = _weight_heads(c, index)
    sizes += [heads * (index if c.stream_source in DENSE else 1) for heads in weights]
    sizes += [1] * len(weights) if c.stream_weight == "mix" else []
    sizes += [1] if c.value_embedding == "values" and index in gated_layers(c) else []
    static, _, scales = _connection(c)
    sizes += [static, scales] * 2 if static else []
    sizes += [index + 2] if c.residual == "dense" else []  # of the average that follows it
    if c.hidden_act in PARAMETRIC:
        sizes += PARAMETRIC[c.hidden_act].learned_sizes(**settings_of(c.hidden_act, c))
    return sizes


def norm_vectors(config: DecoderConfig) -> list[int]:
    return [config.hidden_size] * (2 if config.norm == "layernorm" else 1)


def block_parameters(config: DecoderConfig, index: int) -> int:
    """Numbers trained in block `index`."""
    return sum(block_matrices(config, index)) + sum(block_vectors(config, index))


def table(config: DecoderConfig) -> int:
    """Numbers in the embedding, and in the head: V D."""
    return config.vocab_size * config.hidden_size


def head_matrix(config: DecoderConfig) -> int:
    """Numbers of the head that are multiplied with: rows that only pad the vocabulary are not."""
    return config.unpadded_vocab_size * config.hidden_size


def head_parameters(config: DecoderConfig) -> int:
    """Numbers after the last block: its norm, and the head where it has a matrix of its own."""
    return sum(norm_vectors(config)) + (0 if config.tie_word_embeddings else table(config))


def embedding_parameters(config: DecoderConfig) -> int:
    """Numbers before the first block: the embedding, learned positions and value embeddings."""
    return table(config) + sum(_further_tables(config))


def _further_tables(config: DecoderConfig) -> list[int]:
    """Numbers in each parameter before the first block besides the embedding."""
    c = config
    sizes = [c.max_position_embeddings * c.hidden_size] if c.position == "learned" else []
    if c.value_embedding != "none":
        sizes.append(c.vocab_size * c.num_key_value_heads * c.head_dim)
    return sizes + ([len(gated_layers(c))] if c.value_embedding == "input" else [])


def parameters(config: DecoderConfig) -> int:
    """All of them."""
    blocks = sum(block_parameters(config, index) for index in range(config.num_hidden_layers))
    return embedding_parameters(config) + blocks + head_parameters(config)


def small_parameters(config: DecoderConfig, limit: int) -> int:
    """Numbers in parameters of at most `limit` numbers."""
    c = config
    sizes = norm_vectors(c) + [table(c)] * (1 if c.tie_word_embeddings else 2)
    sizes += _further_tables(c)
    for index in range(c.num_hidden_layers):
        sizes += block_matrices(c, index) + block_vectors(c, index)
    return sum(size for size in sizes if size <= limit)
