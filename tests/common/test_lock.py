"""Locks: held against other processes, let go at the end, and heartbeats where the file system has no locks."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import llm.common.lock as lock
from llm.common.errors import UserError
from llm.runs import reading

OTHER = "import sys, pathlib; from llm.common.lock import acquire_lock; acquire_lock(pathlib.Path(sys.argv[1])); {}"


def asked_elsewhere(folder: Path, then: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", OTHER.format(then), str(folder)], capture_output=True, text=True)


def test_a_folder_belongs_to_one_process_until_it_lets_go(tmp_path: Path) -> None:
    held = lock.acquire_lock(tmp_path)
    assert "another process is training in" in asked_elsewhere(tmp_path).stderr
    held.close()
    assert asked_elsewhere(tmp_path).returncode == 0
    assert asked_elsewhere(tmp_path, "import os; os.kill(os.getpid(), 9)").returncode == -9
    lock.acquire_lock(tmp_path).close()


def test_a_folder_that_was_removed_while_it_was_waited_for_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock would be on a file that is no more, and the next process would hold another."""
    taken = fcntl.lockf

    def removed_meanwhile(file: object, kind: int) -> None:
        taken(file, kind)
        (tmp_path / lock.LOCK).unlink()

    monkeypatch.setattr(fcntl, "lockf", removed_meanwhile)
    assert lock._try_lock(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        lock.acquire_lock(tmp_path / "nowhere")


# ---- Without locks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    lock._told.clear()
    yield


def heartbeat(folder: Path, host: str, process: int, age: float = 0.0) -> None:
    path = folder / lock.HEARTBEAT
    path.write_text(json.dumps({"host": host, "process": process, "time": ""}))
    os.utime(path, (time.time() - age,) * 2)


def test_without_locks_a_heartbeat_keeps_others_out(
    tmp_path: Path, no_locks: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    held = lock.acquire_lock(tmp_path)
    assert "without locks" in capsys.readouterr().err
    assert lock.owner(tmp_path / lock.HEARTBEAT) == (os.uname().nodename, os.getpid())
    before = (tmp_path / lock.HEARTBEAT).stat().st_mtime_ns
    with pytest.raises(UserError, match="another process is training"):
        lock.acquire_lock(tmp_path)
    deadline = time.monotonic() + 30
    while (tmp_path / lock.HEARTBEAT).stat().st_mtime_ns == before:  # it beats
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.close()
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]
    lock.acquire_lock(tmp_path).close()


@pytest.mark.parametrize(
    ("host", "is_alive", "age", "taken"),
    [
        ("here", True, 0, False),
        ("here", False, 0, True),  # its process has ended
        ("elsewhere", False, 100, False),  # nothing is known of a process of another machine
        ("elsewhere", False, 1000, True),
    ],
)
def test_a_heartbeat_is_taken_over_from_the_dead_alone(
    tmp_path: Path, no_locks: None, host: str, is_alive: bool, age: float, taken: bool
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    process = os.getppid() if is_alive else ended.pid
    heartbeat(tmp_path, os.uname().nodename if host == "here" else "elsewhere", process, age)
    if taken:
        lock.acquire_lock(tmp_path).close()
    else:
        with pytest.raises(UserError, match="another process is training"):
            lock.acquire_lock(tmp_path)


def test_one_of_many_that_take_over_one_heartbeat_gets_it(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for processes: each says that it is another one."""
    monkeypatch.setattr(lock, "SETTLE", 0.5)
    heartbeat(tmp_path, "elsewhere", 1, 1000)
    numbers = threading.local()
    monkeypatch.setattr(os, "getpid", lambda: numbers.own)
    barrier, got = threading.Barrier(8), []

    def take(number: int) -> None:
        numbers.own = number
        barrier.wait()
        if lock.Heartbeat.take(tmp_path / lock.HEARTBEAT) is not None:
            got.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_status_reads_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / lock.LOCK).touch()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert reading.lock(tmp_path).held is None
    heartbeat(tmp_path, os.uname().nodename, os.getppid())
    assert reading.lock(tmp_path) == reading.Lock(True, os.getppid())
    heartbeat(tmp_path, "elsewhere", 7, 1000)
    assert reading.lock(tmp_path) == reading.Lock(False, None)
    assert {path.name for path in tmp_path.iterdir()} == {lock.LOCK, lock.HEARTBEAT}  # nothing is written
