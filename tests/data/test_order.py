"""The order is a permutation, a different one each epoch, and looks like a random one."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.order import WindowOrder, permute, round_keys

WINDOWS = 20_500_000  # of 4,096 tokens, in the 84 billion of the real run


@given(items=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_every_epoch_visits_every_item_once(items, seed, epoch):
    keys = round_keys(seed, epoch)
    visited = [permute(index, items, keys) for index in range(items)]
    assert sorted(visited) == list(range(items))


@given(items=st.integers(1, 300), batch_size=st.integers(1, 40), seed=st.integers(0, 9))
def test_batches_run_through_the_epochs_without_a_gap(items, batch_size, seed):
    order = WindowOrder(items, batch_size, seed)
    steps = -(-3 * items // batch_size)
    visits = [(order.epoch(s, r), order.item(s, r)) for s in range(steps) for r in range(batch_size)]
    for epoch in range(3):
        assert sorted(item for at, item in visits if at == epoch) == list(range(items))
    assert [epoch for epoch, _ in visits] == sorted(epoch for epoch, _ in visits)


@given(
    items=st.integers(1, 10**12),
    batch_size=st.integers(1, 4096),
    seed=st.integers(0, 2**63),
    step=st.integers(0, 10**9),
    data=st.data(),
)
def test_rows_and_items_agree(items, batch_size, seed, step, data):
    order = WindowOrder(items, batch_size, seed)
    start = data.draw(st.integers(0, batch_size - 1))
    stop = data.draw(st.integers(start, min(batch_size, start + 5)))
    rows = order.rows(step, start, stop)
    assert rows == [WindowOrder(items, batch_size, seed).item(step, row) for row in range(start, stop)]
    assert all(0 <= item < items for item in rows)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_only_share_out_one_order(ranks):
    order, share = WindowOrder(WINDOWS, 64, 5), 64 // ranks
    for step in (0, 1, 320_311, 320_312, 10**7):  # 320,312 = 20.5 million / 64: where the first epoch ends
        parts = [order.rows(step, rank * share, (rank + 1) * share) for rank in range(ranks)]
        assert [item for part in parts for item in part] == order.rows(step, 0, 64)


def test_the_real_size_is_a_bijection():
    """All 20.5 million windows by `permute_all`, which is `permute` as far as 10,000 of them are drawn."""
    keys = round_keys(1234, 0)
    drawn = [0, WINDOWS - 1, *random.Random(0).sample(range(WINDOWS), 10_000)]
    images = [permute(index, WINDOWS, keys) for index in drawn]
    assert permute_all(np.array(drawn), WINDOWS, keys).tolist() == images
    visits = np.zeros(WINDOWS, np.uint8)
    for start in range(0, WINDOWS, 1 << 18):  # as many as a cache holds
        visits[permute_all(np.arange(start, min(start + (1 << 18), WINDOWS)), WINDOWS, keys)] = 1
    assert visits.all()  # as many images as windows, and each window among them: each once


def permute_all(indices, size, keys):
    """`permute` of many indices at once, written from its description: [n] -> [n]."""
    side = np.uint64(math.ceil(math.sqrt(size)))  # columns
    height = np.uint64(math.ceil(size / int(side)))

    def mixed(value, key):
        once = (value ^ np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)  # uint64 wraps around
        twice = (once ^ (once >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        return twice >> np.uint64(32)

    out = indices.astype(np.uint64)
    walking = np.ones(len(out), bool)
    while walking.any():
        row, column = np.divmod(out[walking], side)
        for for_row, for_column in zip(keys[::2], keys[1::2], strict=True):
            row = (row + mixed(column, for_row)) % height
            column = (column + mixed(row, for_column)) % side
        out[walking] = row * side + column
        walking &= out >= size
    return out.astype(np.int64)


def test_seeds_and_epochs_are_unlike_each_other():
    orders = [[WindowOrder(1000, 10, seed).item(s, r) for s in range(300) for r in range(10)] for seed in range(4)]
    epochs = [tuple(order[1000 * epoch : 1000 * (epoch + 1)]) for order in orders for epoch in range(3)]
    assert len(set(epochs)) == len(epochs)
    for i, one in enumerate(epochs):
        for other in epochs[i + 1 :]:  # two random permutations agree in one place on average, in 10 never
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


@pytest.mark.parametrize("items", [5, 17, 100])
def test_all_places_and_all_neighbours_are_equally_likely(items):
    """Chi squared of (place, item) and of the difference of neighbours, over 1,500 epochs, within six deviations."""
    epochs = 1500
    table = np.array([[permute(i, items, round_keys(3, e)) for i in range(items)] for e in range(epochs)])
    places = np.stack([np.bincount(table[:, place], minlength=items) for place in range(items)])
    steps = np.bincount((np.diff(table, axis=1) % items).ravel(), minlength=items)[1:]
    for counts, freedom in ((places, (items - 1) ** 2), (steps, items - 2)):
        chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / freedom
        assert chi < 1 + 6 * (2 / freedom) ** 0.5


def test_a_large_order_has_no_trend():
    index = np.arange(20_000)
    keys = round_keys(0, 0)
    image = np.array([permute(int(i), WINDOWS, keys) for i in index]) / WINDOWS
    assert abs(image.mean() - 0.5) < 4 / np.sqrt(12 * len(index))  # four standard errors of a uniform mean
    for series in (index, image[1:], image[2:], image[64:]):
        n = min(len(series), len(image))
        assert abs(np.corrcoef(series[:n], image[:n])[0, 1]) < 4 / np.sqrt(n)


def test_what_is_no_order_is_refused():
    with pytest.raises(ValueError, match="both must be positive"):
        WindowOrder(0, 4, 0)
    with pytest.raises(IndexError, match="no row 4 of step 0 in batches of 4"):
        WindowOrder(10, 4, 0).item(0, 4)
