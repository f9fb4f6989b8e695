"""Where documents come from: files of text in five forms, and the built-in corpus.

    patterns (file, folder, glob, `stories`)  ->  open_sources  ->  sources, in a fixed order
    source  ->  documents(): one after the other, streamed, never a whole file in memory

A source either gives every one of its documents or raises a UserError that names file, line and reason; it never ends
early in silence. A source is the unit that becomes one shard a split (see `llm.data.prepare`).
"""

import glob
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from backports import zstd

from ..errors import UserError
from .stories import MARKER, Split, stories

CHUNK = 1 << 20  # bytes read at a time from a .txt
STORIES_A_SOURCE = 10_000
STORY_BYTES = 500  # about the mean length of a story; for the progress bar only
DEFAULT_STORIES = 50_000
STORIES_HELD_OUT = 20  # one validation story for so many training stories: 5 %
REPAIR = "repair the file or leave it out"


class Document(NamedTuple):
    text: str
    read: int  # bytes of the source read so far, for the progress bar


class Source(Protocol):
    """What `llm.data.prepare` asks of a source. Sources are small values that travel to worker processes."""

    @property
    def name(self) -> str: ...  # of its shards; unique in a store
    @property
    def location(self) -> str: ...  # what it is called in messages and manifests
    @property
    def size(self) -> int: ...  # bytes; an estimate where the text is yet to be made
    @property
    def split(self) -> Split | None: ...  # None: each document by the hash of its text

    def documents(self) -> Iterator[Document]: ...
    def description(self) -> dict[str, str | int]: ...  # for manifests: location, size and sha256 of all it holds


@dataclass(frozen=True)
class FileSource:
    """One file of documents; its form is told by its suffix."""

    name: str
    location: str  # absolute path
    size: int
    text_key: str
    marker: str
    split: None = None

    def documents(self) -> Iterator[Document]:
        """Yield the documents in order. Raises UserError at the first that cannot be read, or where there is none."""
        count = read = 0
        any_text = False
        try:
            for document in READERS[_suffix(Path(self.location))](self):
                count, read, any_text = count + 1, document.read, any_text or bool(document.text)
                yield document
        except EOFError as error:  # from gzip and zstd alike
            where = f"after {count} documents, at byte {read} of {self.size}"
            raise UserError(f"{self.location} is truncated ({where}); fetch or compress it again") from error
        except (zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
            where = f"after {count} documents, near byte {read} of {self.size}"
            raise UserError(f"{self.location} is corrupt ({where}: {error}); fetch or compress it again") from error
        except OSError as error:
            raise UserError(f"{self.location} cannot be read ({error.strerror or error}); {REPAIR}") from error
        if not any_text:
            raise UserError(f"{self.location} is empty: it holds no document with any text; {REPAIR}")

    def description(self) -> dict[str, str | int]:
        """Location, size and sha256 of the file as it lies on disk now. Reads it all."""
        try:
            with Path(self.location).open("rb") as raw:
                sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
                return {"location": self.location, "size": raw.tell(), "sha256": sha256}
        except OSError as error:
            raise UserError(f"{self.location} cannot be read ({error.strerror}); {REPAIR}") from error


@dataclass(frozen=True)
class StorySource:
    """A range of the built-in corpus, which has a validation split of its own."""

    name: str
    seed: int
    split: Split
    start: int
    count: int

    @property
    def location(self) -> str:
        return f"stories:{self.seed}, {self.split} {self.start} to {self.start + self.count}"

    @property
    def size(self) -> int:
        return self.count * STORY_BYTES

    def documents(self) -> Iterator[Document]:
        for index, text in enumerate(stories(self.seed, self.split, self.start, self.count), 1):
            yield Document(text, index * STORY_BYTES)

    def description(self) -> dict[str, str | int]:
        """Location, size and sha256 of the stories, a marker after each. Tells versions of the grammar apart."""
        digest, size = hashlib.sha256(), 0
        for document in self.documents():
            data = (document.text + MARKER).encode()
            digest.update(data)
            size += len(data)
        return {"location": self.location, "size": size, "sha256": digest.hexdigest()}


def open_sources(
    patterns: Sequence[str],
    *,
    text_key: str = "text",
    marker: str = MARKER,
    documents: int | None = None,
    seed: int = 0,
) -> list[Source]:
    """Resolve files, folders (searched to the bottom), globs and `stories[:SEED]` into sources, in a fixed order.

    Files are sorted by absolute path, after the stories, whatever the order of the patterns. `documents` is the number
    of training stories, `seed` theirs where the pattern names none. Raises UserError for a pattern that matches
    nothing, a file of unknown form and a source that is named twice.
    """
    if not marker:
        raise UserError("the marker between documents is empty; name one with --marker")
    corpora = [pattern for pattern in patterns if re.fullmatch(r"stories(:\d+)?", pattern)]
    if documents is not None and (not corpora or documents < 1):
        raise UserError("--documents is the number of stories (at least 1) and goes with the source `stories`")
    seeds = [int(pattern.partition(":")[2] or seed) for pattern in corpora]
    paths = sorted(path for pattern in patterns if pattern not in corpora for path in _files(pattern))
    _refuse_duplicates([f"stories:{seed}" for seed in seeds] + [str(path.resolve()) for path in paths])
    ranges = [item for seed in seeds for item in _story_ranges(seed, documents or DEFAULT_STORIES)]
    found: list[Source] = [
        StorySource(f"{index:05d}-stories-{split}", seed, split, start, count)
        for index, (seed, split, start, count) in enumerate(ranges)
    ]
    for index, path in enumerate(paths, len(found)):
        stem = re.sub(r"[^\w.=-]", "_", path.name.removesuffix(_suffix(path)))[:80]
        found.append(FileSource(f"{index:05d}-{stem}", str(path), path.stat().st_size, text_key, marker))
    if not found:
        raise UserError("no source is named; give a file, a folder, a glob or `stories`")
    return found


def _files(pattern: str) -> list[Path]:
    """Absolute paths of the files that a pattern stands for. A file that is named must be of a known form."""
    if Path(pattern).is_dir():
        return _files_below(Path(pattern))
    named = [Path(pattern)] if Path(pattern).is_file() else _glob(pattern)
    if not named:
        raise UserError(f"no file matches {pattern}; give a file, a folder, a glob or `stories`")
    files = [path for path in named if path.is_file()]
    for path in files:
        if _suffix(path) not in READERS:
            raise UserError(f"{path} is of no form that can be read; the known suffixes are {', '.join(READERS)}")
    # With `**` the files below a folder are matched themselves.
    folders = [path for path in named if path.is_dir() and "**" not in pattern]
    return [_absolute(path) for path in files] + [path for folder in folders for path in _files_below(folder)]


def _files_below(folder: Path) -> list[Path]:
    files = [path for path in _glob(f"{glob.escape(str(folder))}/**") if path.is_file()]
    known = [_absolute(path) for path in files if _suffix(path) in READERS]
    if not known:
        raise UserError(f"the folder {folder} holds no file of a known form ({', '.join(READERS)}); give another")
    if len(known) < len(files):
        others = [path.name for path in files if _suffix(path) not in READERS]
        print(
            f"note: left out of {folder}, being of no known form: {len(others)} files, as {others[0]}", file=sys.stderr
        )
    return known


def _glob(pattern: str) -> list[Path]:
    # glob follows links to folders, takes absolute patterns and leaves hidden files out; Path.glob does none of these.
    return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207


def _absolute(path: Path) -> Path:
    # Folders are resolved, so that one file has one name from everywhere; the file itself is not: the hub's cache links
    # names with suffixes to files without.
    return path.parent.resolve() / path.name


def _refuse_duplicates(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{name} is named twice, so its documents would be counted twice; name it once")
        seen.add(name)


def _story_ranges(seed: int, documents: int) -> Iterator[tuple[int, Split, int, int]]:
    """(seed, split, start, count) of each share of the corpus: the training stories, then 5 % as many to validate."""
    held_out = max(1, documents // STORIES_HELD_OUT)
    splits: tuple[tuple[Split, int], ...] = (("train", documents), ("validation", held_out))
    for split, total in splits:
        for start in range(0, total, STORIES_A_SOURCE):
            yield seed, split, start, min(STORIES_A_SOURCE, total - start)


def _suffix(path: Path) -> str:
    """The known suffix of a path, `.jsonl.gz` rather than `.gz`; an unknown one is given back as it is."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), path.suffix)


# ---- One reader a form -----------------------------------------------------------------------------------------------

Reader = Callable[[FileSource], Iterator[Document]]
Unpack = Callable[[BinaryIO], AbstractContextManager[Iterable[bytes]]]


def _marked_text(source: FileSource) -> Iterator[Document]:
    """Documents between markers.

    One line break next to a marker, and one at either end of the file, is layout and not part of a document.
    """
    line = 1  # on which the next document begins
    with Path(source.location).open("rb") as raw:
        for content in _between(raw, source.marker.encode()):
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                number = line + content.count(b"\n", 0, error.start)
                raise UserError(f"{source.location}, line {number}: {_bad_byte(error)}; {REPAIR}") from error
            line += content.count(b"\n") + source.marker.count("\n")
            yield Document(_without_layout(text), raw.tell())


def _between(raw: BinaryIO, marker: bytes) -> Iterator[bytes]:
    """Split a stream at each marker. What follows the last one counts only where it is more than a line break."""
    whole: list[bytes] = []  # pieces of the document being read, known to hold no marker
    rest = b""  # may end in the beginning of a marker
    while chunk := raw.read(CHUNK):
        *ended, rest = (rest + chunk).split(marker)
        for piece in ended:
            yield b"".join([*whole, piece])
            whole.clear()
        settled = max(0, len(rest) - len(marker) + 1)
        whole.append(rest[:settled])
        rest = rest[settled:]
    last = b"".join([*whole, rest])
    if last.strip(b"\r\n"):
        yield last


def _without_layout(text: str) -> str:
    text = text.removeprefix("\r\n") if text.startswith("\r\n") else text.removeprefix("\n")
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _json_lines(unpack: Unpack) -> Reader:
    """A reader of one JSON object a line, from what `unpack` makes of the file."""

    def read(source: FileSource) -> Iterator[Document]:
        with Path(source.location).open("rb") as raw, unpack(raw) as stream:
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    text = _text_of(line, source.text_key, f"{source.location}, line {number}")
                    yield Document(text, raw.tell())

    return read


def _text_of(line: bytes, key: str, where: str) -> str:
    """The text of one JSON line. Raises UserError, opening with `where`, for anything that is not text."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {_bad_byte(error)}; {REPAIR}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error}); {REPAIR}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object but {type(record).__name__}; {REPAIR}")
    if key not in record:
        raise UserError(f"{where}: no key {key!r} among {sorted(record)}; name the key of the text with --text-key")
    return _checked(record[key], key, where)


def _checked(text: object, key: str, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: {key!r} is not text but {type(text).__name__}; name another key with --text-key")
    try:
        text.encode("utf-8")  # JSON may escape half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is half a surrogate pair, not Unicode; {REPAIR}") from error
    return text


def _parquet(source: FileSource) -> Iterator[Document]:
    """One document a row, a row group at a time."""
    import pyarrow
    from pyarrow import parquet  # imported here: 0.3 s that only .parquet pays

    key, row = source.text_key, 0
    try:
        with parquet.ParquetFile(source.location, page_checksum_verification=True) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if key not in names:
                raise UserError(f"{source.location}: no column {key!r} among {names}; name one with --text-key")
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[key]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        where = f"{source.location}, row {row}"
                        yield Document(_checked(text, key, where), source.size * row // rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{source.location}, after row {row}: {_bad_byte(error)}; {REPAIR}") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source.location} is truncated or corrupt, after row {row} ({reason}); fetch it again"
        ) from error


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8, byte 0x{error.object[error.start]:02x} ({error.reason})"


def _zstd(raw: BinaryIO) -> zstd.ZstdFile:
    # Frames written with --long=31 need the large window; only they use the memory.
    return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31})


def _gzip(raw: BinaryIO) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=raw)


def _plain(raw: BinaryIO) -> BinaryIO:
    return raw


READERS: dict[str, Reader] = {
    ".txt": _marked_text,
    ".jsonl": _json_lines(_plain),
    ".jsonl.gz": _json_lines(_gzip),
    ".jsonl.zst": _json_lines(_zstd),
    ".jsonl.zstd": _json_lines(_zstd),
    ".parquet": _parquet,
}
