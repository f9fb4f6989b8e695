"""The sbatch scripts, run as Slurm runs them: by bash, with the variables of a task."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm.data.store import TokenStore
from llm.runs.reading import NEEDED, events

from .slurm.project import make_project

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", sorted(ROOT.glob("slurm/*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def test_an_array_of_tasks_makes_a_store(tmp_path: Path, story_store: Path) -> None:
    for number, quality in enumerate(("high", "high", "low")):
        folder = tmp_path / "source" / f"quality={quality}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f'{{"warc_record_id": "{number}:{i}", "text": "Mary went to the garden {i} times."}}' for i in range(50)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    given = {
        "PYTHON": sys.executable,
        "SOURCE": str(tmp_path / "source"),
        "STORE": str(tmp_path / "store"),
        "TOKENIZER": str(story_store / "tokenizer"),
        "TOKENS": "400",
        "TASKS": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    for task in ("1", "2"):
        assert not (tmp_path / "store" / "store.json").exists()
        subprocess.run(
            [ROOT / "slurm" / "prepare_nemotron.sh", "--validation-fraction", "0"],
            env={**os.environ, **given, "SLURM_ARRAY_TASK_ID": task},
            cwd=tmp_path,
            check=True,
        )
    store = TokenStore.open(tmp_path / "store")
    assert store.verify() == []
    assert 400 <= store.tokens < 450


# ---- launch.sh: with an srun that starts one rank, a scontrol that notes what it is asked, and a `python -m llm` that
# does as it is told


LLM = """
import os, signal, sys, time

print(*sys.argv[1:])
if os.environ.get("WAITS"):
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(60)
sys.exit(int(os.environ["STATUS"]))
"""
SRUN = """
env > srun-environment
while [[ $1 == --* ]]; do echo "$1" >> srun; shift; done
[[ -z ${SAYS:-} ]] || echo "$SAYS" >&2
exec "$@"
"""
SCONTROL = """
echo "$1 $2" >> scontrol
[[ $1 == requeue ]] && exit ${REFUSED:-0}
[[ -n ${TASK:-} ]] && array=" ArrayJobId=11 ArrayTaskId=$TASK"
restarts="Restarts=${RESTARTS:-0} BatchFlag=1"
echo "JobId=12${array:-} JobState=${STATE:-RUNNING} $restarts Command=/srv/me/slurm/1b_classic.sh --x WorkDir=/srv/me"
"""
SBATCH = 'pwd > sbatch; printf "%s\\n" "$@" >> sbatch; env > sbatch-environment'
JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "name",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "7",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = make_project(tmp_path / "project", llm=LLM)
    (root / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH}.items():
        (root / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (root / "bin" / name).chmod(0o755)
    return root


def variables(project: Path, **given: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return {**ours, "PATH": f"{project / 'bin'}:{ours['PATH']}", "PYTHON": sys.executable, **given}


def in_a_job(
    project: Path, script: str = "1b_classic.sh", *words: str, **given: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [as_slurm_copies(project, script), *words],
        env=variables(project, **{**JOB, "SLURM_SUBMIT_DIR": str(project), **given}),
        cwd=project.parent,
        capture_output=True,
        text=True,
    )


def as_slurm_copies(project: Path, script: str) -> Path:
    """The copy that Slurm runs, from a folder of its own."""
    (project.parent / "spool").mkdir(exist_ok=True)
    return Path(shutil.copy(project / "slurm" / script, project.parent / "spool" / "slurm_script"))


def noted(project: Path, program: str) -> list[str]:
    path = project / program
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(("status", "requeues"), [(75, ["requeue 12"]), (0, []), (1, []), (2, []), (137, [])])
def test_a_job_that_was_stopped_is_queued_again_and_no_other(status: int, requeues: list[str], project: Path) -> None:
    done = in_a_job(project, STATUS=str(status))
    assert done.returncode == status
    assert [line for line in noted(project, "scontrol") if line.startswith("requeue")] == requeues
    assert ("is queued again" in done.stdout) == bool(requeues)
    assert not list((project / "slurm" / "logs").iterdir())  # the mark is gone


def test_a_job_that_slurm_is_ending_is_left_to_slurm(project: Path) -> None:
    done = in_a_job(project, STATUS="75", STATE="COMPLETING")
    assert done.returncode == 75
    assert set(noted(project, "scontrol")) == {"show job"}
    assert "COMPLETING" in done.stdout


def test_a_job_that_may_not_be_queued_again_says_how_to_go_on(project: Path) -> None:
    done = in_a_job(project, STATUS="75", REFUSED="1")
    assert done.returncode == 75
    assert "resume with sbatch /srv/me/slurm/1b_classic.sh --x\n" in done.stdout


def test_a_task_of_an_array_goes_by_its_two_numbers(project: Path) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "4", "TASK": "4"}
    done = in_a_job(project, "tinystories_8m.sh", **task, STATUS="75")
    assert done.returncode == 75
    assert "requeue 11_4" in noted(project, "scontrol")
    assert "--output=slurm/logs/name-11_4-rank%t.log" in noted(project, "srun")
    config = "fit --config configs/tinystories_8m_values.yaml"
    assert config in done.stdout
    assert "--run.folder runs/tinystories_8m/values-seed2 --seed_everything 2" in done.stdout


def test_the_users_overrides_come_last(project: Path) -> None:
    given = {"CONFIG": "mine.yaml", "RUN": "runs/mine", "STORE": "data/mine", "TIMEOUT": "60"}
    done = in_a_job(project, "1b_classic.sh", "--data.store", "data/other", STATUS="0", **given)
    words = [
        *("fit", "--config", "mine.yaml", "--resume", "auto", "--trainer.num_nodes", "2", "--trainer.devices", "8"),
        *("--run.folder", "runs/mine", "--data.store", "data/mine", "--strategy.timeout", "60"),
        *("--data.store", "data/other"),
    ]
    assert " ".join(words) in done.stdout.splitlines()
    later = in_a_job(project, "1b_classic.sh", "--resume", "runs/x", RESTARTS="1", STATUS="0")
    assert "--resume runs/x --resume auto" in later.stdout  # it would go back to where the first attempt began
    options = {"--kill-on-bad-exit=1", "--cpus-per-task=7", "--cpu-bind=cores", "--distribution=block:block"}
    assert options | {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8"} <= set(noted(project, "srun"))


def test_the_batch_shell_outlives_the_signals_of_its_ranks(project: Path) -> None:
    process = subprocess.Popen(
        [as_slurm_copies(project, "1b_classic.sh")],
        env=variables(project, **JOB, SLURM_SUBMIT_DIR=str(project), WAITS="yes"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)  # to the shell alone
    os.kill(process.pid, signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    os.killpg(process.pid, signal.SIGUSR1)  # to the rank too
    assert process.wait(20) == 75
    assert "requeue 12" in noted(project, "scontrol")


def test_outside_a_job_a_script_submits_itself(project: Path, tmp_path: Path) -> None:
    given = {"NODES": "4", "GPUS": "2", "PARTITION": "gpu", "ACCOUNT": "mine", "QOS": "long", "TIME": "1:00:00"}
    command = ["bash", "project/slurm/1b_classic.sh", "--run.folder", "a b"]
    subprocess.run(command, env=variables(project, **given), cwd=tmp_path, check=True)
    options = "--nodes=4 --gpus-per-node=2 --ntasks-per-node=2 --partition=gpu --account=mine --qos=long --time=1:00:00"
    words = [*options.split(), "slurm/1b_classic.sh", "--run.folder", "a b"]
    assert noted(project, "sbatch") == [str(project), *words]


def test_ranks_of_a_job_with_gpus_train_on_gpus_alone_and_see_all_of_their_node(project: Path) -> None:
    """Whatever the site binds: Lightning counts the GPUs that a rank sees, and takes the one of its number."""
    site = {"SLURM_GPU_BIND": "single:1", "SLURM_GPUS_PER_TASK": "1"}
    done = in_a_job(project, STATUS="0", SLURM_GPUS_ON_NODE="8", **site)
    assert "--trainer.devices 8 --trainer.accelerator gpu" in done.stdout
    assert "--gpu-bind=none" in noted(project, "srun")
    (project / "srun").unlink()
    assert "accelerator" not in in_a_job(project, STATUS="0").stdout
    assert "--gpu-bind=none" not in noted(project, "srun")


def test_a_job_is_not_taken_for_the_task_that_submitted_it(project: Path) -> None:
    """sbatch passes on these variables, and sets none of them for a job that is in no array and was not restarted."""
    others = {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "3"}
    done = in_a_job(project, "1b_classic.sh", "--resume", "runs/x", STATUS="75", **others)
    assert "requeue 12" in noted(project, "scontrol")
    assert "job 12, attempt 0: " in done.stdout and "--resume runs/x --resume auto" not in done.stdout


def test_the_address_of_another_run_is_not_taken_over(project: Path) -> None:
    others = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "3", "WORLD_SIZE": "64", "LOCAL_RANK": "3"}
    assert in_a_job(project, STATUS="0", **others).returncode == 0
    passed_on = {line.partition("=")[0] for line in noted(project, "srun-environment")}
    assert "SLURM_JOB_ID" in passed_on and not passed_on & others.keys()


@pytest.mark.parametrize("name", ["interactive", "bash"])
def test_an_interactive_allocation_is_trained_in(name: str, project: Path) -> None:
    """From any folder, wherever salloc was called; Lightning takes ranks of a job with such a name for shells."""
    given = {**JOB, "SLURM_JOB_NAME": name, "SLURM_SUBMIT_DIR": "/", "SLURM_GPUS_PER_NODE": "h100:8"}
    given |= {"SLURM_NTASKS": given.pop("SLURM_NTASKS_PER_NODE"), "STATUS": "75"}
    command = ["bash", "project/slurm/1b_classic.sh"]
    done = subprocess.run(
        command, env=variables(project, **given), cwd=project.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 75
    assert "interactive allocation 12" in done.stdout and "--trainer.devices 4" in done.stdout
    assert {"--job-name=fit", "--overlap", "--ntasks-per-node=4"} <= set(noted(project, "srun"))
    assert "SLURM_JOB_NAME=fit" in noted(project, "srun-environment")
    assert "is not queued again: repeat the command" in done.stdout and "requeue 12" not in noted(project, "scontrol")


def test_a_job_can_be_submitted_from_inside_a_job(project: Path, tmp_path: Path) -> None:
    """Without the variables of that job, by which the new one would take itself for one of its tasks."""
    given = {**JOB, "ENVIRONMENT": "BATCH", "SLURM_SUBMIT_DIR": "/", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CONF": "conf"}
    command = ["bash", "project/slurm/1b_classic.sh"]
    subprocess.run(command, env=variables(project, **given), cwd=tmp_path, check=True)
    assert noted(project, "sbatch") == [str(project), "slurm/1b_classic.sh"]
    passed_on = [line for line in noted(project, "sbatch-environment") if line.startswith("SLURM")]
    assert passed_on == ["SLURM_CONF=conf"]


def a_run(folder: Path, attempt: int = 0, step: int = 0) -> Path:
    """A run that attempt `attempt` of job 12 began, with an (empty) checkpoint of `step`."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    files = {name: {"bytes": 0, "sha256": ""} for name in NEEDED}
    for name in files:
        (checkpoint / name).touch()
    (checkpoint / "manifest.json").write_text(json.dumps(files))
    last = {"from_step": 5, "slurm_job": "12", "slurm_restarts": str(attempt)}
    (folder / "run.json").write_text(json.dumps({"attempts": [last]}))
    return folder


@pytest.mark.parametrize(("step", "again"), [(5, False), (6, True)])
def test_a_job_that_fails_is_queued_again_if_it_got_further(step: int, again: bool, project: Path) -> None:
    run = a_run(project / "run", step=step)
    killed = "srun: error: n2: task 9: Aborted (core dumped)"
    done = in_a_job(project, STATUS="134", RUN=str(run), SAYS=killed)
    assert done.returncode == 134
    assert ("requeue 12" in noted(project, "scontrol")) == again
    assert ("job 12 is queued again" in done.stdout) == again
    assert "failed: srun: n2: task 9: Aborted" in done.stdout and killed in done.stderr
    (event,) = events(run)[0]
    assert (event["event"], event["checkpoint"]) == ("attempt failed", step if again else None)
    assert "task 9: Aborted" in event["why"]
    assert not list((project / "slurm" / "logs").iterdir())


# ---- study.sh: with a `python -m llm` that knows the arrays and the runs of their tasks

STUDY_LLM = """
import os, pathlib, sys

words = sys.argv[1:]
print(*words, file=open("llm-words", "a"))
if words[:2] == ["study", "tasks"]:
    if "--task" not in words:
        print("tune 60M 4 1 8 6 1:00:00", "main 60M 9 1 8 6 1:00:00", "main 1B 9 2 8 4 48:00:00", sep="\\n")
    else:
        print(*[name for name in ("trunk.yaml", "branch.yaml") if not pathlib.Path(name + "-over").exists()], sep="\\n")
    sys.exit()
config = words[words.index("--config") + 1]
status = int(os.environ.get("STATUS_" + config.split(".")[0].upper(), "0"))
if status in (0, 3):
    pathlib.Path(config + "-over").touch()
sys.exit(2 if status == 3 else status)
"""
ARRAY = {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "4", "TASK": "4"}


@pytest.fixture
def study_project(project: Path) -> Path:
    (project / "llm" / "__main__.py").write_text(STUDY_LLM)
    sbatch = 'echo "$*" >> sbatch; echo $((100 + $(wc -l < sbatch)))'
    (project / "bin" / "sbatch").write_text(f"#!/usr/bin/env bash\n{sbatch}\n")
    return project


def test_a_study_is_an_array_for_each_size_then_a_verdict(study_project: Path, tmp_path: Path) -> None:
    command = ["bash", "project/slurm/study.sh", "configs/x.yaml"]
    environment = variables(study_project, PARTITION="gpu", ACCOUNT="mine")
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    tune, small, large, verdict = noted(study_project, "sbatch")
    common = "--parsable --partition=gpu --account=mine --job-name=study-"
    first = "60M --array=1-4 --nodes=1 --cpus-per-task=6 --time=1:00:00 --gpus-per-node=8 --ntasks-per-node=8"
    assert tune == f"{common}{first} slurm/study.sh configs/x.yaml tune 60M 4"
    waits = "--dependency=afterany:101 slurm/study.sh configs/x.yaml main"
    assert small == f"{common}{first.replace('1-4', '1-9')} {waits} 60M 9"
    assert large.startswith(f"{common}1B --array=1-9 --nodes=2 --cpus-per-task=4 --time=48:00:00")
    assert large.endswith(f"{waits} 1B 9")
    assert "--dependency=afterany:101:102:103" in verdict and verdict.endswith("slurm/study.sh configs/x.yaml verdict")
    assert "main, 1B: job 103, 9 tasks of 2 nodes x 8 GPUs" in done.stdout and "verdict: job 104" in done.stdout


@pytest.mark.parametrize(
    ("statuses", "status", "requeues"),
    [
        ({}, 0, []),
        ({"STATUS_TRUNK": "3"}, 0, []),  # it diverged, which is a result
        ({"STATUS_TRUNK": "2"}, 2, []),  # the branch has its turn all the same
        ({"STATUS_TRUNK": "75"}, 75, ["requeue 11_4"]),
    ],
)
def test_a_task_of_a_study_trains_its_runs_in_turn(
    study_project: Path, statuses: dict[str, str], status: int, requeues: list[str]
) -> None:
    done = in_a_job(
        study_project, "study.sh", "configs/x.yaml", "main", "1B", "9", **ARRAY, **statuses, RUN="runs/other"
    )
    assert done.returncode == status, done.stderr
    assert [line for line in noted(study_project, "scontrol") if line.startswith("requeue")] == requeues
    words = noted(study_project, "llm-words")
    assert words[0] == "study tasks configs/x.yaml --stage main --size 1B --task 4/9"
    trained = [line.split("--config ")[1].split()[0] for line in words if line.startswith("fit")]
    assert trained == ["trunk.yaml", "branch.yaml"][: 1 if status == 75 else 2]
    assert not any("--run.folder" in line for line in words)
