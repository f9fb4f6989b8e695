"""Where documents come from: files, folders, globs, hub datasets, and the built-in corpus.

    patterns (file, folder, glob, owner/name, `stories`)  ->  open_sources  ->  sources, in a fixed order
    source  ->  documents(): one after the other, streamed, never a whole file in memory

A source is the unit that becomes one shard a split (see `llm.data.preparation.prepare`).
"""

import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import UserError
from ..stories import MARKER, Split, stories
from .documents import LARGEST, REPAIR, BadDocuments, Document, Grouping, Source
from .files import READERS, FileSource, suffix_of
from .hub import hub_sources, is_hub_name

STORIES_A_SOURCE = 10_000
STORY_BYTES = 500  # about the mean length of a story; for the progress bar only
DEFAULT_STORIES = 50_000
STORIES_HELD_OUT = 20  # one validation story for so many training stories: 5 %


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

    def stamp(self) -> tuple[int, ...]:
        """The corpus does not change."""
        return ()

    def documents(self, bad: BadDocuments) -> Iterator[Document]:
        """Yield the stories in order; none is bad."""
        for index, text in enumerate(stories(self.seed, self.split, self.start, self.count), 1):
            yield Document(text, None, index * STORY_BYTES)

    def description(self) -> dict[str, str | int]:
        """Location, size and sha256 of the stories, a marker after each. Tells versions of the grammar apart."""
        digest, size = hashlib.sha256(), 0
        for text in stories(self.seed, self.split, self.start, self.count):
            data = (text + MARKER).encode()
            digest.update(data)
            size += len(data)
        return {"location": self.location, "size": size, "sha256": digest.hexdigest()}


def open_sources(
    patterns: Sequence[str],
    *,
    text_key: str = "text",
    id_key: str | None = None,
    where: Sequence[str] = (),
    marker: str = MARKER,
    documents: int | None = None,
    seed: int = 0,
    largest: int = LARGEST,
    grouping: Grouping | None = None,
) -> list[Source]:
    """Resolve files, folders (searched to the bottom), globs, hub names and `stories[:SEED]` into sources.

    Their order is fixed, whatever that of the patterns: stories, hub datasets, files by absolute path. `where` keeps
    the files with these parts in their path: of `name=value` parts one of each name, and every other. `documents` is
    the number of training stories, `seed` theirs where the pattern names none; a document of more than `largest` bytes
    is a bad one. `grouping`: where records name their group.

    Raises UserError for a pattern that matches nothing, a file of unknown form and a source that is named twice.
    """
    if not marker:
        raise UserError("the marker between documents is empty; name one with --separator")
    corpora = [pattern for pattern in patterns if re.fullmatch(r"stories(:\d+)?", pattern)]
    if documents is not None and (not corpora or documents < 1):
        raise UserError("--documents is the number of stories (at least 1) and goes with the source `stories`")
    seeds = [int(pattern.partition(":")[2] or seed) for pattern in corpora]
    on_hub = sorted(pattern for pattern in patterns if pattern not in corpora and _is_on_hub(pattern))
    named = [pattern for pattern in patterns if pattern not in corpora and pattern not in on_hub]
    paths = _chosen(sorted(path for pattern in named for path in _files(pattern)), where)
    _refuse_duplicates([f"stories:{seed}" for seed in seeds] + on_hub + [str(path.resolve()) for path in paths])
    without_keys = corpora or any(suffix_of(path) == ".txt" for path in paths)
    if id_key is not None and without_keys:
        raise UserError("stories and .txt files have no keys; leave --id-key out and the text stands for the document")
    if grouping is not None and without_keys:
        raise UserError("stories and .txt files have no keys to group by; leave --group-by out, or give JSON lines")
    ranges = [item for seed in seeds for item in _story_ranges(seed, documents or DEFAULT_STORIES)]
    found: list[Source] = [
        StorySource(f"{index:05d}-stories-{split}", seed, split, start, count)
        for index, (seed, split, start, count) in enumerate(ranges)
    ]
    for pattern in on_hub:
        found += hub_sources(pattern, len(found), text_key=text_key, id_key=id_key, largest=largest, grouping=grouping)
    for index, path in enumerate(paths, len(found)):
        stem = re.sub(r"[^\w.=-]", "_", path.name.removesuffix(suffix_of(path)))[:40]  # 160 bytes at most
        size = path.stat().st_size
        found.append(FileSource(f"{index:05d}-{stem}", str(path), size, text_key, id_key, marker, largest, grouping))
    if not found:
        raise UserError("no source is named; give a file, a folder, a glob, a hub name or `stories`")
    return found


def _is_on_hub(pattern: str) -> bool:
    return not Path(pattern).exists() and is_hub_name(pattern) and not _glob(pattern)


def _chosen(paths: list[Path], where: Sequence[str]) -> list[Path]:
    """The paths that have, of the parts in `where`, one of each name (what stands before =)."""
    wanted: dict[str, set[str]] = {}
    for part in where:
        wanted.setdefault(part.partition("=")[0], set()).add(part)
    chosen = [path for path in paths if all(not parts.isdisjoint(path.parts) for parts in wanted.values())]
    if where and not paths:
        raise UserError("--path-filter chooses among files, and no source is a file; leave it out")
    if paths and not chosen:
        raise UserError(
            f"none of {len(paths)} files has {' and '.join(where)} in its path, as {paths[0]}; change --path-filter"
        )
    return chosen


def _files(pattern: str) -> list[Path]:
    """Absolute paths of the files that a pattern stands for. A file that is named must be of a known form."""
    if Path(pattern).is_dir():
        return _files_below(Path(pattern))
    named = [Path(pattern)] if Path(pattern).is_file() else _glob(pattern)
    if not named:
        raise UserError(f"no file matches {pattern}; give a file, a folder, a glob, a hub name or `stories`")
    # With `**` the files below a folder are matched themselves.
    folders = [path for path in named if path.is_dir() and "**" not in pattern]
    files = [path for path in named if not path.is_dir()]
    for path in files:
        if suffix_of(path) not in READERS:
            raise UserError(f"{path} is of no form that can be read; the known suffixes are {', '.join(READERS)}")
    return [_there(path) for path in files] + [path for folder in folders for path in _files_below(folder)]


def _files_below(folder: Path) -> list[Path]:
    """The files of known forms in a folder and those below it, hidden ones left out."""
    files = [Path(place) / name for place, names in _walk(folder) for name in names if not name.startswith(".")]
    known = [_there(path) for path in files if suffix_of(path) in READERS]
    if not known:
        raise UserError(f"the folder {folder} holds no file of a known form ({', '.join(READERS)}); give another")
    if others := [path.name for path in files if suffix_of(path) not in READERS]:
        print(
            f"note: left out of {folder}, being of no known form: {len(others)} files, as {others[0]}", file=sys.stderr
        )
    if len(forms := sorted({suffix_of(path) for path in known})) > 1:
        print(f"note: {folder} holds files of several forms ({', '.join(forms)}); all are read", file=sys.stderr)
    return known


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of a folder and all below it, links to folders followed, hidden ones left out."""
    seen = set()

    def refuse(error: OSError) -> None:  # os.walk would pass over what it may not read
        raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}); {REPAIR}") from error

    for place, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            below.clear()
            continue
        seen.add(real)
        yield place, sorted(names)


def _glob(pattern: str) -> list[Path]:
    # glob follows links to folders, takes absolute patterns and leaves hidden files out; Path.glob does none of these.
    if "**" in pattern:  # glob passes over folders that it may not read
        for _ in _walk(Path(re.split(r"[*?[]", pattern)[0]).parent):
            pass
    return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207


def _there(path: Path) -> Path:
    """The absolute path of a file. Raises UserError where the name leads to none, or cannot be written down."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the file name {str(path)!r} is not UTF-8; rename the file") from error
    if not path.is_file():
        raise UserError(f"{path} is not a file, perhaps a link to one that is gone; {REPAIR}")
    return _absolute(path)


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
