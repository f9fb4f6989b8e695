"""The sizes of a parquet file's pages, which are decompressed whole: read from their headers before any page is.

A page is preceded by a PageHeader of Thrift's compact protocol: field 2 its uncompressed size, field 3 the compressed
one, both i32, then what is skipped here. Source: parquet-format, src/main/thrift/parquet.thrift; Apache Thrift,
doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

# Types of the compact protocol.
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)
DEEPEST = 8  # structs within structs; a PageHeader has three


def page_sizes(file: BinaryIO, chunk: Any) -> Iterator[int]:
    """Uncompressed bytes of each page of a column chunk, given by its pyarrow metadata.

    Raises:
        ValueError, EOFError: a header that cannot be.
    """
    place = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        place = min(place, chunk.dictionary_page_offset)
    end = place + chunk.total_compressed_size
    while place < end:
        file.seek(place)
        sizes = _fields(file, 0)
        uncompressed, compressed = sizes.get(2, -1), sizes.get(3, -1)
        if uncompressed < 0 or compressed < 0:
            raise ValueError(f"no page header at byte {place}")
        yield uncompressed
        place = file.tell() + compressed


def _fields(file: BinaryIO, depth: int) -> dict[int, int]:
    """The integers of a struct by the number of their field; what else it has is skipped."""
    if depth > DEEPEST:
        raise ValueError("a page header with structs in structs")
    number, found = 0, {}
    while (head := _byte(file)) != STOP:
        kind, step = head & 15, head >> 4
        number = number + step if step else _zigzag(file)
        value = _value(file, kind, depth)
        if value is not None:
            found[number] = value
    return found


def _value(file: BinaryIO, kind: int, depth: int) -> int | None:
    if kind in (I16, I32, I64):
        return _zigzag(file)
    if kind == BINARY:
        file.seek(_varint(file), 1)
    elif kind == STRUCT:
        _fields(file, depth + 1)
    elif kind == BYTE:
        _byte(file)
    elif kind == DOUBLE:
        file.seek(8, 1)
    elif kind not in (TRUE, FALSE):  # a page header has no lists, sets or maps
        raise ValueError(f"a page header with a field of type {kind}")
    return None


def _byte(file: BinaryIO) -> int:
    if not (content := file.read(1)):
        raise EOFError("the file ends within a page header")
    return content[0]


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number of more than 64 bits in a page header")


def _zigzag(file: BinaryIO) -> int:
    value = _varint(file)
    return (value >> 1) ^ -(value & 1)
