"""Forms of the residual connection: how a layer reads what the layers before it gave, and how it adds to that.

    plain            x_{l+1} = x_l + F(x_l)
    dense            DenseFormer (Pagliardini et al. 2024, Section 3): each block reads a learned average over the
                     outputs of all blocks before it and the embedding, Y_i = sum over j <= i of a_ij X_j
    hyper            hyper-connections (Zhu et al. 2024, Section 3, the dynamic form): N copies of the residual stream;
                     attention and FFN each read a mix of them, and add to each copy and mix the copies
    hyper-manifold   the same with constraints, mHC (Xie et al. 2025, Section 4): what is read and added is weighed with
                     numbers from 0 to 1 and 0 to 2, and the mix of the copies is doubly stochastic

With H the N copies, (N, D), a layer F of either hyper form gives

    H <- R H + p F(q H)      q (1, N) reads, R (N, N) mixes, p (N, 1) adds

where q, R and p are learned numbers plus a small part that depends on H at that position. All forms begin as the plain
one: a pretrained model is unchanged at first. The copies of the last block are averaged. (Zhu et al. add them up, which
is the same to the norm that follows, and have a LayerNorm with weights in the small part. Xie et al. leave open how q
and R start: here each layer reads mostly one copy, all in turn, and the copies hardly mix.)

Every quantity belongs to one position, so nothing moves between positions or documents. All of it is computed outside
of autocast: the residual stream keeps its format.

Dimension letters: B batch, T time, N copies, D width, C coefficients.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMS = ("plain", "dense", "hyper", "hyper-manifold")
SCALE = 0.01  # first factor of the part that depends on the input, in both papers
EPS = 1e-6
ITERATIONS = 20  # of Sinkhorn and Knopp, as Xie et al. 2025 have them
DIAGONAL = 4.0  # first logarithm of how much more of itself than of another a copy keeps


def copies(config: Any) -> int:
    """Copies of the residual stream: 1 where the form has a single one."""
    return config.residual_expansion if config.residual in CONNECTIONS else 1


class DepthAverage(nn.Module):
    """sum over j of a_j X_j, a (M, 1, 1) learned; at first the last X alone."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, 1, 1))
        self.reset("weight")

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Give a parameter of this module its first values."""
        self.weight.zero_()[-1] = 1

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """M tensors (B, T, D) -> (B, T, D)."""
        weights = self.weight.to(outputs[0].dtype)
        total = weights[0] * outputs[0]
        for weight, output in zip(weights[1:], outputs[1:], strict=True):
            total = torch.addcmul(total, weight, output)
        return total


class HyperConnection(nn.Module):
    """Reads from and writes to N copies of the residual stream, around one layer.

    The coefficients of each copy, (N + 2): what the layer reads of it, what each copy takes of it, what it takes of the
    layer. They are `static`, plus tanh of a projection of the normalised copy times `scale`.

    Args:
        index: of the layer, attention and FFN counted apart; it first reads copy `index` modulo N.
        expansion: N.
        width: D.
    """

    def __init__(self, index: int, expansion: int, width: int) -> None:
        super().__init__()
        self.index, self.expansion, self.width = index, expansion, width
        static, matrix, scales = self.sizes(expansion, width)
        self.static = nn.Parameter(torch.empty(static))  # a vector: no weight decay
        self.weight = nn.Parameter(torch.empty(matrix))
        self.scale = nn.Parameter(torch.empty(scales))
        for name in ("static", "weight", "scale"):
            self.reset(name)

    @staticmethod
    def sizes(expansion: int, width: int) -> tuple[int, tuple[int, int], int]:
        """Shapes of `static`, `weight` and `scale`."""
        return expansion * (expansion + 2), (expansion + 2, width), 2

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Give a parameter of this module its first values."""
        if name == "static":
            self.static.copy_(self._first().flatten())
        else:
            getattr(self, name).fill_(SCALE if name == "scale" else 0.0)

    def _first(self) -> Tensor:
        n = self.expansion
        read = torch.zeros(n, 1)
        read[self.index % n] = 1
        return torch.cat([read, torch.eye(n), torch.ones(n, 1)], 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H (B, T, N, D) -> what the layer reads (B, T, D), the mixed copies R H, and p (B, T, N, 1)."""
        with torch.autocast(hidden.device.type, enabled=False):
            read, mix, add = (each.to(hidden.dtype) for each in self.coefficients(hidden))
            return (read @ hidden).squeeze(-2), mix @ hidden, add

    def coefficients(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, 1, N), R (B, T, N, N) and p (B, T, N, 1) in float32."""
        n = self.expansion
        scale = torch.cat([self.scale[:1].expand(n + 1), self.scale[1:]]).float()
        found = self.static.view(n, n + 2).float() + scale * torch.tanh(self._projected(hidden))  # (B, T, N, N + 2)
        return found[..., :1].mT, found[..., 1:-1].mT, found[..., -1:]

    def _projected(self, copies: Tensor) -> Tensor:
        """(..., D) -> (..., C): the projection of the normalised input, divided after it, so that no normalised copy is
        kept for the backward pass."""
        size = copies.square().mean(-1, keepdim=True, dtype=torch.float32)
        return F.linear(copies, self.weight.to(copies.dtype)).float() * torch.rsqrt(size + EPS)


class ManifoldHyperConnection(HyperConnection):
    """Hyper-connections whose q is in (0, 1), p in (0, 2), and R doubly stochastic, all from a projection of the
    normalised N D numbers of a position."""

    @staticmethod
    def sizes(expansion: int, width: int) -> tuple[int, tuple[int, int], int]:
        count = expansion * (expansion + 2)
        return count, (count, expansion * width), 3

    def _first(self) -> Tensor:
        n = self.expansion
        read = torch.full((n,), -math.log(4 * (n - 1) - 1))  # the sigmoids are 1 / (4 (n - 1)), and 3/4: 1 together
        read[self.index % n] = math.log(3)
        return torch.cat([read, DIAGONAL * torch.eye(n).flatten(), torch.zeros(n)])

    def coefficients(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.expansion
        sizes = torch.tensor([n, n * n, n], device=hidden.device)
        scale = self.scale.float().repeat_interleave(sizes, output_size=n * (n + 2))
        found = self.static.float() + scale * self._projected(hidden.flatten(-2))  # (B, T, N^2 + 2 N)
        read, mix, add = found.split([n, n * n, n], -1)
        doubly = doubly_stochastic(mix.unflatten(-1, (n, n)))
        return torch.sigmoid(read).unsqueeze(-2), doubly, 2 * torch.sigmoid(add).unsqueeze(-1)


CONNECTIONS: dict[str, type[HyperConnection]] = {"hyper": HyperConnection, "hyper-manifold": ManifoldHyperConnection}


def connection(config: Any, index: int) -> HyperConnection | None:
    """The hyper-connection of layer `index`, attention and FFN counted apart; None where the form has none."""
    kind = CONNECTIONS.get(config.residual)
    return None if kind is None else kind(index, config.residual_expansion, config.hidden_size)


class _SinkhornFunction(torch.autograd.Function):
    """Keeps the logarithms alone: the iterations are done again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logs: Tensor) -> Tensor:
        return _normalised(logs)[-1].exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        steps = _normalised(*ctx.saved_tensors)
        grad = grad * steps[-1].exp()
        for count, step in reversed(list(enumerate(steps))):
            grad = grad - step.exp() * grad.sum(_dimension(count), keepdim=True)
        return grad


def _normalised(logs: Tensor) -> list[Tensor]:
    """The logarithms (..., N, N) after each step: columns sum to 1, then rows do, and so on."""
    steps = []
    for count in range(2 * ITERATIONS):
        logs = logs - torch.logsumexp(logs, _dimension(count), keepdim=True)
        steps.append(logs)
    return steps


def _dimension(count: int) -> int:
    return -2 if count % 2 == 0 else -1


def doubly_stochastic(logs: Tensor) -> Tensor:
    """exp(logs), (..., N, N) in float32, scaled until rows and columns sum to 1 (Sinkhorn and Knopp 1967)."""
    if torch.jit.is_tracing():  # a saved trace holds no Python function
        return _SinkhornFunction.forward(logs)
    return _SinkhornFunction.apply(logs)
