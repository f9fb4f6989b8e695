"""Datasets of the Hugging Face hub, as sources.

    owner/name[:configuration]  ->  the `datasets` library  ->  Arrow files in its cache, some a split
    Arrow files                 ->  ranges of rows          ->  HubSource.documents(), streamed

Only `hub_sources` imports `datasets`, which takes 0.6 to 1.2 s and brings pandas. A worker maps the Arrow files with
pyarrow alone (0.1 s) and needs no network. Rows are counted from 0 in their split, as the hub's viewer counts them.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

from ...common.errors import UserError
from ..stories import Split
from .documents import LARGEST, REPAIR, BadDocuments, Document, Grouping, too_large
from .files import READERS, Keys, document_of

if TYPE_CHECKING:
    import pyarrow

ROWS_A_SOURCE = 100_000  # 0.5 GB of OpenWebText, which makes 81 sources; 0.09 GB of TinyStories, 22 and one
VALIDATION = ("validation", "valid", "dev", "val")  # the names that such a split goes by
NAME = r"\w[\w.-]*"


class Piece(NamedTuple):
    """Rows of one Arrow file."""

    path: str
    start: int
    rows: int


@dataclass(frozen=True)
class HubSource:
    """A range of the rows of one split of a dataset."""

    name: str
    dataset: str  # owner/name or owner/name:configuration
    rows_of: str  # the split by the dataset's own name
    split: Split | None  # None where it has no validation split of its own
    start: int
    count: int
    size: int  # bytes of text in Arrow's layout: UTF-8 and a few bytes a row
    text_key: str
    id_key: str | None
    pieces: tuple[Piece, ...]
    largest: int = LARGEST  # bytes of a document; a larger one is bad
    grouping: Grouping | None = None

    @property
    def location(self) -> str:
        return f"{self.dataset}, {self.rows_of} {self.start} to {self.start + self.count}"

    @property
    def keys(self) -> Keys:
        return Keys(self.text_key, self.id_key, self.grouping)

    def stamp(self) -> tuple[int, ...]:
        """The cache's files are never written to again."""
        return ()

    def documents(self, bad: BadDocuments) -> Iterator[Document]:
        """Yield the documents in order. `bad` is told of each that cannot be read, by its row."""
        for row, values in enumerate(self._rows(), self.start):
            where = f"{self.location}, row {row}"
            if (size := len(values[self.text_key] or b"")) > self.largest:
                bad(too_large(where, size, self.largest))
                continue
            try:
                record = {key: None if value is None else value.decode() for key, value in values.items()}
                read = self.size * (row + 1 - self.start) // self.count
                document = document_of(record, self.keys, where, read)
            except UnicodeDecodeError as error:
                byte = f"byte 0x{error.object[error.start]:02x} ({error.reason})"
                bad(UserError(f"{where}: invalid UTF-8, {byte}; {REPAIR}"))
            except UserError as error:
                bad(error)
            else:
                yield document

    def description(self) -> dict[str, str | int]:
        """Location, bytes of text, and the sha256 of the rows, which is the same wherever the dataset was downloaded.

        Hashed of each row: its text and, with an `id_key`, its id, and likewise its group; each as its length in UTF-8
        (8 bytes, little-endian, signed, -1 for null), then itself. Reads it all.
        """
        digest, size = hashlib.sha256(), 0
        for values in self._rows():
            for value in values.values():
                digest.update((-1 if value is None else len(value)).to_bytes(8, "little", signed=True))
                digest.update(value or b"")
            size += len(values[self.text_key] or b"")
        return {"location": self.location, "size": size, "sha256": digest.hexdigest()}

    def _rows(self) -> Iterator[dict[str, bytes | None]]:
        """The values of each row by key, text first: UTF-8 where the dataset is sound, None for null."""
        import pyarrow  # imported here: 0.1 s that only datasets of the hub pay

        keys = self.keys.names
        rows = 0
        try:
            for batch in self._batches():
                columns = [_utf8(batch.column(key)) for key in keys]
                for values in zip(*columns, strict=True):
                    yield {key: value.as_py() for key, value in zip(keys, values, strict=True)}
                rows += len(batch)
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            raise self._damaged(str(error).splitlines()[0]) from error
        if rows < self.count:  # a file cut between two batches looks whole to Arrow
            raise self._damaged(f"it ends after {rows} rows of {self.count}")

    def _batches(self) -> Iterator[pyarrow.RecordBatch]:
        """The rows, some 1,000 at a time as they lie in the files, which are mapped into memory and not copied."""
        import pyarrow

        for piece in self.pieces:
            with pyarrow.memory_map(piece.path) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
                row = 0  # of the file, at which the batch begins
                for batch in stream:
                    first, last = max(piece.start - row, 0), min(piece.start + piece.rows - row, len(batch))
                    if first < last:
                        yield batch.slice(first, last - first)
                    row += len(batch)
                    if row >= piece.start + piece.rows:
                        break

    def _damaged(self, reason: str) -> UserError:
        folder = Path(self.pieces[0].path).parent
        return UserError(
            f"{self.location} cannot be read from the cache of the hub ({reason}); delete {folder} and run the same "
            "command again"
        )


def is_hub_name(pattern: str) -> bool:
    """Whether a pattern that matches no file can be a dataset, owner/name or owner/name:configuration.

    It cannot where a file was meant: in a folder that is here, or by a suffix that files of documents have.
    """
    owner = pattern.partition("/")[0]
    return (
        re.fullmatch(rf"{NAME}/{NAME}(:{NAME})?", pattern) is not None
        and not pattern.endswith(tuple(READERS))
        and not Path(owner).is_dir()
    )


def hub_sources(
    pattern: str,
    first_index: int,
    *,
    text_key: str,
    id_key: str | None,
    largest: int = LARGEST,
    grouping: Grouping | None = None,
) -> list[HubSource]:
    """Load a dataset, downloading what is not in the cache, and cut its splits into ranges of ROWS_A_SOURCE rows.

    `train` comes first, then the validation split where there is one; other splits are left out with a note. The
    names of the sources count up from `first_index`. Raises UserError for a dataset that cannot be loaded, has no
    training split, or lacks a column.
    """
    loaded = _load(pattern)
    sources: list[HubSource] = []
    for rows_of, split in _chosen(pattern, {name: len(rows) for name, rows in loaded.items()}):
        table = loaded[rows_of].data
        _check_columns(pattern, table.schema, Keys(text_key, id_key, grouping))
        files = [(file["filename"], _rows_in(file["filename"])) for file in loaded[rows_of].cache_files]
        for start in range(0, len(table), ROWS_A_SOURCE):
            count = min(ROWS_A_SOURCE, len(table) - start)
            stem = re.sub(r"[^\w.=-]", "_", pattern)[:40]
            sources.append(
                HubSource(
                    name=f"{first_index + len(sources):05d}-{stem}-{rows_of}-{start:010d}",
                    dataset=pattern,
                    rows_of=rows_of,
                    split=split,
                    start=start,
                    count=count,
                    size=table.column(text_key).slice(start, count).nbytes,
                    text_key=text_key,
                    id_key=id_key,
                    pieces=_pieces(files, start, count),
                    largest=largest,
                    grouping=grouping,
                )
            )
    return sources


def _load(pattern: str) -> Any:
    """The splits of a dataset by name. Raises UserError for whatever keeps it from being loaded."""
    print(f"loading {pattern} from the hub ...", file=sys.stderr)
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    name, _, configuration = pattern.partition(":")
    try:
        # Arrow files are what the workers read: never a copy in memory, whatever the user's settings of the library.
        return load_dataset(name, configuration or None, keep_in_memory=False)
    except Exception as error:  # no network, no such name, a broken file, a full disk: each has its own exception
        if isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in str(error):  # not here, nor there
            fix = f"run it once where there is a network, or there {_download(name)}"
        elif isinstance(error, DatasetNotFoundError):
            fix = "check the name, and log in with `hf auth login` if the dataset has to be asked for"
        elif isinstance(error, ValueError) and "config" in str(error).lower():
            fix = f"name one configuration as {name}:CONFIGURATION"
        else:
            fix = _download(name)
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        told = shorten(f"{type(reason).__name__}: {str(reason).rstrip('. ')}", 300, placeholder=" ...")
        raise UserError(
            f"no file {pattern} here, and no dataset could be loaded from the hub ({told}); {fix}"
        ) from error


def _download(name: str) -> str:
    return f"download its files (hf download {name} --repo-type dataset --local-dir FOLDER) and name its .parquet files"


def _chosen(pattern: str, rows: dict[str, int]) -> list[tuple[str, Split | None]]:
    """The splits to read, each by the dataset's own name, and what becomes of its documents."""
    validation = next((name for name in VALIDATION if rows.get(name)), None)
    if not rows.get("train"):
        raise UserError(
            f"the dataset {pattern} has no rows of a split `train`, but {rows}; {_download(pattern.partition(':')[0])}"
        )
    others = sorted(set(rows) - {"train", validation})
    if others:
        print(
            f"note: left out of {pattern}, being neither training nor validation: {', '.join(others)}", file=sys.stderr
        )
    return [("train", None)] if validation is None else [("train", "train"), (validation, "validation")]


def _check_columns(pattern: str, schema: pyarrow.Schema, keys: Keys) -> None:
    """Raise UserError, of all that is wrong, unless there is a column of text and, where named, of ids and groups."""
    from pyarrow import types

    texts = (types.is_string, types.is_large_string)
    names, problems = (*texts, types.is_integer), []
    wanted_columns = (
        (keys.text, texts, "--text-key"),
        (keys.id, names, "--id-key"),
        (keys.grouping and keys.grouping.key, names, "--group-by"),
    )
    for key, kinds, option in wanted_columns:
        if key is None:
            continue
        if key not in schema.names:
            problems.append(f"no column {key!r} among {schema.names}; name another with {option}")
        elif not any(is_kind(schema.field(key).type) for is_kind in kinds):
            wanted = "text" if kinds is texts else "text or whole numbers"
            problems.append(f"column {key!r} is not {wanted} but {schema.field(key).type}; name another with {option}")
    if problems:
        raise UserError(f"the dataset {pattern}: {'; '.join(problems)}")


def _rows_in(path: str) -> int:
    """Rows of an Arrow file, by the headers of its batches."""
    import pyarrow

    with pyarrow.memory_map(path) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        return sum(len(batch) for batch in stream)


def _pieces(files: Sequence[tuple[str, int]], start: int, count: int) -> tuple[Piece, ...]:
    """Where the rows `start` to `start + count` of a split lie in its files (path, rows), which follow each other."""
    pieces, begins = [], 0
    for path, rows in files:
        first, last = max(start - begins, 0), min(start + count - begins, rows)
        if first < last:
            pieces.append(Piece(path, first, last - first))
        begins += rows
    return tuple(pieces)


def _utf8(column: pyarrow.Array) -> pyarrow.Array:
    """The bytes of texts, unchecked, and of numbers in decimal."""
    import pyarrow

    as_text = column.cast(pyarrow.string()) if pyarrow.types.is_integer(column.type) else column
    return as_text.cast(pyarrow.large_binary())
