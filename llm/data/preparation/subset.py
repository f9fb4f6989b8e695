"""A random subset of documents: a pure function of (seed, document id), whoever asks and in whatever order.

    (seed, id)            ->  place in [0, 2^64), uniform          a document is in the subset where its place is low
    fraction              ->  threshold                             fraction * 2^64
    number of tokens      ->  survey of the sources -> threshold    the same, where the tokens below it are as many

A larger subset of one seed holds every smaller one. A document's id is what the source says it is (`--id-key`), else
the sha256 of its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...common.errors import UserError
from ..workers import Progress, Report, run_all
from .documents import BadDocuments, Document, Source

PLACES = 1 << 64
SURVEYED_SOURCES = 16  # read from end to end, spread evenly over all; the rest is taken to be like them
SURVEYED_BYTES = 50_000_000  # of text that is tokenized to know the tokens of a byte
BATCH_DOCUMENTS = 256

Lengths = Callable[[list[str]], list[int]]  # tokens of each text, with those that begin and end a document


@dataclass(frozen=True)
class Subset:
    """The documents whose place under `seed` is below `threshold`, of 2^64."""

    seed: int
    threshold: int

    def __contains__(self, identity: str) -> bool:
        return place(self.seed, identity) < self.threshold


def place(seed: int, identity: str) -> int:
    """Where a document falls in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(f"subset {seed} {identity}".encode()).digest()[:8], "big")


def identity_of(document: Document) -> str:
    """The id of a document: its source's, or the sha256 of its text."""
    return document.id or hashlib.sha256(document.text.encode()).hexdigest()


def subset_of_tokens(
    sources: Sequence[Source], tokens: int, seed: int, lengths: Lengths, workers: int, skip_bad: int
) -> Subset:
    """The subset of about `tokens` tokens. `lengths` is called in the worker processes.

    Up to 16 sources are read from end to end, and of their text about 50 MB are tokenized, by place, so that the sample
    is a random one. Where that is everything, the subset is exact to one document; else the tokens of other documents
    are estimated from their bytes, and other sources are taken to be like these. A source that cannot be read is left
    out. Raises UserError where there are not so many tokens.
    """
    count = min(SURVEYED_SOURCES, len(sources))
    spread = [sources[index * len(sources) // count] for index in range(count)]
    size = sum(source.size for source in spread)
    items = [(source, SURVEYED_BYTES * source.size // max(1, size)) for source in spread]
    with Progress(size, count, "survey") as progress:
        results = run_all(partial(survey, seed, lengths, skip_bad), items, workers, progress)
    read = [(source, found) for source, found in zip(spread, results, strict=True) if not isinstance(found, UserError)]
    places = np.concatenate([np.empty(0, dtype=np.uint64), *(found[0] for _, found in read)])
    estimates = np.concatenate([np.empty(0), *(found[1] for _, found in read)])
    scale = sum(source.size for source in sources) / max(1, sum(source.size for source, _ in read))
    order = np.argsort(places, kind="stable")
    below = np.cumsum(estimates[order]) * scale  # tokens of the documents up to each place
    if not len(below) or tokens > below[-1]:
        total = below[-1] if len(below) else 0
        raise UserError(f"the sources hold about {total:,.0f} tokens, not {tokens:,}; give a smaller --subset-tokens")
    last = order[np.searchsorted(below, tokens)]
    return Subset(seed, int(places[last]) + 1)


def survey(
    seed: int, lengths: Lengths, skip_bad: int, item: tuple[Source, int], report: Report
) -> tuple[np.ndarray, np.ndarray]:
    """Place (uint64) and tokens (float64) of each document of a source; `item` is (source, bytes to tokenize).

    The documents with the lowest places are tokenized, as many as the bytes allow: each time they are used up, half of
    the places are given up. So up to a few times as many bytes are tokenized on the way.
    """
    source, budget = item
    sample = Sample(lengths, budget)
    places: list[int] = []
    sizes: list[int] = []
    read = told = 0
    for document in source.documents(BadDocuments(skip_bad)):
        if not document.text:
            continue
        places.append(place(seed, identity_of(document)))
        sizes.append(len(document.text.encode()))
        if places[-1] < sample.limit:
            sample.add(len(places) - 1, document.text, places, sizes)
        if len(places) % BATCH_DOCUMENTS == 0:
            report(document.read - read, BATCH_DOCUMENTS, sample.tokens - told)
            read, told = document.read, sample.tokens
    sample.count(places, sizes)
    report(source.size - read, len(places) % BATCH_DOCUMENTS, sample.tokens - told)
    rate = sum(sample.counted[n] for n in sample.kept) / max(1, sum(sizes[n] for n in sample.kept))
    estimates = [sample.counted.get(n, size * rate) for n, size in enumerate(sizes)]
    return np.array(places, dtype=np.uint64), np.array(estimates, dtype=np.float64)


class Sample:
    """The documents of a source that are tokenized: those with places below `limit`, which falls as bytes run out."""

    def __init__(self, lengths: Lengths, budget: int) -> None:
        self.lengths, self.budget = lengths, budget
        self.limit = PLACES
        self.counted: dict[int, int] = {}  # tokens of every document that was tokenized, by its number
        self.kept: list[int] = []  # numbers of those still below the limit
        self.tokens = 0
        self._waiting: list[tuple[int, str]] = []

    def add(self, number: int, text: str, places: list[int], sizes: list[int]) -> None:
        self._waiting.append((number, text))
        if len(self._waiting) == BATCH_DOCUMENTS:
            self.count(places, sizes)

    def count(self, places: list[int], sizes: list[int]) -> None:
        """Tokenize what waits, and give up places while the kept documents are more than the budget."""
        found = self.lengths([text for _, text in self._waiting])
        self.counted.update(zip((number for number, _ in self._waiting), found, strict=True))
        self.kept += [number for number, _ in self._waiting]
        self.tokens += sum(found)
        self._waiting.clear()
        while len(self.kept) > 1 and sum(sizes[number] for number in self.kept) > self.budget:
            fewer = [number for number in self.kept if places[number] < self.limit // 2]
            if not fewer:
                break
            self.limit, self.kept = self.limit // 2, fewer
