"""One shard of a token store on disk: three files, each written atomically.

    ids, lengths  ->  ShardWriter  ->  NAME.tokens  little-endian uint16, or uint32 for a vocabulary above 65,536
                                       NAME.ends    position after each document in the shard, little-endian uint64
                                       NAME.groups  only where documents have groups: see GROUPS
                                       NAME.hashes  only where duplicates are dropped: see HASHES
                                       NAME.json    the manifest: where from, how much, sha256; renamed into place last

A document is its ids, then the end-of-document id. `is_complete` asks whether the files are those of the manifest,
`shard_problems` also whether they make sense.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.files import write_json
from .stories import Split

SPLITS: tuple[Split, ...] = ("train", "validation")
ENDS = np.dtype("<u8")
GROUPS = np.dtype("<u8")  # what a document is a part of: 8 bytes of the hash of its name; equal for one group
# Of the text of each document that a shard was made of, duplicates too: the first 16 bytes of its sha256, big-endian in
# two halves, and its length in UTF-8.
HASHES = np.dtype([("high", ">u8"), ("low", ">u8"), ("bytes", "<u8")])
PAGE = 4096  # bytes
SAMPLED_PAGES = {"tokens": 3, "ends": 1}  # that `sampled_hash` reads of each file
CHUNK = 1 << 22  # tokens checked at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """The least type that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def boundary_tokens(begin_of_document: int | None) -> int:
    """How many ids a document has beside those of its text: its end, and its beginning where there is one."""
    return 1 if begin_of_document is None else 2


@dataclass(frozen=True)
class Manifest:
    """What a shard holds and what it was made of. Nothing in it depends on when or by how many processes."""

    name: str
    split: Split
    source: dict[str, str | int]  # location, size, sha256
    documents_in: int  # that belong to this split, those left out among them
    documents: int
    left_out: dict[str, int]  # why (empty, subset, duplicate) and how many documents
    bad: list[str]  # documents left out for being broken, a sentence each; the first split of a source lists them
    tokens: int  # ids that begin and end documents included
    bytes_in: int  # of the text of `documents` in UTF-8
    bytes_out: int  # of NAME.tokens
    sha256: dict[str, str]  # of each file, by suffix
    dtype: str
    tokenizer_fingerprint: str
    versions: dict[str, str]
    sampled: str = ""  # `sampled_hash` of the shard; older ones have none
    lost: dict[str, Any] = field(default_factory=dict)  # `LostText` of the documents that were encoded

    @classmethod
    def read(cls, folder: Path, name: str) -> "Manifest | None":
        """The manifest of a shard; None where there is none or it is no manifest."""
        try:
            return cls(**json.loads((folder / f"{name}.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


class ShardWriter:
    """Writes a shard aside, under names that end in .partial, and renames it when it is complete.

    A context: leaving it without `finish` removes what was written. What is counted beside tokens and documents is the
    caller's to count, who knows the text.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, kinds: tuple[str, ...] = ("tokens", "ends")) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.tokens = self.documents = self.bytes_in = self.documents_in = 0
        self.left_out: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {kind: _partial(self._path(kind)).open("wb") for kind in kinds}
        self._digests = {kind: hashlib.sha256() for kind in self._files}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for kind, file in self._files.items():
            with suppress(OSError):  # a full disk, which has been told already
                file.close()
            _partial(self._path(kind)).unlink(missing_ok=True)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `tokens` [sum of lengths], of which each takes `lengths` [documents], its end included."""
        self.write("tokens", tokens.astype(self.dtype))
        self.write("ends", (self.tokens + np.cumsum(lengths)).astype(ENDS))
        self.tokens += len(tokens)
        self.documents += len(lengths)

    def leave_out(self, reason: str) -> None:
        """Count a document that was read and is not in the shard."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def write(self, kind: str, values: np.ndarray) -> None:
        """Append to one of the files."""
        data = values.tobytes()
        self._files[kind].write(data)
        self._digests[kind].update(data)

    def finish(
        self,
        split: Split,
        source: dict[str, str | int],
        tokenizer_fingerprint: str,
        versions: dict[str, str],
        bad: list[str] | None = None,
        lost: dict[str, Any] | None = None,
    ) -> Manifest:
        """Move the shard into place, its manifest last, and return the manifest."""
        sha256 = self.move_into_place()
        manifest = Manifest(
            name=self.name,
            split=split,
            source=source,
            documents_in=self.documents_in or self.documents,
            documents=self.documents,
            left_out=self.left_out,
            bad=bad or [],
            tokens=self.tokens,
            bytes_in=self.bytes_in,
            bytes_out=self.tokens * self.dtype.itemsize,
            sha256=sha256,
            dtype=self.dtype.name,
            tokenizer_fingerprint=tokenizer_fingerprint,
            versions=versions,
            sampled=sampled_hash(self.folder, self.name),
            lost=lost or {},
        )
        write_json(self._path("json"), asdict(manifest))
        return manifest

    def move_into_place(self) -> dict[str, str]:
        """Move the files into place, and return the sha256 of each."""
        for kind, file in self._files.items():
            _close(file)
            _partial(self._path(kind)).replace(self._path(kind))
        return {kind: digest.hexdigest() for kind, digest in self._digests.items()}

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}"


def sampled_hash(folder: Path, name: str) -> str:
    """Hash a few pages of a shard's tokens and ends, at places that its name draws: 16 hex digits.

    It tells shards of equal sizes apart in a few reads each, where hashing them whole would read the store.

    Raises OSError where a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    for kind, pages in SAMPLED_PAGES.items():
        descriptor = os.open(folder / f"{name}.{kind}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            last = max(0, os.fstat(descriptor).st_size - PAGE) // PAGE
            for page in range(pages):
                drawn = zlib.crc32(f"{name}.{kind} {page}".encode()) % (last + 1)
                digest.update(os.pread(descriptor, PAGE, drawn * PAGE))
        finally:
            os.close(descriptor)
    return digest.hexdigest()


def is_complete(folder: Path, manifest: Manifest) -> bool:
    """Whether the files of a shard are, byte for byte, those that its manifest describes."""
    for kind, expected in manifest.sha256.items():
        path = folder / f"{manifest.name}.{kind}"
        if not path.is_file() or _sha256(path) != expected:
            return False
    return True


def sizes_match(folder: Path, manifest: Manifest) -> bool:
    """Whether the files of a shard have the sizes that its manifest says: a stat each."""
    hashed = manifest.documents + manifest.left_out.get("duplicate", 0)
    sizes = {
        "tokens": manifest.bytes_out,
        "ends": manifest.documents * ENDS.itemsize,
        "groups": manifest.documents * GROUPS.itemsize,
        "hashes": hashed * HASHES.itemsize,
    }
    try:
        found = {kind: (folder / f"{manifest.name}.{kind}").stat().st_size for kind in manifest.sha256}
    except OSError:
        return False
    return all(size == sizes[kind] for kind, size in found.items())


def shard_problems(
    folder: Path, name: str, vocab_size: int, end_of_document: int, begin_of_document: int | None = None
) -> Iterator[str]:
    """Read a shard from end to end: one sentence for each thing that is wrong with it."""
    manifest = Manifest.read(folder, name)
    if manifest is None:
        yield f"{folder / name}.json is missing or no manifest"
        return
    if not {"tokens", "ends"} <= manifest.sha256.keys() or not is_complete(folder, manifest):
        yield f"{folder / name}: its files are not those that its manifest describes"
    tokens_path, ends_path = folder / f"{name}.tokens", folder / f"{name}.ends"
    if not (tokens_path.is_file() and ends_path.is_file()):
        return
    ends = np.fromfile(ends_path, ENDS).astype(np.int64)
    dtype = token_dtype(vocab_size)
    if (np.diff(ends, prepend=0) <= 0).any():
        yield f"{ends_path}: the document ends do not ascend"
    if (ends[-1] if len(ends) else 0) != tokens_path.stat().st_size // dtype.itemsize:
        yield f"{ends_path}: the last document does not end at the last token"
    largest, ended, begun = 0, [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    with tokens_path.open("rb") as file:
        start = 0
        while len(ids := np.fromfile(file, dtype, CHUNK)):
            largest = max(largest, int(ids.max()))
            ended.append(start + 1 + np.flatnonzero(ids == end_of_document))
            if begin_of_document is not None:
                begun.append(start + np.flatnonzero(ids == begin_of_document))
            start += len(ids)
    if largest >= vocab_size:
        yield f"{tokens_path}: the token id {largest} is beyond the vocabulary of {vocab_size}"
    if not np.array_equal(np.concatenate(ended), ends):
        yield f"{tokens_path}: the end-of-document ids are not where the documents end"
    if begin_of_document is not None and not np.array_equal(np.concatenate(begun), np.append(0, ends)[: len(ends)]):
        yield f"{tokens_path}: the begin-of-document ids are not where the documents begin"


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _close(file: BinaryIO) -> None:
    """Close a file when its content is on the disk, so that a rename never outruns it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
