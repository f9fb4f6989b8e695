"""A folder belongs to one process at a time."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .errors import UserError

LEASE = 180.0  # seconds


def hold(folder: Path) -> TextIO:
    """Hold the folder until the returned file is closed, or the end of the process.

    By lockf, whose lock is the process's own: that of flock would live on in the loading processes of a killed run.

    Raises:
        UserError: another process holds it.
    """
    held = (folder / ".lock").open("w")
    # The lock of a node that was lost lives on until its lease on the file system is over.
    until = time.monotonic() + (LEASE if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0)
    while True:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                held.close()
                raise UserError(f"another process is training in {folder}: wait for it or end it") from error
            time.sleep(5)
            continue
        except OSError:  # a file system without locks
            pass
        return held


@contextlib.contextmanager
def wait_for(folder: Path) -> Iterator[None]:
    """Hold the folder for a moment, after whoever holds it now."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as held:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(held, fcntl.LOCK_EX)
        yield
