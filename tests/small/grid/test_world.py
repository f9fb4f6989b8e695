"""Walks against their definition: transitions, stationary distribution, visits; a trial as a function of its seed."""

import collections
import math
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import stats

from llm.common.errors import UserError
from small import walks as small_walks
from small.grid.world import Walks, World
from small.spaces import NOWHERE, space

SPACES = ("4x5", "line:6", "hex:4x4", "3x3x2")


def world(text: str = "4x5", seed: int = 3, maps: int = 4) -> World:
    return World(space(text), maps, seed)


def test_a_step_is_an_action_of_its_cell_and_leads_where_it_says() -> None:
    for text in SPACES:
        graph = space(text)
        walks = World(graph, 2, 0).trial("train", 0, 50, 40)
        came_from, action, came_to = walks.cells[:, :-1], walks.actions[:, 1:], walks.cells[:, 1:]
        led = torch.from_numpy(graph.targets)[came_from, action]
        assert (led != NOWHERE).all() and torch.equal(led, came_to)
        assert not walks.actions[:, 0].any()


@pytest.mark.parametrize("text", ["11x11", *SPACES])
@pytest.mark.parametrize("reach", [2, 1, 0], ids=["two steps", "one step", "uniform"])
def test_transitions_and_stationary_distribution_are_within_one_percent(text, reach, monkeypatch) -> None:
    """Of D^-1 (A + I), whose stationary distribution is proportional to the number of actions."""
    graph = space(text)
    faces = math.lcm(*(graph.targets != NOWHERE).sum(1).tolist())
    monkeypatch.setattr(small_walks, "FACES_AT_MOST", len(graph.cells) * faces**reach if reach else 1)
    assert small_walks.ActionSampler(graph).reach == reach
    walks = World(graph, 1, 0).trial("train", 0, 4000, 1000)
    pairs = walks.cells[:, :-1] * len(graph.cells) + walks.cells[:, 1:]
    counts = torch.bincount(pairs.flatten(), minlength=len(graph.cells) ** 2).view(len(graph.cells), -1).numpy()
    rates = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(rates, graph.transition, atol=0.01)
    for found, expected in zip(counts, graph.transition, strict=True):
        assert stats.chisquare(found[expected > 0], expected[expected > 0] * found.sum()).pvalue > 1e-6
    sides = (graph.targets != NOWHERE).sum(1)
    visits = torch.bincount(walks.cells[:, 500:].flatten(), minlength=len(sides)).numpy()
    left, right = visits / visits.sum(), sides / sides.sum()
    assert 0.5 * abs(left - right).sum() < 0.01


@pytest.mark.parametrize("text", SPACES)
def test_every_roll_of_two_steps_counts_the_walks_of_two_steps(text: str, monkeypatch) -> None:
    """Exactly: all rolls from a cell together hold every walk as often as its probability says."""
    graph = space(text)
    monkeypatch.setattr(small_walks, "BLOCK", 2**30)
    sampler = small_walks.ActionSampler(graph)
    assert sampler.reach == 2

    class EveryRoll:
        def integers(self, high: int, size: tuple, dtype: object) -> np.ndarray:
            return np.arange(high).reshape(size)  # one block

    for start in range(len(graph.cells)):
        cells, actions = sampler.walk(np.full(sampler.rolls, start), 2, EveryRoll())  # type: ignore[arg-type]
        walks = zip(*actions[0].T.tolist(), *cells[0].T.tolist(), strict=True)
        found = collections.Counter(walks)
        expected = {
            (first, second, int(there), int(then)): 1 / np.sum(graph.targets[[start, there]] != NOWHERE, axis=1).prod()
            for first, there in enumerate(graph.targets[start])
            for second, then in enumerate(graph.targets[there])
            if there != NOWHERE and then != NOWHERE
        }
        assert {walk: count / sampler.rolls for walk, count in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize(("cells", "reach"), [(256, 2), (257, 2), (65_536, 2), (65_537, 1), (2_100_000, 0)])
def test_walks_on_rings_of_any_size(cells: int, reach: int) -> None:
    """Cells of one, two and four bytes; everyone goes on by one or stays."""
    cells_of = np.arange(cells)
    sampler = small_walks.ActionSampler(Ring(np.stack([cells_of, (cells_of + 1) % cells], axis=1)))  # type: ignore[arg-type]
    assert sampler.reach == reach
    start = np.arange(cells - 50, cells)
    walked, actions = sampler.walks(start, 21, np.random.default_rng(0))
    assert np.array_equal(walked, (start[:, None] + actions.cumsum(1)) % cells)
    assert 0.4 < actions[:, 1:].mean() < 0.6


class Ring(NamedTuple):
    """What a sampler reads of a graph, whose own checks take long for so many cells."""

    targets: np.ndarray


def test_actions_may_outnumber_cells_of_a_byte() -> None:
    """A star with 300 arms: the middle has as many actions, an arm two."""
    targets = np.full((301, 302), NOWHERE)
    targets[:, 0] = np.arange(301)
    targets[0, 1:301] = np.arange(1, 301)
    targets[1:, 301] = 0
    walked, actions = small_walks.ActionSampler(Ring(targets)).walks(
        np.zeros(400, np.int64), 9, np.random.default_rng(0)
    )  # type: ignore[arg-type]
    assert (targets[walked[:, :-1], actions[:, 1:]] == walked[:, 1:]).all() and actions.max() == 301


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_walks_of_any_length_are_whole(steps: int) -> None:
    """Also of more walkers than a block of rolls holds."""
    graph = space("4x5")
    walks = World(graph, 2, 0).trial("train", 0, 70_000, steps)
    assert walks.cells.shape == walks.actions.shape == (70_000, steps + 1)
    led = torch.from_numpy(graph.targets)[walks.cells[:, :-1], walks.actions[:, 1:]]
    assert torch.equal(led, walks.cells[:, 1:])


def test_letters_are_those_of_the_map_and_uniform() -> None:
    made = world(maps=500)
    assert made.letters.shape == (1000, 20)
    assert stats.chisquare(np.bincount(made.letters.ravel(), minlength=10)).pvalue > 1e-5
    for kind in ("train", "familiar", "novel"):
        walks = made.trial(kind, 0, 300, 30)
        assert torch.equal(walks.letters, torch.from_numpy(made.letters)[walks.maps[:, None], walks.cells])
        assert ((walks.maps >= 500) == (kind == "novel")).all()
        assert len(walks.maps.unique()) > 150


@given(st.sampled_from(SPACES), st.integers(0, 50), st.integers(1, 60), st.integers(1, 40))
@settings(max_examples=60)
def test_visits_are_those_of_a_slow_count(text: str, seed: int, steps: int, window: int) -> None:
    walks = World(space(text), 2, seed).trial("familiar", 1, 3, steps)
    visited, first = walks.visited(window), walks.first
    for row, cells in enumerate(walks.cells.tolist()):
        for now, cell in enumerate(cells):
            assert visited[row, now].item() == (cell in cells[max(0, now - window) : now])
            assert first[row, now].item() == (cell not in cells[:now])


def test_a_trial_is_a_function_of_seed_kind_and_number() -> None:
    def cells(seed: int, kind: str, number: int) -> list:
        return world(seed=seed).trial(kind, number, 5, 20).cells.tolist()

    assert cells(3, "train", 2) == cells(3, "train", 2)
    assert (
        len({str(cells(*each)) for each in ((3, "train", 2), (4, "train", 2), (3, "novel", 2), (3, "train", 3))}) == 4
    )
    assert (world(seed=3).letters != world(seed=4).letters).any()


def test_walkers_may_be_put_on_one_map() -> None:
    walks = world().trial("record", 0, 20, 5, only=6)
    assert (walks.maps == 6).all()
    assert torch.equal(walks.letters, torch.from_numpy(world().letters[6])[walks.cells])


def test_walkers_start_anywhere() -> None:
    starts = world().trial("train", 0, 4000, 1).cells[:, 0]
    assert stats.chisquare(torch.bincount(starts, minlength=20).numpy()).pvalue > 1e-5


def test_visits_of_a_walk_by_hand() -> None:
    cells = torch.tensor([[4, 4, 5, 4, 6, 5]])
    walks = Walks(*[torch.zeros(1)] * 4, torch.from_numpy(small_walks.gaps_of(cells.numpy())))
    assert walks.gaps.tolist() == [[0, 1, 0, 2, 0, 3]]
    assert walks.visited(2).tolist() == [[False, True, False, True, False, False]]


@pytest.mark.parametrize(("changed", "named"), [({"maps": 0}, "maps 0"), ({"seed": -1}, "seed -1")])
def test_numbers_below_their_least_are_refused(changed: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        world(**changed)
