"""Exact duplicates are dropped: of equal texts in a split the first stays, in the order of the sources.

    NAME.hashes of every shard  ->  parts by hash, each sorted  ->  which documents are repeats  ->  shards without them

A shard is first made of all its documents and later rewritten without the repeats, its hashes left as they are. So
which documents are repeats can be found again at any time. A shard whose manifest counts duplicates, be it none, has
been through this; one that a kill has left half-rewritten is not what its manifest says, and is first made anew from
its source (see `llm.data.preparation.prepare`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ...common.errors import UserError
from ...common.files import write_json
from ..shard import ENDS, GROUPS, HASHES, Manifest, ShardWriter, is_complete, sampled_hash
from ..workers import Report
from .encode import store_lock

PART_DOCUMENTS = 1 << 25  # sorted at a time: 32 bytes each, about a gigabyte, and as much again while it lasts
PIECE = 1 << 24  # tokens copied at a time


def repeats(folder: Path, names: list[str]) -> list[np.ndarray]:
    """For each shard, which of the documents in its .hashes were there before: [documents] bool."""
    counts = [(folder / f"{name}.hashes").stat().st_size // HASHES.itemsize for name in names]
    found = np.zeros(sum(counts), dtype=bool)
    parts = -(-len(found) // PART_DOCUMENTS)
    for part in range(parts):
        found[_repeats_of_part(folder, names, part, parts)] = True
    return np.split(found, np.cumsum(counts)[:-1])


def _repeats_of_part(folder: Path, names: list[str], part: int, parts: int) -> np.ndarray:
    """Of the documents whose hash falls in `part`, those with an equal one before them: places over all shards."""
    collected, start = [], 0
    for name in names:
        hashes = np.fromfile(folder / f"{name}.hashes", HASHES)
        mine = np.flatnonzero(hashes["low"] % parts == part)
        columns = np.empty((3, len(mine)), dtype=np.uint64)
        columns[0], columns[1], columns[2] = hashes["high"][mine], hashes["low"][mine], start + mine
        collected.append(columns)
        start += len(hashes)
    high, low, place = np.concatenate(collected, axis=1)
    order = np.lexsort((place, low, high))
    same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    return place[order[1:][same]]


def rewrite(folder: Path, item: tuple[str, np.ndarray], report: Report) -> Manifest:
    """Rewrite a shard without the documents that `item`, (name, [documents] bool), marks; its new manifest."""
    name, drop = item
    with store_lock(folder.parent, name):
        manifest = Manifest.read(folder, name)
        if manifest is not None and "duplicate" in manifest.left_out:  # another process was here
            return manifest
        if manifest is None or not is_complete(folder, manifest):  # `drop` is of the whole shard
            raise UserError(
                f"{folder / name} was damaged while the store was made; run the same command without --task"
            )
        new = replace(manifest, left_out=manifest.left_out | {"duplicate": int(drop.sum())})
        if drop.any():
            grouped = "groups" in manifest.sha256
            with ShardWriter(folder, name, _dtype(manifest), ("tokens", "ends", *["groups"] * grouped)) as writer:
                for tokens, lengths in _without(folder, manifest, drop):
                    writer.add(tokens, lengths)
                if grouped:
                    writer.write("groups", np.fromfile(folder / f"{name}.groups", GROUPS)[~drop])
                sha256 = (
                    writer.move_into_place()
                )  # until the manifest follows, the shard is not whole and would be made anew
            new = replace(
                new,
                documents=writer.documents,
                tokens=writer.tokens,
                bytes_in=int(np.fromfile(folder / f"{name}.hashes", HASHES)["bytes"][~drop].sum()),
                bytes_out=writer.tokens * writer.dtype.itemsize,
                sha256=manifest.sha256 | sha256,
                sampled=sampled_hash(folder, name),
            )
        write_json(folder / f"{name}.json", asdict(new))
        report(new.bytes_out, new.documents, new.tokens)
        return new


def _without(folder: Path, manifest: Manifest, drop: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and lengths of the documents that stay, some millions of tokens at a time."""
    ends = np.fromfile(folder / f"{manifest.name}.ends", ENDS).astype(np.int64)
    lengths: np.ndarray = np.diff(ends, prepend=0)
    pieces = np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(ends // PIECE)) + 1)
    with (folder / f"{manifest.name}.tokens").open("rb") as file:
        for documents in pieces:
            tokens = np.fromfile(file, _dtype(manifest), int(lengths[documents].sum()))
            stays = ~drop[documents]
            yield tokens[np.repeat(stays, lengths[documents])], lengths[documents][stays]


def _dtype(manifest: Manifest) -> np.dtype:
    return np.dtype(manifest.dtype).newbyteorder("<")
