"""Episodes against their definition: structure shared, symbols fresh, links and visits counted slowly."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from llm.common.errors import UserError
from small.spaces import NOWHERE, space
from small.tem.environments import Environments, LongWalks, accuracy
from small.tem.settings import TemSettings

STRUCTURES = (("3x3", "4x4", "3x5"), ("hex:3x3", "hex:4x4"), ("line:5", "line:8"), ("family:3", "family:4"))


def environments(*spaces: str, seed: int = 0, symbols: int = 45) -> Environments:
    return Environments([space(text) for text in spaces], seed, symbols)


@pytest.mark.parametrize("spaces", STRUCTURES)
def test_walks_obey_their_space_and_a_cell_keeps_its_symbol(spaces: tuple[str, ...]) -> None:
    made = environments(*spaces)
    episode = made.episode("train", 0, 20, 60)
    assert episode.cells.shape == (20, 61) and episode.spaces.tolist() == [n % len(spaces) for n in range(20)]
    for number, cells, actions, symbols in zip(*(part.tolist() for part in episode[:4]), strict=True):
        seen: dict[int, int] = {}
        targets = made.spaces[number].targets
        for before, action, after in zip(cells, actions[1:], cells[1:], strict=False):
            assert targets[before, action] == after != NOWHERE
        for cell, symbol in zip(cells, symbols, strict=True):
            assert seen.setdefault(cell, symbol) == symbol


@given(st.sampled_from(STRUCTURES), st.integers(0, 99), st.integers(1, 80))
@settings(max_examples=40)
def test_zero_shot_links_are_those_of_a_slow_count(spaces: tuple[str, ...], number: int, steps: int) -> None:
    episode = environments(*spaces).episode("test", number, 4, steps)
    for row in range(4):
        cells, actions = episode.cells[row].tolist(), episode.actions[row].tolist()
        taken, seen = set(), {cells[0]}
        assert not episode.zero_shot[row, 0] and not episode.visited[row, 0]
        for time in range(1, steps + 1):
            link = (cells[time - 1], actions[time])
            zero_shot = link not in taken and cells[time] in seen and actions[time] != 0
            assert episode.zero_shot[row, time].item() == zero_shot
            assert episode.visited[row, time].item() == (cells[time] in seen)
            taken.add(link)
            seen.add(cells[time])


def test_an_episode_is_a_function_of_seed_kind_and_number() -> None:
    def shown(seed: int, kind: str, number: int) -> str:
        return str(environments("3x3", "4x4", seed=seed).episode(kind, number, 6, 20))

    assert shown(1, "train", 2) == shown(1, "train", 2)
    assert len({shown(*each) for each in ((1, "train", 2), (2, "train", 2), (1, "test", 2), (1, "train", 3))}) == 4


def test_memory_of_sequences_is_at_chance_on_zero_shot_links() -> None:
    """What followed the same symbol and action before says nothing of a link that was never taken."""
    episode = environments("5x5", "6x6", "7x7").episode("test", 0, 60, 300)
    right = torch.zeros_like(episode.visited)
    for row in range(60):
        symbols, actions = episode.symbols[row].tolist(), episode.actions[row].tolist()
        after: dict[tuple[int, int], int] = {}
        for time in range(1, 301):
            key = (symbols[time - 1], actions[time])
            right[row, time] = after.get(key, symbols[time - 1]) == symbols[time]
            after[key] = symbols[time]
    assert episode.zero_shot.sum() > 2000
    assert accuracy(right, episode.zero_shot) < 0.08  # chance is 1 / 45; one key of two cells gives a little more
    assert accuracy(right, episode.visited & ~episode.new_link) > 0.6


def test_symbols_are_uniform_and_no_prediction_is_no_accuracy() -> None:
    episode = environments("3x3", symbols=5).episode("train", 0, 4000, 1)
    counts = np.bincount(episode.symbols[:, 0].numpy(), minlength=5)
    assert abs(counts / 4000 - 0.2).max() < 0.03
    assert np.isnan(accuracy(episode.visited, torch.zeros_like(episode.visited)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: environments("3x3", "hex:3x3"), "spaces must share one structure: one has the actions stay, right"),
        (lambda: environments(), "need a space, and none is given"),
        (lambda: environments("3x3", seed=-1), "seed -1 must be at least 0"),
        (lambda: environments("3x3", symbols=1), "symbols 1 at least 2"),
    ],
)
def test_what_cannot_be_is_refused(make, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_long_walks_go_on_end_by_themselves_and_are_followed_by_others() -> None:
    settings = TemSettings(
        spaces=("3x3", "3x4"), symbols=9, steps=60, batch=3, walk_from=30, walk_to=10, walk_spread=5, backprop=4
    )
    worlds = Environments([space(text) for text in settings.spaces], 0, symbols=9)
    walks, lengths, now, last = LongWalks(worlds, settings), [], [0, 0, 0], None
    for step in range(1, 61):
        actions, symbols, fresh = walks.part(step)
        assert actions.shape == symbols.shape == (3, 5) and (step > 1 or fresh.all())
        for row in range(3):
            if fresh[row]:
                lengths += [(step, now[row])] if step > 1 else []
                now[row] = 0
                assert actions[row, 0] == 0
            else:
                assert actions[row, 0] == last[0][row, -1] and symbols[row, 0] == last[1][row, -1]
            now[row] += 4
        last = actions, symbols
    shrinks = [length for _, length in lengths]
    assert min(shrinks) >= 5 and max(shrinks) <= 36 and all(length % 4 == 0 for length in shrinks)
    assert np.mean(shrinks[-6:]) < np.mean(shrinks[:6])
    for begun in (17, 43):  # a training that resumes there
        again = LongWalks(worlds, settings).part(begun)
        other = LongWalks(worlds, settings)
        for step in range(1, begun):
            other.part(step)
        assert all(torch.equal(one, two) for one, two in zip(again, other.part(begun), strict=True))


def test_a_long_walk_sees_one_symbol_at_each_cell() -> None:
    settings = TemSettings(spaces=("3x3",), symbols=40, batch=1, walk_from=200, walk_to=200, backprop=200)
    room = space("3x3")
    actions, symbols, _ = LongWalks(Environments([room], 0, symbols=40), settings).part(1)
    # Of all starts, one at least explains every symbol by the cell that the actions lead to.
    explained = []
    for start in range(9):
        cell, seen = start, {}
        alike = []
        for action, symbol in zip(actions[0].tolist(), symbols[0].tolist(), strict=True):
            cell = int(room.targets[cell, action])
            alike.append(cell >= 0 and seen.setdefault(cell, symbol) == symbol)
            if cell < 0:
                break
        explained.append(all(alike) and len(alike) == 201)
    assert any(explained)
