"""What this process may use and uses: cores, memory; and its progress bar."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines of progress in a log
PARENT = "HIPPOFORMER_PARENT"  # the process that starts the other ranks, in their environment


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine has in a Slurm job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_file_limit() -> int:
    """How many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft >= 0 else sys.maxsize  # RLIM_INFINITY is -1


def raise_open_file_limit() -> None:
    """Let this process and its children open as many files as the system allows them: a shell's usual 1,024 are few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS takes no infinite limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def end_with_parent() -> None:
    """Have a rank end when the process that started it does: a rank that waits for another would outlive it by hours.

    A rank is a process of Lightning's or torchrun's. It asks for its parent's id: the signal that Linux can send at a
    parent's death follows the thread that started the process.
    """
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    if PARENT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        parent = int(os.environ[PARENT])
    if parent is not None and (parent == os.getppid() or not is_alive(parent)):  # else another process's environment
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def end_with_creator(_: int = 0) -> None:
    """Have a loading process end with its maker. Torch watches its parent, which may be a fork server instead."""
    creator = multiprocessing.parent_process()
    if creator is not None:
        threading.Thread(target=_end_after, args=(creator,), name="creator", daemon=True).start()


def _end_after(creator: BaseProcess) -> None:
    creator.join()
    os._exit(1)


def is_alive(process: int) -> bool:
    """Return whether there is a process of this id on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """`tokenizers` on one core of this process, as each of many workers has it."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def resident() -> int:
    """Bytes of this process in memory now; on a system without /proc, of its high-water mark."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return peak_rss()


def reset_peak_rss() -> None:
    """Reset the high-water mark to what is in memory now (proc(5), clear_refs); on Linux only."""
    with suppress(FileNotFoundError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Bytes of this process's high-water mark. (On Linux, getrusage would count the parent's, from before exec.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def progress_bar(total: int | None, done: int, what: str, unit: str, **settings: Any) -> tqdm:
    """Return a bar with rate and time left; where standard error is no terminal, one that writes lines."""
    kind = tqdm if sys.stderr.isatty() else ProgressLines
    return kind(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, **settings)


class ProgressLines(tqdm):
    """A progress bar for a log file: a whole line every half minute, and one at the end; no cursor is moved."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        settings["mininterval"] = LINE_SECONDS
        self.said_at = -LINE_SECONDS if settings.get("delay", 0) == 0 else time.monotonic()
        self.said = ""
        super().__init__(*arguments, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the bar's state as a line, unless one was written less than half a minute ago."""
        if time.monotonic() - self.said_at >= LINE_SECONDS:
            self._say()

    def clear(self, nolock: bool = False) -> None:
        """A line in a log stays."""

    def close(self) -> None:
        """Write the last state, where any was written before."""
        if not self.disable:
            if self.said:
                self._say()
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]  # tqdm's own, which its stubs leave out

    def _say(self) -> None:
        self.said_at, line = time.monotonic(), str(self)
        if line != self.said:
            self.said = line
            self.fp.write(f"{line}\n")
            self.fp.flush()
