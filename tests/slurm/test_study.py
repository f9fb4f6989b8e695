"""Studies on a real cluster of two nodes: arrays, requeues, kills, and the verdict that comes out."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.__main__ import main as evals
from llm.cli import main
from llm.runs.study_record import StudyRecord, read_record
from llm.study.description import configured

from .cluster import environment, run
from .jobs import MODEL, STEPS, column, end, facts, log, queued_again, rank_of, rows, start_now, wait

pytestmark = pytest.mark.slurm

PATIENCE = 1800.0  # seconds, for a dozen tasks at once on two cores
ONE_CORE = {"gpus": 0, "cpus": 1, "time": "1:00:00"}


def write_study(project: Path, tmp_path: Path, store: Path, name: str = "study", **changes: Any) -> Path:
    """Write the YAML of a study of runs of a few seconds; `changes` replace its keys."""
    settings = {**MODEL, "run.loggers": ["csv"], "data.store": str(store), "data.validate_every": 1000}
    del settings["decoder.unpadded_vocab_size"]  # null, as text
    nested = configured(yaml.safe_load((project / "configs" / "1b_classic.yaml").read_text()), settings)
    nested["decoder"] |= {"num_key_value_heads": 2, "unpadded_vocab_size": None}
    nested["strategy"], nested["model"]["compile"], nested["data"]["micro_batch_size"] = {}, False, None
    nested["model"]["schedule"] = {"warmup_steps": 5}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(nested))
    content = {
        "base": str(tmp_path / "base.yaml"),
        "folder": str(tmp_path / name),
        "baseline": "classic",
        "arms": {"classic": {}, "values": {"decoder.stream": ["values"]}},
        "null_arm": False,
        "sizes": {"small": {}, "large": {"decoder.hidden_size": 40}},
        "tokens": {"absolute": [512 * 30, 512 * STEPS], "cooldown": 0.2, "max_epochs": 2},
        "slurm": {"small": ONE_CORE, "large": ONE_CORE | {"nodes": 2}},
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def submit_study(project: Path, study: Path) -> list[str]:
    """Submit all arrays of a study and its verdict; return their jobs."""
    variables = environment() | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    command = ["bash", "slurm/study.sh", str(study)]
    done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.findall(r"job (\d+)", done.stdout)


@pytest.fixture
def four_at_once(cluster: None) -> Iterator[None]:
    """Two tasks on each node, not as many as it claims cores: each needs a core and half a gigabyte of this machine."""
    run("scontrol", "update", "PartitionName=main", "MaxCPUsPerNode=2")
    yield
    run("scontrol", "update", "PartitionName=main", "MaxCPUsPerNode=UNLIMITED")


def states(record: StudyRecord) -> list[str]:
    return [record.state(each).state for each in record.runs]


def test_a_study_is_an_array_for_each_size_and_then_a_verdict(project: Path, tmp_path: Path, story_store: Path) -> None:
    """A task that is signalled is queued again, trains its branch, and has the losses of the run alone."""
    study = write_study(project, tmp_path, story_store)
    small, large, verdict = submit_study(project, study)

    trunk = tmp_path / "study" / "small" / f"classic-seed1-{512 * STEPS / 1000:g}K"
    wait(lambda: len(rows(trunk)) > 20)
    run("scancel", "--signal=USR1", f"{small}_1")
    wait(lambda: queued_again(f"{small}_1"))
    assert facts(verdict)["JobState"] == "PENDING"
    start_now(f"{small}_1")
    for task in (f"{small}_1", f"{small}_2", f"{large}_1", f"{large}_2"):
        size = "small" if task.startswith(small) else "large"
        assert end(task)["JobState"] == "COMPLETED", log(project, f"study-{size}-{task}")
    assert facts(f"{large}_1")["NumNodes"] == "2"
    assert facts(verdict)["NumCPUs"] == "1"
    wait(lambda: facts(verdict)["JobState"] != "PENDING")
    record = read_record(study)
    assert states(record) == ["done"] * 8
    alone = ["fit", "--config", str(tmp_path / "study" / "configs" / "small" / f"{trunk.name}.yaml")]
    assert main([*alone, "--run.folder", str(tmp_path / "alone")]) == 0
    assert column(trunk, "train_loss") == column(tmp_path / "alone", "train_loss")


@pytest.mark.skipif("STUDY_CLUSTER" not in os.environ, reason="over ten minutes on two cores; STUDY_CLUSTER=1 runs it")
def test_24_runs_with_kills_and_requeues_have_the_verdict_of_undisturbed_ones(
    four_at_once: None, project: Path, tmp_path: Path, story_store: Path, capsys: pytest.CaptureFixture
) -> None:
    """A signal and a requeue of Slurm's on two tasks, a rank killed in a third; the same command then trains the rest.

    The undisturbed study is trained by `fit` in this process, which spares 24 starts of Python.
    """
    plan: dict[str, Any] = {
        "seeds": 2,
        "sizes": {f"w{width}": {"decoder.hidden_size": width} for width in (24, 32, 40)},
        "slurm": {f"w{width}": ONE_CORE for width in (24, 32, 40)},
    }
    study = write_study(project, tmp_path, story_store, "disturbed", **plan)
    jobs = submit_study(project, study)
    record = read_when_there(tmp_path / "disturbed")
    assert len(record.runs) == 24
    trunks = [each.name for each in record.runs if each.trunk is None]  # a task each, 4 of each size
    tasks = [f"{jobs[number // 4]}_{number % 4 + 1}" for number in range(len(trunks))]
    folders = [tmp_path / "disturbed" / name for name in trunks]

    for number, command in ((0, ("scancel", "--signal=USR1")), (5, ("scontrol", "requeue"))):
        wait(lambda folder=folders[number]: len(rows(folder)) > 20, PATIENCE)  # type: ignore[misc]
        run(*command, tasks[number])
        wait(lambda task=tasks[number]: queued_again(task), PATIENCE)  # type: ignore[misc]
        start_now(tasks[number])
    wait(lambda: len(rows(folders[10])) > 20, PATIENCE)
    rank = rank_of(facts(tasks[10])["JobId"], 0)
    assert rank > 0
    os.kill(rank, signal.SIGKILL)
    assert end(tasks[10], PATIENCE)["JobState"] == "FAILED"
    end(jobs[-1], PATIENCE)  # the verdict on what was there, once all tasks have ended: Slurm forgets them in minutes
    assert len(json.loads((folders[0] / "run.json").read_text())["attempts"]) == 2
    assert 1 <= states(record).count("done") < 24

    again = submit_study(project, study)
    wait(lambda: states(record) == ["done"] * 24, PATIENCE)
    assert end(again[-1], PATIENCE)["JobState"] == "COMPLETED"
    undisturbed = write_study(project, tmp_path, story_store, "undisturbed", **plan)
    for size in plan["sizes"]:
        for task in range(1, 5):
            capsys.readouterr()
            words = ["--stage", "main", "--size", size, "--task", f"{task}/4"]
            assert main(["study", "tasks", str(undisturbed), *words]) == 0
            for config in capsys.readouterr().out.split():
                assert main(["fit", "--config", config]) == 0
    assert states(read_record(undisturbed)) == ["done"] * 24
    assert verdict_of(study, tmp_path) == verdict_of(undisturbed, tmp_path)


def read_when_there(folder: Path) -> StudyRecord:
    wait(lambda: (folder / "study.json").is_file(), PATIENCE)
    return read_record(folder)


def verdict_of(study: Path, tmp_path: Path) -> dict[str, Any]:
    """All numbers and sentences of a verdict; without the command that made it, and when the study began."""
    out = tmp_path / f"{study.stem}-verdict"
    assert evals(["study", str(study), "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found.pop("made_by") and found.pop("registered") and len(found["runs"]) == 24
    return found
