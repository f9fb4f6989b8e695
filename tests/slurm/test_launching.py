"""Where jobs start and how they fail, on the test cluster: variables of other jobs, interactive allocations, missing
GPUs, stopped ranks; and the first minutes on GPUs, without GPUs.

Run by `make test-slurm`; see `cluster.py`.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .cluster import environment
from .jobs import (
    LLAMA,
    MODEL,
    SMALL,
    column,
    end,
    facts,
    log,
    overrides,
    queued_again,
    rank_of,
    rows,
    start_now,
    submit,
    wait,
    with_one_core,
)

pytestmark = pytest.mark.slurm

PARTS = "one-gpu resume ddp rows-8 one-node signal signal-first nodes-fsdp2 stage-1 stage-2".split()
PARTS += "nodes-ddp stop requeue".split()


def test_variables_of_another_job_do_no_harm(project: Path, tmp_path: Path, story_store: Path) -> None:
    """Submitted from inside a task of an array, with sbatch and without, where another launcher left its address."""
    short = overrides(MODEL, LLAMA, {"strategy.name": "ddp", "trainer.max_steps": 12})
    commands = [
        f"RUN={tmp_path}/sbatch sbatch {shlex.join([*SMALL, 'slurm/1b_nmda.sh', *short])}",
        f"RUN={tmp_path}/bash GPUS=1 bash {with_one_core(project, '1b_nmda.sh')} {shlex.join(short)}",
    ]
    script = tmp_path / "outer.sh"
    script.write_text("\n".join(["#!/usr/bin/env bash", "set -e", *commands]))
    others = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "9", "RANK": "3", "WORLD_SIZE": "64", "LOCAL_RANK": "3"}
    given = {"STORE": str(story_store), **others}
    outer = submit(project, "--array=7", "--output=/dev/null", "--nodes=1", str(script), **given)
    assert end(f"{outer}_7")["JobState"] == "COMPLETED"
    for name in ("sbatch", "bash"):
        wait(lambda name=name: (tmp_path / name / "summary.json").exists())
        (attempt,) = json.loads((tmp_path / name / "run.json").read_text())["attempts"]
        assert attempt["devices"] == 2
        job = attempt["slurm_job"]
        assert f"job {job}, attempt 0: 2 nodes x 1 ranks" in log(project, f"1b-nmda-{job}")


def test_an_interactive_allocation_trains_one_run_on_all_its_ranks(
    project: Path, tmp_path: Path, story_store: Path
) -> None:
    """`salloc`, which calls the job by its command, bash, and leaves the number of tasks to a node to be found."""
    short = overrides(MODEL, LLAMA, {"strategy.name": "ddp", "trainer.max_steps": 12})
    given = {"RUN": str(tmp_path / "run"), "STORE": str(story_store), "PYTHON": sys.executable}
    done = subprocess.run(
        ["salloc", "--nodes=2", "--ntasks=2", "--mem=1G", "bash", "slurm/1b_nmda.sh", *short],
        cwd=project,
        env=environment() | given,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running in the interactive allocation" in done.stdout
    assert "2 nodes x 1 ranks, logs in slurm/logs/fit-" in done.stdout
    (attempt,) = json.loads((tmp_path / "run" / "run.json").read_text())["attempts"]
    assert attempt["devices"] == 2
    assert column(tmp_path / "run", "step") == [str(step) for step in range(1, 13)]


# Rank 0 is told to do without a GPU, and then waits for rank 1.
ONE_HAS_ONE = """#!/usr/bin/env bash
[[ $1 == slurm/rank.py && $SLURM_PROCID == 0 ]] && set -- "$@" --trainer.accelerator cpu
exec {python} "$@"
"""


@pytest.mark.parametrize("missing", ["all", "one"])
def test_ranks_without_a_gpu_end_the_job_and_say_so(
    missing: str, project: Path, tmp_path: Path, story_store: Path
) -> None:
    """The cluster claims to have GPUs, and has none."""
    python = tmp_path / "python"
    python.write_text(ONE_HAS_ONE.format(python=sys.executable))
    python.chmod(0o755)
    model = {key: value for key, value in MODEL.items() if key != "trainer.accelerator"}
    words = ["--gpus-per-node=1", "slurm/1b_nmda.sh", *overrides(model, LLAMA, {"strategy.name": "ddp"})]
    given = {"RUN": str(tmp_path / "run"), "STORE": str(story_store)}
    job = submit(project, *SMALL, *words, **given, PYTHON=sys.executable if missing == "all" else str(python))
    ended = end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    told = log(project, f"1b-nmda-{job}")
    assert "sees 0 of the 1 GPUs that trainer.devices needs" in told
    assert ("(and 1 more ranks): error: rank 0 on" if missing == "all" else "rank 1 on n2: error: rank 1 on") in told
    assert "not queued again: fix the error" in told
    assert not (tmp_path / "run").exists()


def test_a_stopped_rank_is_named_and_the_job_goes_on(project: Path, tmp_path: Path, story_store: Path) -> None:
    """Under gloo, twice: it is queued again after the first time, with a new checkpoint, and not after the second."""
    run_folder = tmp_path / "run"
    endless = {"trainer.max_steps": 100_000, "run.checkpoint_every": 200, "strategy.name": "ddp"}
    words = [*SMALL, "slurm/1b_nmda.sh", *overrides(MODEL, LLAMA, endless)]
    job = submit(project, *words, RUN=str(run_folder), STORE=str(story_store), TIMEOUT="5")
    wait(lambda: len(rows(run_folder)) > 210)
    os.kill(rank_of(job, 1), signal.SIGSTOP)
    wait(lambda: queued_again(job))
    printed = log(project, f"1b-nmda-{job}")
    assert "failed: rank 0 on n1: error: rank 0 lost contact to the other ranks at step" in printed, printed
    assert "failed: the others waited for rank 1 on n2: hung or killed" in printed
    wait(lambda: f"failed after a checkpoint; job {job} is queued again" in log(project, f"1b-nmda-{job}"))
    lines = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line["event"] == "attempt failed"]
    assert "waited for rank 1 on n2: hung" in event["why"] and event["checkpoint"] >= 200

    start_now(job)
    wait(lambda: len(json.loads((run_folder / "run.json").read_text())["attempts"]) == 2)
    wait(lambda: rank_of(job, 0) > 0)
    os.kill(rank_of(job, 0), signal.SIGKILL)
    ended = end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1")
    assert "failed: srun: n1: task 0: Killed" in log(project, f"1b-nmda-{job}")
    assert "not queued again: this attempt wrote no checkpoint" in log(project, f"1b-nmda-{job}")


@pytest.mark.skipif("FIRST_MINUTES" not in os.environ, reason="a quarter of an hour; FIRST_MINUTES=1 runs it")
def test_the_first_minutes_run_from_beginning_to_end(project: Path, tmp_path: Path, story_store: Path) -> None:
    """All parts on one rank, one node of two and two nodes, without GPUs; the last job queues itself again."""
    out, config = tmp_path / "out", tmp_path / "tiny.yaml"
    tree: dict[str, dict[str, object]] = {}
    for key, value in {**MODEL, **LLAMA, "strategy.name": "fsdp2", "strategy.stage": 1}.items():
        part, _, name = key.partition(".")
        tree.setdefault(part, {})[name] = yaml.safe_load(str(value)) if isinstance(value, str) else value
    tree["model"] = {"schedule": {"warmup_steps": 5, "cooldown_steps": 5}}
    config.write_text(yaml.safe_dump(tree))
    given = {"OUT": str(out), "CONFIG": str(config), "STORE": str(story_store), "GPUS": "2", "MINUTES": "20"}
    done = subprocess.run(
        ["bash", with_one_core(project, "first_minutes.sh"), "--trainer.accelerator", "cpu"],
        cwd=project,
        env=environment() | {"PYTHON": sys.executable} | given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"job (\d+)", done.stdout)
    assert len(jobs) == 3
    wait(
        lambda: queued_again(jobs[-1]) or facts(jobs[-1])["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 3000
    )
    start_now(jobs[-1])
    ended = end(jobs[-1])  # Slurm forgets the others after five minutes
    told = log(project, f"first-minutes-{jobs[-1]}")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), told
    results = [json.loads(path.read_text()) for path in (out / "results").glob("*.json")]
    assert {result["part"]: result["failed_checks"] for result in results} == {part: [] for part in PARTS}
    assert told.count("| passed |") == len(PARTS)
    assert all(result["after"] is not None for result in results if result["part"] in ("signal", "stop", "requeue"))
