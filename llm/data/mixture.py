"""Which store a row comes from, where a run draws on several: a pure function of (seed, step, row).

    weights  ->  whole shares of 1,000 slots  ->  a pattern: the store of each slot
    (step, row)  ->  running index i  ->  slot i % 1,000  ->  (store, the store's own running index)  ->  its item

The pattern repeats for ever, so any 1,000 consecutive rows hold exactly the shares, wherever they begin. A store's own
rows are numbered without a gap: it goes through the same epochs as alone (`order.py`), only more slowly. A single store
has every slot, and its order is that of `WindowOrder`.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UserError
from .contradictions import SLOTS
from .order import WindowOrder
from .store import TokenStore

ALIKE = ("tokenizer_fingerprint", "vocab_size", "begin_of_document", "end_of_document", "validation_fraction")
Item = tuple[int, int]  # (number of the store, window or document of it)


class Pattern:
    """Row i belongs to the store of slot i % 1,000. `stores` holds each slot's store, counted from 0 without a gap."""

    def __init__(self, stores: Sequence[int]) -> None:
        self.slots: list[list[int]] = [[] for _ in range(max(stores) + 1)]  # of each store, ascending
        self.places: list[tuple[int, int]] = []  # of each slot: its store, and its rank among the store's slots
        for slot, store in enumerate(stores):
            self.places.append((store, len(self.slots[store])))
            self.slots[store].append(slot)

    @classmethod
    def shuffled(cls, shares: Sequence[int], seed: int) -> Pattern:
        """The order of a run. Sorting by a hash is the same shuffle in every version of Python."""

        def draw(slot: int) -> bytes:
            return hashlib.blake2b(f"mixture, seed {seed}, slot {slot}".encode(), digest_size=8).digest()

        stores = [store for store, share in enumerate(shares) for _ in range(share)]
        return cls([stores[slot] for slot in sorted(range(SLOTS), key=draw)])

    @classmethod
    def even(cls, shares: Sequence[int]) -> Pattern:
        """Each store's slots at equal distances: the first few rows too stand in proportion, for every seed alike."""
        ranked = sorted(((rank + 0.5) / share, store) for store, share in enumerate(shares) for rank in range(share))
        return cls([store for _, store in ranked])

    def place(self, row: int) -> tuple[int, int]:
        """The store that a row belongs to, and which of the store's own rows it is."""
        turn, slot = divmod(row, SLOTS)
        store, rank = self.places[slot]
        return store, turn * len(self.slots[store]) + rank

    def row(self, store: int, own: int) -> int:
        """The row that is a store's own row `own`: the inverse of `place`."""
        turn, rank = divmod(own, len(self.slots[store]))
        return turn * SLOTS + self.slots[store][rank]

    def drawn(self, rows: int) -> list[int]:
        """How many of the first `rows` rows belong to each store."""
        turns, rest = divmod(rows, SLOTS)
        return [turns * len(slots) + bisect_left(slots, rest) for slots in self.slots]


class MixtureOrder:
    """The global batches of a run: rows of `items[n]` windows (or documents) of each store n, `shares[n]` of 1,000.

    Each store visits each of its items exactly once an epoch, in an order named by (seed, epoch).
    """

    def __init__(self, items: Sequence[int], shares: Sequence[int], batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.pattern = Pattern.shuffled(shares, seed)
        self.orders = [WindowOrder(count, batch_size, seed) for count in items]

    def rows(self, step: int, start: int, stop: int) -> list[Item]:
        """The (store, item) of rows start, ..., stop - 1 of global batch `step`: one rank's share of it."""
        first = step * self.batch_size
        places = map(self.pattern.place, range(first + start, first + stop))
        return [(store, self.orders[store].at(own)) for store, own in places]

    def epochs(self, steps: int) -> list[float]:
        """How often `steps` global batches go through each store."""
        drawn = self.pattern.drawn(steps * self.batch_size)
        return [rows / order.items for rows, order in zip(drawn, self.orders, strict=True)]


@dataclass(frozen=True)
class Component:
    """A store of a run: its path as given, its rows of 1,000, and both splits."""

    path: str
    share: int
    train: TokenStore
    validation: TokenStore


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole shares of 1,000, by largest remainder; at least 1 each.

    Those that are worth less than a slot get one, and the others divide what is left.
    """
    largest = max(weights)
    weights = [weight / largest for weight in weights]  # 1e308 twice would overflow
    rare: set[int] = set()
    while True:
        each = (SLOTS - len(rare)) / math.fsum(weight for n, weight in enumerate(weights) if n not in rare)
        quotas = [1.0 if n in rare else weight * each for n, weight in enumerate(weights)]
        below = {n for n, quota in enumerate(quotas) if quota < 1}
        if not below:
            break
        rare |= below
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda n: (shares[n] - quotas[n], n))
    for n in by_remainder[: SLOTS - sum(shares)]:
        shares[n] += 1
    return shares


def open_stores(weights: Mapping[str, float]) -> list[Component]:
    """Open both splits of each store.

    They are numbered by fingerprint, so that neither where they lie nor in which order a config names them changes a
    run's data.

    Raises:
        UserError: no store, a torn one, one that is given twice, or two that were not prepared alike.
    """
    seen: dict[Path, str] = {}
    for path in weights:
        if (other := seen.setdefault(Path(path).resolve(), path)) != path:
            raise UserError(f"data.store names one store twice, {other} and {path}: give it once, with both weights")
    opened = sorted(
        ((TokenStore.open(path, "train"), weight, path) for path, weight in weights.items()),
        key=lambda one: (one[0].fingerprint, one[1]),
    )
    first = opened[0][0]
    for store, _, _ in opened[1:]:
        # With other fractions a document that one store holds out could be trained on from the other.
        for what in ALIKE:
            if (ours := getattr(first, what)) != (theirs := getattr(store, what)):
                raise UserError(
                    f"{first.path} and {store.path} differ in {what} ({ours} and {theirs}): prepare both with one "
                    "tokenizer and the same options"
                )
    shares = whole_shares([weight for _, weight, _ in opened])
    return [
        Component(path, share, train, TokenStore.open(path, "validation"))
        for (train, _, path), share in zip(opened, shares, strict=True)
    ]


def mixed_fingerprint(components: Sequence[Component]) -> str:
    """Of the data and its mixture: a single store's own, or sha256 over all shares and fingerprints."""
    if len(components) == 1:
        return components[0].train.fingerprint
    lines = "".join(f"{component.share} {component.train.fingerprint}\n" for component in components)
    return hashlib.sha256(lines.encode()).hexdigest()


def short_names(paths: Iterable[str]) -> list[str]:
    """The folders' names, with as many folders above them as it takes to tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    return [str(Path(*each[-depth:])) for each in parts]
