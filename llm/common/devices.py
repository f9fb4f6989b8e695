"""Devices by name, and the libraries that a number may depend on."""

import platform
from importlib.metadata import version
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
