"""Devices by name, and the libraries that a number may depend on."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .files import first_line

if TYPE_CHECKING:
    import torch


def versions() -> dict[str, str]:
    """Of the libraries that a number may depend on."""
    return {name: version(name) for name in ("transformers", "torch")} | {"python": platform.python_version()}


def resolve_device(device: str) -> "torch.device":
    """`auto` is a GPU where there is one; anything else must exist, else a UserError."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    # Unknown names, CUDA that torch was built without (an assertion of its own), devices without any code.
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used here ({first_line(error)}); give --device cpu") from error


def missing_gpus(needed: int) -> str | None:
    """Return one sentence if this process does not see the `needed` GPUs of its machine, else None."""
    import torch

    seen = torch.cuda.device_count()
    if seen >= needed:
        return None
    try:
        torch.cuda.init()
        why = f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"
    except (RuntimeError, AssertionError) as error:  # the driver is too old, or torch is built without CUDA
        why = first_line(error)
    rank = f"rank {os.environ['SLURM_PROCID']} on " if "SLURM_PROCID" in os.environ else ""
    return (
        f"{rank}{platform.node()} sees {seen} of the {needed} GPUs that trainer.devices needs ({why}): compare with "
        "nvidia-smi on that machine, start ranks with srun --gpu-bind=none, or set trainer.accelerator to cpu"
    )


def device_name(device: str) -> str:
    """The model of a GPU, or of the CPU with its fastest instructions for bfloat16 products and torch's threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or "CPU"
    name = re.search(r"^model name\s*: (.*)$", known, re.M)
    fast = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {flag} " in known), None)
    return (name[1].strip() if name else "CPU") + (f" ({fast})" if fast else "")
