"""Python processes that begin with everything imported: the imports take longer than the few steps of a test."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import torch

_context = multiprocessing.get_context("forkserver")
# deepspeed imports its Muon where it builds any optimizer, and compiles there
_preload = ["tests.signatures", "llm.train.cli", "deepspeed", "deepspeed.runtime.zero.muon.original_muon"]
if os.environ.get("KILLS"):  # of all programs, many times
    _preload += ["datasets", "lm_eval.evaluator", "evals.harness.run", "evals.page.curves", "small.grid.train"]
_context.set_forkserver_preload(_preload)
# As `python -m llm`, also to what starts its ranks by the command that started it.
LLM = """
import importlib.util, sys
from llm.cli import main
sys.modules["__main__"].__spec__ = importlib.util.find_spec("llm.__main__")
sys.exit(main(sys.argv[1:]))
"""


_made: list["Python"] = []


def end_all() -> None:
    """Kill what a test has left running, and remove what its processes wrote."""
    for process in _made:
        process.kill()
        process.wait()
        process.log.unlink(missing_ok=True)
    _made.clear()


def wait_for_none(seconds: float = 60) -> None:
    """Wait until none of these processes is left, nor what they have started; fails after a time."""
    server = Path(f"/proc/{forkserver._forkserver._forkserver_pid}")
    deadline = time.monotonic() + seconds
    while left := (server / "task" / server.name / "children").read_text().split():
        assert time.monotonic() < deadline, f"processes {left} live on"
        time.sleep(0.05)


class Python:
    """`python -c CODE WORDS...`, to be used like a `Popen` whose stderr and stdout are one pipe."""

    def __init__(self, code: str, words: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        handle, log = tempfile.mkstemp()
        os.close(handle)
        self.log = Path(log)
        place = {"OMP_NUM_THREADS": "1", **(environment or {})}
        self._process = _context.Process(target=_run, args=(code, list(words), place, self.log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        _made.append(self)

    @property
    def returncode(self) -> int:
        assert self._process.exitcode is not None
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what it wrote comes second, as stderr."""
        self.wait(timeout)
        return "", self.log.read_text()


def two_ranks(code: str, words: Sequence[str]) -> list[Python]:
    """Ranks 0 and 1 of one run, neither of which is the other's parent."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    place = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Python(code, words, place | {"LOCAL_RANK": str(rank)}) for rank in range(2)]


def _run(code: str, words: list[str], environment: dict[str, str], log: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stderr.fileno(), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # torch has read the variable already
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})
