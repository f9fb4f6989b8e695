"""Jobs of the test cluster: submitting them, waiting for them, reading what they leave."""

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .cluster import environment, run

STEPS = 150
MODEL = {
    "decoder.vocab_size": 512,
    "decoder.unpadded_vocab_size": "null",
    "decoder.hidden_size": 32,
    "decoder.intermediate_size": 64,
    "decoder.num_hidden_layers": 2,
    "decoder.num_attention_heads": 4,
    "decoder.max_position_embeddings": 64,
    "data.context": 64,
    "data.batch_size": 8,
    "data.validate_every": 50,
    "data.validation_rows": 8,
    "trainer.max_steps": STEPS,
    "trainer.log_every_n_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "run.checkpoint_every": 1000,
    "run.loggers": "[csv]",
}
LLAMA = {
    "decoder.num_key_value_heads": 2,
    "data.micro_batch_size": 2,
    "model.schedule.warmup_steps": 5,
    "model.schedule.cooldown_steps": 5,
}
SMALL = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=1G")
Facts = dict[str, str]


def overrides(*settings: dict[str, object]) -> list[str]:
    return [word for part in settings for key, value in part.items() for word in (f"--{key}", str(value))]


def submit(project: Path, *words: str, **variables: str) -> str:
    """The number of a job that was submitted from the project's root."""
    done = subprocess.run(
        ["sbatch", "--parsable", *words],
        cwd=project,
        env=environment() | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def with_one_core(project: Path, script: str) -> str:
    """`slurm/SCRIPT` of the project, changed to ask for one core a rank: this machine has few."""
    path = project / "slurm" / script
    path.write_text(path.read_text().replace("--cpus-per-task=8", "--cpus-per-task=1"))
    return f"slurm/{script}"


def facts(job: str) -> Facts:
    """What `scontrol show job` says of a job, or of a task as 12_1."""
    words = run("scontrol", "show", "job", job, "--oneliner").split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def end(job: str, seconds: float = 300) -> Facts:
    """The facts of a job when it has ended."""
    wait(lambda: facts(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
    return facts(job)


def queued_again(job: str) -> bool:
    return facts(job)["JobState"] == "PENDING" and facts(job)["Restarts"] == "1"


def start_now(job: str) -> None:
    """Start a job that was queued again, which Slurm would have wait until the credential of its last one has expired.

    That was revoked, and one issued within the same second would be taken for it.
    """
    time.sleep(1.5)
    run("scontrol", "update", f"JobId={job}", "StartTime=now")


def log(project: Path, name: str) -> str:
    path = project / "slurm" / "logs" / f"{name}.log"
    return path.read_text() if path.exists() else ""


def rows(run_folder: Path) -> list[dict[str, str]]:
    """The rows of training."""
    if not (run_folder / "metrics.csv").exists():
        return []
    with (run_folder / "metrics.csv").open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["train_loss"]]


def column(run_folder: Path, name: str) -> list[str]:
    return [row[name] for row in rows(run_folder)]


def rank_of(job: str, rank: int) -> int:
    """The process of a rank, 0 if there is none."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = set((folder / "environ").read_bytes().split(b"\0"))
            _, *words = (folder / "cmdline").read_bytes().split(b"\0")
            if wanted <= variables and words[:1] == [b"slurm/rank.py"]:  # srun has it further on
                return int(folder.name)
    return 0
