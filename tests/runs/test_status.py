"""`python -m llm status`: real runs, and folders made by hand as runs of all ages and fates leave them."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from llm.cli import main
from llm.train.loggers import MetricsFile

from ..train.runs import fit, metrics

Config = Callable[..., Path]
HEADER = "step,tokens,train_loss,tokens_per_second,validation_loss,seconds"
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def shown(capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, dict[str, Any]]]:
    """What `status` says of a run, as text and as JSON."""

    def show(run: Path, *words: str) -> tuple[str, dict[str, Any]]:
        capsys.readouterr()
        assert main(["status", str(run), *words]) == 0
        text = capsys.readouterr().out
        assert main(["status", str(run), "--json", *words]) == 0
        (status,) = json.loads(capsys.readouterr().out)
        assert all(len(line) <= 100 for line in text.splitlines() if "note: " not in line and str(run) not in line)
        return text, status

    return show


def made(run: Path, rows: str | None = None, record: dict[str, Any] | None = None, config: str | None = None) -> Path:
    """A run folder by hand; `rows` are lines of metrics.csv without its header, ended as they are to be."""
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"name": run.name, "seed": 3} if record is None else record))
    if rows is not None:
        (run / "metrics.csv").write_text(f"{HEADER}\r\n{rows}", newline="")
    if config is not None:
        (run / "config.yaml").write_text(config)
    return run


def checkpoint(folder: Path, **sizes: int) -> Path:
    """A checkpoint whose files have these sizes, with a manifest as `fit` writes it; its digests are not true."""
    folder.mkdir(parents=True)
    kinds = ("model", "optimizer")
    names = {"config": "config.json", "state": "state.json", **{kind: f"{kind}.safetensors" for kind in kinds}}
    given = {names[kind]: sizes.get(kind, 10) for kind in names}
    for name, size in given.items():
        (folder / name).write_bytes(b"x" * size)
    manifest = {name: {"bytes": size, "sha256": "0" * 64} for name, size in given.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@contextmanager
def held(run: Path) -> Iterator[int]:
    """Another process holds the folder, as a run does. Yields its id."""
    words = [sys.executable, "-c", HOLD, str(run / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.stdin.close()


def test_a_finished_run_and_a_flipped_byte(tiny_config: Config, tmp_path: Path, shown: Callable) -> None:
    run = tmp_path / "run"
    assert fit(tiny_config(run__keep_checkpoints=3)) == 0
    text, status = shown(run)
    rows = metrics(run)
    assert (status["state"], status["step"], status["max_steps"]) == ("finished", 20, 20)
    assert "20 of 20, 100%" in text
    assert status["tokens"] == 20 * 8 * 32
    trained = [row for row in rows if row["train_loss"]]
    assert (status["train_loss"], status["train_loss_step"]) == (float(trained[-1]["train_loss"]), 20)
    summary = json.loads((run / "summary.json").read_text())
    assert (status["validation_loss"], status["validation_loss_step"]) == (summary["validation_loss"], 20)
    rates = sorted(float(row["tokens_per_second"]) for row in trained)
    assert status["tokens_per_second"] == pytest.approx((rates[9] + rates[10]) / 2)
    elapsed = float(rows[-1]["seconds"]) - float(rows[0]["seconds"])
    assert status["steps_per_second"] == pytest.approx(19 / elapsed)
    assert status["ends_at"] is None and status["skipped_steps"] == 0 and status["events"] == {}
    folders = sorted((run / "checkpoints").iterdir())
    assert [(each["step"], each["state"]) for each in status["checkpoints"]] == [(n, "complete") for n in (10, 15, 20)]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert [each["bytes"] for each in status["checkpoints"]] == sizes
    weights = bytearray((folders[1] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folders[1] / "model.safetensors").write_bytes(weights)
    assert [each["state"] for each in shown(run)[1]["checkpoints"]] == ["complete"] * 3  # by their sizes
    text, status = shown(run, "--verify")
    assert [each["state"] for each in status["checkpoints"]] == ["complete", "torn", "complete"]
    assert "model.safetensors has not the sha256 of its manifest" in text


def test_a_run_that_goes_on_is_seen_and_not_disturbed(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process trains and holds the folder's lock; another asks, twice."""
    run, said, log = tmp_path / "run", [], MetricsFile.log_metrics

    def asking(file: MetricsFile, row: dict[str, Any], step: int) -> None:
        log(file, row, step)
        if step in (7, 13) and "train_loss" in row:
            words = [sys.executable, "-m", "llm", "status", str(run), "--json"]
            said.extend(json.loads(subprocess.run(words, capture_output=True, check=True).stdout))

    monkeypatch.setattr(MetricsFile, "log_metrics", asking)
    assert fit(tiny_config()) == 0
    assert [(status["state"], status["process"]) for status in said] == [("running", os.getpid())] * 2
    assert [status["step"] for status in said] == [7, 13]
    assert all(status["seconds_left"] is not None for status in said)
    assert [each["step"] for each in said[1]["checkpoints"] if each["state"] == "complete"] == [5, 10]


def test_the_predicted_end(tmp_path: Path, shown: Callable) -> None:
    """Steps 100, 200, ... take 50 s each, validations 30 s more; the last row is 20 s old."""
    rows, seconds = "", 0.0
    for step in range(100, 1001, 100):
        seconds += 50
        rows += f"{step},{step * 64},2.5,{1000 + step},,{seconds}\r\n"
        if step % 200 == 0:
            seconds += 30
            rows += f"{step},{step * 64},,,2.75,{seconds}\r\n"
    config = "trainer: {max_steps: 2000}\ndata: {validate_every: 200}\nrun: {checkpoint_every: 100}\n"
    run = made(tmp_path / "run", rows, config=config)
    os.utime(run / "metrics.csv", (time.time() - 20,) * 2)
    with held(run) as process:
        text, status = shown(run)
        with (run / ".lock").open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is still the other's
        assert (status["state"], status["process"]) == ("running", process)
        assert status["written_seconds_ago"] == pytest.approx(20, abs=3)
        # From the row of step 400 on, the last three turns of 200: 600 steps, 12 rows of 50 s less, 4 validations.
        assert status["steps_per_second"] == pytest.approx(600 / (6 * 50 + 4 * 30), rel=0.01)
        left = 1000 / status["steps_per_second"] - 20
        assert status["seconds_left"] == pytest.approx(left, abs=3)
        ends = datetime.fromisoformat(status["ends_at"]).timestamp()
        assert ends == pytest.approx(time.time() + left, abs=63)
        assert "1,000 of 2,000, 50%" in text
        assert "train 2.5000 at step 1,000, validation 2.7500 at step 1,000" in text
        assert "may hang" not in text
        os.utime(run / "metrics.csv", (time.time() - 3600,) * 2)
        text, status = shown(run)
        assert "no row for 1 h 0 min, and 50 s was the longest so far: it may hang" in text
        assert status["ends_at"] is None
    text, status = shown(run)
    assert (status["state"], status["process"], status["ends_at"]) == ("stopped", None, None)
    assert "hang" not in text


def test_what_is_half_written_is_left_out_or_named(tmp_path: Path, shown: Callable) -> None:
    run = made(tmp_path / "run", "100,6400,2.5,900,,10\r\n200,12800,nan,900,,20\r\n30", config="trainer: {max_st")
    events = [
        {
            "time": "2026-03-05T12:00:00+00:00",
            "step": 110,
            "event": "skipped step",
            "loss": "nan",
            "batch": {"seed": 3},
        },
        {"time": "2026-03-05T12:00:01+00:00", "step": 120, "event": "loss spike", "loss": 9.25, "median": 2.5},
        {
            "time": "2026-03-05T12:09:00+00:00",
            "step": 110,
            "event": "skipped step",
            "loss": "nan",
            "batch": {"seed": 3},
        },
        {"time": "2026-03-05T12:10:00+00:00", "step": 200, "event": "stopped", "signal": "SIGTERM"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"time": "2026')
    folder = run / "checkpoints"
    checkpoint(folder / "step-00000050")
    checkpoint(folder / "step-00000100", model=5)
    (folder / "step-00000100" / "model.safetensors").write_bytes(b"xx")
    checkpoint(folder / "step-00000150", model=5)
    (folder / "step-00000150" / "state.json").unlink()
    (folder / "step-00000200").mkdir()
    (folder / "step-00000250.partial").mkdir()
    checkpoint(folder / "superseded-step-00000300")
    (folder / "notes.txt").write_text("mine")
    text, status = shown(run)
    assert (status["step"], status["train_loss"], status["max_steps"]) == (200, "nan", None)
    assert [(each["name"], each["state"], each["problems"]) for each in status["checkpoints"]] == [
        ("step-00000050", "complete", []),
        ("step-00000100", "torn", ["model.safetensors has 2 of 5 bytes"]),
        ("step-00000150", "torn", ["state.json is missing"]),
        ("step-00000200", "torn", ["it has no manifest.json"]),
        ("step-00000250.partial", "left by a kill", []),
        ("superseded-step-00000300", "superseded", []),
    ]
    assert status["events"] == {"skipped step": 1, "loss spike": 1, "stopped": 1}  # step 110 was made twice
    assert status["last_events"] == events[1:]
    for part in ("config.yaml cannot be read", "1 line(s)", "loss 9.25, median 2.5", "signal SIGTERM", "train nan"):
        assert part in text
    assert f"llm batch {run} --step 110" in text
    with held(run):
        assert shown(run)[1]["checkpoints"][4]["state"] == "being written"


def test_young_and_old_runs(tmp_path: Path, shown: Callable) -> None:
    young = made(
        tmp_path / "young", record={"device": "A", "devices": 8, "attempts": [{"from_step": 0, "device": "A"}]}
    )
    (young / "events.jsonl").write_text("")
    text, status = shown(young)
    assert (status["state"], status["step"], status["tokens"], status["checkpoints"]) == ("stopped", 0, None, [])
    assert "no row in this attempt yet, which started" in text
    assert "from step 0 on 8 x A" in text
    assert shown(made(young, ""))[1]["train_loss"] is None  # a header alone
    (young / "metrics.csv").write_text("ste")
    assert shown(young)[1]["step"] == 0
    old = made(tmp_path / "old", "10,640,2.5,100,,9\r\n", record={"name": "old"}, config="trainer:\n")
    (old / "metrics.csv").write_text("step,train_loss\n10,2.5\n20,\n")
    text, status = shown(old)
    assert (status["step"], status["train_loss"], status["seconds"], status["skipped_steps"]) == (20, 2.5, None, None)
    assert "an unknown device" in text


def test_attempts_of_a_run(tmp_path: Path, shown: Callable) -> None:
    """The speed is that of the last attempt, and its first row is still to come."""
    devices = {0: "CPU", 40: "CPU", 20: "GPU"}
    attempts = [{"from_step": step, "device": device} for step, device in devices.items()]
    rows = "".join(f"{step},{step},2,10,,{step}\r\n" for step in (10, 20))
    run = made(tmp_path / "run", rows, {"attempts": attempts})
    text, status = shown(run)
    assert (status["step"], status["steps_per_second"]) == (20, 1)
    assert "3: from steps 0, 40 on CPU; from step 20 on GPU" in text
    assert "no row in this attempt yet" in text
    (run / "metrics.csv").write_text(f"{HEADER}\r\n{rows}30,30,2,40,,22.5\r\n", newline="")
    assert shown(run)[1]["steps_per_second"] == 4


def test_other_folders_are_named_after_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = made(tmp_path / "run", "10,640,2.5,100,,9\r\n")
    (tmp_path / "store").mkdir()
    torn = made(tmp_path / "torn")
    (torn / "run.json").write_text("{")
    assert main(["status", str(tmp_path / "store"), str(run), str(torn)]) == 2
    told = capsys.readouterr()
    assert told.out.startswith(f"{run}: stopped\n")
    assert told.err.startswith(f"error: {tmp_path / 'store'} is not a run folder")
    assert "torn/run.json cannot be read" in told.err and told.err.count("\n") == 1


def test_names_and_events_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = made(tmp_path / "a\x1b[2Jb", "4,8,2.5,1,,1\r\n", {"name": "x", "attempts": [{"device": "\x1b]0;own\x07"}]})
    event = {"step": 4, "event": "loss \x1b[31mspike", "why": "\r\u202ehidden\x1b[1A"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.isprintable() or not [mark for mark in said if mark in "\x1b\x07\r\u202e"]
    assert "\\x1b[2J" in said and "loss \\x1b[31mspike" in said
    assert main(["status", str(tmp_path / "no\x1b[2Jrun")]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("record", [{}, [], {"attempts": 3}, {"attempts": [3]}, {"attempts": []}])
def test_a_record_without_attempts_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture, record: Any) -> None:
    run = made(tmp_path / "run", "4,8,2.5,1,,1\r\n", record)
    assert main(["status", str(run)]) == 0
    assert "from step 0 on an unknown device" in capsys.readouterr().out
