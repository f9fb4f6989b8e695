"""Feed-forward networks: plain (GPT-2) and gated (Llama).

Dimension letters: B batch, T time, D width, F width inside.
"""

from torch import Tensor, nn

from .linear import Linear


class FeedForward(nn.Module):
    """down(act(up(x))): (B, T, D) -> (B, T, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))  # (B, T, F) inside


class GatedFeedForward(FeedForward):
    """down(act(gate(x)) * up(x)): (B, T, D) -> (B, T, D); SwiGLU when act is SiLU (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: nn.Module, bias: bool = False) -> None:
        super().__init__(hidden_size, intermediate_size, act, bias)
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) inside


FEEDFORWARDS: dict[str, type[FeedForward]] = {"plain": FeedForward, "gated": GatedFeedForward}
