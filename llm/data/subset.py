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

from ..errors import UserError
from .documents import BadDocuments, Document, Source
from .workers import Progress, Report, run_all

PLACES = 1 << 64
SURVEYED_SOURCES = 16  # read from end to end, spread evenly over all; the rest is taken to be like them
SURVEYED_BYTES = 50_000_000  # of text that is tokenized to know the tokens of a byte
BATCH_DOCUMENTS = 1024

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

    Up to 16 sources are read from end to end, and up to 50 MB of their text is tokenized. Where that is everything,
    the subset is exact to one document; else the rest is estimated from it. Raises UserError where there are not so
    many tokens.
    """
    count = min(SURVEYED_SOURCES, len(sources))
    spread = [sources[index * len(sources) // count] for index in range(count)]
    with Progress(sum(source.size for source in spread), count, "survey") as progress:
        work = partial(survey, seed, lengths, SURVEYED_BYTES // count, skip_bad)
        results = run_all(work, spread, workers, progress)
    surveys = [result for result in results if not isinstance(result, UserError)]
    for result in results:
        if isinstance(result, UserError):
            raise result
    places = np.concatenate([found[0] for found in surveys])
    estimates = np.concatenate([found[1] for found in surveys])
    scale = sum(source.size for source in sources) / max(1, sum(source.size for source in spread))
    order = np.argsort(places, kind="stable")
    below = np.cumsum(estimates[order]) * scale  # tokens of the documents up to each place
    if not len(below) or tokens > below[-1]:
        total = below[-1] if len(below) else 0
        raise UserError(f"the sources hold about {total:,.0f} tokens, not {tokens:,}; give a smaller --subset-tokens")
    last = order[np.searchsorted(below, tokens)]
    return Subset(seed, int(places[last]) + 1)


def survey(
    seed: int, lengths: Lengths, budget: int, skip_bad: int, source: Source, report: Report
) -> tuple[np.ndarray, np.ndarray]:
    """Place (uint64) and tokens (float64, estimated from the bytes beyond the first `budget`) of each document."""
    places: list[int] = []
    sizes: list[int] = []
    counted: list[int] = []
    texts: list[str] = []
    read = told = 0
    for document in source.documents(BadDocuments(skip_bad)):
        if not document.text:
            continue
        places.append(place(seed, identity_of(document)))
        sizes.append(len(document.text.encode()))
        if budget > 0:
            texts.append(document.text)
            budget -= sizes[-1]
        if len(texts) == BATCH_DOCUMENTS or (texts and budget <= 0):
            counted += lengths(texts)
            texts = []
        if len(places) % BATCH_DOCUMENTS == 0:
            report(document.read - read, BATCH_DOCUMENTS, sum(counted) - told)
            read, told = document.read, sum(counted)
    counted += lengths(texts)
    report(source.size - read, len(places) % BATCH_DOCUMENTS, sum(counted) - told)
    rate = sum(counted) / max(1, sum(sizes[: len(counted)]))
    estimates = np.array(counted + [size * rate for size in sizes[len(counted) :]], dtype=np.float64)
    return np.array(places, dtype=np.uint64), estimates
