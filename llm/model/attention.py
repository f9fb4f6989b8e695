"""Multi-head and grouped-query attention, with residual streams and a key-value cache.

Dimension letters: B batch, T time (queries), S keys (cached and new), D width, H query heads, G key-value heads,
K width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .positions import rotate
from .streams import STREAMS, AttentionStream, Carry
from .value_embeddings import ValueGate


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that shows its weights: (B, H, T, K), (B, G, S, K) twice -> (B, T, H, K) and (B, H, T, S).

    `attention_mask` is added to the scores, (B or 1, 1, T, S), 0 or a very negative number; softmax in float32, and in
    float64 where that is the queries' format.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # repeating by one would copy
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)  # (B, H, S, K)
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Causal self-attention; every size is a plain argument.

    Args:
        hidden_size, num_heads, num_key_value_heads, head_dim: D, H, G, K.
        layer_index: this layer's place in the key-value cache.
        bias: biases in the query, key, value and output projections.
        softmax_scale: factor of the scores; None is K^-0.5.
        dropout: of the attention weights.
        stream: the layer's residual stream, or None. Queries and keys are summed before RoPE turns them.
        qk_norms: of each head's queries and keys, after the stream and before RoPE (Henry et al. 2020; their form with
            learned scales is Qwen3's and OLMo 2's).
        value_gate: adds token values to this layer's, after the stream, so that it carries projections alone.
        without: which of queries, keys and values come from the stream alone, and have no projection here.
    """

    is_causal = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        layer_index: int = 0,
        *,
        bias: bool = False,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        stream: AttentionStream | None = None,
        qk_norms: tuple[nn.Module, nn.Module] | None = None,
        value_gate: ValueGate | None = None,
        without: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.head_dim, self.layer_idx = head_dim, layer_index
        self.num_key_value_groups = num_heads // num_key_value_heads  # transformers' attention functions read it
        self.scaling = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = dropout
        widths = dict.fromkeys(STREAMS, num_key_value_heads * head_dim) | {"queries": num_heads * head_dim}
        self.q_proj, self.k_proj, self.v_proj = (
            None if name in without else nn.Linear(hidden_size, width, bias=bias) for name, width in widths.items()
        )
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.stream, self.value_gate = stream, value_gate
        self.q_norm, self.k_norm = qk_norms or (None, None)

    def forward(
        self,
        hidden: Tensor,
        carry: Carry,
        angles: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        implementation: str,
        token_values: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Carry]:
        """hidden (B, T, D), token values (B, G, T, K) -> (B, T, D), attention weights (B, H, T, S) where shown, and the
        stream's carry."""
        query, key, value = (
            None if project is None else project(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H or G, T, K)
        if self.stream is not None:
            mixed, carry = self.stream({"queries": query, "keys": key, "values": value}, carry, hidden)
            query, key, value = mixed["queries"], mixed["keys"], mixed["values"]
        if self.value_gate is not None and token_values is not None:
            value = self.value_gate(value, token_values)
        if self.q_norm is not None and self.k_norm is not None:  # under autocast its weights are wider than its input
            query, key = self.q_norm(query).to(query.dtype), self.k_norm(key).to(key.dtype)
        if angles is not None:
            query, key = self.rotate(query, angles), self.rotate(key, angles)
        if past_key_values is not None:  # after the stream: the carry must hold the current tokens only
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, G, S, K)
        cached = past_key_values is not None
        out, weights = self.attend(query, key, value, attention_mask, implementation, cached, **kwargs)  # (B, T, H, K)
        return self.o_proj(out.flatten(-2)), weights, carry

    rotate = staticmethod(rotate)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        implementation: str,
        cached: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, T, K), (B, G, S, K) twice -> (B, T, H, K), and the weights (B, H, T, S) where shown.

        `cached`: keys and values come from a cache.
        """
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
