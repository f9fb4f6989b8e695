"""The reading side of `python -m llm bench-data`: stores of random or no tokens, and the tasks that read them.

A task is a function that measures once and returns its figures, {unit: value}; `llm.bench.data` gives each its turns.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UserError
from ..common.processes import raise_open_file_limit
from ..data.shard import SPLITS, Manifest, ShardWriter, token_dtype
from ..data.store import TokenStore
from ..data.store_index import write_index
from ..data.stories import Split

Figures = dict[str, float]  # unit: value
Task = Callable[[], Figures]

VOCABULARY = 100_000  # so that ids are uint32
WINDOWS = (257, 4097)  # tokens: of a small model and of a large one, a context and one more
ROWS = 8  # of a micro-batch
DRAWN = 20_000  # windows, in an order that was found before the clock starts: `rows` and `micro-batches` find theirs
DEMAND = 1_000_000  # tokens a second
READS = 500  # micro-batches whose reading is timed one by one
SECONDS = 1.0  # that a reading task goes on for
WARM_TOKENS, WARM_SHARDS = 1 << 26, 16  # 256 MiB
COLD_SHARD = 1 << 26  # tokens: 256 MiB
COLD_SHARES = ((4097, 256), (4097, 2), (257, 4096))  # window; every how manieth of the store is read
FAR = 10_000_000  # a step
TOKENS = 84_000_000_000  # of the store of many shards, about as Nemotron-CC's high-quality part
GIB = 2**30


# ---- Stores ----------------------------------------------------------------------------------------------------------


def random_store(folder: Path, tokens: int, shards: int) -> None:
    """A real store of random uint32 ids: one document a shard in train, and a small validation split."""
    generator, manifests = np.random.default_rng(0), dict[Split, list[Manifest]]()
    sizes: dict[Split, tuple[int, int]] = {"train": (tokens // shards, shards), "validation": (1 << 14, 1)}
    for split, (each, count) in sizes.items():
        manifests[split] = []
        for shard in range(count):
            with ShardWriter(folder / split, f"{shard:05d}", token_dtype(VOCABULARY)) as writer:
                writer.add(generator.integers(VOCABULARY, size=each, dtype=np.uint32), np.array([each]))
                manifests[split].append(writer.finish(split, {"location": "random", "size": 0, "sha256": ""}, "", {}))
    _write_index(folder, manifests)


def sparse_store(folder: Path, tokens: int, shards: int, documents: int = 1 << 20) -> None:
    """A store of zeros that takes no room on the disk; its validation split has as many shards, of a tenth the size."""
    manifests = dict[Split, list[Manifest]]()
    for split in SPLITS:
        scale = 1 if split == "train" else 10
        (folder / split).mkdir(parents=True)
        sizes = {"tokens": tokens // shards // scale, "ends": documents // shards // scale}
        manifests[split] = [_sparse_shard(folder, split, f"{n:05d}-part-{n:05d}", sizes) for n in range(shards)]
    _write_index(folder, manifests)


def _sparse_shard(folder: Path, split: Split, name: str, sizes: dict[str, int]) -> Manifest:
    for kind, width in (("tokens", 4), ("ends", 8)):
        with (folder / split / f"{name}.{kind}").open("wb") as file:
            file.truncate(width * sizes[kind])
    none = dict.fromkeys(sizes, "0" * 64)
    documents, tokens = sizes["ends"], sizes["tokens"]
    return Manifest(name, split, {}, documents, documents, {}, [], tokens, 0, 0, none, "uint32", "", {})


def _write_index(folder: Path, manifests: dict[Split, list[Manifest]]) -> None:
    # The last id ends documents: neither a sparse file nor a check in passing is about them.
    write_index(folder, manifests, vocab_size=VOCABULARY, end_of_document=VOCABULARY - 1, tokenizer_fingerprint="none")


# ---- Read ------------------------------------------------------------------------------------------------------------


def read_tasks(folder: Path) -> dict[str, Task]:
    """Random windows by one process, of a store that was just written and lies in memory."""
    from ..data.mixture import MixtureOrder
    from ..data.rows import Rows, TrainingBatches

    random_store(folder, WARM_TOKENS, WARM_SHARDS)
    store, tasks = TokenStore.open(folder), dict[str, Task]()
    for window in WINDOWS:
        rows = Rows([store], window - 1)
        order = MixtureOrder(rows.counts, [1000], ROWS, 0)
        batches = TrainingBatches(rows, order, 1, 0, 1)
        for name, step in (
            ("read", partial(_bare, store, [item * (window - 1) for _, item in order.rows(0, 0, DRAWN)], window)),
            ("rows", partial(_rows, rows, order)),
            ("micro-batches", batches.__getitem__),
        ):
            tasks[f"{name}, {window:,} tokens"] = partial(steady, step, ROWS * window)
        tasks[f"waiting, {window:,} tokens"] = partial(waiting, batches, ROWS * (window - 1))
    return tasks


def _bare(store: TokenStore, starts: list[int], window: int, step: int) -> list[np.ndarray]:
    return [store.read(starts[(step * ROWS + row) % len(starts)], window) for row in range(ROWS)]


def _rows(rows: Any, order: Any, step: int) -> dict[str, Any]:
    return rows.tensors(rows.read(order.rows(step, 0, ROWS)))


def steady(step: Callable[[int], Any], tokens: int) -> Figures:
    """Tokens a second of `step(n)`, which reads so many."""
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < SECONDS:
        step(done)
        done += 1
    return {"tokens/s": done * tokens / passed}


def waiting(batches: Any, tokens: int) -> Figures:
    """Share of the time that a trainer waits for data which takes `DEMAND` tokens a second, and leaves the CPU alone
    in between, as one does whose model is on a GPU."""
    from torch.utils.data import DataLoader

    from ..data.module import Prefetcher

    steps = max(3, int(SECONDS * DEMAND / tokens))
    loader = Prefetcher(DataLoader(batches, batch_size=None, sampler=range(steps)))
    began, waited = time.perf_counter(), 0.0
    source = iter(loader)
    for step in range(steps):
        asked = time.perf_counter()
        next(source)
        waited += time.perf_counter() - asked
        time.sleep(max(0.0, began + (step + 1) * tokens / DEMAND - time.perf_counter()))
    return {"share of the time": waited / (time.perf_counter() - began)}


# ---- Stalls ----------------------------------------------------------------------------------------------------------


def stall_tasks(folder: Path, step: float) -> dict[str, Task]:
    """Random micro-batches of a user's store, where it lies, and what a trainer would wait for them.

    Args:
        step: seconds that the trainer computes for each.

    Raises:
        UserError: there is no store, or it has too few tokens.
    """
    from ..data.mixture import MixtureOrder
    from ..data.module import AHEAD
    from ..data.rows import Rows, TrainingBatches

    raise_open_file_limit()  # as a run does
    rows = Rows([TokenStore.open(folder)], WINDOWS[-1] - 1)
    first = random.randrange(FAR)  # other rows than the last time, which may still be in memory
    batches, places = TrainingBatches(rows, MixtureOrder(rows.counts, [1000], ROWS, 0), 1, 0, 1), itertools.count(first)

    def turn() -> Figures:
        seconds = []
        for place in itertools.islice(places, READS):
            began = time.perf_counter()
            batches[place]
            seconds.append(time.perf_counter() - began)
        work = READS * step
        waited = {ahead: 100 * (run_seconds(seconds, step, ahead) / work - 1) for ahead in (1, AHEAD)}
        return {
            "ms, the median": 1000 * statistics.median(seconds),
            "ms, the slowest of a hundred": 1000 * sorted(seconds)[-READS // 100],
            "ms, the slowest": 1000 * max(seconds),
            **{f"% longer, {ahead} read ahead": percent for ahead, percent in waited.items()},
        }

    return {f"a micro-batch of {ROWS} x {WINDOWS[-1] - 1:,} tokens, {rows.stores[0].files // 2:,} shards": turn}


def run_seconds(reads: Sequence[float], step: float, ahead: int) -> float:
    """Seconds that a trainer takes for micro-batches that take so many seconds each to read, by `Prefetcher`.

    Args:
        reads: [micro-batches] seconds of reading, one after the other.
        step: seconds of computing with each.
        ahead: how many are read before they are used; the next one begins when one is taken.
    """
    read = now = 0.0  # until when the thread reads, and the trainer computes
    taken: list[float] = []
    for number, seconds in enumerate(reads):
        begins = taken[number - ahead] if number >= ahead else 0.0
        read = max(read, begins) + seconds
        taken.append(max(read, now))
        now = taken[-1] + step
    return now


# ---- Cold ------------------------------------------------------------------------------------------------------------

Read = Callable[[int, int, int], np.ndarray]  # shard, first token of it, how many


def by_store(folder: Path) -> Read:
    store = TokenStore.open(folder)
    size = store.shards()[0].tokens
    return lambda shard, start, count: store.read(shard * size + start, count)


def by_pread(folder: Path) -> Read:
    files = [path.open("rb") for path in _token_files(folder)]
    return lambda shard, start, count: np.frombuffer(os.pread(files[shard].fileno(), 4 * count, 4 * start), "<u4")


def by_memmap(folder: Path) -> Read:
    maps = [np.memmap(path, "<u4", "r") for path in _token_files(folder)]
    return lambda shard, start, count: maps[shard][start : start + count].astype(np.int64)


READERS = {"TokenStore": by_store, "os.pread without advice": by_pread, "np.memmap": by_memmap}


def cold_tasks(folder: Path, gib: float) -> dict[str, Task]:
    """Windows in a random order, each once as in an epoch, of a store that was put out of memory.

    Raises UserError where the store has no room, or lies where what the disk reads cannot be counted.
    """
    tokens = int(gib * GIB) // 4
    bytes_from_disk()
    if (free := shutil.disk_usage(folder.parent).free) < 4 * tokens:
        raise UserError(f"{folder.parent} has {free / GIB:.1f} GiB free; name another --folder or a smaller --cold")
    random_store(folder, tokens, shards := max(1, tokens // COLD_SHARD))
    seeds = itertools.count()

    def turn(reader: str, window: int, share: int) -> Figures:
        each = (tokens // shards - 1) // (window - 1)
        places = list(itertools.product(range(shards), range(each)))
        places = random.Random(next(seeds)).sample(places, max(1, len(places) // share))
        forget(_token_files(folder))
        read = READERS[reader](folder)
        before, began = bytes_from_disk(), time.perf_counter()
        for shard, place in places:
            read(shard, place * (window - 1), window)
        used, seconds = len(places) * window, time.perf_counter() - began
        if (from_disk := bytes_from_disk() - before) == 0:
            raise UserError(f"{folder.parent} does not lie on a disk that can be read again; name another --folder")
        return {"bytes read/used": from_disk / (4 * used), "tokens/s": used / seconds}

    return {
        f"{reader}, {window:,} tokens, 1/{share} of the store": partial(turn, reader, window, share)
        for window, share in COLD_SHARES
        for reader in READERS
    }


def forget(files: Sequence[Path]) -> None:
    """Put files that lie on the disk out of memory."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """What the disk has read for this process so far. Raises UserError where the system does not say."""
    try:  # of Linux, which also has posix_fadvise
        return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])  # type: ignore[index]
    except OSError as error:
        raise UserError("--cold counts in /proc/self/io, which is not here; leave it out") from error


def _token_files(folder: Path) -> list[Path]:
    return sorted((folder / "train").glob("*.tokens"))


# ---- Start -----------------------------------------------------------------------------------------------------------


def start_tasks(folder: Path, shards: int) -> dict[str, Task]:
    """From the store's path to the first batch, as a run that goes on at a far step does it."""
    from ..data.module import TokenDataModule
    from ..data.rows import TrainingBatches

    sparse_store(folder, TOKENS, shards)

    def turn() -> Figures:
        began = time.perf_counter()
        data = TokenDataModule(str(folder), context=4096, batch_size=64)
        data.open()
        batch = TrainingBatches(data.training, data.order, 64 // ROWS, 0, 1)[FAR * 64 // ROWS]
        total = time.perf_counter() - began
        assert batch["input_ids"].shape == (ROWS, 4096)
        began = time.perf_counter()
        for split in SPLITS:
            TokenStore.open(folder, split)
        opened = time.perf_counter() - began
        began = time.perf_counter()
        for component in data.components:
            component.train.check_sizes()
            component.validation.check_sizes()
        checked = time.perf_counter() - began
        return {"s": total, "s, the indexes": opened, "s, the sizes of all files": checked}

    return {f"first batch of step {FAR:,}, {shards:,} shards": turn}
