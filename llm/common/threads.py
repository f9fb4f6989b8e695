"""OpenMP threads on a shared machine: how long they spin at a barrier, and how busy other processes keep the cores.

Imports no torch: libgomp reads its settings from the environment at the moment torch loads it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .processes import available_cores

WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPIN_COUNT = 10_000  # measured: benchmarks/threads.md
SHORTEST = 0.1  # seconds to watch the machine for: the kernel counts CPU time in hundredths of a second
TOLERANCE = 0.5  # cores: a desktop, a shell and the clock's resolution


def set_wait_policy() -> None:
    """Let OpenMP threads sleep soon after they arrive at a barrier, unless the user has set a wait policy.

    By default libgomp's threads spin for milliseconds. Where another process has the core of the thread that they wait
    for, they burn the time that this thread needs. Call before torch is imported; child processes inherit it.
    `busy_machine` watches the machine from this call on.
    """
    global _started
    _started = CpuClock.now()
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def thread_count() -> int:
    """Number of threads that torch starts with at most: OMP_NUM_THREADS, or the cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdigit() and int(given) > 0 else available_cores()


class CpuClock(NamedTuple):
    """Seconds since some start: wall, CPU of this process and its finished children, CPU of all processes."""

    wall: float
    own: float
    machine: float | None  # None where the system does not report it

    @classmethod
    def now(cls) -> CpuClock:
        spent = os.times()
        own = time.process_time() + spent.children_user + spent.children_system
        return cls(time.perf_counter(), own, _machine_seconds())

    def others_since(self, before: CpuClock) -> float | None:
        """Average number of cores that other processes used since `before`; None if the system does not report it."""
        if self.machine is None or before.machine is None:
            return None
        return max(0.0, self.machine - before.machine - (self.own - before.own)) / (self.wall - before.wall)


def _machine_seconds() -> float | None:
    """CPU seconds of all processes since boot, from /proc/stat."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    except (OSError, ValueError):
        return None
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


_started = CpuClock.now()


def _restart() -> None:
    global _started
    _started = CpuClock.now()


os.register_at_fork(after_in_child=_restart)  # a child's own CPU time begins at zero


def is_crowded(others: float | None, threads: int) -> bool:
    """Whether `threads` threads find fewer free cores than they need."""
    return others is not None and others + threads > (os.cpu_count() or 1) + TOLERANCE


def busy_machine(threads: int) -> str | None:
    """A sentence if other processes have left fewer free cores than `threads` since the start, else None."""
    time.sleep(max(0.0, SHORTEST - (time.perf_counter() - _started.wall)))
    others = CpuClock.now().others_since(_started)
    if not is_crowded(others, threads):
        return None
    advice = "set OMP_NUM_THREADS=1 or wait for them" if threads > 1 else "wait for them"
    return (
        f"other processes use {others:.1f} of {os.cpu_count()} cores, and this one is going to use {threads}: "
        f"it will be slow, and its time says nothing about cost; {advice}"
    )


def warn_if_busy() -> None:
    """Print one line on stderr if other processes leave too few free cores for this process's threads."""
    if sentence := busy_machine(thread_count()):
        print(f"warning: {sentence}", file=sys.stderr)
