"""The two-layer transformer of the pair task, classic or with residual attention streams; many runs as one model.

Burns et al. 2025, Section 3.2. Each layer is one causal attention head, softmax(Q K^T) V without a scale
and without an output projection, added to its input; then the last token passes three ReLU layers and a read-out:

    tokens -> [attention + input] x layers -> last token -> 3 x act(W x + b) -> logits of the labels

The attention function, the streams and the activations are those of the language models (`llm.model`). What is only
here is the batching: a run is one variant with one seed, and the weights of all runs lie in one tensor. The shared
parts see each run's sequences as sequences of a longer batch. The last layer's queries are only those of the last
token, which alone is read.

Runs are ordered by variant, then by seed, so that the runs of a variant are a slice.

Dimension letters: R runs, S seeds of a variant, B batch, T time, D width (and that of the values), K width of queries
and keys, F neurons of the MLP, L labels.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.activations import activation
from llm.model.attention import eager_attention
from llm.model.streams import AttentionStream, Carry

from ..draws import Draws
from .settings import IclSizes, Variant


class Transformers(nn.Module):
    """R = variants x seeds transformers of equal size, each with weights of its own.

    Runs of one seed start from the same weights, whatever their variant, and whatever runs are beside them: attention
    N(0, 1/E), layers of the MLP N(0, 2/fan-in) (He), their scalar biases and the read-out N(0, 1/F). The paper gives
    none of these; they are those of the authors' code (github.com/tfburns/AMICL-and-residual-attention-streams).

    Args:
        variants, seeds: of the runs.
        sizes: of each.
        tokens: T of the task.
        content: E of the task: the variance of the attention weights is 1/E.
        products: dtype of activations and matrix products: float32, or bfloat16; weights, their updates, softmax and
            loss are float32 in both.
        device: of the weights.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        sizes: IclSizes,
        tokens: int,
        content: int,
        products: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.variants, self.seeds, self.sizes, self.products = tuple(variants), tuple(seeds), sizes, products
        self.device = torch.device(device)
        self.each = len(self.seeds)  # runs of a variant; a compiled forward knows no more of the seeds
        spread = content**-0.5
        width, key_width, neurons = sizes.width, sizes.key_width, sizes.neurons
        rows = 2 * key_width + width  # of queries, keys, values, one under the other
        self.projections = nn.ParameterList(
            self._drawn(f"attention {n}", (rows, width), spread) for n in range(sizes.layers)
        )
        fans = (width, neurons, neurons)
        self.hidden = nn.ParameterList(
            self._drawn(f"mlp {n}", (neurons, fan), (2 / fan) ** 0.5) for n, fan in enumerate(fans)
        )
        self.biases = nn.ParameterList(self._drawn(f"bias {n}", (1, 1), neurons**-0.5) for n in range(len(fans)))
        self.read_out = self._drawn("read-out", (sizes.labels, neurons), neurons**-0.5)
        self.streams = nn.ModuleList(  # of layer n and variant v: n variants + v
            _stream(variant, len(self.seeds), n) for n in range(sizes.layers) for variant in self.variants
        ).to(self.device)
        self.acts = [
            activation("relu") if variant.nmda is None else activation("nmda", alpha=variant.nmda)
            for variant in self.variants
        ]
        self.causal = torch.full((tokens, tokens), -torch.inf, device=self.device).triu(1)

    def _drawn(self, name: str, shape: tuple[int, int], spread: float) -> nn.Parameter:
        """(R, *shape), the same for the runs of a seed."""
        drawn = [Draws(torch.device("cpu"), seed, f"weights {name}").normal(*shape) for seed in self.seeds]
        return nn.Parameter((torch.stack(drawn) * spread).repeat(len(self.variants), 1, 1).to(self.device))

    @property
    def runs(self) -> list[tuple[Variant, int]]:
        """(variant, seed) of each run, in order."""
        return list(itertools.product(self.variants, self.seeds))

    def forward(self, inputs: Tensor, weights: list[Tensor] | None = None) -> Tensor:
        """inputs (S, B, T, D), of each seed -> logits (R, B, L) in the weights' dtype.

        Runs of a seed read the same sequences. Attention of each layer and variant, (S B, T or 1, T), is appended to
        `weights`.
        """
        every = inputs.to(self.products).expand(len(self.variants), -1, -1, -1, -1)
        hidden = every.flatten(0, 1)  # (R, B, T, D)
        carries: list[Carry] = [None] * len(self.variants)
        for n in range(self.sizes.layers):
            last = n == self.sizes.layers - 1
            attended, carries = self._attend(n, hidden, carries, last, weights)
            hidden = (hidden[:, :, -1:] if last else hidden) + attended
        x = hidden.squeeze(2)  # (R, B, D)
        for weight, bias in zip(self.hidden, self.biases, strict=True):
            x = self._activate(torch.bmm(x, weight.to(x.dtype).mT) + bias.to(x.dtype))  # (R, B, F)
        return torch.bmm(x, self.read_out.to(x.dtype).mT).to(self.read_out.dtype)

    def _attend(
        self, n: int, hidden: Tensor, carries: list[Carry], last: bool, weights: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Carry]]:
        """Attention of layer n: hidden (R, B, T, D) -> (R, B, T or 1, D), and the carry of each variant."""
        _, batch, time, _ = hidden.shape
        key_width = self.sizes.key_width
        weight = self.projections[n].to(hidden.dtype).mT  # (R, D, 2 K + D)
        tokens = hidden.flatten(1, 2)  # (R, B T, D)
        if last:  # nothing reads what the other tokens ask
            query = torch.bmm(hidden[:, :, -1], weight[..., :key_width])  # (R, B, K)
            key, value = torch.bmm(tokens, weight[..., key_width:]).split([key_width, self.sizes.width], -1)
        else:
            query, key, value = torch.bmm(tokens, weight).split([key_width, key_width, self.sizes.width], -1)
        asked = 1 if last else time
        outputs, onward = [], []
        for variant, carry in enumerate(carries):
            own = slice(variant * self.each, (variant + 1) * self.each)
            q, k, v = query[own], key[own], value[own]  # (S, B T, K or D)
            stream = self.streams[n * len(carries) + variant]
            if isinstance(stream, AttentionStream):
                carry = _of_last(stream, carry, batch, time) if last else carry
                mixed, carry = stream({"queries": q, "keys": k, "values": v}, carry)
                q, k, v = mixed["queries"], mixed["keys"], mixed["values"]
            # (S B, 1, T, K): the shared attention function sees one head and a longer batch.
            q, k, v = (
                part.reshape(-1, 1, length, part.shape[-1]) for part, length in ((q, asked), (k, time), (v, time))
            )
            mask = None if last else self.causal
            out, attended = eager_attention(self, q, k, v, mask, scaling=1.0)  # (S B, T, 1, D)
            if weights is not None:
                weights.append(attended[:, 0])
            outputs.append(out.reshape(self.each, batch, asked, -1))
            onward.append(carry)
        return torch.cat(outputs), onward

    def _activate(self, x: Tensor) -> Tensor:
        """(R, B, F), each variant with its activation."""
        if len({variant.nmda for variant in self.variants}) == 1:
            return self.acts[0](x)
        return torch.cat([act(part) for act, part in zip(self.acts, x.split(self.each), strict=True)])

    def loss(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Cross-entropy of each run: logits (R, B, L), answers (S, B) -> (R,). The sum trains every run by its own."""
        targets = answers.expand(len(self.variants), -1, -1).reshape(len(logits), -1)  # (R, B)
        return F.cross_entropy(logits.mT, targets, reduction="none").mean(1)


def _stream(variant: Variant, seeds: int, layer: int) -> nn.Module:
    """The shared stream over (S, B T, K): a run is to it what a head is in the language models."""
    if not variant.streams:
        return nn.Identity()
    heads = dict.fromkeys(variant.streams, seeds)
    return AttentionStream(variant.streams, variant.source, "head" if variant.learned else "fixed", heads, layer)


def _of_last(stream: AttentionStream, carry: Carry, batch: int, time: int) -> Carry:
    """The carry of a layer that asks for the last token alone: its queries' part (S, B T, K) -> (S, B, K)."""
    if carry is None or "queries" not in stream.streams:
        return carry
    place = stream.streams.index("queries")
    return tuple(
        part.unflatten(1, (batch, time))[:, :, -1] if index == place else part for index, part in enumerate(carry)
    )
