"""Maps of letters over a space, and walkers on them, many at once; a trial is a pure function of (seed, kind, number).

Kim et al. 2023, Section 2.1: a map has one of ten letters at every cell, N maps are for training and N others for
testing, and a walker starts anywhere. At each step it takes any action that can be taken, all with one probability, to
stay among them, as in the authors' code (github.com/kdkyum/transformer_memory_consolidation). Stages:

    space, seed -> letters of all maps -> a trial: which map, where from -> cells and actions -> letters, visits

Walks are drawn in NumPy on the CPU and then moved: they are the same on every device.

Dimension letters: B walkers, T cells of a walk, N maps of a kind, S cells of the space, A actions.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.common.errors import UserError

from ..draws import seeds_of
from ..spaces import Graph
from ..walks import ActionSampler, gaps_of


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
        self._sampler = ActionSampler(graph)

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
        cells, actions = self._sampler.walks(random.integers(len(self.graph.cells), size=walkers), steps, random)
        letters = self.letters[maps[:, None], cells]
        found = (maps, cells, actions, letters, gaps_of(cells))
        return Walks(*(torch.from_numpy(each).to(self.device) for each in found))
