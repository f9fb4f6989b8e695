"""The same work on many items, on all cores, under one progress bar.

    items  ->  run_all  ->  their results in the order of the items, whatever the number of processes

Processes are spawned, not forked: a fork of a process that has run Rust or torch threads can hang. They end with the
process that began them, even where that is killed outright, so that none goes on writing beside the next run.
"""

import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ..common.errors import UserError
from ..common.processes import one_thread, progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[int, int, int], None]  # bytes of the source read, documents and tokens since the last report
Work = Callable[[Item, Report], Result]

POLL_SECONDS = 0.2


class Progress:
    """A bar over the bytes of all sources, with files, documents and tokens a second beside it. A context."""

    def __init__(self, size: int, files: int, what: str = "prepare") -> None:
        self._bar = progress_bar(size, 0, what, "B", unit_scale=True)
        self._files, self._done, self._documents, self._tokens = files, 0, 0, 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, read: int, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens
        rate = self._tokens / max(self._bar.format_dict["elapsed"], 1e-3)
        self._bar.set_postfix_str(
            f"{self._done}/{self._files} files, {self._documents:,} documents, {rate:,.0f} tokens/s", refresh=False
        )
        self._bar.update(read)

    def file_done(self) -> None:
        self._done += 1
        self.add(0, 0, 0)


def run_all(
    work: Work[Item, Result], items: Sequence[Item], workers: int, progress: Progress
) -> list[Result | UserError]:
    """`work(item, report)` for each item. Where it raises UserError, that is its result, and the others go on.

    One worker runs in this process, on one core. More are processes of their own; where there are fewer items than
    workers, the tokenizer of each has several threads. Raises UserError where a process is killed, as by a full memory.
    """
    if workers == 1:
        return _run_here(work, items, progress)
    context = get_context("spawn")
    counts = context.Array("q", 3)  # what the reports add up to, over all processes
    lifeline, held_here = context.Pipe(duplex=False)
    processes = max(1, min(workers, len(items)))
    settings = (counts, lifeline, max(1, workers // processes))
    executor = ProcessPoolExecutor(processes, context, _start_worker, settings)
    try:
        return _collect(executor, work, items, 2 * processes, counts, progress)
    except BaseException as error:
        held_here.close()  # ends the workers, which may be far from done
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker was killed, perhaps for want of memory; run the same command again with fewer --workers"
            ) from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        held_here.close()


def _run_here(work: Work[Item, Result], items: Sequence[Item], progress: Progress) -> list[Result | UserError]:
    gc.freeze()  # or the collector searches through all that torch and transformers brought, a tenth of the time
    results = []
    try:
        with one_thread():
            for item in items:
                results.append(_attempt(work, item, progress.add))
                progress.file_done()
    finally:
        gc.unfreeze()
    return results


def _collect(
    executor: ProcessPoolExecutor,
    work: Work[Item, Result],
    items: Sequence[Item],
    in_flight: int,
    counts: Any,
    progress: Progress,
) -> list[Result | UserError]:
    """Keep `in_flight` items with the workers, and the bar at what they report, until all are done."""
    waiting = deque(enumerate(items))
    running: dict[Future, int] = {}
    results: dict[int, Result | UserError] = {}
    shown = [0, 0, 0]
    while waiting or running:
        while waiting and len(running) < in_flight:
            index, item = waiting.popleft()
            running[executor.submit(_attempt_there, work, item)] = index
        for future in wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
            results[running.pop(future)] = future.result()
            progress.file_done()
        now = list(counts.get_obj())  # read without the lock, which a killed worker may still hold
        progress.add(*(new - old for new, old in zip(now, shown, strict=True)))
        shown = now
    return [results[index] for index in range(len(items))]


def _attempt(work: Work[Item, Result], item: Item, report: Report) -> Result | UserError:
    try:
        return work(item, report)
    except UserError as error:
        return error


# ---- In a worker process ---------------------------------------------------------------------------------------------

_counts: Any = None


def _start_worker(counts: Any, lifeline: Connection, threads: int) -> None:
    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers, without a trace
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of `tokenizers`; read when it first encodes
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    """Wait for the end of a pipe on which nothing is ever sent: it comes when the parent closes it, or is no more."""
    lifeline.poll(None)
    os._exit(1)


def _attempt_there(work: Work[Item, Result], item: Item) -> Result | UserError:
    return _attempt(work, item, _report)


def _report(read: int, documents: int, tokens: int) -> None:
    with _counts.get_lock():
        for index, value in enumerate((read, documents, tokens)):
            _counts[index] += value
