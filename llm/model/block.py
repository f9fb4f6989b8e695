"""The pre-norm block.

Dimension letters: B batch, T time, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention
from .feedforward import FeedForward


class Block(GradientCheckpointingLayer):
    """x + s attention(norm(x)), then x + s feedforward(norm(x)), s being `residual_scale`; composed from ready parts.

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
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.feedforward_norm, self.feedforward = feedforward_norm, feedforward
        self.dropout = nn.Dropout(dropout)
        self.residual_scale = residual_scale

    def forward(self, hidden: Tensor, *carry: Tensor, **attention_inputs: Any) -> tuple[Tensor | None, ...]:
        """Map hidden (B, T, D) and the stream's carry to both for the next block.

        The carry is flat and positional, since reentrant checkpointing finds no tensor inside a tuple or a keyword and
        would lose its gradient.

        Returns:
            Hidden states, attention weights (None unless the attention shows them), and the carry's tensors.
        """
        attended, weights, onward = self.attention(self.attention_norm(hidden), carry or None, **attention_inputs)
        hidden = torch.add(hidden, self.dropout(attended), alpha=self.residual_scale)
        changed = self.feedforward(self.feedforward_norm(hidden))
        hidden = torch.add(hidden, self.dropout(changed), alpha=self.residual_scale)
        return hidden, weights, *(onward or ())
