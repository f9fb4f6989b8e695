"""The one exception that a command shows without a traceback, and the exit status it leads to."""

import errno
import io
import os
import select
import sys
import unicodedata
from collections.abc import Callable

# Errors of a system call that no program can rule out beforehand, whatever path it is given.
OF_THE_MACHINE = {
    errno.EACCES, errno.EDQUOT, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS, errno.ESTALE, errno.ETXTBSY,
}  # fmt: skip


class UserError(Exception):
    """What the user gave cannot be used. The message is one sentence that names the fix."""


class StoppedError(Exception):
    """A signal has asked a run to stop, and it has: its state is saved, the same command goes on from there."""

    def __init__(self, step: int, name: str) -> None:
        super().__init__(f"{name} stopped the run at step {step}")
        self.step, self.name = step, name


def printable(text: str) -> str:
    """Return text with escapes for what moves a terminal's cursor or cannot be written: names come from anyone."""
    return "".join(
        mark if mark in "\n\t" or unicodedata.category(mark)[0] != "C" else repr(mark)[1:-1] for mark in text
    )


NO_MEMORY = "can't allocate memory"  # of torch's allocator on CPUs


def exit_status(command: Callable[[], None]) -> int:
    """Run a command: 0; 2 for a UserError, printed as `error: ...`; 130 where it was interrupted.

    75, EX_TEMPFAIL, where a signal stopped a run that has saved its state: `slurm/launch.sh` then requeues the job.
    141, as of any program, where its output went to a `head` that has seen enough.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone, and names any byte
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except StoppedError:
        return os.EX_TEMPFAIL
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter writes once more at its end
        return 141
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {printable(where)}{error.strerror}: change that, or give another path", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or NO_MEMORY in str(error)):
            raise
        print(
            f"error: this machine's memory is too small for this ({_asked(error)}): give smaller sizes", file=sys.stderr
        )
        return 2
    return 0


def _asked(error: BaseException) -> str:
    """What a failed allocation says of how much was asked for; torch puts a place in its source in front."""
    text = " ".join(str(error).split())
    return text[text.find(NO_MEMORY) :].partition(" Error code")[0] if NO_MEMORY in text else text or "no details"


def _nobody_reads() -> bool:
    """Whether the reader of our output has gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
