"""Vision Transformer (Dosovitskiy et al. 2021) of the language models' blocks.

    images -> patches -> [class token | patches] + positions -> blocks -> norm -> the class token's logits

The block with its attention, streams, feed-forward network, activations and norms is that of `llm.model`; every token
sees every other.

Dimension letters: B images, S side of an image, P side of a patch, N patches, T = 1 + N tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.attention import Attention
from llm.model.block import Block
from llm.model.feedforward import FeedForward
from llm.model.norms import norm

from ..variants import Variant
from .settings import VisionSizes

EPS = 1e-6  # of the norms (Dosovitskiy et al.'s code)


class TwoWayAttention(Attention):
    """The shared attention without a causal mask."""

    is_causal = False


class VisionTransformer(nn.Module):
    """The classifier."""

    def __init__(self, sizes: VisionSizes, variant: Variant) -> None:
        super().__init__()
        self.sizes = sizes
        self.patches = nn.Linear(3 * sizes.patch_side**2, sizes.width)  # a convolution whose stride is its width
        self.class_token = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.positions = nn.Parameter(torch.empty(1, sizes.tokens, sizes.width))
        self.blocks = nn.ModuleList(_block(sizes, variant, layer) for layer in range(sizes.layers))
        self.norm = norm("layernorm", sizes.width, EPS)
        self.read_out = nn.Linear(sizes.width, sizes.classes)
        for name, weight in self.named_parameters():
            if name in ("class_token", "positions") or weight.ndim == 2:
                nn.init.trunc_normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S), normalised -> logits (B, classes)."""
        tokens = self.patches(into_patches(images, self.sizes.patch_side))  # (B, N, D)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1).to(tokens.dtype), tokens], dim=1)
        hidden = F.dropout(tokens + self.positions, self.sizes.dropout, self.training)  # (B, T, D)
        carry: list[Tensor] = []
        for block in self.blocks:
            hidden, _, *carry = block(
                hidden, *carry, angles=None, attention_mask=None, past_key_values=None, implementation="sdpa"
            )
        return self.read_out(self.norm(hidden[:, 0]))


def into_patches(images: Tensor, patch: int) -> Tensor:
    """(B, 3, S, S) -> patches from left to right and down, (B, N, 3 P P)."""
    parts = images.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # (B, 3, S / P, P, S / P, P)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _block(sizes: VisionSizes, variant: Variant, layer: int) -> Block:
    attention = TwoWayAttention(
        sizes.width, sizes.heads, sizes.heads, sizes.width // sizes.heads, layer, bias=True,
        stream=variant.stream(sizes.heads, layer),
    )  # fmt: skip
    feedforward = FeedForward(sizes.width, sizes.neurons, variant.activation.module())
    before_attention, before_feedforward = (norm("layernorm", sizes.width, EPS) for _ in range(2))
    return Block(before_attention, attention, before_feedforward, feedforward, sizes.dropout)
