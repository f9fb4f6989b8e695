"""Where and with what something was made: versions, commit, device, time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .devices import device_name

PACKAGES = ("hippoformer", "torch", "lightning", "deepspeed", "transformers", "tokenizers", "numpy")


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def process_info() -> dict[str, Any]:
    """Where a run's rank zero is: host, process, and Slurm's job with the number of its restarts."""
    here = {"host": platform.node(), "process": os.getpid()}
    job = os.environ.get("SLURM_JOB_ID")
    return here | ({"slurm_job": job, "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT", "0")} if job else {})


def environment() -> dict[str, Any]:
    """Versions, git commit, and device: what a reader needs to trust or repeat a figure."""
    return {
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "platform": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the source, with "+changes" where the work tree differs; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
