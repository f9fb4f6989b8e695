"""Transformer-XL with recurrent positions, which says the letter of the cell that an action leads to.

Kim et al. 2023, Section 2.4; what the paper leaves out is as in the authors' code
(github.com/kdkyum/transformer_memory_consolidation). A walk is cut into segments; the letters of the last one are a
memory:

    actions -> recurrent codes -> positions \\
                                            concatenated -> layers over [memory | letters | queries] -> letters of the
    letters -> embeddings ----------------- /                                                           queries

A query is a token with the position of a time and the embedding of no letter; it sees the memory, the letters of
strictly earlier times and itself. Asked for one time, the one after the last letter, this is the paper's masked
observation; asked for all times of a segment it is their parallel objective, with the same logits, as no token but
itself sees a query. The last layer computes its queries alone, which alone are read.

The attention function, the streams, the feed-forward network with its activations and the norm are those of the
language models (`llm.model`). Memory, relative positions and recurrent codes are only here.

Dimension letters: B walkers, L letters of a segment, Q queries, T = L + Q tokens, M letters of the memory, S = M + T,
D width, H heads, K width of a head, F neurons, C width of a code, A actions, R distances.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llm.model.activations import activation
from llm.model.attention import eager_attention
from llm.model.feedforward import FeedForward
from llm.model.norms import norm
from llm.model.streams import AttentionStream, Carry

from .. import variants
from ..recurrence import path_integration
from .settings import GridSizes

POSITIONS = ("paper", "residual", "actions")
TRANSITIONS = ("tanh", "relu", "identity")


@dataclass(frozen=True)
class Variant(variants.Variant):
    """What is compared.

    Args:
        position: e_{t+1} = act(e_t W_a) with W_a starting at the identity ("paper"), act(e_t + e_t W_a) with W_a
            starting at zero ("residual", the authors' code), or an embedding of the last action alone ("actions",
            Appendix A.5). The first two are one model written in two ways: only rounding tells them apart.
        transition: act of the recurrent code.
    """

    position: str = "paper"
    transition: str = "tanh"

    def choices(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("position", self.position, POSITIONS), ("transition", self.transition, TRANSITIONS)]


Memory = tuple[Tensor, ...]  # of each layer, what its last M letters were when they entered: (B, M, D)


class Answer(NamedTuple):
    """What a segment gives."""

    logits: Tensor  # (B, Q, letters)
    code: Tensor  # (B, C), of the time after the last letter
    memory: Memory  # of the next segment
    weights: tuple[Tensor, ...]  # of each layer, attention of the queries: (B, H, Q, S)


class Navigator(nn.Module):
    """The transformer.

    Args:
        actions, letters: how many.
        sizes, variant: see there.
    """

    def __init__(self, actions: int, letters: int, sizes: GridSizes, variant: Variant) -> None:
        super().__init__()
        self.sizes, self.letters = sizes, letters
        half = sizes.width // 2
        self.position = nn.Linear(sizes.code, half)
        self.letter = nn.Embedding(letters + 1, half)  # the last is no letter: a query's
        self.dropout = nn.Dropout(sizes.dropout)
        self.layers = nn.ModuleList(Layer(sizes, variant, index) for index in range(sizes.layers))
        self.norm = norm("layernorm", sizes.width, 1e-5)
        self.read_out = nn.Linear(sizes.width, letters)
        self.apply(_start)
        # Last, so that all forms of the code leave the other weights the same first values.
        self.codes = Codes(actions, sizes.code, variant.position, variant.transition).apply(_start)

    def first_code(self, walkers: int, generator: torch.Generator) -> Tensor:
        """e_1 of a trial, (B, C), from N(0, 1 / C)."""
        device, width = self.read_out.weight.device, self.sizes.code
        return torch.randn(walkers, width, generator=generator, device=device) * width**-0.5

    def forward(self, code: Tensor, actions: Tensor, letters: Tensor, memory: Memory, asked: tuple[int, ...]) -> Answer:
        """One segment, or its beginning.

        Args:
            code: (B, C), of the first letter's time.
            actions: (B, L + 1), what led to each letter's cell, and to the one after.
            letters: (B, L).
            memory: `Answer.memory` of the last segment, () at the start of a trial.
            asked: consecutive times of the queries, from 1, of the second letter, to L, of the cell after the last.
        """
        count, remembered = letters.shape[1], memory[0].shape[1] if memory else 0
        codes = self.codes(code, actions)  # (B, L + 1, C)
        of_tokens = torch.cat([codes[:, :count], codes[:, asked[0] : asked[-1] + 1]], dim=1)  # (B, T, C)
        distances, mask = _plan(remembered, count, asked, self.sizes.window, letters.device)
        logits, onward, weights = self.read(of_tokens, letters, memory, distances, mask)
        return Answer(logits, codes[:, -1], onward, weights)

    def read(
        self, codes: Tensor, letters: Tensor, memory: Memory, distances: Tensor, mask: Tensor
    ) -> tuple[Tensor, Memory, tuple[Tensor, ...]]:
        """What follows the recurrence, which alone depends on its number of steps: it may be compiled for all of them.

        Codes of all tokens (B, T, C), letters (B, L), and `_plan`'s tables -> `Answer`'s logits, memory, weights.
        """
        count, queries = letters.shape[1], codes.shape[1] - letters.shape[1]
        none = letters.new_full((len(letters), queries), self.letters)
        seen = self.letter(torch.cat([letters, none], dim=1))  # (B, T, D / 2)
        positions = torch.relu(self.position(codes))  # (B, T, D / 2)
        hidden = self.dropout(torch.cat([positions, seen], dim=-1))
        carry: Carry = None
        onward, weights = [], []
        for index, layer in enumerate(self.layers):
            before = memory[index] if memory else hidden[:, :0]
            kept = torch.cat([before, hidden[:, :count]], 1)[:, -self.sizes.memory or count + before.shape[1] :]
            onward.append(kept.detach())
            rows = queries if index == len(self.layers) - 1 else codes.shape[1]  # the last ones of the tokens
            hidden, shown, carry = layer(hidden, before, distances[-rows:], mask[-rows:], carry)
            weights.append(shown[:, :, -queries:])
        return self.read_out(self.norm(hidden)), tuple(onward), tuple(weights)


class Layer(nn.Module):
    """Pre-norm attention over memory and tokens, then the feed-forward network."""

    def __init__(self, sizes: GridSizes, variant: Variant, index: int) -> None:
        super().__init__()
        stream = variant.stream(sizes.heads, index)
        self.attention_norm = norm("layernorm", sizes.width, 1e-5)
        self.attention = MemoryAttention(sizes.width, sizes.heads, sizes.head_dim, sizes.window, stream)
        self.ffn_norm = norm("layernorm", sizes.width, 1e-5)
        self.ffn = FeedForward(sizes.width, sizes.neurons, variant.activation.module(), bias=False)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self, hidden: Tensor, memory: Tensor, distances: Tensor, mask: Tensor, carry: Carry
    ) -> tuple[Tensor, Tensor, Carry]:
        """hidden (B, T, D), memory (B, M, D) -> the last rows of hidden, as many as distances (rows, S) has; their
        attention (B, H, rows, S); the stream's carry."""
        context = self.attention_norm(torch.cat([memory, hidden], dim=1))  # (B, S, D)
        added, weights, carry = self.attention(context, distances, mask, carry)
        hidden = hidden[:, -len(distances) :] + self.dropout(added)
        return hidden + self.dropout(self.ffn(self.ffn_norm(hidden))), weights, carry


class MemoryAttention(nn.Module):
    """Attention whose scores depend on the distance in time too (Dai et al. 2019, with learned tables).

    score = ((q + u) k + q r_d + b_d) / sqrt(K) with u of a head, r_d and b_d of a head and a distance. Distances from
    the tables' last on share its entry.
    """

    def __init__(self, width: int, heads: int, head_dim: int, reach: int, stream: AttentionStream | None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.content_bias = nn.Parameter(torch.empty(heads, 1, head_dim).normal_(std=0.02))  # u
        self.distance_keys = nn.Parameter(torch.empty(heads, reach, head_dim).normal_(std=0.02))  # r, (H, R, K)
        self.distance_bias = nn.Parameter(torch.zeros(heads, 1, reach))  # b
        self.stream = stream

    def forward(self, context: Tensor, distances: Tensor, mask: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """context (B, S, D), of whose tokens the last ask; distances and mask (rows, S) -> (B, rows, D), attention
        (B, H, rows, S), the stream's carry."""
        rows = len(distances)
        query, key, value = (
            project(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, rows or S, K)
            for project, tokens in (
                (self.q_proj, context[:, -rows:]), (self.k_proj, context), (self.v_proj, context)
            )
        )  # fmt: skip
        if self.stream is not None:
            carry = _of_rows(self.stream, carry, rows)
            mixed, carry = self.stream({"queries": query, "keys": key, "values": value}, carry)
            query, key, value = mixed["queries"], mixed["keys"], mixed["values"]
        by_distance = query @ self.distance_keys.mT + self.distance_bias  # (B, H, rows, R)
        index = distances.expand(*by_distance.shape[:2], -1, -1)  # (B, H, rows, S)
        position = by_distance.gather(-1, index) * self.head_dim**-0.5
        out, weights = eager_attention(
            self, query + self.content_bias, key, value, position + mask, scaling=self.head_dim**-0.5
        )  # (B, rows, H, K)
        return self.o_proj(out.flatten(-2)), weights, carry


class Codes(nn.Module):
    """Recurrent position codes: where a walker is, from its actions alone.

    In float32 under autocast too: a code is made of thousands of steps.
    """

    def __init__(self, actions: int, width: int, form: str, transition: str) -> None:
        super().__init__()
        self.form = form
        self.act = activation(transition)
        if form == "actions":
            self.embedding = nn.Embedding(actions, width)
        else:
            start = torch.eye(width) if form == "paper" else torch.zeros(width, width)
            self.transitions = nn.Parameter(start.repeat(actions, 1))  # (A C, C), W_a of each action under the last

    def forward(self, code: Tensor, actions: Tensor) -> Tensor:
        """code (B, C) of the first time, actions (B, L + 1) -> codes of all times, (B, L + 1, C)."""
        if self.form == "actions":
            return self.embedding(actions)
        with torch.autocast(code.device.type, enabled=False):
            return path_integration(code, actions, self.transitions, self._onward)

    def _onward(self, code: Tensor, moved: Tensor) -> Tensor:
        return self.act(moved if self.form == "paper" else code + moved)


@lru_cache(maxsize=256)
def _plan(memory: int, letters: int, asked: tuple[int, ...], reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every token [letters | queries] to [memory | letters | queries]: distance (T, S) in time, at most reach - 1;
    and what is added to a score, (T, S): 0, or -inf where the token must not look."""
    with torch.inference_mode(False):  # what is kept must serve a training too
        return _made_plan(memory, letters, asked, reach, device)


def _made_plan(
    memory: int, letters: int, asked: tuple[int, ...], reach: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    times = torch.tensor([*range(letters), *asked], device=device)
    of_keys = torch.cat([torch.arange(-memory, 0, device=device), times])
    asks = torch.arange(len(times), device=device) >= letters  # which tokens are queries
    keys_ask = torch.cat([asks.new_zeros(memory), asks])
    distances = times[:, None] - of_keys
    itself = torch.arange(len(times), device=device)[:, None] + memory == torch.arange(len(of_keys), device=device)
    sees = ~keys_ask & (distances > 0) | itself
    mask = torch.zeros(sees.shape, device=device).masked_fill(~sees, -torch.inf)
    return distances.clamp(0, reach - 1), mask


def _of_rows(stream: AttentionStream, carry: Carry, rows: int) -> Carry:
    """The carry of a layer whose last tokens alone ask: of the queries', (B, H, T, K), the last rows."""
    if carry is None or "queries" not in stream.streams:
        return carry
    place = stream.streams.index("queries")
    return tuple(part[:, :, -rows:] if index == place else part for index, part in enumerate(carry))


def _start(module: nn.Module) -> None:
    """Weights N(0, 0.02), biases zero, as in the authors' code; norms and transitions have a start of their own."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
