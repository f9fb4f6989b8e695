"""Maps of letters over a space, and walkers on them, many at once; a trial is a pure function of (seed, kind, number).

nmda-transformer.txt, Section 2.1, and NOTES.md: a map has one of ten letters at every cell, N maps are for training and
N others for testing; a walker starts anywhere and takes, at each step, any action that can be taken, all with one
probability, to stay among them. Stages:

    space, seed -> letters of all maps -> a trial: which map, where from -> cells and actions -> letters, visits

Walks are drawn in NumPy on the CPU and then moved: they are the same on every device.

Dimension letters: B walkers, T cells of a walk, N maps of a kind, S cells of the space, A actions.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.errors import UserError

from ..draws import seeds_of
from .graph import NOWHERE, Graph

FACES_AT_MOST = 2**22  # entries of each of the two tables of dice: 17 and 34 MB


class Walks(NamedTuple):
    """B walks of T cells, the first of which is where they start."""

    maps: Tensor  # (B,), of 2 N: the first N are those of training
    cells: Tensor  # (B, T)
    actions: Tensor  # (B, T), what led to the cell; to stay, at the first
    letters: Tensor  # (B, T), what is seen there
    gaps: Tensor  # (B, T), steps since the cell was visited last; 0 where this is the first visit of the walk

    def visited(self, window: int) -> Tensor:
        """(B, T) bool: whether the cell occurs in the `window` steps before. Wrong there is a working-memory error."""
        return (self.gaps > 0) & (self.gaps <= window)

    @property
    def first(self) -> Tensor:
        """(B, T) bool: whether this is the cell's first visit of the walk."""
        return self.gaps == 0


class World:
    """The maps of one seed, and walks on them.

    Args:
        graph: the space.
        maps: N, of training; as many others are for testing.
        seed: of maps and walks, at least 0.
        letters: how many different ones.
        device: where walks go.

    Raises:
        UserError: a number below its least.
    """

    def __init__(
        self, graph: Graph, maps: int, seed: int, letters: int = 10, device: torch.device | str = "cpu"
    ) -> None:
        least = {"maps": (maps, 1), "seed": (seed, 0), "letters": (letters, 2)}
        if problems := [
            f"{name} {value} must be at least {low}" for name, (value, low) in least.items() if value < low
        ]:
            raise UserError("; ".join(problems))
        self.graph, self.maps, self.seed, self.device = graph, maps, seed, torch.device(device)
        random = np.random.default_rng(seeds_of(seed, "letters"))
        self.letters = random.integers(letters, size=(2 * maps, len(graph.cells)))  # (2 N, S)
        self._dice = _Dice(graph)

    def trial(self, kind: str, number: int, walkers: int, steps: int, only: int | None = None) -> Walks:
        """Walks of one trial: B = walkers, T = steps + 1.

        Args:
            kind: "train"; "familiar" or "novel": evaluation on the maps of training, or on the others; or "record".
            number: of the trial.
            only: the map of all walkers, from 0; N and more are novel. None draws one for each.
        """
        random = np.random.default_rng(seeds_of(self.seed, kind, number))
        maps = random.integers(self.maps, size=walkers) + (self.maps if kind == "novel" else 0)
        if only is not None:
            maps[:] = only
        walked = self._dice.walk(random.integers(len(self.graph.cells), size=walkers), steps, random)
        cells, actions = (np.ascontiguousarray(each.T) for each in walked)  # (B, T)
        letters = self.letters[maps[:, None], cells]
        found = (maps, cells, actions, letters, _gaps(cells))
        return Walks(*(torch.from_numpy(each).to(self.device) for each in found))


class _Dice:
    """A die for every cell, with as many faces for each action that can be taken there.

    Of M faces, M the least common multiple of how many actions the cells have, so that a step is one random integer and
    one look-up: place <- table[place + face], a place being its cell's row of the table. Rows are as long as the next
    power of two, so that a place is its cell, shifted. Spaces whose M is too large roll floor(u * actions) instead.
    """

    def __init__(self, graph: Graph) -> None:
        can = graph.targets != NOWHERE
        self.sides = can.sum(1)  # (S,)
        self.actions = np.argsort(~can, axis=1, kind="stable")  # (S, A), those that can be taken first
        self.targets = np.take_along_axis(graph.targets, self.actions, axis=1)
        faces = math.lcm(*self.sides.tolist())
        self.shift = (faces - 1).bit_length()
        self.faces = faces if len(can) << self.shift <= FACES_AT_MOST else None
        if self.faces is not None:
            side_of = np.zeros((len(can), 1 << self.shift), np.int64)
            side_of[:, :faces] = np.arange(faces) * self.sides[:, None] // faces
            self.table = (np.take_along_axis(self.targets, side_of, axis=1) << self.shift).astype(np.int32).ravel()
            self.action_of = np.take_along_axis(self.actions, side_of, axis=1).ravel()

    def walk(self, start: np.ndarray, steps: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """start (B,) -> cells (steps + 1, B) and the actions that led there."""
        actions = np.zeros((steps + 1, len(start)), np.int64)
        if self.faces is None:
            cells = np.empty_like(actions)
            cells[0] = start
            uniform = random.random((steps, len(start)))
            for step in range(steps):
                side = (uniform[step] * self.sides[cells[step]]).astype(np.int64)
                actions[step + 1] = self.actions[cells[step], side]
                cells[step + 1] = self.targets[cells[step], side]
            return cells, actions
        rolled = random.integers(self.faces, size=(steps, len(start)), dtype=np.int32)
        places = np.empty((steps + 1, len(start)), np.int32)
        places[0] = start << self.shift
        for step in range(steps):
            rolled[step] += places[step]
            np.take(self.table, rolled[step], out=places[step + 1], mode="clip")
        np.take(self.action_of, rolled, out=actions[1:], mode="clip")
        return (places >> self.shift).astype(np.int64), actions


def _gaps(cells: np.ndarray) -> np.ndarray:
    """(B, T) cells -> steps since the same cell before, 0 where there is none."""
    order = np.argsort(cells.astype(np.uint16) if cells.max() < 2**16 else cells, axis=1, kind="stable")
    sorted_cells = np.take_along_axis(cells, order, axis=1)
    again = sorted_cells[:, 1:] == sorted_cells[:, :-1]
    gaps = np.zeros_like(cells)
    np.put_along_axis(gaps, order[:, 1:], np.where(again, np.diff(order, axis=1), 0), axis=1)
    return gaps
