"""The token store: a folder of shards that are read by position and never loaded.

    STORE/store.json                      index: shards of each split, vocabulary, fingerprints; written last
    STORE/tokenizer/                      the tokenizer, as save_pretrained writes it
    STORE/{train,validation}/NAME.*       the shards: tokens, document ends and a manifest each (see `llm.data.shard`)
    STORE/plan.json                       the settings it was made with (see `llm.data.preparation.prepare`)

The shards of a split form one row of tokens; a position counts from its start. A document is its ids and, as its last,
the end-of-document id; an end is the position after that. Where the store has a begin-of-document id, that is the first
id of each. Opening reads store.json alone. A shard's size is checked when it is first read, its content on demand by
`verify`.

Reads are `os.pread` on files opened for random access: windows of a store larger than memory cost the pages they lie
on, where np.memmap read 200 times as much (see benchmarks/data.md), and processes share a descriptor but not a
position.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..common.errors import UserError
from ..common.processes import open_file_limit
from .shard import ENDS, GROUPS, Manifest, sampled_hash, shard_problems, token_dtype
from .store_index import content_fingerprint, read_index
from .stories import Split
from .tokenizer import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN_FILES = 1 << 15  # all 31,279 shards of Nemotron-CC's high-quality part; at most a quarter of the process's limit
STAT_THREADS, STATS = 16, 500  # files that a thread is given at a time
PIECE = 1 << 24  # tokens read at a time; Linux reads at most 2 GiB a call
REMAKE = "run the same prepare command again to make this shard again"
FEW_DOCUMENTS = 30  # of validation: below, an interval over them says little of other documents
ENDS_IN_A_ROW = 1 << 20  # read at a time where all are wanted: 8 MiB


class TokenStore:
    """One split of a store, read by position.

    Any number of processes may read one store. An instance may be pickled and survives a fork: DataLoader workers
    each open their files when they first read. Threads of one process each take an instance of their own.

    path, split              the folder (absolute) and which part of it
    tokens, documents        how many this split holds
    vocab_size, dtype        every id is below vocab_size; how the shards hold them
    end_of_document          the id that ends each document and is nowhere else
    begin_of_document        the id that begins each document and is nowhere else; None where none does
    fingerprint              of the tokens of both splits: what a resumed run compares
    tokenizer_fingerprint    of the tokenizer that made it
    validation_fraction      of the documents held out by the hash of their text; None where that is not known
    groups                   in words, the key that names the group of each document; None where they have none
    validation_groups        how many groups the validation split has; None where documents have none
    """

    def __init__(self, path: Path, split: Split, index: dict[str, Any]) -> None:
        self.path = path
        self.split = split
        self.vocab_size: int = index["vocab_size"]
        self.dtype = np.dtype(index["dtype"])
        self.end_of_document: int = index["end_of_document"]
        self.begin_of_document: int | None = index.get("begin_of_document")
        self.fingerprint: str = index["fingerprint"]
        self.tokenizer_fingerprint: str = index["tokenizer_fingerprint"]
        self.validation_fraction: float | None = index.get("validation_fraction")
        self.groups: str | None = index.get("groups")
        self.validation_groups: int | None = index.get("validation_groups")
        shards = index["splits"][split]
        self._names: list[str] = shards["names"]
        self._sha256: list[str] = shards["sha256"]
        self._sampled: list[str] = shards.get("sampled") or [""] * len(self._names)
        self._token_ends = list(accumulate(shards["tokens"]))  # global position after each shard's last token
        self._document_ends = list(accumulate(shards["documents"]))
        self.tokens: int = self._token_ends[-1] if self._token_ends else 0
        self.documents: int = self._document_ends[-1] if self._document_ends else 0
        self._files: OrderedDict[tuple[int, str], int] = OrderedDict()  # descriptors, the least recently used first

    @classmethod
    def open(cls, path: str | Path, split: Split = "train") -> TokenStore:
        """Open by its index alone, whatever the number of shards. Raises UserError where there is no finished store."""
        path = Path(path).absolute()
        return cls(path, split, read_index(path))

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids at positions start, ..., start + count - 1: [count] int64, across shards where need be.

        Raises UserError for positions outside the split and for a shard that is missing or truncated.
        """
        self._check_range(start, start + count)
        ids = np.empty(count, dtype=np.int64)
        width = self.dtype.itemsize
        filled = 0
        while filled < count:
            shard, begin, end = self._shard_at(start + filled)
            some = min(count - filled, end - start - filled, PIECE)
            data = self._pread(shard, "tokens", (start + filled - begin) * width, some * width)
            ids[filled : filled + some] = np.frombuffer(data, self.dtype)
            filled += some
        return ids

    def document(self, index: int) -> tuple[int, int]:
        """The positions [start, end) of a document, its end-of-document id included."""
        if not 0 <= index < self.documents:
            raise UserError(f"{self._called()} has no document {index}; it holds {self.documents}")
        shard = bisect_right(self._document_ends, index)
        begin = self._token_ends[shard - 1] if shard else 0
        local = index - (self._document_ends[shard - 1] if shard else 0)
        start = int(self._ends(shard, local - 1, local)[0]) if local else 0
        return begin + start, begin + int(self._ends(shard, local, local + 1)[0])

    def document_tokens(self, index: int) -> np.ndarray:
        """The ids of a document, its end-of-document id last: [length] int64."""
        start, end = self.document(index)
        return self.read(start, end - start)

    def document_groups(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The group of each of these documents: [number] uint64, equal for documents of one group.

        Raises UserError where the documents of this store have no groups.
        """
        if self.groups is None:
            raise UserError(f"{self._called()} has no groups; prepare it with --group-by")
        found = np.empty(len(indices), dtype=GROUPS)
        for place, index in enumerate(indices):
            shard = bisect_right(self._document_ends, int(index))
            local = int(index) - (self._document_ends[shard - 1] if shard else 0)
            data = self._pread(shard, "groups", local * GROUPS.itemsize, GROUPS.itemsize)
            found[place] = np.frombuffer(data, GROUPS)[0]
        return found

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, in order, [at most 2^20] int64 at a time. Raises UserError where ends descend."""
        for shard, name in enumerate(self._names):
            documents, before = self._counts(shard)[1], 0
            for first in range(0, documents, ENDS_IN_A_ROW):
                ends = self._ends(shard, first, min(first + ENDS_IN_A_ROW, documents))
                lengths = np.diff(ends, prepend=before)
                if lengths.min() < 1:
                    raise UserError(f"{self.path / self.split / name}.ends does not ascend; {REMAKE}")
                before = ends[-1]
                yield lengths

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the store, from the store."""
        return load_tokenizer(self.path / "tokenizer")

    @property
    def files(self) -> int:
        """How many files the shards of the split are: tokens and ends."""
        return 2 * len(self._names)

    def check_sizes(self) -> None:
        """Compare the size of every file with the index: a stat each, what a run does before its first step.

        A network file system takes milliseconds for a stat, and as long for `STAT_THREADS` at once.

        Raises UserError for a shard that is missing or truncated.
        """
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            for kind, counted, width in (
                ("tokens", self._token_ends, self.dtype.itemsize),
                ("ends", self._document_ends, ENDS.itemsize),
                *[("groups", self._document_ends, GROUPS.itemsize)] * (self.groups is not None),
            ):
                expected = (np.diff(counted, prepend=0) * width).tolist()
                parts = [range(first, len(expected))[:STATS] for first in range(0, len(expected), STATS)]
                list(threads.map(partial(self._check_sizes, kind, expected), parts))

    def _check_sizes(self, kind: str, expected: list[int], shards: range) -> None:
        folder = str(self.path / self.split)  # plain strings: a Path takes twice as long as the stat itself
        for shard in shards:
            try:
                found = os.stat(f"{folder}/{self._names[shard]}.{kind}").st_size  # noqa: PTH116
            except OSError as error:
                raise self._missing(shard, kind, error) from error
            if found != expected[shard]:
                self._check_size(shard, kind, found)

    def check_samples(self) -> None:
        """Compare a few pages of every shard with store.json: a shard of another store may have the same size.

        Reads 16 KiB a shard. A store of an older version has nothing to compare with.

        Raises UserError for a shard that is another.
        """
        for name, expected in zip(self._names, self._sampled, strict=True):
            if expected and sampled_hash(self.path / self.split, name) != expected:
                raise UserError(f"{self.path / self.split / name}: not the shard that store.json lists; {REMAKE}")

    def verify(self) -> list[str]:
        """Read everything again: each sentence names one shard and what is wrong with it; none means all is well."""
        return [*self.index_problems(), *(problem for shard in self.shards() for problem in shard.problems())]

    def index_problems(self) -> list[str]:
        """What is wrong with store.json and the tokenizer, a sentence each."""
        problems = []
        if content_fingerprint(read_index(self.path)["splits"]) != self.fingerprint:
            problems.append(f"{self.path}/store.json: its fingerprint is not that of the shards it lists")
        try:
            if tokenizer_fingerprint(self.tokenizer()) != self.tokenizer_fingerprint:
                problems.append(f"{self.path}/tokenizer: not the tokenizer that made the store")
        except UserError as error:
            problems.append(str(error))
        return problems

    def shards(self) -> list[ListedShard]:
        """The shards as store.json lists them."""
        folder, ids = self.path / self.split, (self.vocab_size, self.end_of_document, self.begin_of_document)
        return [
            ListedShard(folder, name, *self._counts(shard), self._sha256[shard], ids)
            for shard, name in enumerate(self._names)
        ]

    def close(self) -> None:
        """Close the open files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):  # a failed __init__ has none
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore.open, (self.path, self.split)

    # ---- Shards ------------------------------------------------------------------------------------------------------

    def _shard_at(self, position: int) -> tuple[int, int, int]:
        """(shard, begin, end): the shard that holds a position, and the positions it holds. An empty one holds none."""
        shard = bisect_right(self._token_ends, position)
        return shard, self._token_ends[shard - 1] if shard else 0, self._token_ends[shard]

    def _counts(self, shard: int) -> tuple[int, int]:
        """(tokens, documents) of a shard."""
        tokens, documents = self._token_ends[shard], self._document_ends[shard]
        if shard == 0:
            return tokens, documents
        return tokens - self._token_ends[shard - 1], documents - self._document_ends[shard - 1]

    def _file(self, shard: int, kind: str) -> Path:
        return self.path / self.split / f"{self._names[shard]}.{kind}"

    def _pread(self, shard: int, kind: str, offset: int, length: int) -> bytes:
        descriptor = self._files.get((shard, kind))
        if descriptor is None:
            descriptor = self._open(shard, kind)
        else:
            self._files.move_to_end((shard, kind))
        data = os.pread(descriptor, length, offset)
        if len(data) < length:  # it was whole when it was opened
            raise UserError(f"{self._file(shard, kind)} was truncated while it was read; {REMAKE}")
        return data

    def _open(self, shard: int, kind: str) -> int:
        """Open a file of a shard, check its size against the index, and make room among the open files."""
        while len(self._files) >= min(OPEN_FILES, open_file_limit() // 4):  # a run may have several stores
            os.close(self._files.popitem(last=False)[1])
        try:
            descriptor = os.open(self._file(shard, kind), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._missing(shard, kind, error) from error
        try:
            self._check_size(shard, kind, os.fstat(descriptor).st_size)
        except UserError:
            os.close(descriptor)
            raise
        if hasattr(os, "posix_fadvise"):
            # Without it Linux reads ahead where the windows before this one happen to be in memory: in the first half
            # of an epoch 1.9 bytes for each that is used, with it 1.1 (see benchmarks/data.md).
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._files[shard, kind] = descriptor
        return descriptor

    def _check_size(self, shard: int, kind: str, found: int) -> None:
        tokens, documents = self._counts(shard)
        width = ENDS.itemsize if kind == "ends" else GROUPS.itemsize
        expected = tokens * self.dtype.itemsize if kind == "tokens" else documents * width
        if found != expected:
            path = self._file(shard, kind)
            raise UserError(f"{path} has {found} bytes, not the {expected} that store.json lists; {REMAKE}")

    def _missing(self, shard: int, kind: str, error: OSError) -> UserError:
        return UserError(f"{self._file(shard, kind)} cannot be opened ({error.strerror}); {REMAKE}")

    def _ends(self, shard: int, first: int, last: int) -> np.ndarray:
        """Ends of the documents first, ..., last - 1 of a shard, counted in the shard: [last - first] int64."""
        width = ENDS.itemsize
        return np.frombuffer(self._pread(shard, "ends", first * width, (last - first) * width), ENDS).astype(np.int64)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.tokens:
            raise UserError(f"{self._called()} has no positions {start} to {stop}; it holds {self.tokens} tokens")

    def _called(self) -> str:
        return f"the {self.split} split of {self.path}"


class ListedShard(NamedTuple):
    """One shard and what store.json says of it: a small value, which may go to another process to be verified."""

    folder: Path
    name: str
    tokens: int
    documents: int
    sha256: str  # of its tokens
    ids: tuple[int, int, int | None]  # vocabulary size, end and begin of document

    @property
    def size(self) -> int:
        """Bytes of tokens and ends."""
        return self.tokens * token_dtype(self.ids[0]).itemsize + self.documents * ENDS.itemsize

    def problems(self) -> Iterator[str]:
        """Read it from end to end: a sentence for each thing that is wrong with it."""
        try:
            yield from shard_problems(self.folder, self.name, *self.ids)
        except OSError as error:  # a disk that fails, a file that may not be read
            yield f"{self.folder / self.name}: cannot be read ({error.strerror})"
        manifest = Manifest.read(self.folder, self.name)
        listed = (self.tokens, self.documents, self.sha256)
        if manifest and (manifest.tokens, manifest.documents, manifest.sha256.get("tokens")) != listed:
            yield f"{self.folder / self.name}: its manifest is not the one that store.json lists"


def check_tokenizer(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless `tokenizer` encodes as the one that made the store does."""
    given = tokenizer_fingerprint(tokenizer)
    # A newer `tokenizers` may write the same tokenizer down differently: then the store's own copy is asked.
    if given != store.tokenizer_fingerprint and given != tokenizer_fingerprint(store.tokenizer()):
        raise UserError(
            f"{store.path} was made with another tokenizer; use the one in {store.path / 'tokenizer'} or prepare a "
            "store with this one"
        )


def check_vocabulary(store: TokenStore, model_vocab_size: int) -> None:
    """Raise UserError where the store may hold an id that a model with `model_vocab_size` rows has no row for."""
    if store.vocab_size > model_vocab_size:
        raise UserError(
            f"{store.path} holds token ids up to {store.vocab_size - 1}, beyond the model's vocabulary of "
            f"{model_vocab_size}; set vocab_size to at least {store.vocab_size}"
        )
