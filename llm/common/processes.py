"""What this process may use and uses: cores, memory; and its progress bar."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm


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
    """Bytes of this process in memory now, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak_rss() -> None:
    """Let the high-water mark begin anew at what is in memory now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Bytes of this process's high-water mark, on Linux. (getrusage would count the parent's, from before exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def progress_bar(total: int, done: int, what: str, unit: str, **settings: Any) -> tqdm:
    """A bar with rate and time left; in a log file a line every half minute instead of ten a second."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=done, desc=what, unit=unit, mininterval=interval, dynamic_ncols=True, **settings)
