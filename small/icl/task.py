"""Sequences of object-label pairs, whose last object's label is asked for; many at once, on any device.

Burns et al. 2025, Sections 2.1 and 3.3, after Reddy (2024). Some rules are only in the authors' code
(github.com/tfburns/AMICL-and-residual-attention-streams):

    object 1, label 1, ..., object P, label P, query object          T = 2 P + 1 tokens, 2 P + 2 with AMICL's blank

- A class has a prototype mu of E components from N(0, 1/E), class c the label c mod L, labels have such vectors too.
- An object is (mu + noise eta) / sqrt(1 + noise^2), eta from N(0, 1/E) anew for every object token.
- A sequence is *bursty* with probability `bursty`: each of its P / copies classes comes `copies` times, in random
  order, no two of them with one label, and the query is one of them. Else all P + 1 classes are drawn freely: then the
  answer is in the weights, as the query's class is seldom in the context.
- A sequence is *novel* with probability `novel`: its classes are of `novel_classes` ones redrawn for each batch, with
  the known label vectors. Nothing but the context tells their labels, so they are always bursty (as in the authors'
  public code); three sequences in four are bursty in all.
- Positions are one-hot, 2 * 32 + 1 of them, and the whole sequence is shifted by a random offset.

A batch is a pure function of (seed, step, size), evaluation sequences of (seed, kind, part, count), on one kind of
device.

Dimension letters: N sequences here, P pairs, T tokens, E content components, D = positions + E.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llm.common.errors import UserError

from ..draws import Draws, normal
from .settings import Task

KINDS = ("test", "ic", "ic2", "iw")
COUNTED_UP_TO = 64  # keys: each is compared to each, which takes less time than to sort so few
TITLES = {"test": "Test", "ic": "IC", "ic2": "IC2", "iw": "IW"}


class Sequences(NamedTuple):
    """N sequences with all that was drawn for them."""

    inputs: Tensor  # (N, T, D)
    answers: Tensor  # (N,), the label asked for
    classes: Tensor  # (N, P + 1) of the known classes, or of the redrawn ones where novel; the query's last
    labels: Tensor  # (N, P) that the context shows
    bursty: Tensor  # (N,), whether
    novel: Tensor  # (N,), whether
    offsets: Tensor  # (N,), place of the first token


class _Rules(NamedTuple):
    """How one kind of sequences departs from the task."""

    bursty: float
    novel: float
    label_shift: int = 0  # IC2: the label after the one that was learned
    query: str = "free"  # of a sequence that is not bursty: "free", of the "context", or its label "outside" of it


class World:
    """The prototypes of one seed, and sequences from them.

    Args:
        task: the rules.
        seed: all that is drawn follows from it; at least 0.
        device: where everything is drawn and stays; CPU and CUDA draw other numbers from one seed.
        compiled: `batch` through torch.compile; its numbers are then the same but for rounding.
    """

    def __init__(self, task: Task, seed: int, device: torch.device | str = "cpu", compiled: bool = False) -> None:
        if seed < 0:
            raise UserError(f"seed {seed} must be at least 0")
        self.task, self.seed, self.device = task, seed, torch.device(device)
        draws, spread = self.draws("prototypes"), task.content**-0.5
        self.class_means = draws.normal(task.classes, task.content) * spread  # (classes, E)
        self.label_means = draws.normal(task.labels, task.content) * spread  # (labels, E)
        self._sequences = torch.compile(_sequences, dynamic=False) if compiled else _sequences

    def batch(self, step: int, size: int) -> Sequences:
        """The training sequences of a step: N = size."""
        draws = self.draws("train", step)
        return self._draw(self._sequences, _Rules(self.task.bursty, self.task.novel), size, draws, draws)

    def evaluation(self, kind: str, part: int, count: int) -> Sequences:
        """`count` fixed sequences of a kind (Section 3.3); another `part`, other sequences of the same classes.

        Args:
            kind: "test", as in training; "ic", novel classes; "ic2", known classes whose labels are all shifted by
                one, the answer too; "iw", known classes, of which none in the context has the query's label.

        The paper has label vectors redrawn in "ic" and "ic2"; no read-out could name those, so the known ones stay,
        as in the authors' code. That code draws the classes of "iw" freely, so that 22 in 100 have the label.
        """
        rules = {
            "test": _Rules(self.task.bursty, self.task.novel),
            "ic": _Rules(1.0, 1.0),
            "ic2": _Rules(1.0, 0.0, label_shift=1),
            "iw": _Rules(0.0, 0.0, query="outside"),
        }[kind]
        return self._draw(_sequences, rules, count, self.draws(kind, part), self.draws(f"classes of {kind}"))

    def trials(self, part: int, count: int) -> Sequences:
        """`count` sequences of known classes whose answer is in the context, bursty or not (AMICL, Section 2)."""
        draws = self.draws("trials", part)
        return self._draw(_sequences, _Rules(self.task.bursty, 0.0, query="context"), count, draws, draws)

    def draws(self, purpose: str, index: int = 0) -> Draws:
        """Random numbers that belong to (seed, purpose, index)."""
        return Draws(self.device, self.seed, purpose, index)

    def _draw(
        self, make: Callable[..., Sequences], rules: _Rules, count: int, draws: Draws, draws_of_classes: Draws
    ) -> Sequences:
        task = self.task
        novel_bits = draws_of_classes.bits(task.novel_classes * task.content)
        uniform = draws.uniform(count, sum(_choices(task).values()))
        noise_bits = draws.bits(count * (task.pairs + 1) * task.content)
        return make(task, rules, self.class_means, self.label_means, novel_bits, uniform, noise_bits)


# ---- From random numbers to sequences, without a state: a compiler makes few loops of it -----------------------------


def _sequences(
    task: Task,
    rules: _Rules,
    class_means: Tensor,
    label_means: Tensor,
    novel_bits: Tensor,
    uniform: Tensor,
    noise_bits: Tensor,
) -> Sequences:
    """What is in each sequence; `_tokens` then writes it down.

    Args:
        class_means, label_means: (classes, E), (labels, E).
        novel_bits, noise_bits: `Draws.bits` of the redrawn prototypes and of the objects' noise.
        uniform: (N, all that `_choices` names).
    """
    choices = _choices(task)
    u = dict(zip(choices, uniform.split(list(choices.values()), dim=1), strict=True))
    novel = u["novel"].squeeze(1) < rules.novel
    bursty = (u["bursty"].squeeze(1) < rules.bursty) | novel
    classes = _bursts(task, u, novel)  # (N, P + 1)
    if rules.bursty < 1:
        classes = torch.where(bursty[:, None], classes, _free(task, u, rules.query))
    shown = (classes + rules.label_shift) % task.labels  # (N, P + 1)
    offsets = _integers(u["offset"], max(0, task.positions - task.tokens) + 1).squeeze(1)
    novel_means = normal(novel_bits, task.novel_classes, task.content) * task.content**-0.5
    rows = classes + task.classes * novel[:, None]  # of the known and the redrawn prototypes, one after the other
    noise = normal(noise_bits, *rows.shape, task.content) * (task.noise * task.content**-0.5)
    objects = (torch.cat([class_means, novel_means])[rows] + noise) * (1 + task.noise**2) ** -0.5
    inputs = _tokens(task, objects, label_means[shown[:, :-1]], offsets)
    return Sequences(inputs, shown[:, -1], classes, shown[:, :-1], bursty, novel, offsets)


def _choices(task: Task) -> dict[str, int]:
    """How many uniform numbers a sequence takes, and what for."""
    groups = -(-task.pairs // task.copies)
    return {
        "novel": 1,
        "bursty": 1,
        "offset": 1,
        "labels": task.labels if task.distinct_labels else groups,
        "members": groups,
        "order": groups * task.copies,
        "burst query": 1,
        "free": task.pairs + 1,
        "free query": task.pairs,
    }


def _integers(uniform: Tensor, below: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) -> integers from 0, below `below`."""
    return (uniform * below).long()


def _ranks(keys: Tensor, count: int) -> Tensor:
    """The places of the first `count` of each row's keys (N, K) among all K: so many different numbers below K."""
    if keys.shape[1] > COUNTED_UP_TO:
        return keys.argsort(dim=1).argsort(dim=1)[:, :count]
    return (keys[:, None, :] < keys[:, :count, None]).sum(-1)


def _bursts(task: Task, u: dict[str, Tensor], novel: Tensor) -> Tensor:
    """(N, P + 1) classes, `copies` of each in random order; the last is one of the others."""
    groups = u["members"].shape[1]
    labels = _ranks(u["labels"], groups) if task.distinct_labels else _integers(u["labels"], task.labels)
    per_label = torch.where(novel, task.novel_classes // task.labels, task.classes // task.labels)
    burst = _integers(u["members"], per_label[:, None]) * task.labels + labels  # (N, groups)
    context = burst.gather(1, _ranks(u["order"], task.pairs) % groups)
    return torch.cat([context, context.gather(1, _integers(u["burst query"], task.pairs))], dim=1)


def _free(task: Task, u: dict[str, Tensor], query: str) -> Tensor:
    """(N, P + 1) classes drawn freely, up to what `query` asks of the last."""
    classes = _integers(u["free"], task.classes)
    context, last = classes[:, :-1], classes[:, -1:]
    if query == "context":
        last = context.gather(1, _integers(u["free query"][:, :1], task.pairs))
    elif query == "outside":
        other = 1 + _integers(u["free query"], task.labels - 1)  # how far the label is from the query's
        context = context - context % task.labels + (last + other) % task.labels
    return torch.cat([context, last], dim=1)


def _tokens(task: Task, objects: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
    """Object tokens (N, P + 1, E), label tokens (N, P, E), offsets (N,) -> inputs (N, T, D)."""
    place = offsets[:, None] + torch.arange(2 * task.pairs + 2, device=offsets.device)
    one_hot = (place[..., None] == torch.arange(task.positions, device=offsets.device)).to(objects.dtype)
    labels = torch.cat([labels, torch.zeros_like(objects[:, :1])], dim=1)  # the query's is the blank, or left out
    pairs = torch.cat([one_hot[:, ::2], objects, one_hot[:, 1::2], labels], dim=2)  # (N, P + 1, 2 D)
    return pairs.view(len(pairs), -1, task.width)[:, : task.tokens]


def amicl_task(length: int = 20, width: int = 100, noise: float = 0.1) -> Task:
    """The plain variant for AMICL (Section 2): content only, the blank last; `length` counts it and the query.

    Half of the sequences are bursty in the sense of the transformer's task, without its rule of different labels, which
    a thousand tokens could not keep; the query's class is always in the context.

    Raises:
        UserError: a length that is odd or below four.
    """
    if length < 4 or length % 2:
        raise UserError(f"length {length} must be even and at least 4: pairs, the last with a blank for its label")
    return Task(
        pairs=length // 2 - 1, noise=noise, content=width, positions=0, novel=0.0, distinct_labels=False, blank=True
    )
