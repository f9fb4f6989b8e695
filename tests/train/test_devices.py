"""Where ranks run: missing GPUs, Slurm's interactive jobs, the limit of open files."""

import resource
from datetime import timedelta

import pytest
import torch
import torch.distributed as distributed
from lightning.pytorch.plugins.environments import SLURMEnvironment

from llm.common.devices import missing_gpus
from llm.common.processes import raise_open_file_limit
from llm.train.callbacks import OpenRunFolder
from llm.train.run_folder import RunFolder, RunSettings
from llm.train.strategy import STARTING, plugins

from .runs import Config, fit


@pytest.mark.parametrize("devices", ["8", "[0, 7]"])
@pytest.mark.parametrize("seen", [0, 1])
def test_a_rank_that_misses_gpus_ends_at_once_and_says_so(
    seen: int, devices: str, tiny_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """No GPU where the driver is too old or one was lost; one where a site binds each task to its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("SLURM_PROCID", "3")

    def init() -> None:
        if not seen:
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nSee the manual.")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    config = tiny_config()
    assert fit(config, "--trainer.accelerator", "gpu", "--trainer.devices", devices) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: rank 3 on ") and said.count("\n") == 1
    assert f"sees {seen} of the 8 GPUs" in said
    assert ("driver on your system is too old" if not seen else "CUDA_VISIBLE_DEVICES is 5") in said
    assert not (config.parent / "run").exists()


def test_as_many_gpus_as_needed_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert missing_gpus(8) is None
    assert missing_gpus(9) is not None


@pytest.mark.parametrize("name", ["interactive", "bash", "train"])
def test_ranks_that_srun_started_are_ranks_whatever_the_jobs_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
    for key, value in (job | {"SLURM_JOB_NAME": name, "SLURM_STEP_NUM_TASKS": "8"}).items():
        monkeypatch.setenv(key, value)
    (found,) = plugins()
    assert isinstance(found, SLURMEnvironment) and not found.auto_requeue
    assert (found.global_rank(), found.local_rank(), found.world_size()) == (3, 3, 8)


def test_a_shell_in_a_job_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --pty bash`, in which fit starts its own ranks."""
    for key, value in {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(key, value)
    assert plugins() == []


def test_files_may_be_opened_up_to_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("one_rank")
def test_groups_of_deepspeed_wait_as_long_as_the_first_while_a_run_starts() -> None:
    """torch gives a group that is made without a time-out 10 minutes under NCCL, whatever the first one has."""
    run = OpenRunFolder(RunFolder(RunSettings()), list, timeout=1800.0)
    groups = [distributed.group.WORLD, distributed.new_group([0], timeout=timedelta(seconds=7))]

    def timeouts() -> set[float]:
        backends = [group._get_backend(torch.device("cpu")) for group in groups if group is not None]
        return {backend.options._timeout.total_seconds() for backend in backends}

    run.on_fit_start(None, None)  # type: ignore[arg-type]
    assert timeouts() == {1800.0}
    run.timeout = 5.0
    run.on_fit_start(None, None)  # type: ignore[arg-type]
    assert timeouts() == {STARTING}
    run.on_train_start(None, None)  # type: ignore[arg-type]
    assert timeouts() == {5.0}
