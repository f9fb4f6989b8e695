"""What flows from a source to its shards: documents, one after the other, and what is to be done with bad ones.

A source either gives every one of its documents or raises a UserError that names file, line and reason; it never ends
early in silence. Where bad documents may be left out, each leaves such a sentence behind.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from ...common.errors import UserError
from ..stories import Split

REPAIR = "repair the file or leave it out"
LARGEST = 50_000_000  # bytes of a document, which take 7 GB to tokenize; a small compressed file may hold a larger one


def too_large(where: str, size: int, largest: int) -> UserError:
    """Return the error for a document of `size` bytes."""
    return UserError(
        f"{where}: a document of {size:,} bytes, more than {largest:,}; leave it out with --max-bad-documents, or "
        "raise --max-document-bytes"
    )


class Document(NamedTuple):
    text: str
    id: str | None  # None where the source names no key for it: the text then stands for the document
    read: int  # bytes of the source read so far, for the progress bar
    group: str | None = None  # what it is a part of, as a book; None where no key is named for it


class Grouping(NamedTuple):
    """Where the group of a document stands: under `key`, up to the last `separator` if there is one."""

    key: str
    separator: str | None = None

    def __str__(self) -> str:
        return self.key if self.separator is None else f"{self.key} up to the last {self.separator!r}"

    def of(self, record: Mapping[str, object], where: str) -> str:
        """The group of a record. Raises UserError, opening with `where`, if it names none."""
        if self.key not in record:
            raise UserError(f"{where}: no key {self.key!r} among {sorted(record)}; name one with --group-by")
        value = record[self.key]
        if not isinstance(value, str | int) or isinstance(value, bool):
            kind = type(value).__name__
            raise UserError(
                f"{where}: {self.key!r} is neither text nor a number but {kind}; name another with --group-by"
            )
        if self.separator is None:
            return str(value)
        group, separator, _ = str(value).rpartition(self.separator)
        if not separator:
            raise UserError(
                f"{where}: {self.key!r} is {str(value)[:60]!r}, without {self.separator!r}; pass another "
                "--group-separator"
            )
        return group


class BadDocuments:
    """Takes note of documents that cannot be read, up to a limit. Called with the UserError that says why.

    sentences    what was noted, in order
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.sentences: list[str] = []

    def __call__(self, error: UserError) -> None:
        """Raise the error where `limit` others were noted before it."""
        if len(self.sentences) >= self.limit:
            raise error
        self.sentences.append(str(error))


class Source(Protocol):
    """What `llm.data.preparation.prepare` asks of a source. Sources are small values that travel to worker
    processes."""

    @property
    def name(self) -> str: ...  # of its shards; unique in a store
    @property
    def location(self) -> str: ...  # what it is called in messages and manifests
    @property
    def size(self) -> int: ...  # bytes; an estimate where the text is yet to be made
    @property
    def split(self) -> Split | None: ...  # None: each document by the hash of its text

    def stamp(self) -> tuple[int, ...]: ...  # changes when what there is to read does
    def documents(self, bad: BadDocuments) -> Iterator[Document]: ...
    def description(self) -> dict[str, str | int]: ...  # for manifests: location, size and sha256 of all it holds
