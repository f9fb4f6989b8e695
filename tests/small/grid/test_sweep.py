"""Sweeps: shares of an array, places of workers, runs that are the same as one after the other, and kills."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llm.common.errors import UserError
from small.grid import sweep as sweeping
from small.grid.cli import main
from small.grid.model import Variant
from small.grid.runs import combinations, read_runs
from small.grid.settings import GridSettings, GridSizes
from small.grid.sweep import Knob, places, share
from small.spaces import space

TINY = [
    "--preset", "small", "--space", "3x3", "--trials", "2", "--steps", "16", "--batch", "4", "--walkers", "4",
    "--width", "16", "--neurons", "8", "--device", "cpu", "--seeds", "2", "--alpha", "0", "10",
]  # fmt: skip


def contents(out: Path) -> dict[str, bytes]:
    return {run.label: (run.folder / "errors.csv").read_bytes() for run in read_runs(out)}


def test_a_sweep_trains_what_train_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, both = tmp_path / "one", tmp_path / "both"
    assert main(["train", *TINY, "--out", str(one)]) == 0
    capsys.readouterr()
    assert main(["sweep", *TINY, "--workers", "2", "--out", str(both)]) == 0
    assert "4 of 4 runs, 2 at once" in capsys.readouterr().out
    assert contents(one) == contents(both)
    assert (both / "reference_error_by_alpha.png").is_file()


def test_the_tasks_of_an_array_share_all_runs(tmp_path: Path) -> None:
    asked = combinations(space("3x3"), GridSizes(), Variant(), GridSettings(), {"maps": [1, 2, 3], "seed": range(3)})
    shares = [share(asked, f"{task}/4") for task in range(1, 5)]
    assert sorted(run.label for part in shares for run in part) == sorted(run.label for run in asked)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    words = ["sweep", *TINY, "--workers", "1", "--out", str(tmp_path)]
    for task, done in (("1/3", 2), ("3/3", 3), ("2/3", 4)):
        assert main([*words, "--task", task]) == 0
        assert len(read_runs(tmp_path)) == done


@pytest.mark.slow
def test_a_sweep_that_is_ended_leaves_no_worker_and_goes_on(tmp_path: Path) -> None:
    """Though each signal reaches the sweep's process alone: a worker that lived on would hold its folder."""
    words = ["sweep", *TINY, "--trials", "40", "--steps", "64", "--workers", "2"]
    command = [sys.executable, "-m", "small.grid", *words, "--out", str(tmp_path)]

    def written() -> set[int]:
        return {path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint.safetensors")}

    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before = written()
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while written() <= before:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(how)
        assert process.wait(60) != 0
        while subprocess.run(["pgrep", "--session", str(process.pid)], stdout=subprocess.DEVNULL).returncode == 0:
            assert time.monotonic() < deadline, "a worker lives on"
            time.sleep(0.05)
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert {run.last.trial for run in read_runs(tmp_path)} == {40}


def test_a_run_that_fails_is_named_and_the_others_are_trained(tmp_path: Path, capsys) -> None:
    words = ["sweep", *TINY, "--out", str(tmp_path)]
    broken = tmp_path / "act=nmda:10,maps=16,seed=0"
    broken.mkdir()
    (broken / "thesis.txt").write_text("precious")
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: 1 of 4 runs could not be trained: act=nmda:10,maps=16,seed=0 (")
    assert len(read_runs(tmp_path)) == 3 and (broken / "thesis.txt").read_text() == "precious"


def test_workers_have_a_place_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places("cpu", 3) == ["cpu"] * 3
    assert len(places("cpu", None)) == len(os.sched_getaffinity(0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert places("cuda", None) == ["cuda:0", "cuda:1"]
    assert places("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert places("cuda:1", 2) == ["cuda:1", "cuda:1"]


def test_knobs_have_the_types_of_their_fields() -> None:
    assert Knob.parse("lr=1e-3,1e-4") == ("lr", (1e-3, 1e-4))
    assert Knob.parse("neurons=8,16") == ("neurons", (8, 16))
    assert Knob.parse("position=paper,actions") == ("position", ("paper", "actions"))
    assert Knob.parse("streams=none,values,queries+keys") == ("streams", ((), ("values",), ("queries", "keys")))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--vary", "colour=red"], "--vary 'colour=red': give NAME=V,V,... with one of act, batch"),
        (["--vary", "neurons=8,many"], "--vary 'neurons=8,many': invalid literal"),
        (["--vary", "position=paper,there"], "position 'there' is unknown"),
        (["--task", "5/4"], "--task '5/4': give I/N"),
        (["--task", "x"], "--task 'x': give I/N"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], named: str, tmp_path: Path, capsys) -> None:
    assert main(["sweep", *TINY, *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and named in said[0]
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_killed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = combinations(space("3x3"), GridSizes(), Variant(), GridSettings(), {"seed": range(2)})
    monkeypatch.setattr(sweeping, "_train", _dies)
    said = (
        "2 of 2 runs could not be trained: act=nmda:1,maps=32,seed=0 (its process ended by SIGKILL: if for its memory"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        sweeping.sweep(asked, tmp_path, ["cpu"], "")


def _dies(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
