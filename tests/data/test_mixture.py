"""Mixtures: exact shares in any 1,000 rows, each store's epochs as alone, and what is refused."""

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.common.errors import UserError
from llm.data.contradictions import of_weights
from llm.data.mixture import (
    SLOTS,
    MixtureOrder,
    Pattern,
    mixed_fingerprint,
    open_stores,
    short_names,
    whole_shares,
)
from llm.data.order import WindowOrder
from llm.data.store import TokenStore

from .random_stores import random_store

weights = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)
seeds = st.integers(0, 2**63)


@settings(deadline=None)
@given(weights=weights, seed=seeds, first=st.integers(0, 10**12))
def test_any_thousand_consecutive_rows_hold_exactly_the_shares(weights, seed, first):
    shares = whole_shares(weights)
    for pattern in (Pattern.shuffled(shares, seed), Pattern.even(shares)):
        stores = [pattern.place(row)[0] for row in range(first, first + SLOTS)]
        assert [stores.count(store) for store in range(len(shares))] == shares


@settings(deadline=None)
@given(weights=weights, seed=seeds, rows=st.integers(0, 5000))
def test_a_stores_own_rows_are_numbered_without_a_gap(weights, seed, rows):
    shares = whole_shares(weights)
    for pattern in (Pattern.shuffled(shares, seed), Pattern.even(shares)):
        next_own = [0] * len(shares)
        for row in range(rows):
            store, own = pattern.place(row)
            assert own == next_own[store]
            assert pattern.row(store, own) == row
            next_own[store] += 1
        assert pattern.drawn(rows) == next_own


@settings(deadline=None)
@given(
    items=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    data=st.data(),
    batch_size=st.integers(1, 60),
    seed=seeds,
)
def test_each_store_visits_every_item_once_an_epoch(items, data, batch_size, seed):
    """Over 6,000 rows; the k-th visit of a store is the k-th of `WindowOrder` alone."""
    shares = whole_shares(data.draw(st.lists(st.floats(0.01, 1), min_size=len(items), max_size=len(items))))
    order = MixtureOrder(items, shares, batch_size, seed)
    steps = -(-6000 // batch_size)
    visits: list[list[int]] = [[] for _ in items]
    for step in range(steps):
        for store, item in order.rows(step, 0, batch_size):
            visits[store].append(item)
    for store, (count, seen) in enumerate(zip(items, visits, strict=True)):
        assert order.epochs(steps)[store] == len(seen) / count
        for epoch in range(len(seen) // count):
            assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
        assert len(set(seen[len(seen) // count * count :])) == len(seen) % count
        alone = WindowOrder(count, 1, seed)
        assert seen[:50] == [alone.item(visit, 0) for visit in range(min(50, len(seen)))]


@given(items=st.integers(1, 10**9), batch_size=st.integers(1, 1000), seed=seeds, step=st.integers(0, 10**9))
def test_one_store_goes_in_the_order_without_a_mixture(items, batch_size, seed, step):
    order, plain = MixtureOrder([items], whole_shares([0.3]), batch_size, seed), WindowOrder(items, batch_size, seed)
    rows = range(0, batch_size, 1 + batch_size // 7)
    assert [order.rows(step, row, row + 1)[0] for row in rows] == [(0, plain.item(step, row)) for row in rows]


def test_ranks_only_share_out_one_order() -> None:
    order = MixtureOrder([20_500_000, 1000], whole_shares([0.9, 0.1]), 64, seed=5)
    for step in (0, 1, 320_311, 10**7):
        whole = order.rows(step, 0, 64)
        for ranks in (2, 4, 8):
            share = 64 // ranks
            parts = [order.rows(step, rank * share, (rank + 1) * share) for rank in range(ranks)]
            assert [row for part in parts for row in part] == whole


def test_the_pattern_is_shuffled_and_of_the_seed() -> None:
    shares = whole_shares([0.5, 0.5])
    patterns = [[store for store, _ in Pattern.shuffled(shares, seed).places] for seed in range(20)]
    for n, one in enumerate(patterns):
        runs = 1 + sum(a != b for a, b in pairwise(one))
        assert abs(runs - 501) < 5 * math.sqrt(250)  # as many as a random sequence has: 501, deviation 15.8
        assert all(abs(sum(a == b for a, b in zip(one, other, strict=True)) - 500) < 100 for other in patterns[n + 1 :])


@settings(deadline=None)
@given(weights=weights)
def test_the_even_pattern_is_in_proportion_from_the_first_row_on(weights):
    shares = whole_shares(weights)
    pattern = Pattern.even(shares)
    for rows in range(1, SLOTS):
        for share, drawn in zip(shares, pattern.drawn(rows), strict=True):
            assert abs(drawn - rows * share / SLOTS) < max(1, len(shares) / 2)


# ---- Weights ---------------------------------------------------------------------------------------------------------


def exact_shares(weights: list[float]) -> list[int]:
    """Largest remainder in rational numbers; for weights of which none is worth less than a slot."""
    total = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * SLOTS / total for weight in weights]
    shares = [math.floor(quota) for quota in quotas]
    rest = sorted(range(len(quotas)), key=lambda n: (shares[n] - quotas[n], n))[: SLOTS - sum(shares)]
    return [share + (n in rest) for n, share in enumerate(shares)]


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9))
def test_shares_are_those_of_largest_remainder(weights):
    assert whole_shares(weights) == exact_shares(weights)


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=40))
def test_every_weight_has_a_share_and_they_are_a_thousand(weights):
    shares = whole_shares(weights)
    assert sum(shares) == SLOTS
    assert min(shares) >= 1
    for (low, fewer), (high, more) in pairwise(sorted(zip(weights, shares, strict=True))):
        assert fewer <= more or low == high


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.3], [700, 300]),
        ([1, 1, 1], [334, 333, 333]),
        ([2, 1], [667, 333]),
        ([1, 1e-9], [999, 1]),
        ([1e308, 1e308], [500, 500]),
        ([1, 1e-9, 1], [500, 1, 499]),
        ([1.0] * SLOTS, [1] * SLOTS),
        ([5], [1000]),
    ],
)
def test_some_shares(weights: list[float], shares: list[int]) -> None:
    assert whole_shares(weights) == shares


def test_weights_that_cannot_be_are_named() -> None:
    bad = {"a": 0.0, "b": -1.0, "c": math.inf, "d": math.nan, "e": 0.5}
    problems = of_weights(bad)
    assert [problem.split(" of ")[1][0] for problem in problems] == ["a", "b", "c", "d"]
    assert all("above 0" in problem for problem in problems)
    assert "0 stores" in of_weights({})[0]
    assert "1001 stores" in of_weights({str(n): 1.0 for n in range(1001)})[0]
    assert of_weights({"a": 1.0, "b": 1e-9}) == []


# ---- Stores ----------------------------------------------------------------------------------------------------------


def test_neither_place_nor_order_of_the_stores_matters(tmp_path: Path) -> None:
    for folder, names in (("here", "ab"), ("there", "zy")):
        for seed, name in enumerate(names):
            random_store(tmp_path / folder / name, seed=seed)
    here, there = tmp_path / "here", tmp_path / "there"
    settings = [
        {here / "a": 0.7, here / "b": 0.3},
        {here / "b": 3.0, here / "a": 7.0},
        {there / "y": 0.3, there / "z": 0.7},
    ]
    opened = [open_stores({str(path): weight for path, weight in weights.items()}) for weights in settings]
    assert len({tuple((s.share, s.train.fingerprint) for s in sources) for sources in opened}) == 1
    assert len({mixed_fingerprint(sources) for sources in opened}) == 1
    other = open_stores({str(here / "a"): 0.6, str(here / "b"): 0.4})
    assert mixed_fingerprint(other) != mixed_fingerprint(opened[0])
    alone = open_stores({str(here / "a"): 17.0})
    assert mixed_fingerprint(alone) == TokenStore.open(here / "a").fingerprint


def test_stores_that_do_not_mix_are_named(tmp_path: Path) -> None:
    a = random_store(tmp_path / "a")
    others: dict[str, dict[str, Any]] = {
        "tokenizer_fingerprint": {"fingerprint": "other"},
        "vocab_size": {"vocab_size": 500},
    }
    for name, other in others.items():
        b = random_store(tmp_path / name, seed=1, **other)
        with pytest.raises(UserError, match=name) as error:
            open_stores({str(a): 1.0, str(b): 1.0})
        assert str(a) in str(error.value) and str(b) in str(error.value)
    with pytest.raises(UserError, match="twice"):
        open_stores({str(a): 1.0, str(tmp_path / "x" / ".." / "a"): 1.0})


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["runs/web", "stores/code"]) == ["web", "code"]
    assert short_names(["runs/web/store", "runs/code/store"]) == ["web/store", "code/store"]
    assert short_names(["/a", "/b/a"]) == ["/a", "b/a"]
    assert short_names(["x"]) == ["x"]
