"""Locks that one process at a time holds.

`acquire_lock` takes a whole folder by a POSIX lock on FOLDER/.lock. On a file system without such locks it takes a
heartbeat instead: a file with host, process and time that its owner writes again every `BEAT` seconds. Another process
takes it over only when its owner is known to be dead, or has not written for `LEASE` seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from .errors import UserError
from .files import as_json, write_file
from .processes import is_alive

LEASE = 180.0  # seconds that the lock of a node that was lost lives on
BEAT = 20.0  # seconds between two beats
RETRY = 5.0  # seconds between two attempts at a lock
SETTLE = 1.0  # seconds in which two processes that take over one heartbeat see each other
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of lockf, where there are none
LOCK, HEARTBEAT = ".lock", ".heartbeat"  # all that a process killed right after it took a folder leaves there

_told: set[Path] = set()


class Heartbeat:
    """A file that keeps other processes out where the file system has no locks; see above."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @classmethod
    def take(cls, path: Path) -> Heartbeat | None:
        """Take the file at `path`; None where a living process has it."""
        taken_over = path.exists()
        if taken_over:
            if is_beating(path):
                return None
            path.unlink(missing_ok=True)
        heartbeat = cls(path)
        try:
            with path.open("x") as file:
                file.write(_who())
        except FileExistsError:
            return None
        if taken_over:
            time.sleep(SETTLE)
            if not heartbeat._is_ours():
                return None
        if path.parent not in _told:
            _told.add(path.parent)
            print(
                f"note: {path.parent} is on a file system without locks: {path.name} there keeps other processes out "
                f"(for {LEASE:g} s more after a node is lost)",
                file=sys.stderr,
            )
        heartbeat._thread.start()
        return heartbeat

    @classmethod
    def wait(cls, path: Path) -> Heartbeat:
        """Take the file at `path`, as soon as no living process has it."""
        while (heartbeat := cls.take(path)) is None:
            time.sleep(RETRY)
        return heartbeat

    def close(self) -> None:
        """Give the file back."""
        self._stop.set()
        self._thread.join()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(UserError):  # a full disk: the next beat may find room
                if self._is_ours():
                    write_file(self.path, _who())

    def _is_ours(self) -> bool:
        host, process = owner(self.path)
        return (host, process) == (platform.node(), os.getpid())


def owner(path: Path) -> tuple[str | None, int | None]:
    """Return host and process id of a heartbeat's owner; None each where the file does not say."""
    try:
        facts = json.loads(path.read_bytes())
        return str(facts["host"]), int(facts["process"])
    except (OSError, ValueError, TypeError, KeyError):
        return None, None


def is_beating(path: Path, now: float | None = None) -> bool:
    """Return whether the owner of a heartbeat may be alive: by its process id on this host, else by the file's age.

    `now` is the time; without it the clock of the file system is asked, by a file that is made and removed.
    """
    host, process = owner(path)
    try:
        if host == platform.node() and process is not None and not is_alive(process):
            return False
        return (now or _time_there(path.parent)) - path.stat().st_mtime <= LEASE
    except FileNotFoundError:
        return False


class FolderLock:
    """A folder that this process holds until `close`, or its end."""

    def __init__(self, file: TextIO, heartbeat: Heartbeat | None = None) -> None:
        self._file, self._heartbeat = file, heartbeat

    def close(self) -> None:
        """Let go of the folder."""
        if self._heartbeat is not None:
            self._heartbeat.close()
        self._file.close()


def acquire_lock(folder: Path) -> FolderLock:
    """Lock a folder against other processes.

    By lockf, whose lock is the process's own: that of flock would live on in the loading processes of a killed run. A
    job that Slurm has requeued waits for the lease of the node that it was lost on.

    Raises:
        UserError: another process holds the folder, or it cannot be written.
    """
    until = time.monotonic() + (LEASE if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0)
    while (lock := _try_lock(folder)) is None:
        if time.monotonic() > until:
            raise UserError(f"another process is training in {folder}: wait for it or end it")
        time.sleep(RETRY)
    return lock


@contextmanager
def wait_for(folder: Path) -> Iterator[None]:
    """Hold a folder for a moment, after whoever holds it now. It is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    while (lock := _try_lock(folder)) is None:
        time.sleep(0.1)
    try:
        yield
    finally:
        lock.close()


def _try_lock(folder: Path) -> FolderLock | None:
    path = folder / LOCK
    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give a folder that can be written") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:  # else its last owner has removed the folder
            return FolderLock(file)
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise UserError(f"{folder} cannot be locked ({error.strerror}): give a folder elsewhere") from error
        if (heartbeat := Heartbeat.take(folder / HEARTBEAT)) is not None:
            return FolderLock(file, heartbeat)
    file.close()
    return None


def _who() -> str:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return as_json({"host": platform.node(), "process": os.getpid(), "time": when})


def _time_there(folder: Path) -> float:
    """Return the time by the clock that sets the times of files in `folder`, which may be another machine's."""
    probe = folder / f"{HEARTBEAT}-{platform.node()}-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # not ours to write
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
