"""What a run of two processes survives: kill -9 of one or of both, a rank that hangs, a disk that fills up."""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm.train import checkpoint as checkpoints
from llm.train.module import LanguageModule

from .preloaded import LLM, Python, two_ranks
from .runs import Config, assert_same_weights, events, fit, losses, measured, metrics

KEEPING = {"run__keep_checkpoints": 9, "run__checkpoint_every": 2, "run__loggers": ["csv"]}
ZERO2 = ["--trainer.devices", "2", "--strategy.name", "deepspeed", "--strategy.stage", "2"]


def start(config: Path, *words: str) -> Python:
    return Python(LLM, ["fit", "--config", str(config), "--resume", "auto", *words])


def child(process: Python) -> int:
    """Rank 1, which rank 0 has started; its loading processes there are none."""
    (number,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(number)


def last_step(run: Path) -> int:
    return max((int(row["step"]) for row in metrics(run)), default=0) if (run / "metrics.csv").exists() else 0


def wait_until(process: Python, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether no such process runs any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_ten_kills_of_one_rank_or_of_both_change_nothing(tiny_config: Config, tmp_path: Path) -> None:
    """At random moments, checkpoints among them: metrics and weights are bitwise those of a run left alone.

    In the first three attempts rank 0 has started rank 1, as on a machine without Slurm; then neither has the other.
    """
    common = {
        "trainer__max_steps": 120,
        "run__checkpoint_every": 3,
        "run__loggers": ["csv"],
        "data__validate_every": 60,
        "decoder__residual_dropout": 0.1,
        "data__micro_batch_size": 2,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    left_alone = ["fit", "--config", str(tiny_config(**common, run__folder=str(whole))), *ZERO2]
    ends_well(two_ranks(LLM, left_alone))
    config = tiny_config(**common, run__folder=str(broken))
    words = ["fit", "--config", str(config), "--resume", "auto", *ZERO2]
    chance = random.Random(11)
    for number in range(10):
        if number < 3:
            process = start(config, *ZERO2)
        else:
            process, second = two_ranks(LLM, words)
        goal = last_step(broken) + chance.randrange(1, 11)
        wait_until(process, lambda: last_step(broken) >= goal)  # noqa: B023  # called within this turn
        time.sleep(chance.uniform(0, 0.05))
        other = child(process) if number < 3 else second.pid
        victims = [[process.pid, other], [other], [process.pid]][number % 3]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
        if victims == [other]:
            assert process.returncode in (2, -signal.SIGKILL)  # told by gloo, or ended by Lightning, which looks too
            assert process.returncode < 0 or "lost contact to the other ranks" in said
        wait_until_gone(other)
    ends_well(two_ranks(LLM, words))
    assert measured(broken) == measured(whole)
    assert [int(row["step"]) for row in metrics(broken) if row["train_loss"]] == list(range(1, 121))
    assert_same_weights(whole, broken, 120)


def ends_well(ranks: list[Python]) -> None:
    for rank in ranks:
        said = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, said[-3000:]


def wait_until_gone(pid: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not gone(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


def test_a_rank_that_hangs_is_ended_with_a_message(tiny_config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(tiny_config(trainer__max_steps=100_000), *ZERO2, "--strategy.timeout", "5")
    wait_until(process, lambda: last_step(run) > 20)
    other = child(process)
    os.kill(other, signal.SIGSTOP)
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 2
    message = said.strip().splitlines()[-1]
    for part in ("error: rank 0 lost contact", "hangs for longer than strategy.timeout 5 s", "--resume auto"):
        assert part in message
    wait_until_gone(other)
    assert events(run)[-1]["why"] == "lost contact to the other ranks"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk], check=False).returncode:
        pytest.skip("a disk of its own needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("seen", ["before writing", "while writing"])
def test_a_full_disk_stops_the_run_and_keeps_what_is_there(
    tiny_config: Config, small_disk: Path, seen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A checkpoint here has 0.4 MB, and 1 MiB is left free beside it."""
    run = small_disk / "run"
    if seen == "while writing":
        monkeypatch.setattr(checkpoints, "_check_space", lambda *_: None)
    settings = {
        "run__folder": str(run),
        "run__keep_checkpoints": 9,
        "run__loggers": ["csv"],
        "run__checkpoint_every": 2,
    }
    assert fit(tiny_config(**settings)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    last = checkpoints.find(run)
    assert message.startswith(f"error: checkpoint {run}/checkpoints/step-{last.step + 2:08d} cannot be written")
    assert ("are free" if seen == "before writing" else "No space left on device") in message
    assert "free some space" in message
    assert last.step >= 4
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        f"step-{n:08d}" for n in range(2, last.step + 1, 2)
    }
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert fit(tiny_config(**settings), "--resume", "auto") == 0
    assert list(losses(run)) == list(range(1, 21))


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_full_disk_may_be_trained_through(
    tiny_config: Config,
    small_disk: Path,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """What is missing at the end is a checkpoint, and the run says so, of each, however long the writing takes."""
    run = small_disk / "run"
    write = checkpoints.write

    def slowly(*arguments: Any) -> Path:
        time.sleep(seconds)
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "write", slowly)
    settings = {
        "run__folder": str(run),
        "run__keep_checkpoints": 9,
        "run__loggers": ["csv"],
        "run__checkpoint_every": 2,
    }
    assert fit(tiny_config(**settings, run__on_full_disk="continue")) == 2  # the last one is not there either
    said = capsys.readouterr().err
    last = checkpoints.find(run).step
    assert "training continues without a checkpoint" in said
    assert list(losses(run)) == list(range(1, 21))
    missed = [line["why"] for line in events(run) if line["event"] == "checkpoint not written"]
    assert [int(re.search(r"step-(\d+)", why)[1]) for why in missed] == list(range(last + 2, 20, 2))
    assert not (run / "summary.json").exists()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert fit(tiny_config(**settings), "--resume", "auto") == 0
    assert (run / "summary.json").exists()


def test_a_disk_without_a_byte_left_takes_no_line_and_ends_no_run(
    tiny_config: Config, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Rows and events cannot be written either, from step 7 to step 40: they wait, and none is lost."""
    run, filler = small_disk / "run", small_disk / "filler"
    training_step = LanguageModule.training_step

    def fills_the_disk(module: LanguageModule, batch: dict, batch_idx: int) -> object:
        # At every step: a checkpoint that finds no room is removed, and its bytes would be room again.
        if 6 <= module.global_step < 40:
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as stream:
                while True:
                    stream.write(bytes(64))
        if module.global_step == 40:
            filler.unlink(missing_ok=True)
        return training_step(module, batch, batch_idx)

    monkeypatch.setattr(LanguageModule, "training_step", fills_the_disk)
    settings = {"run__folder": str(run), **KEEPING, "run__keep_checkpoints": 1, "trainer__max_steps": 50}
    settings["run__loggers"] = ["csv", "tensorboard"]
    assert fit(tiny_config(**settings, run__on_full_disk="continue")) == 0
    said = capsys.readouterr().err
    assert "metrics.csv: lines wait in memory (" in said and "Traceback" not in said
    assert list(losses(run)) == list(range(1, 51))
    scalars = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload().Scalars("train_loss")
    assert [event.step for event in scalars] == list(range(1, 51))
    assert {"lines wait in memory", "waiting lines written"} <= {event["event"] for event in events(run)}
    assert checkpoints.find(run).step == 50
