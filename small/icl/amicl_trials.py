"""Trials of AMICL under two conventions: as the paper's text has them, and as the authors' notebook has them.

Burns et al. 2025, Sections 2.1 and 2.2, and github.com/tfburns/AMICL-and-residual-attention-streams:

    |                   | "paper"                               | "code", the notebook                              |
    |-------------------|---------------------------------------|---------------------------------------------------|
    | pairs             | bursts in half of the trials: most    | drawn with replacement; the last one repeats one  |
    |                   | classes come twice                    | of the others                                     |
    | classes, labels   | 512 classes share 32 label vectors    | 50, or 512; the first is never drawn; each has    |
    |                   |                                       | a label vector of its own                         |
    | vectors           | one set for each seed                 | new ones for each trial                           |
    | noise, last key   | 0.1 / sqrt(E), zero                   | 0.1 / E, from N(0, 1 / E)                         |
    | a trial is right  | the retrieved vector is most like the | the value at the argmax is that label vector      |
    |                   | right label                           |                                                   |

A trial is 2 P tokens: objects and labels, the last label a blank (zero).

Dimension letters: N trials, S = 2 P tokens, P pairs, E components, L labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws
from .settings import Task
from .task import World, amicl_task

NOISE = 0.1  # epsilon
CLASSES = {"sweep": 50, "single": 512}  # of the notebook: in the sweeps of Figures 7 and 8, and in single runs


class Trials(NamedTuple):
    """N trials and what is right in them."""

    tokens: Tensor  # (N, S, E)
    last_key: Tensor | None  # (N, E) in place of zero
    vectors: Tensor  # (L, E) of all labels, or (N, P - 1, E), of each pair's label
    owner: Tensor  # (N or 1, L or P - 1): the first number that has the same vector
    answers: Tensor  # (N,), number of the right vector, the first of equals
    first: Tensor  # (N,) bool: the first object is of the class that is asked for

    def right(self, retrieved: Tensor, exactly: bool) -> Tensor:
        """retrieved (N, E) -> (N,) bool: it is the right vector `exactly`, or most like it of all."""
        if exactly:
            rows = torch.arange(len(retrieved), device=retrieved.device)
            return (retrieved == self.vectors[rows, self.answers]).all(-1)
        scores = (self.vectors @ retrieved[..., None])[..., 0] if self.vectors.ndim == 3 else retrieved @ self.vectors.T
        best = scores.argmax(-1, keepdim=True)
        return self.owner.expand(len(best), -1).gather(1, best)[:, 0] == self.answers


Draw = Callable[[int, int, int, int, int, torch.device | str, int], Trials]


@dataclass(frozen=True)
class Convention:
    """How trials are made, and when one is right.

    Args:
        name: of the convention.
        draw: length S, width E, seed, part, count, device, classes -> trials; another part, other trials of the seed.
        exactly: with argmax, only the right vector itself is right.
    """

    name: str
    draw: Draw
    exactly: bool


def paper_task(length: int, width: int) -> Task:
    """The pair task of the paper's trials."""
    return amicl_task(length, width, NOISE)


def paper_trials(
    length: int, width: int, seed: int, part: int, count: int, device: torch.device | str, classes: int
) -> Trials:
    """Trials of the pair task, whose classes and labels are those of the seed, however many `classes` are asked for."""
    world = World(paper_task(length, width), seed, device)
    drawn = world.trials(part, count)
    owner = torch.arange(len(world.label_means), device=drawn.inputs.device)[None]
    first = drawn.classes[:, 0] == drawn.classes[:, -1]
    return Trials(drawn.inputs, None, world.label_means, owner, drawn.answers, first)


def notebook_trials(
    length: int, width: int, seed: int, part: int, count: int, device: torch.device | str, classes: int
) -> Trials:
    """Trials of the notebook, of `classes` classes, the first of which is never drawn."""
    amicl_task(length, width)  # says what cannot be
    pairs, spread = length // 2, width**-0.5
    draws = Draws(torch.device(device), seed, f"notebook of {classes} classes", part)
    drawn = (draws.uniform(count, pairs - 1) * (classes - 1)).long()  # (N, P - 1)
    picked = (draws.uniform(count, 1) * (pairs - 1)).long()
    every = torch.cat([drawn, drawn.gather(1, picked)], dim=1)  # (N, P)
    owner = (every[:, :, None] == every[:, None]).to(torch.uint8).argmax(-1)  # (N, P), the first pair of each class
    rows = owner[..., None].expand(-1, -1, width)
    means, labels = (draws.normal(count, pairs, width).gather(1, rows) * spread for _ in range(2))
    noise = draws.normal(count, pairs, width) * (NOISE / width)
    objects = (means + noise) * (1 + NOISE**2) ** -0.5
    labels = torch.cat([labels[:, :-1], torch.zeros_like(labels[:, :1])], dim=1)
    tokens = torch.stack([objects, labels], dim=2).flatten(1, 2)  # (N, S, E)
    last_key = draws.normal(count, width) * spread
    return Trials(tokens, last_key, labels[:, :-1], owner[:, :-1], owner[:, -1], owner[:, -1] == 0)


CONVENTIONS = {
    "paper": Convention("paper", paper_trials, exactly=False),
    "code": Convention("code", notebook_trials, exactly=True),
}


def pearsons_plateau(length: int, classes: int) -> float:
    """Share of the notebook's trials whose first pair has another class than the one that is asked for.

    The class asked for is that of one of P - 1 pairs: of the first itself, or of another, which has the first one's
    class with a probability of 1 / (classes - 1).
    """
    others = length // 2 - 1
    return 1 - (1 / others + (others - 1) / others / (classes - 1))
