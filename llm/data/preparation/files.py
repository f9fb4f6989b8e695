"""Files of documents: one reader a form, told by the suffix.

    .txt  .jsonl  .jsonl.gz  .jsonl.zst  .jsonl.zstd  .parquet  ->  FileSource.documents()  ->  documents, streamed

A broken line is one bad document and the next is read; a file whose packing is broken ends there. Either is an error
unless bad documents may be left out.
"""

import gzip
import hashlib
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from backports import zstd

from ...common.errors import UserError
from .documents import LARGEST, REPAIR, BadDocuments, Document, Grouping, too_large
from .parquet_pages import page_sizes

CHUNK = 1 << 20  # bytes read at a time from a .txt
WINDOW_TOO_LARGE = "requires too much memory"  # of zstd
LARGEST_PAGE = 1 << 29  # bytes of a parquet page; writers make them of one megabyte


@dataclass(frozen=True)
class FileSource:
    """One file of documents; its form is told by its suffix."""

    name: str
    location: str  # absolute path
    size: int
    text_key: str
    id_key: str | None
    marker: str
    largest: int = LARGEST  # bytes of a document; a larger one is bad, and never whole in memory
    grouping: Grouping | None = None
    split: None = None

    @property
    def keys(self) -> "Keys":
        return Keys(self.text_key, self.id_key, self.grouping)

    def documents(self, bad: BadDocuments) -> Iterator[Document]:
        """Yield the documents in order. `bad` is told of each that cannot be read, and where there is none."""
        count = read = 0
        any_text = False
        try:
            for document in READERS[suffix_of(Path(self.location))](self, bad):
                count, read, any_text = count + 1, document.read, any_text or bool(document.text)
                yield document
        except EOFError:  # from gzip and zstd alike
            where = f"after {count} documents, at byte {read} of {self.size}"
            bad(UserError(f"{self.location} is truncated ({where}); fetch or compress it again"))
        except (zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
            where = f"after {count} documents, near byte {read} of {self.size}"
            if WINDOW_TOO_LARGE in str(error):
                raise UserError(
                    f"{self.location} asks for a window of more than {max(1 << 27, self.largest):,} bytes; raise "
                    "--max-document-bytes to 2147483648, or compress it again without --long"
                ) from error
            bad(UserError(f"{self.location} is corrupt ({where}: {error}); fetch or compress it again"))
        except OSError as error:
            raise UserError(f"{self.location} cannot be read ({error.strerror or error}); {REPAIR}") from error
        if not any_text and not bad.sentences:
            bad(UserError(f"{self.location} is empty: it holds no document with any text; {REPAIR}"))

    def description(self) -> dict[str, str | int]:
        """Location, size and sha256 of the file as it lies on disk now. Reads it all."""
        try:
            with Path(self.location).open("rb") as raw:
                sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
                return {"location": self.location, "size": raw.tell(), "sha256": sha256}
        except OSError as error:
            raise UserError(f"{self.location} cannot be read ({error.strerror}); {REPAIR}") from error

    def stamp(self) -> tuple[int, ...]:
        """Changes when the file is written to or replaced."""
        try:
            found = Path(self.location).stat()
        except OSError as error:
            raise UserError(f"{self.location} cannot be read ({error.strerror}); {REPAIR}") from error
        return found.st_ino, found.st_size, found.st_mtime_ns


def suffix_of(path: Path) -> str:
    """The known suffix of a path, `.jsonl.gz` rather than `.gz`; an unknown one is given back as it is."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), path.suffix)


class Keys(NamedTuple):
    """Under which keys a record has its text, its id and its group."""

    text: str
    id: str | None
    grouping: Grouping | None

    @property
    def names(self) -> list[str]:
        """Each key once, the text's first."""
        keys = (self.text, self.id, self.grouping and self.grouping.key)
        return list(dict.fromkeys(key for key in keys if key is not None))


def document_of(record: Mapping[str, object], keys: Keys, where: str, read: int) -> Document:
    """The document of a record; `read` as in `Document`. Raises UserError, opening with `where`."""
    text, identity = text_and_id(record, keys.text, keys.id, where)
    return Document(text, identity, read, keys.grouping and keys.grouping.of(record, where))


def text_and_id(record: Mapping[str, object], text_key: str, id_key: str | None, where: str) -> tuple[str, str | None]:
    """The text and, where `id_key` names one, the id of a record. Raises UserError, opening with `where`."""
    for key, option in ((text_key, "--text-key"), (id_key, "--id-key")):
        if key is not None and key not in record:
            raise UserError(f"{where}: no key {key!r} among {sorted(record)}; name one with {option}")
    text, identity = record[text_key], None if id_key is None else record[id_key]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {text_key!r} is not text but {type(text).__name__}; name another key with --text-key"
        )
    try:
        for value in (text, identity if isinstance(identity, str) else ""):
            value.encode("utf-8")  # JSON may escape half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is half a surrogate pair, not Unicode; {REPAIR}") from error
    if id_key is not None and (not isinstance(identity, str | int) or isinstance(identity, bool)):
        raise UserError(
            f"{where}: {id_key!r} is neither text nor a number but {type(identity).__name__}; name another "
            "key with --id-key"
        )
    return text, None if identity is None else str(identity)


# ---- One reader a form -----------------------------------------------------------------------------------------------

Reader = Callable[[FileSource, BadDocuments], Iterator[Document]]
Unpack = Callable[[BinaryIO, int], AbstractContextManager[Any]]


def _marked_text(source: FileSource, bad: BadDocuments) -> Iterator[Document]:
    """Documents between markers.

    One line break next to a marker, and one at either end of the file, is layout and not part of a document.
    """
    line = 1  # on which the next document begins
    with Path(source.location).open("rb") as raw:
        for piece in _between(raw, source.marker.encode(), source.largest):
            if piece.content is None:
                bad(too_large(f"{source.location}, line {line}", piece.size, source.largest))
            else:
                content = piece.content.removeprefix(BOM_UTF8) if line == 1 else piece.content
                try:
                    yield Document(_without_layout(content.decode("utf-8")), None, raw.tell())
                except UnicodeDecodeError as error:
                    number = line + content.count(b"\n", 0, error.start)
                    bad(UserError(f"{source.location}, line {number}: {_bad_byte(error)}; {REPAIR}"))
            line += piece.lines + source.marker.count("\n")


class Piece(NamedTuple):
    """What lies between two marks of a stream: `content` is None where it has more bytes than are allowed."""

    content: bytes | None
    size: int  # bytes
    lines: int  # line breaks


class _Growing:
    """A piece that is read part by part. Beyond `largest` bytes it is only counted."""

    def __init__(self, largest: int) -> None:
        self.largest, self.parts, self.size, self.lines = largest, list[bytes](), 0, 0

    def add(self, part: bytes) -> None:
        self.size += len(part)
        self.lines += part.count(b"\n")
        if self.size <= self.largest:
            self.parts.append(part)
        else:
            self.parts.clear()

    def take(self) -> Piece:
        """The piece, at whose end the next begins."""
        content = b"".join(self.parts) if self.size <= self.largest else None
        piece = Piece(content, self.size, self.lines)
        self.parts, self.size, self.lines = [], 0, 0
        return piece


def _between(raw: BinaryIO, marker: bytes, largest: int) -> Iterator[Piece]:
    """Split a stream at each marker. What follows the last one counts only where it is more than a line break."""
    growing = _Growing(largest)  # of the document being read: parts known to hold no marker
    rest = b""  # may end in the beginning of a marker
    while chunk := raw.read(CHUNK):
        *ended, rest = (rest + chunk).split(marker)
        for part in ended:
            growing.add(part)
            yield growing.take()
        known = max(0, len(rest) - len(marker) + 1)
        growing.add(rest[:known])
        rest = rest[known:]
    growing.add(rest)
    last = growing.take()
    if last.content is None or last.content.strip(b"\r\n"):
        yield last


def _lines(stream: BinaryIO, largest: int) -> Iterator[Piece]:
    """The lines of a stream, read a megabyte at a time at most."""
    growing = _Growing(largest)
    while part := stream.readline(CHUNK):
        growing.add(part)
        if part.endswith(b"\n"):
            yield growing.take()
    if growing.size:
        yield growing.take()


def _without_layout(text: str) -> str:
    text = text.removeprefix("\r\n") if text.startswith("\r\n") else text.removeprefix("\n")
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _json_lines(unpack: Unpack) -> Reader:
    """A reader of one JSON object a line, from what `unpack` makes of the file."""

    def read(source: FileSource, bad: BadDocuments) -> Iterator[Document]:
        with Path(source.location).open("rb") as raw, unpack(raw, source.largest) as stream:
            for number, piece in enumerate(_lines(stream, source.largest), 1):
                where = f"{source.location}, line {number}"
                if piece.content is None:
                    bad(too_large(where, piece.size, source.largest))
                    continue
                line = piece.content.removeprefix(BOM_UTF8) if number == 1 else piece.content
                if line.isspace():
                    continue
                try:
                    document = document_of(_record(line, where), source.keys, where, raw.tell())
                except UserError as error:
                    bad(error)
                else:
                    yield document

    return read


def _record(line: bytes, where: str) -> dict[str, object]:
    """The JSON object of a line. Raises UserError, opening with `where`, for anything else."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {_bad_byte(error)}; {REPAIR}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error}); {REPAIR}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object but {type(record).__name__}; {REPAIR}")
    return record


def _parquet(source: FileSource, bad: BadDocuments) -> Iterator[Document]:
    """One document a row, a row group at a time.

    A page is decompressed whole, so that one of more than `LARGEST_PAGE` and more than a document may have ends the
    file. A value that repeats stays one value.
    """
    import pyarrow
    from pyarrow import parquet  # imported here: 0.3 s that only .parquet pays

    row = 0
    columns = source.keys.names
    try:
        names = parquet.read_schema(source.location).names
        group_key = source.grouping and source.grouping.key
        for key, option in ((source.text_key, "--text-key"), (source.id_key, "--id-key"), (group_key, "--group-by")):
            if key is not None and names.count(key) != 1:
                what = "no column" if key not in names else "more than one column"
                raise UserError(f"{source.location}: {what} {key!r} among {names}; name one with {option}")
        with parquet.ParquetFile(source.location, page_checksum_verification=True, read_dictionary=columns) as file:
            _check_pages(source, file.metadata, columns)
            rows = file.metadata.num_rows
            for group in range(file.num_row_groups):
                at_a_time = _rows_at_a_time(file.metadata.row_group(group), source.text_key)
                for batch in file.iter_batches(batch_size=at_a_time, row_groups=[group], columns=columns):
                    for index in range(len(batch)):
                        row += 1
                        where = f"{source.location}, row {row}"
                        if (size := max(_cell_bytes(batch.column(key), index) for key in columns)) > source.largest:
                            bad(too_large(where, size, source.largest))
                            continue
                        try:
                            record = {key: batch.column(key)[index].as_py() for key in columns}
                            document = document_of(record, source.keys, where, source.size * row // rows)
                        except UnicodeDecodeError as error:
                            bad(UserError(f"{where}: {_bad_byte(error)}; {REPAIR}"))
                        except UserError as error:
                            bad(error)
                        else:
                            yield document
    except (pyarrow.ArrowException, OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        bad(UserError(f"{source.location} is truncated or corrupt, after row {row} ({reason}); fetch it again"))


def _check_pages(source: FileSource, metadata: Any, columns: list[str]) -> None:
    """Raise UserError for a page that would take more memory than a document may."""
    with Path(source.location).open("rb") as raw:
        for group in range(metadata.num_row_groups):
            chunks = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
            for chunk in chunks:
                most = max(LARGEST_PAGE, source.largest)
                if chunk.path_in_schema in columns and (size := max(page_sizes(raw, chunk), default=0)) > most:
                    raise UserError(
                        f"{source.location}: a page of {size:,} bytes in column {chunk.path_in_schema!r}, more than "
                        f"{most:,}; write the file again with smaller pages, or raise --max-document-bytes"
                    )


def _rows_at_a_time(group: Any, key: str) -> int:
    """So many rows of a row group that their text has a megabyte each at most, on the average."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == key)
    return max(1, min(1024, (1024 * CHUNK) // max(1, size // max(1, group.num_rows))))


def _cell_bytes(column: Any, index: int) -> int:
    """Bytes of a text in a column; 0 of what is none."""
    value = column[index]
    value = getattr(value, "value", value) if hasattr(value, "dictionary") else value
    return len(value.as_buffer() or b"") if hasattr(value, "as_buffer") else 0


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8, byte 0x{error.object[error.start]:02x} ({error.reason})"


def _zstd(raw: BinaryIO, largest: int) -> zstd.ZstdFile:
    # A frame written with --long=31 asks for a window of 2 GiB: no more than zstd's own default, or a document.
    window = min(31, max(27, (largest - 1).bit_length()))
    return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: window})


def _gzip(raw: BinaryIO, largest: int) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=raw)


def _plain(raw: BinaryIO, largest: int) -> BinaryIO:
    return raw


READERS: dict[str, Reader] = {
    ".txt": _marked_text,
    ".jsonl": _json_lines(_plain),
    ".jsonl.gz": _json_lines(_gzip),
    ".jsonl.zst": _json_lines(_zstd),
    ".jsonl.zstd": _json_lines(_zstd),
    ".parquet": _parquet,
}
