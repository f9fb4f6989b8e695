"""The pre-norm block, and how a config becomes one.

Dimension letters: B batch, T time, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .activations import activation, settings_of
from .attention import Attention
from .config import DecoderConfig
from .feedforward import FEEDFORWARDS, FeedForward
from .norms import norm
from .parametrization import scales
from .residual import HyperConnection, connection
from .streams import AttentionStream, lacks_projections, receives
from .value_embeddings import ValueGate, gated_layers


class Block(GradientCheckpointingLayer):
    """x + s attention(norm(x)), then x + s feedforward(norm(x)), s being `residual_scale`; composed from ready parts.

    With hyper-connections, x has N copies, (B, T, N, D), and "+" is theirs (`residual.py`).

    The base class recomputes the block in the backward pass when activation checkpointing is on.
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: Attention,
        feedforward_norm: nn.Module,
        feedforward: FeedForward,
        dropout: float = 0.0,
        residual_scale: float = 1.0,
        takes_token_values: bool = False,
        connections: tuple[HyperConnection | None, HyperConnection | None] = (None, None),
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.feedforward_norm, self.feedforward = feedforward_norm, feedforward
        self.dropout = nn.Dropout(dropout)
        self.residual_scale, self.takes_token_values = residual_scale, takes_token_values
        self.attention_connection, self.feedforward_connection = connections

    def forward(self, hidden: Tensor, *carry: Tensor, **attention_inputs: Any) -> tuple[Tensor | None, ...]:
        """Map hidden (B, T, D) and the carry to both for the next block.

        The carry begins with the token values (B, G, T, K) where the model has them, the same for every block; the rest
        is the stream's. It is flat and positional, since reentrant checkpointing finds no tensor inside a tuple or a
        keyword and would lose its gradient.

        Returns:
            Hidden states, attention weights (None unless the attention shows them), and the carry's tensors.
        """
        shared, carry = (carry[:1], carry[1:]) if self.takes_token_values else ((), carry)
        read, hidden, add = _read(self.attention_connection, hidden)
        attended, weights, onward = self.attention(
            self.attention_norm(read), carry or None, token_values=shared[0] if shared else None, **attention_inputs
        )
        hidden = self._write(hidden, self.dropout(attended), add)
        read, hidden, add = _read(self.feedforward_connection, hidden)
        changed = self.feedforward(self.feedforward_norm(read))
        hidden = self._write(hidden, self.dropout(changed), add)
        return hidden, weights, *shared, *(onward or ())

    def _write(self, hidden: Tensor, changed: Tensor, add: Tensor | None) -> Tensor:
        if add is None:
            return torch.add(hidden, changed, alpha=self.residual_scale)
        return torch.addcmul(hidden, add, changed.unsqueeze(-2), value=self.residual_scale)


def _read(connection: HyperConnection | None, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a layer reads (B, T, D), what it adds to, and with which factors; see `HyperConnection`."""
    return (hidden, hidden, None) if connection is None else connection(hidden)


def build_block(config: DecoderConfig, index: int) -> Block:
    """Layer `index` from the config's parts; the one place that turns switches into modules."""
    c, scale = config, scales(config)
    heads = {"queries": c.num_attention_heads, "keys": c.num_key_value_heads, "values": c.num_key_value_heads}
    stream = (
        AttentionStream(
            tuple(c.stream),
            c.stream_source,
            c.stream_weight,
            heads,
            index,
            c.hidden_size,
            own=c.stream_own,
            arriving=c.stream_arriving,
            receives=receives(c, index),
            accumulated_scale=1 / scale.depth,
        )
        if c.stream
        else None
    )
    attention = Attention(
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        index,
        bias=c.attention_bias,
        softmax_scale=c.softmax_scale if scale.head == 1 else _base_softmax_scale(c) / scale.head,
        dropout=c.attention_dropout,
        stream=stream,
        qk_norms=(norm("rmsnorm", c.head_dim, c.norm_eps), norm("rmsnorm", c.head_dim, c.norm_eps))
        if c.qk_norm
        else None,
        value_gate=ValueGate(c.value_embedding_gate)
        if c.value_embedding == "values" and index in gated_layers(c)
        else None,
        without=lacks_projections(c, index),
    )
    act = activation(c.hidden_act, **settings_of(c.hidden_act, c))
    return Block(
        norm(c.norm, c.hidden_size, c.norm_eps),
        attention,
        norm(c.norm, c.hidden_size, c.norm_eps),
        FEEDFORWARDS[c.feedforward](c.hidden_size, c.intermediate_size, act, bias=c.mlp_bias),
        c.residual_dropout,
        1 / scale.depth,
        c.value_embedding == "values",
        (connection(c, 2 * index), connection(c, 2 * index + 1)),
    )


def _base_softmax_scale(config: DecoderConfig) -> float:
    """Factor of the attention scores at the base size."""
    return config.softmax_scale or config.base_head_dim**-0.5
