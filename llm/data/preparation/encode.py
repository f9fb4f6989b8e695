"""One source becomes its shards, one a split.

    documents  ->  those of the subset, split by hash  ->  batches  ->  ids, begun and ended  ->  ShardWriter

This is the work of one process of `python -m llm prepare`. It needs `tokenizers` but neither torch nor transformers, so
that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ...common.errors import UserError
from ...common.lock import HEARTBEAT, NO_LOCKS, Heartbeat
from ..lost_text import CountingEncoder, LostText
from ..shard import GROUPS, HASHES, SPLITS, Manifest, ShardWriter, boundary_tokens, is_complete, token_dtype
from ..stories import Split
from ..tokenizer import encode_documents, keep_to_the_text
from ..workers import Report
from .documents import BadDocuments, Document, Source
from .subset import Subset

BATCH_CHARACTERS = 1 << 20  # encoded at a time: enough for several threads, tens of megabytes while it lasts
BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to know beside the source: small, and sent to it once."""

    out: Path
    vocab_size: int
    begin_of_document: int | None
    end_of_document: int
    tokenizer_fingerprint: str
    validation_fraction: float
    subset: Subset | None
    skip_bad: int  # broken documents a source may have
    deduplicate: bool  # then a shard also has the hashes of its documents
    grouped: bool = False  # then a shard also has the group of each document

    @property
    def kinds(self) -> tuple[str, ...]:
        """The files of a shard beside its manifest."""
        return ("tokens", "ends", *["groups"] * self.grouped, *["hashes"] * self.deduplicate)

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text as a document, ids that begin and end it included."""
        around = boundary_tokens(self.begin_of_document)
        encoded = encode_documents(_encoder(self.out, self.tokenizer_fingerprint).tokenizer, texts)
        return [len(ids) + around if ids else 0 for ids in encoded]


class Kept(NamedTuple):
    """A document that goes into a shard."""

    split: Split
    text: str
    size: int  # bytes of the text in UTF-8
    digest: bytes  # sha256 of them
    read: int
    group: int  # `group_number`; 0 where documents have no groups


@contextmanager
def store_lock(store: Path, part: str) -> Iterator[None]:
    """Lock a part of a store against all other processes; wait for it where it is taken.

    Other nodes are kept out where the file system carries locks between them, as NFS and Lustre can, and by a heartbeat
    where it has none. One part at a time: closing the file lets go of all that the process holds.
    """
    heartbeat = None
    with (store / "prepare.lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, zlib.crc32(part.encode()))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            heartbeat = Heartbeat.wait(store / f".{part}{HEARTBEAT}")
        try:
            yield
        finally:
            if heartbeat is not None:
                heartbeat.close()


def is_in_use(store: Path) -> bool:
    """Return whether another process holds a part of a store, or may: without locks that is not known."""
    try:
        with (store / "prepare.lock").open("ab") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def shards_of(recipe: Recipe, source: Source, report: Report) -> list[Manifest]:
    """The shards of one source, one a split that it has documents for: those that are there and whole, or new ones."""
    with store_lock(recipe.out, source.name):
        return _shards_of(recipe, source, report)


def _shards_of(recipe: Recipe, source: Source, report: Report) -> list[Manifest]:
    splits, stamp = splits_of(source), source.stamp()
    described = source.description()
    there = [Manifest.read(recipe.out / split, source.name) for split in splits]
    kept = [manifest for manifest in there if manifest and is_complete(recipe.out / manifest.split, manifest)]
    kept = [manifest for manifest in kept if manifest.tokenizer_fingerprint == recipe.tokenizer_fingerprint]
    if any(manifest.source != described for manifest in kept):
        raise UserError(f"{source.location} has changed since its shard was made; restore it or prepare another --out")
    if len(kept) == len(splits):
        report(source.size, sum(manifest.documents for manifest in kept), sum(manifest.tokens for manifest in kept))
        return kept
    bad = BadDocuments(recipe.skip_bad)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(recipe.out / split, source.name, token_dtype(recipe.vocab_size), recipe.kinds)
            )
            for split in splits
        }
        lost = _encode(source, recipe, writers, bad, report)
        if source.stamp() != stamp:  # hashed before, read after
            raise UserError(f"{source.location} changed while it was read; run the same command again")
        versions = {"hippoformer": version("hippoformer"), "tokenizers": version("tokenizers")}
        return [
            writers[split].finish(
                split,
                described,
                recipe.tokenizer_fingerprint,
                versions,
                bad.sentences if split == splits[0] else None,
                asdict(lost[split]),
            )
            for split in splits
        ]


def splits_of(source: Source) -> tuple[Split, ...]:
    """The splits that a source has a shard for."""
    return SPLITS if source.split is None else (source.split,)


def split_of(source: Source, digest: bytes, validation_fraction: float, group: str | None = None) -> Split:
    """Where a document belongs: a pure function of its text's sha256, `digest`, but where the source has a split of its
    own. A document of a group goes where its group's hash says, so that no group is on both sides.
    """
    if source.split is not None:
        return source.split
    number = int.from_bytes(digest[:8], "big") if group is None else group_number(group)
    return "validation" if number < validation_fraction * 2**64 else "train"


def group_number(group: str) -> int:
    """The first 8 bytes of the sha256 of a group's name, which stand for it in NAME.groups."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def _encode(
    source: Source, recipe: Recipe, writers: dict[Split, ShardWriter], bad: BadDocuments, report: Report
) -> dict[Split, LostText]:
    """Write the ids of every document of a source to the writer of its split; return what of their text is lost."""
    encoder = _encoder(recipe.out, recipe.tokenizer_fingerprint)
    lost = {split: LostText() for split in writers}
    read = 0
    for batch in _batches(_kept(source.documents(bad), source, recipe, writers)):
        tokens = 0
        for split, writer in writers.items():
            mine = [document for document in batch if document.split == split]
            encoded = encoder.encode([document.text for document in mine], lost[split])
            if not all(encoded):  # white space under a normalizer that strips it: nothing to learn from
                for _ in range(sum(not ids for ids in encoded)):
                    writer.leave_out("empty")
                mine = [document for document, ids in zip(mine, encoded, strict=True) if ids]
                encoded = [ids for ids in encoded if ids]
            ids, lengths = _packed(encoded, recipe, source)
            writer.add(ids, lengths)
            if recipe.grouped:
                writer.write("groups", np.array([document.group for document in mine], dtype=GROUPS))
            if recipe.deduplicate:
                writer.write("hashes", _hashes(mine))
            writer.bytes_in += sum(document.size for document in mine)
            tokens += len(ids)
        report(batch[-1].read - read, len(batch), tokens)
        read = batch[-1].read
    report(source.size - read, 0, 0)
    return lost


def _kept(
    documents: Iterator[Document], source: Source, recipe: Recipe, writers: dict[Split, ShardWriter]
) -> Iterator[Kept]:
    """The documents to encode; the others are counted in the writer of their split."""
    for document in documents:
        data = document.text.encode()
        digest = hashlib.sha256(data).digest()
        split = split_of(source, digest, recipe.validation_fraction, document.group)
        writers[split].documents_in += 1
        if not document.text:  # nothing to learn from
            writers[split].leave_out("empty")
        elif recipe.subset is not None and (document.id or digest.hex()) not in recipe.subset:
            writers[split].leave_out("subset")
        else:
            group = 0 if document.group is None else group_number(document.group)
            yield Kept(split, document.text, len(data), digest, document.read, group)


def _hashes(documents: list[Kept]) -> np.ndarray:
    whole = np.frombuffer(b"".join(document.digest[:16] for document in documents), ">u8").reshape(-1, 2)
    hashes = np.empty(len(documents), dtype=HASHES)
    hashes["high"], hashes["low"] = whole.T
    hashes["bytes"] = [document.size for document in documents]
    return hashes


def _packed(documents: list[list[int]], recipe: Recipe, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end, each begun and ended by its id: ids [sum of lengths] and lengths [documents].

    Raises UserError where a text gave an id beyond the vocabulary, or one that begins or ends documents.
    """
    begin, end = recipe.begin_of_document, recipe.end_of_document
    for ids in documents:
        if begin is not None:
            ids.insert(0, begin)
        ids.append(end)
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    packed = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=int(lengths.sum()))
    if packed.max(initial=0) >= recipe.vocab_size:
        raise UserError(
            f"{source.location}: a text gave the token id {packed.max()}, beyond the tokenizer's vocabulary of "
            f"{recipe.vocab_size}; give a tokenizer whose ids have no holes"
        )
    for special, what in ((begin, "begins"), (end, "ends")):
        if special is not None and np.count_nonzero(packed == special) != len(documents):
            raise UserError(
                f"{source.location}: the tokenizer gives text inside a document the id {special}, which only {what} "
                "documents; give a tokenizer with a special token of its own for that"
            )
    return packed, lengths


def _batches(documents: Iterator[Kept]) -> Iterator[list[Kept]]:
    """Documents in groups of about a million characters."""
    batch: list[Kept] = []
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
def _encoder(store: Path, fingerprint: str) -> CountingEncoder:
    """The tokenizer of a store, loaded once a process; the fingerprint tells stores of one path apart.

    Without its post-processor, which adds special tokens and trims offsets: documents want neither, and it takes a
    twenty-fifth of the time.
    """
    whole = json.loads((store / "tokenizer" / "tokenizer.json").read_bytes())
    backend = Tokenizer.from_str(json.dumps(whole | {"post_processor": None}))
    keep_to_the_text(backend)  # of a store that an older version began
    return CountingEncoder(backend)
