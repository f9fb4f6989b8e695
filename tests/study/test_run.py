"""`llm study run`: killed, repeated, shared between processes, and with runs that diverge or fail."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.verdict.study import judge_study
from llm.cli import main
from llm.runs import reading
from llm.runs.study_record import read_record

from ..train.preloaded import Python
from ..train.runs import assert_same_weights, measured
from .conftest import Study

DIVERGING: dict[str, Any] = {  # its weights are beyond float32 after a few steps
    "arms": {"classic": {}, "hot": {"model.optimizer.lr": 1e38}},
    "allow_difference": ["model.optimizer.lr"],
    "sizes": {"small": {}},
}
# A process that has everything imported needs no server to fork from.
RUN = """
import sys
from llm.cli import main
from llm.study import run
run.START = "fork"
sys.exit(main(["study", "run", *sys.argv[1:]]))
"""


def run(study: Path, *words: str) -> int:
    return main(["study", "run", str(study), *words])


def wait_for(condition: Any, process: Python) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_twice_it_ends_as_one_left_alone(
    tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Every loss and weight to the last bit; one arm diverges, which is a result; the null arm has the same data."""
    whole, broken = tiny_study("whole", **DIVERGING), tiny_study("broken", **DIVERGING)
    assert run(whole, "--jobs", "2") == 0
    told = capsys.readouterr().err
    assert "[6/6]" in told and "small/hot-seed1-5.12K: diverged: loss nan" in told

    folder = tmp_path / "broken" / "small"
    first = Python(RUN, [str(broken)])
    wait_for(lambda: len(reading.metrics(folder / "classic-seed1-5.12K")) > 5, first)
    first.kill()  # -9: its run saves and ends by itself
    first.wait()
    second = Python(RUN, [str(broken), "--jobs", "2"])
    wait_for(lambda: len(reading.metrics(folder / "null-seed1-5.12K")) > 5, second)
    started = [path for path in folder.glob("*") if reading.lock(path).held]
    for path in started:  # the processes of the runs
        if process := reading.lock(path).process:
            os.kill(process, signal.SIGKILL)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) in (2, 75)
    assert run(broken, "--jobs", "2") == 0

    record = read_record(broken)
    assert len(record.runs) == 6
    for each in record.runs:
        state = record.state(each)
        assert state == read_record(whole).state(each)
        if each.arm == "hot":
            assert state.state == "diverged" and state.over
            continue
        assert state.state == "done"
        assert measured(tmp_path / "broken" / each.name) == measured(tmp_path / "whole" / each.name)
        assert_same_weights(tmp_path / "broken" / each.name, tmp_path / "whole" / each.name, each.steps)
    branch = next(each for each in record.runs if each.name == "small/classic-seed1-2.56K")
    assert (branch.trunk, branch.start, branch.steps) == ("small/classic-seed1-5.12K", 7, 10)
    attempts = [
        json.loads((folder / f"{arm}-seed1-2.56K" / "run.json").read_text())["attempts"] for arm in ("classic", "null")
    ]
    assert [attempt[0]["from_step"] for attempt in attempts] == [7, 7]
    classic, null = (measured(folder / f"{arm}-seed1-5.12K") for arm in ("classic", "null"))
    assert [row["data_digest"] for row in classic] == [row["data_digest"] for row in null]
    assert classic[0]["train_loss"] != null[0]["train_loss"]

    modified = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run(broken) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == modified
    capsys.readouterr()
    assert main(["study", "status", str(broken)]) == 0
    table = capsys.readouterr().out
    assert "small/hot-seed1-2.56K: diverged at step" in table and "with small/hot-seed1-5.12K" in table
    assert main(["study", "status", str(tmp_path / "broken"), "--json"]) == 0
    states = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in states].count("done") == 4
    verdicts = [judge_study(study).sentences for study in (whole, broken)]
    assert verdicts[0] == verdicts[1] and "small has 0 finished pairs of hot and classic" in verdicts[0]["hot"]


def test_two_commands_share_the_runs(tiny_study: Study, tmp_path: Path) -> None:
    study = tiny_study(sizes={"small": {}}, null_arm=False)
    other = Python(RUN, [str(study)])
    assert run(study) == 0
    assert other.wait(120) == 0
    record = read_record(study)
    assert [record.state(each).state for each in record.runs] == ["done"] * 4
    for each in record.runs:  # one attempt each: none was trained twice
        assert len(json.loads((tmp_path / "study" / each.name / "run.json").read_text())["attempts"]) == 1


def test_a_run_that_fails_is_told_and_tried_again(
    tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = tiny_study(sizes={"small": {}}, null_arm=False)
    stranger = tmp_path / "study" / "small" / "classic-seed1-5.12K" / "thesis.txt"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("mine")
    assert run(study) == 2
    message = capsys.readouterr().err
    assert "1 of 4 runs failed, 1 more wait for them: small/classic-seed1-5.12K (" in message
    assert "holds no run" in message
    record = read_record(study)
    states = {each.name: record.state(each) for each in record.runs}
    assert states["small/classic-seed1-5.12K"].state == "failed"
    assert "holds no run" in states["small/classic-seed1-5.12K"].reason
    assert states["small/values-seed1-2.56K"].state == "done"
    stranger.unlink()
    assert run(study) == 0


def test_a_study_that_is_changed_says_so(tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What adds runs is noted; what would make others of those that have started is refused."""
    settings: dict[str, Any] = {"sizes": {"small": {}}, "null_arm": False, "tokens": {"absolute": 512}}
    study = tiny_study(**settings)
    assert run(study) == 0
    text = study.read_text()
    tiny_study(**settings | {"seeds": 2})
    assert run(study) == 0
    record = read_record(study)
    assert record.changes == ["seeds was None when the first run started, and is 2 now"]
    assert record.registered["study"] == text
    assert [record.state(each).state for each in record.runs] == ["done"] * 4

    base = yaml.safe_load(study.read_text())["base"]
    config = yaml.safe_load(Path(base).read_text())
    config["model"]["optimizer"]["lr"] = 0.5
    Path(base).write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert run(study) == 2
    message = capsys.readouterr().err
    assert "model.optimizer.lr was 0.003 and is 0.5 in small/classic-seed1-512 and 3 more" in message
    assert "set folder to a new one" in message


def test_a_larger_budget_branches_what_is_there_already(tiny_study: Study, tmp_path: Path) -> None:
    """The run of the largest budget so far is the same, to the bit, as a branch of the new trunk."""
    settings: dict[str, Any] = {
        "sizes": {"small": {}},
        "arms": {"classic": {}, "values": {"decoder.stream": ["values"]}},
    }
    study = tiny_study(**settings, null_arm=False, tokens={"absolute": [2560], "cooldown": 0.3})
    assert run(study) == 0
    before = measured(tmp_path / "study" / "small" / "classic-seed1-2.56K")
    tiny_study(**settings, null_arm=False)
    assert run(study) == 0
    record = read_record(study)
    assert [record.state(each).state for each in record.runs] == ["done"] * 4
    assert measured(tmp_path / "study" / "small" / "classic-seed1-2.56K") == before
    assert (tmp_path / "study" / "small" / "classic-seed1-5.12K" / "checkpoints" / "step-00000007").is_dir()
