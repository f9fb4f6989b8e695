"""Walks in environments of one structure: the same rules of space everywhere, other symbols in each.

Whittington et al. 2022, Section 3: a model predicts the symbol of the cell that an action leads to, in many
environments that share what actions do, of several sizes. Every cell of an environment has one of 45 symbols, as in
TEM's reference code (github.com/djcrw/generalising-structural-knowledge). Stages:

    spaces, seed -> which space each environment has -> walks -> symbols of the cells; which links are new

An episode is a pure function of (seed, kind, number). Dimension letters: B environments, T cells of a walk, S cells of
the largest space.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.common.errors import UserError

from ..draws import seeds_of
from ..spaces import Graph
from ..walks import ActionSampler, gaps_of
from .settings import SYMBOLS, TemSettings


class Episode(NamedTuple):
    """A walk in each of B environments."""

    spaces: Tensor  # (B,), number of the space
    cells: Tensor  # (B, T), of that space
    actions: Tensor  # (B, T), what led to the cell; to stay, at the first
    symbols: Tensor  # (B, T), what is seen there
    visited: Tensor  # (B, T) bool: the cell was seen before in this walk
    new_link: Tensor  # (B, T) bool: the action was not taken before from the cell before

    @property
    def zero_shot(self) -> Tensor:
        """(B, T) bool: a new link leads to a cell seen before: only the rules of space tell what is there.

        To stay is no link in this sense: it leads to what was just seen.
        """
        return self.new_link & self.visited & (self.actions > 0)


class Environments:
    """Environments over several spaces of one structure.

    Args:
        spaces: with the same actions; environment b is over space b modulo their number.
        seed: at least 0.
        symbols: how many different ones.
        device: where episodes go.

    Raises:
        UserError: no space, spaces whose actions differ, or a number below its least.
    """

    def __init__(
        self, spaces: Sequence[Graph], seed: int, symbols: int = SYMBOLS, device: torch.device | str = "cpu"
    ) -> None:
        if not spaces:
            raise UserError("environments need a space, and none is given")
        if other := next((space for space in spaces if space.actions != spaces[0].actions), None):
            raise UserError(
                f"spaces must share one structure: one has the actions {', '.join(spaces[0].actions)}, another "
                f"{', '.join(other.actions)}"
            )
        if seed < 0 or symbols < 2:
            raise UserError(f"seed {seed} must be at least 0, and symbols {symbols} at least 2")
        self.spaces, self.seed, self.symbols, self.device = tuple(spaces), seed, symbols, torch.device(device)
        self.sampler = [ActionSampler(space) for space in spaces]

    @property
    def actions(self) -> int:
        """How many, the first of which is to stay."""
        return len(self.spaces[0].actions)

    def episode(self, kind: str, number: int, environments: int, steps: int) -> Episode:
        """Fresh environments and a walk in each: B = environments, T = steps + 1.

        Args:
            kind: "train", "test" or whatever else: other environments for each.
            number: of the episode.
        """
        random = np.random.default_rng(seeds_of(self.seed, f"environments {kind}", number))
        spaces = np.arange(environments) % len(self.spaces)
        cells, actions = np.zeros((2, environments, steps + 1), np.int64)
        for index, (space, sampler) in enumerate(zip(self.spaces, self.sampler, strict=True)):
            own = spaces == index
            if not own.any():  # fewer environments than spaces
                continue
            start = random.integers(len(space.cells), size=own.sum())
            cells[own], actions[own] = sampler.walks(start, steps, random)
        most = max(len(space.cells) for space in self.spaces)
        drawn = random.integers(self.symbols, size=(environments, most))  # (B, S)
        links = cells[:, :-1] * self.actions + actions[:, 1:]
        new_link = np.zeros(cells.shape, bool)
        new_link[:, 1:] = gaps_of(links) == 0
        found = (spaces, cells, actions, np.take_along_axis(drawn, cells, axis=1), gaps_of(cells) > 0, new_link)
        return Episode(*(torch.from_numpy(each).to(self.device) for each in found))


class LongWalks:
    """Walks that are longer than a gradient step, each in an environment of its own, which go on from step to step.

    A walk of row b ends by itself, and another one in a fresh environment takes its place. Lengths are whole parts. The
    nth walk of a row, and so every part, is a pure function of (seed, row, n).

    Args:
        environments: spaces, seed and symbols.
        settings: batch B, and parts of `backprop` steps; a walk that begins at a gradient step has
            settings.walk(step) steps, up to `walk_spread` more or less. The first walks of all rows have any length
            that occurs, so that they do not end together.
    """

    def __init__(self, environments: Environments, settings: TemSettings) -> None:
        self.environments, self.settings = environments, settings
        self._walks = [_Walk(row, 0, 1, self._parts(row, 0, 1)) for row in range(settings.batch)]
        self._drawn: dict[int, tuple[_Walk, np.ndarray, np.ndarray]] = {}

    def _parts(self, row: int, nth: int, step: int) -> int:
        """How many gradient steps a walk takes that begins at `step`."""
        settings, spread = self.settings, self.settings.walk_spread
        low, high = settings.walk(step) - spread, settings.walk(step) + spread
        if nth == 0 and spread:
            low = min(settings.walk_from, settings.walk_to) - spread
            high = max(settings.walk_from, settings.walk_to) + spread
        random = np.random.default_rng(seeds_of(settings.seed, f"length {row}", nth))
        return -(-int(random.integers(low, high + 1)) // settings.backprop)

    def part(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions and symbols (B, backprop + 1) of gradient step `step`, from 1, and which walks begin (B,).

        The last cell of a part is the first one of the next. Steps must not go back.
        """
        of, rows, fresh = self.settings.backprop, [], []
        for row, walk in enumerate(self._walks):
            while walk.end <= step:
                walk = _Walk(row, walk.nth + 1, walk.end, self._parts(row, walk.nth + 1, walk.end))
            self._walks[row] = walk
            if row not in self._drawn or self._drawn[row][0] != walk:
                self._drawn[row] = walk, *self._draw(walk)
            now = (step - walk.begin) * of
            rows.append([each[now : now + of + 1] for each in self._drawn[row][1:]])
            fresh.append(step == walk.begin)
        actions, symbols = (torch.from_numpy(np.stack(each)) for each in zip(*rows, strict=True))
        device = self.environments.device
        return actions.to(device), symbols.to(device), torch.tensor(fresh, device=device)

    def _draw(self, walk: "_Walk") -> tuple[np.ndarray, np.ndarray]:
        """Actions and symbols of a whole walk."""
        spaces = self.environments.spaces
        random = np.random.default_rng(seeds_of(self.settings.seed, f"walk {walk.row}", walk.nth))
        index = (walk.row + walk.nth) % len(spaces)
        count = len(spaces[index].cells)
        letters = random.integers(self.environments.symbols, size=count)
        sampler = self.environments.sampler[index]
        cells, actions = sampler.walks(random.integers(count, size=1), walk.parts * self.settings.backprop, random)
        return actions[0], letters[cells[0]]


class _Walk(NamedTuple):
    """The nth walk of a row, which begins at a gradient step and takes so many."""

    row: int
    nth: int
    begin: int
    parts: int

    @property
    def end(self) -> int:
        """The first gradient step after it."""
        return self.begin + self.parts


def accuracy(right: Tensor, of: Tensor) -> float:
    """The share of right predictions (B, T) among those chosen by `of` (B, T) bool; NaN of none."""
    return (right & of).sum().item() / of.sum().item() if of.any() else float("nan")
