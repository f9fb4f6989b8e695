"""Walkers on a space, many at once, drawn in NumPy."""

import math

import numpy as np

from .spaces import NOWHERE, Graph

FACES_AT_MOST = 2**22  # entries of each of the two tables of a sampler: 17 MB, and 17 or 34 MB
BLOCK = 2**16  # integers at a time, which stay in a core's cache


class ActionSampler:
    """Sampler of actions: at every cell, each action that can be taken there has the same probability.

    A step is one random integer below M, the least common multiple of how many actions the cells have, and one look-up:
    place <- table[place + integer], a place being where its cell's row of the table begins. If the table stays small,
    one integer below M^2 is two steps. Spaces whose M is too large draw floor(u * actions) instead.
    """

    def __init__(self, graph: Graph) -> None:
        can = graph.targets != NOWHERE
        self.sides = can.sum(1)  # (S,)
        self.actions = np.argsort(~can, axis=1, kind="stable")  # (S, A), those that can be taken first
        self.targets = np.take_along_axis(graph.targets, self.actions, axis=1)
        faces = math.lcm(*self.sides.tolist())
        self.part = np.min_scalar_type(max(can.shape) - 1)  # of a cell or an action
        packed = 2 * self.part.itemsize  # bytes of a step; a number has at most eight
        fits = (n for n in (2, 1) if len(can) * faces**n <= FACES_AT_MOST and packed * n <= 8)
        self.reach = next(fits, 0)
        if self.reach:
            self._make_tables(faces)

    def _make_tables(self, faces: int) -> None:
        """Make `table`, of the next place; and `packed`, of the cells and actions of a draw, in one number."""
        self.rolls = faces**self.reach
        count = len(self.sides)
        packed_steps = np.empty((count, self.rolls, 2, self.reach), self.part)
        cells, rolled = np.arange(count)[:, None], np.arange(self.rolls)
        for nth in range(self.reach):
            side = rolled // faces**nth % faces * self.sides[cells] // faces  # (S, rolls)
            packed_steps[:, :, 1, nth] = self.actions[cells, side]
            packed_steps[:, :, 0, nth] = cells = self.targets[cells, side]
        self.table = (cells * self.rolls).astype(np.int32).ravel()
        self.packed = packed_steps.ravel().view(f"u{2 * self.reach * packed_steps.itemsize}")

    def walks(self, start: np.ndarray, steps: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """start (B,) -> cells, the first of which is the start, and what led there: (B, steps + 1) int64 twice."""
        cells, actions = np.zeros((2, len(start), steps + 1), np.int64)
        cells[:, 0] = start
        for whole, walked in zip((cells, actions), self.walk(start, steps, random), strict=True):
            whole[:, 1:] = walked.transpose(1, 0, 2).reshape(len(start), -1)[:, :steps]
        return cells, actions

    def walk(self, start: np.ndarray, steps: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """start (B,) -> cells after every step and the actions that led there: (R, B, n), in R draws of n steps."""
        if not self.reach:
            return self._walk_without_tables(start, steps, random)
        rolls, walkers = -(-steps // self.reach), len(start)
        packed_steps = np.empty((rolls, walkers), self.packed.dtype)
        place = (start * self.rolls).astype(np.int32)
        add, take = np.add, self.table.take  # a loop of few microseconds a step
        for block in np.array_split(packed_steps, -(-packed_steps.size // BLOCK)):
            rolled = random.integers(self.rolls, size=block.shape, dtype=np.min_scalar_type(self.rolls - 1)).astype(
                np.int32
            )
            for faces in rolled:
                add(faces, place, faces)
                take(faces, None, place, "clip")
            self.packed.take(rolled, None, block, "clip")
        parts = packed_steps.view(self.part).reshape(rolls, walkers, 2, self.reach)
        return parts[:, :, 0], parts[:, :, 1]

    def _walk_without_tables(
        self, start: np.ndarray, steps: int, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        cells, actions = np.empty((2, steps, len(start), 1), np.int64)
        now, uniform = start, random.random((steps, len(start)))
        for step in range(steps):
            side = (uniform[step] * self.sides[now]).astype(np.int64)
            actions[step, :, 0] = self.actions[now, side]
            cells[step, :, 0] = now = self.targets[now, side]
        return cells, actions


def gaps_of(cells: np.ndarray) -> np.ndarray:
    """(B, T) cells -> steps since the same cell before, 0 where there is none."""
    order = np.argsort(cells.astype(np.uint16) if cells.max() < 2**16 else cells, axis=1, kind="stable")
    sorted_cells = np.take_along_axis(cells, order, axis=1)
    again = sorted_cells[:, 1:] == sorted_cells[:, :-1]
    gaps = np.zeros_like(cells)
    np.put_along_axis(gaps, order[:, 1:], np.where(again, np.diff(order, axis=1), 0), axis=1)
    return gaps
