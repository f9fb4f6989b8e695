"""One source becomes its shards, one a split.

    documents  ->  batches  ->  split by hash  ->  ids, the end-of-document id after each  ->  ShardWriter

This is the work of one process of `python -m llm prepare`. It needs `tokenizers` but neither torch nor transformers, so
that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..errors import UserError
from .shard import SPLITS, Manifest, ShardWriter, is_whole, token_dtype
from .sources import Document, Source
from .stories import Split
from .tokenizer import encode_documents
from .workers import Report

BATCH_CHARACTERS = 1 << 20  # encoded at a time: enough for several threads, tens of megabytes while it lasts
BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to know beside the source: small, and sent to it once."""

    out: Path
    vocab_size: int
    end_of_document: int
    tokenizer_fingerprint: str
    validation_fraction: float

    @property
    def tokenizer_file(self) -> str:
        return str(self.out / "tokenizer" / "tokenizer.json")


def shards_of(recipe: Recipe, source: Source, report: Report) -> list[Manifest]:
    """The shards of one source, one a split that it has documents for: those that are there and whole, or new ones."""
    splits = SPLITS if source.split is None else (source.split,)
    described = source.description()
    there = [Manifest.read(recipe.out / split, source.name) for split in splits]
    kept = [manifest for manifest in there if manifest and is_whole(recipe.out / manifest.split, manifest)]
    kept = [manifest for manifest in kept if manifest.tokenizer_fingerprint == recipe.tokenizer_fingerprint]
    if any(manifest.source != described for manifest in kept):
        raise UserError(f"{source.location} has changed since its shard was made; restore it or prepare another --out")
    if len(kept) == len(splits):
        report(source.size, sum(manifest.documents for manifest in kept), sum(manifest.tokens for manifest in kept))
        return kept
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(recipe.out / split, source.name, token_dtype(recipe.vocab_size)))
            for split in splits
        }
        _encode(source, recipe, writers, report)
        versions = {"hippoformer": version("hippoformer"), "tokenizers": version("tokenizers")}
        return [
            writer.finish(split, described, recipe.tokenizer_fingerprint, versions) for split, writer in writers.items()
        ]


def split_of(source: Source, text: str, validation_fraction: float) -> Split:
    """Where a document belongs: a pure function of its text, but where the source has a split of its own."""
    if source.split is not None:
        return source.split
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "validation" if place < validation_fraction * 2**64 else "train"


def _encode(source: Source, recipe: Recipe, writers: dict[Split, ShardWriter], report: Report) -> None:
    """Write the ids of every document of a source to the writer of its split."""
    backend = _backend(recipe.tokenizer_file, recipe.tokenizer_fingerprint)
    read = 0
    for batch in _batches(source.documents()):
        texts: dict[Split, list[str]] = {split: [] for split in writers}
        for document in batch:
            split = split_of(source, document.text, recipe.validation_fraction)
            writers[split].bytes_in += len(document.text.encode())
            if document.text:
                texts[split].append(document.text)
            else:
                writers[split].empty_documents += 1
        tokens = 0
        for split, writer in writers.items():
            ids, lengths = _packed(encode_documents(backend, texts[split]), recipe, source)
            writer.add(ids, lengths)
            tokens += len(ids)
        report(batch[-1].read - read, len(batch), tokens)
        read = batch[-1].read
    report(source.size - read, 0, 0)


def _packed(documents: list[list[int]], recipe: Recipe, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end, the end-of-document id after each: ids [sum of lengths] and lengths [documents].

    Raises UserError where a text gave an id beyond the vocabulary, or the one that ends documents.
    """
    for ids in documents:
        ids.append(recipe.end_of_document)
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    packed = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=int(lengths.sum()))
    if packed.max(initial=0) >= recipe.vocab_size:
        raise UserError(
            f"{source.location}: a text gave the token id {packed.max()}, beyond the tokenizer's vocabulary of "
            f"{recipe.vocab_size}; give a tokenizer whose ids have no holes"
        )
    if np.count_nonzero(packed == recipe.end_of_document) != len(documents):
        raise UserError(
            f"{source.location}: the tokenizer gives text inside a document the id {recipe.end_of_document}, which "
            "only ends documents; give a tokenizer with an end-of-sequence token of its own"
        )
    return packed, lengths


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about a million characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _backend(file: str, fingerprint: str) -> Tokenizer:
    """The tokenizer of a store, loaded once a process; the fingerprint tells stores of one path apart."""
    return Tokenizer.from_file(file)
