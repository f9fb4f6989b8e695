"""The sbatch scripts on a real cluster of two nodes: real sbatch, slurmctld and slurmd, training on CPUs over gloo.

Run by `make test-slurm`; see `cluster.py`.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import environment, run
from .jobs import (
    LLAMA,
    MODEL,
    SMALL,
    STEPS,
    column,
    end,
    log,
    overrides,
    queued_again,
    rows,
    start_now,
    submit,
    wait,
)
from .project import make_project

pytestmark = pytest.mark.slurm

SCRIPTS = sorted({path.name for path in Path(__file__).parents[2].glob("slurm/*.sh")} - {"launch.sh"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_accepted_as_they_stand(script: str, project: Path) -> None:
    done = subprocess.run(
        ["sbatch", "--test-only", f"slurm/{script}"],
        cwd=project,
        env=environment() | {"RUN": "a-run"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_a_signalled_job_is_queued_again_and_ends_as_one_that_never_was(
    project: Path, tmp_path: Path, story_store: Path
) -> None:
    sharded = {"strategy.name": "deepspeed", "strategy.stage": 2}
    words = [*SMALL, "slurm/1b_resvalue.sh", *overrides(MODEL, LLAMA, sharded)]
    given = {"STORE": str(story_store)}
    broken, whole = (submit(project, *words, RUN=str(tmp_path / name), **given) for name in ("broken", "whole"))
    wait(lambda: len(rows(tmp_path / "broken")) > 20)
    run("scancel", "--signal=USR1", broken)
    wait(lambda: queued_again(broken))
    stopped_at = len(rows(tmp_path / "broken"))
    assert 20 < stopped_at < STEPS
    start_now(broken)

    for job, restarts in ((broken, "1"), (whole, "0")):
        ended = end(job)
        told = log(project, f"1b-resvalue-{job}") + log(project, f"1b-resvalue-{job}-rank0")
        assert (ended["JobState"], ended["Restarts"], ended["NumNodes"]) == ("COMPLETED", restarts, "2"), told
        assert log(project, f"1b-resvalue-{job}").count("queued again") == int(restarts)
    assert column(tmp_path / "broken", "step") == [str(step) for step in range(1, STEPS + 1)]
    for name in ("step", "train_loss", "gradient_norm", "data_digest"):
        assert column(tmp_path / "broken", name) == column(tmp_path / "whole", name)
    attempts = json.loads((tmp_path / "broken" / "run.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, stopped_at]
    ranks = [log(project, f"1b-resvalue-{broken}-rank{rank}") for rank in (0, 1)]
    assert "starting at step 0" in ranks[0] and "continuing from" in ranks[0]  # both attempts in one file
    assert not list((project / "slurm" / "logs").glob("*-stopped"))


@pytest.fixture(scope="session")
def pair(project: Path, story_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs, trained as tasks 1 and 2 of an array."""
    runs = tmp_path_factory.mktemp("pair")
    words = ["--array=1,2", *SMALL, "slurm/tinystories_8m.sh", *overrides(MODEL, {"trainer.max_steps": 20})]
    array = submit(project, *words, RUNS=str(runs), STORE=str(story_store))
    for task in (f"{array}_1", f"{array}_2"):
        assert end(task)["JobState"] == "COMPLETED", log(project, f"tinystories-8m-{task}-rank0")
    return runs


def test_two_tasks_of_an_array_train_a_pair_on_the_same_batches(pair: Path) -> None:
    classic, values = pair / "classic-seed1", pair / "values-seed1"
    assert column(classic, "step") == [str(step) for step in range(1, 21)]
    assert column(classic, "data_digest") == column(values, "data_digest")
    assert len(set(column(classic, "data_digest"))) == 20
    assert all(a != b for a, b in zip(column(classic, "train_loss"), column(values, "train_loss"), strict=True))


def test_the_tasks_of_an_array_share_a_sweep_of_the_grid_experiments(project: Path, tmp_path: Path) -> None:
    tiny = "--preset small --space 3x3 --trials 1 --steps 16 --batch 4 --walkers 4 --width 16 --neurons 8 --device cpu"
    words = ["--array=1,2", *SMALL, "slurm/grid_sweep.sh", *tiny.split(), "--seeds", "1", "--alpha", "0", "1", "10"]
    array = submit(project, *words, RUNS=str(tmp_path), TASKS="2")
    for task in (f"{array}_1", f"{array}_2"):
        assert end(task)["JobState"] == "COMPLETED", log(project, f"grid-sweep-{task}")
    trained = {path.parent.name for path in tmp_path.glob("*/checkpoint.safetensors")}
    assert trained == {f"act=nmda:{alpha},maps=16,seed=0" for alpha in (0, 1, 10)}
    assert "2 of 3 runs" in log(project, f"grid-sweep-{array}_1")


def test_a_run_is_exported_and_evaluated(project: Path, pair: Path) -> None:
    given = {"RUN": str(pair / "values-seed1"), "TASKS": "stories", "SHOTS": "0 1"}
    job = submit(project, *SMALL, "slurm/evaluate.sh", "--limit", "5", **given)
    assert end(job)["JobState"] == "COMPLETED", log(project, f"evaluate-{job}")
    exports = pair / "values-seed1" / "exports"
    assert (exports / "step-00000020" / "evals" / "lm_eval.json").is_file() and (exports / "accuracy.png").is_file()


def test_a_job_that_its_user_cancels_is_saved_and_not_queued_again(
    project: Path, tmp_path: Path, story_store: Path
) -> None:
    words = [*SMALL, "slurm/1b_nmda.sh", *overrides(MODEL, LLAMA, {"trainer.max_steps": 100000})]
    job = submit(project, *words, RUN=str(tmp_path / "run"), STORE=str(story_store), TIMEOUT="100")
    wait(lambda: len(rows(tmp_path / "run")) > 5)
    run("scancel", job)
    ended = end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    wait(lambda: "stopped and saved" in log(project, f"1b-nmda-{job}"))
    assert "queued again" not in log(project, f"1b-nmda-{job}")
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


STOPPABLE = """
import signal, sys, time

def stop(*_):
    sys.exit(75)

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(600)
"""
FAILING = """
import os, sys, time

sys.exit(3) if os.environ["SLURM_PROCID"] == "1" else time.sleep(600)
"""


@pytest.fixture
def stoppable(cluster: None, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A running job on both nodes, whose ranks end with 75 when they are told to stop; and its log."""
    project = make_project(tmp_path / "project", llm=STOPPABLE)
    job = submit(project, "--exclusive", *SMALL, "slurm/1b_classic.sh")
    wait(lambda: all("ready" in log(project, f"1b-classic-{job}-rank{rank}") for rank in (0, 1)))
    yield job, project / "slurm" / "logs" / f"1b-classic-{job}.log"
    run("scancel", job)


def test_a_pre_empted_job_is_queued_again(project: Path, stoppable: tuple[str, Path]) -> None:
    job, path = stoppable
    urgent = submit(project, "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=true")
    wait(lambda: queued_again(job))
    wait(lambda: f"job {job} is queued again" in path.read_text())
    assert end(urgent)["JobState"] == "COMPLETED"


def test_slurm_queues_a_job_again_after_the_loss_of_a_node(stoppable: tuple[str, Path]) -> None:
    job, path = stoppable
    run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    wait(lambda: queued_again(job))
    run("scontrol", "update", "NodeName=n2", "State=IDLE")
    assert "Node failure on n2" in path.read_text()
    assert "is queued again" not in path.read_text()


def test_a_job_that_may_not_be_queued_again_says_how_to_go_on(cluster: None, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", llm=STOPPABLE)
    job = submit(project, "--no-requeue", *SMALL, "slurm/1b_classic.sh", "--run.keep_checkpoints", "3")
    wait(lambda: all("ready" in log(project, f"1b-classic-{job}-rank{rank}") for rank in (0, 1)))
    run("scancel", "--signal=USR1", job)
    ended = end(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")
    command = f"resume with sbatch {project}/slurm/1b_classic.sh --run.keep_checkpoints 3\n"
    assert command in log(project, f"1b-classic-{job}")


def test_a_rank_that_fails_ends_the_job(cluster: None, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", llm=FAILING)
    job = submit(project, *SMALL, "slurm/1b_classic.sh")
    ended = end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "task 1: Exited with exit code 3" in log(project, f"1b-classic-{job}")
