"""The wait policy is set before torch is imported, and a busy machine is noticed: clocks are made up, but for one."""

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.cli import main
from llm.common import threads
from llm.common.threads import CpuClock, busy_machine, is_crowded, set_wait_policy, thread_count, warn_if_busy

from ..train.runs import events

ROOT = Path(__file__).parents[2]
# Runs a module with its arguments up to the first import of torch, and prints libgomp's setting at that moment.
UP_TO_TORCH = """
import os, runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("GOMP_SPINCOUNT", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
sys.path[0] = os.getcwd()
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
DOORS = [
    "llm fit --config configs/stories_classic.yaml",
    "llm export none none",
    "llm bench --config configs/stories_classic.yaml",
    "evals incontext none --store none",
    "evals losses none --store none",
    "small.icl train --out none",
    "small.grid train --out none",
    "small.tem train --out none",
    "small.vision train --dataset cifar100 --data none",
    "benchmarks.threads --child",
]


@pytest.mark.parametrize("door", DOORS)
def test_the_wait_policy_is_set_before_torch_is_imported(door: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in threads.WAIT_SETTINGS}
    set_by_door = [sys.executable, "-c", UP_TO_TORCH, *door.split()]
    done = subprocess.run(set_by_door, env=environment, cwd=ROOT, capture_output=True, text=True)
    expected = None if door.startswith("benchmarks") else threads.SPIN_COUNT  # it measures what each setting is worth
    assert done.stdout.splitlines()[-1] == f"GOMP_SPINCOUNT {expected}", done.stderr


@pytest.mark.parametrize("name", threads.WAIT_SETTINGS)
def test_a_policy_of_the_user_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in threads.WAIT_SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "7")
    set_wait_policy()
    assert {other: os.environ[other] for other in threads.WAIT_SETTINGS if other in os.environ} == {name: "7"}


def test_threads_are_at_least_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may start fewer: MKL counts physical cores."""
    for given_threads in ("1", "3", None):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given_threads:
            monkeypatch.setenv("OMP_NUM_THREADS", given_threads)
        words = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
        told = int(subprocess.run(words, capture_output=True, text=True).stdout)
        assert told <= thread_count()
        assert not given_threads or thread_count() == int(given_threads)


@given(st.floats(0.1, 100), st.floats(0, 50), st.floats(0, 50))
def test_what_others_used(wall: float, own: float, others: float) -> None:
    before, after = CpuClock(5.0, 7.0, 11.0), CpuClock(5.0 + wall, 7.0 + own, 11.0 + own + others)
    assert after.others_since(before) == pytest.approx(others / wall, abs=1e-6)
    assert CpuClock(1.0, 1.0, None).others_since(before) is None
    cores = os.cpu_count() or 1
    if abs(others - threads.TOLERANCE) > 1e-6:  # else rounding decides
        assert is_crowded(others, cores) == (others > threads.TOLERANCE)
    assert not is_crowded(None, 2 * cores)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CPU time of all processes is read from /proc/stat")
def test_children_that_ended_are_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the clock of this machine
    before = CpuClock.now()
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    after = CpuClock.now()
    assert before.machine is not None and after.machine is not None
    assert after.own - before.own >= 0.45
    assert after.machine - before.machine >= 0.45


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets other processes use so many cores from now on, by the clock; ours uses a tenth of its time."""

    def use(cores: float) -> None:
        seconds = itertools.count(step=2.0)
        monkeypatch.setattr(
            CpuClock, "now", classmethod(lambda cls: cls(at := next(seconds), 0.1 * at, (cores + 0.1) * at))
        )

    return use


def test_a_busy_machine_is_said_at_the_start(others: Callable, capsys: pytest.CaptureFixture) -> None:
    others(0)
    set_wait_policy()
    warn_if_busy()
    assert capsys.readouterr().err == ""
    others(os.cpu_count() or 1)
    set_wait_policy()
    warn_if_busy()
    assert capsys.readouterr().err.startswith(f"warning: other processes use {os.cpu_count()}.0 of {os.cpu_count()} ")
    assert "OMP_NUM_THREADS=1" in (busy_machine(2) or "")


@pytest.mark.parametrize("from_start", [True, False], ids=["from the start", "later"])
def test_a_run_that_shares_its_cores_is_marked(
    from_start: bool,
    others: Callable,
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others(os.cpu_count() or 1)
    if not from_start:
        monkeypatch.setattr("llm.train.busy_machine.busy_machine", lambda threads: None)
    assert main(["fit", "--config", str(tiny_config())]) == 0
    said = [line for line in re.split("[\r\n]+", capsys.readouterr().err) if line.startswith("warning: ")]
    (event,) = events(tmp_path / "run", "busy_machine")
    assert said == [f"warning: {event['why']}"] and "says nothing about cost" in event["why"]
    assert (event["step"] == 0) == from_start
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "1 x busy_machine" in capsys.readouterr().out


def test_a_forked_process_does_not_take_its_parents_time_for_that_of_others() -> None:
    """Its own CPU time begins at zero: the parent's would count as others'."""
    receiving, sending = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(sending, f"{threads._started.own}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert float(os.read(receiving, 100)) < 1 < time.process_time()
