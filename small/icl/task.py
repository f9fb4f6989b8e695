"""Sequences of object-label pairs, whose last object's label is asked for; many at once, on any device.

residual-attention-streams.txt, Section 2.1 and 3.3, after Reddy (2024); NOTES.md has the rules that only the code says:

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

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.errors import UserError

KINDS = ("test", "ic", "ic2", "iw")
TITLES = {"test": "Test", "ic": "IC", "ic2": "IC2", "iw": "IW"}


@dataclass(frozen=True)
class Task:
    """The rules. The defaults are those of the two-layer transformer (Section 3).

    Args:
        classes, labels: how many; class c has the label c mod labels.
        pairs: in the context, before the query.
        copies: of each class in a bursty sequence: the burstiness B.
        bursty: share of the sequences of known classes that are bursty.
        novel: share of the sequences with redrawn classes.
        novel_classes: how many are redrawn for a batch.
        noise: epsilon, how far the objects of a class differ.
        content: E.
        positions: one-hot positions; 0 leaves them out.
        distinct_labels: no two classes of a bursty sequence have one label.
        blank: a token of zeros in the place of the missing label ends the sequence (AMICL).

    Raises:
        UserError: rules that contradict each other, all of them named.
    """

    classes: int = 512
    labels: int = 32
    pairs: int = 8
    copies: int = 2
    bursty: float = 0.5
    novel: float = 0.5
    novel_classes: int = 128
    noise: float = 0.1
    content: int = 85
    positions: int = 65
    distinct_labels: bool = True
    blank: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} {getattr(self, name)} must be at least 1"
            for name in ("classes", "labels", "pairs", "copies", "novel_classes", "content")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} {getattr(self, name)} must be between 0 and 1"
            for name in ("bursty", "novel")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not 0 <= self.noise < float("inf"):
            problems.append(f"noise {self.noise} must be a finite number of at least 0")
        if problems:  # what follows divides by them
            raise UserError("; ".join(problems))
        problems += [
            f"{name} {getattr(self, name)} must be a multiple of the {self.labels} labels, so that each has as many"
            for name in ("classes", "novel_classes")
            if getattr(self, name) % self.labels
        ]
        if self.distinct_labels and self.pairs % self.copies:
            problems.append(f"pairs {self.pairs} must be a multiple of the copies {self.copies}")
        if self.distinct_labels and self.pairs // self.copies > self.labels:
            problems.append(
                f"{self.pairs} pairs in {self.copies} copies need {self.pairs // self.copies} different labels of "
                f"{self.labels}: give fewer pairs, more copies or more labels"
            )
        if self.positions and self.positions < self.tokens:
            problems.append(f"pairs {self.pairs} make {self.tokens} tokens, and positions {self.positions} are fewer")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def tokens(self) -> int:
        """T."""
        return 2 * self.pairs + 1 + self.blank

    @property
    def width(self) -> int:
        """D, components of a token."""
        return self.positions + self.content


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
    """

    def __init__(self, task: Task, seed: int, device: torch.device | str = "cpu") -> None:
        if seed < 0:
            raise UserError(f"seed {seed} must be at least 0")
        self.task, self.seed, self.device = task, seed, torch.device(device)
        generator = self.generator("prototypes")
        self.class_means = self._prototypes(task.classes, generator)  # (classes, E)
        self.label_means = self._prototypes(task.labels, generator)  # (labels, E)

    def batch(self, step: int, size: int) -> Sequences:
        """The training sequences of a step: N = size."""
        generator = self.generator("train", step)
        means = self._prototypes(self.task.novel_classes, generator)
        return self._draw(size, _Rules(self.task.bursty, self.task.novel), means, generator)

    def evaluation(self, kind: str, part: int, count: int) -> Sequences:
        """`count` fixed sequences of a kind (Section 3.3); another `part`, other sequences of the same classes.

        Args:
            kind: "test", as in training; "ic", novel classes; "ic2", known classes whose labels are all shifted by
                one, the answer too; "iw", known classes, of which none in the context has the query's label.

        The paper has label vectors redrawn in "ic" and "ic2"; no read-out could name those, so the known ones stay,
        as in NOTES.md. The authors' code draws the classes of "iw" freely, so that 22 in 100 have the label.
        """
        rules = {
            "test": _Rules(self.task.bursty, self.task.novel),
            "ic": _Rules(1.0, 1.0),
            "ic2": _Rules(1.0, 0.0, label_shift=1),
            "iw": _Rules(0.0, 0.0, query="outside"),
        }[kind]
        means = self._prototypes(self.task.novel_classes, self.generator(kind))
        return self._draw(count, rules, means, self.generator(kind, part))

    def trials(self, part: int, count: int) -> Sequences:
        """`count` sequences of known classes whose answer is in the context, bursty or not (AMICL, Section 2)."""
        rules = _Rules(self.task.bursty, 0.0, query="context")
        return self._draw(count, rules, self.class_means[:0], self.generator("trials", part))

    def generator(self, purpose: str, index: int = 0) -> torch.Generator:
        """Random numbers that belong to (seed, purpose, index)."""
        return generator(self.device, self.seed, purpose, index)

    def _prototypes(self, count: int, generator: torch.Generator) -> Tensor:
        shape = (count, self.task.content)
        return torch.randn(shape, generator=generator, device=self.device) * self.task.content**-0.5

    def _draw(self, count: int, rules: _Rules, novel_means: Tensor, generator: torch.Generator) -> Sequences:
        """What is in each sequence; `_tokens` then writes it down."""
        task = self.task
        options: dict = {"generator": generator, "device": self.device}
        novel = torch.rand(count, **options) < rules.novel
        bursty = (torch.rand(count, **options) < rules.bursty) | novel
        per_label = torch.where(novel, task.novel_classes // task.labels, task.classes // task.labels)
        classes = self._bursts(count, per_label, options)  # (N, P + 1)
        if rules.bursty < 1:
            classes = torch.where(bursty[:, None], classes, self._free(count, rules.query, options))
        shown = (classes + rules.label_shift) % task.labels  # (N, P + 1)
        room = max(0, task.positions - task.tokens)
        offsets = torch.randint(room + 1, (count,), **options)
        rows = classes + task.classes * novel[:, None]  # of the known and the novel prototypes, one after the other
        inputs = self._tokens(torch.cat([self.class_means, novel_means])[rows], shown[:, :-1], offsets, options)
        return Sequences(inputs, shown[:, -1], classes, shown[:, :-1], bursty, novel, offsets)

    def _bursts(self, count: int, per_label: Tensor, options: dict) -> Tensor:
        """(N, P + 1) classes, `copies` of each in random order; the last is one of the others."""
        task = self.task
        groups = -(-task.pairs // task.copies)
        if task.distinct_labels:
            labels = torch.rand(count, task.labels, **options).argsort(dim=1)[:, :groups]
        else:
            labels = torch.randint(task.labels, (count, groups), **options)
        member = (torch.rand(count, groups, **options) * per_label[:, None]).long()
        burst = (member * task.labels + labels).repeat(1, task.copies)  # (N, >= P)
        order = torch.rand(count, burst.shape[1], **options).argsort(dim=1)[:, : task.pairs]
        context = burst.gather(1, order)
        query = torch.randint(task.pairs, (count, 1), **options)
        return torch.cat([context, context.gather(1, query)], dim=1)

    def _free(self, count: int, query: str, options: dict) -> Tensor:
        """(N, P + 1) classes drawn freely, up to what `query` asks of the last."""
        task = self.task
        classes = torch.randint(task.classes, (count, task.pairs + 1), **options)
        context, last = classes[:, :-1], classes[:, -1:]
        if query == "context":
            last.copy_(context.gather(1, torch.randint(task.pairs, (count, 1), **options)))
        elif query == "outside":
            other = torch.randint(1, task.labels, context.shape, **options)  # how far the label is from the query's
            context.sub_(context % task.labels).add_((last + other) % task.labels)
        return classes

    def _tokens(self, means: Tensor, labels: Tensor, offsets: Tensor, options: dict) -> Tensor:
        """Prototypes (N, P + 1, E) of the objects, shown labels (N, P), offsets (N,) -> inputs (N, T, D)."""
        task, count = self.task, len(means)
        inputs = torch.zeros(count, task.tokens, task.width, device=self.device)
        objects = torch.randn(means.shape, **options).mul_(task.noise * task.content**-0.5).add_(means)
        end = 2 * task.pairs + 1
        torch.mul(objects, (1 + task.noise**2) ** -0.5, out=inputs[:, :end:2, task.positions :])
        inputs[:, 1:end:2, task.positions :] = self.label_means[labels]
        if task.positions:
            place = offsets[:, None] + torch.arange(task.tokens, device=self.device)  # (N, T)
            inputs.scatter_(2, place[..., None], 1.0)
        return inputs


def generator(device: torch.device, seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """Random numbers on a device that belong to (seed, purpose, index) alone."""
    words = np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), index)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]) >> 1)


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
