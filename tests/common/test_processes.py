"""Ranks end with their parent; progress in a log file is whole lines."""

import io
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from llm.common import processes

CHILD = (
    "import time; from llm.common.processes import end_with_parent\n"
    "end_with_parent(); print('up', flush=True); time.sleep({})"
)
PARENT = """
import os, subprocess, sys, time
settings = {"LOCAL_RANK": "1", "HIPPOFORMER_PARENT": str(os.getpid())} if sys.argv[2] == "lightning" else {}
settings |= {"TORCHELASTIC_RUN_ID": "x"} if sys.argv[2] == "torchrun" else {}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | settings, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_rank_ends_when_the_process_that_started_it_is_killed(launcher: str) -> None:
    command = [sys.executable, "-c", PARENT, CHILD.format(600), launcher]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_whose_parent_ended_before_it_looked_ends_too() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    settings = {"LOCAL_RANK": "1", processes.PARENT: str(ended.pid)}
    done = subprocess.run([sys.executable, "-c", CHILD.format(600)], env=os.environ | settings, timeout=60, check=False)
    assert done.returncode == 1


@pytest.mark.parametrize("settings", [{}, {processes.PARENT: "1"}, {processes.PARENT: "1", "LOCAL_RANK": "1"}])
def test_other_processes_end_by_themselves(settings: dict[str, str]) -> None:
    """A first rank under nohup, or one in the environment of another run, whose first rank lives."""
    done = subprocess.run([sys.executable, "-c", CHILD.format(1)], env=os.environ | settings, timeout=60, check=False)
    assert done.returncode == 0


def test_progress_in_a_log_is_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at the beginning, one every half minute, one at the end; no cursor is moved, by a second bar either."""
    log, now = io.StringIO(), [100.0]
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = processes.progress_bar(100, 0, "train", "step", file=log, miniters=1)
    bar._time, bar.start_t, bar.last_print_t = (lambda: now[0]), now[0], now[0]  # tqdm's own clock
    for step in range(100):
        now[0] += 1
        bar.update()
        if step == 50:
            inner = processes.progress_bar(10, 0, "validate", "batch", file=log, leave=False, delay=3)
            inner.update(10)
            inner.close()
            tqdm.write("step 50: validation loss 1.0", file=log)
    bar.close()
    text = log.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    counts = [line.split("|")[2].split("[")[0].strip() for line in text.splitlines() if line.startswith("train")]
    assert counts == ["0/100", "30/100", "60/100", "90/100", "100/100"]
    assert "step 50: validation loss 1.0" in text.splitlines() and "validate" not in text


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = processes.progress_bar(2, 0, "train", "step", file=io.StringIO())
    assert type(bar) is tqdm
    bar.close()


def test_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: the high-water mark alone, from getrusage."""

    def absent(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(self)

    before = processes.resident()
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(Path, "write_text", absent)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2 * before))
    processes.reset_peak_rss()
    assert processes.resident() == processes.peak_rss() == 2 * before
