"""Which experiment a folder is of; imports the one that is asked for."""

import importlib
import json
from pathlib import Path
from typing import Any

from llm.common.errors import UserError

from .loaded import Loaded
from .runs import RECORD

PARTS = {"grid": "space", "icl": "task", "tem": "model", "vision": "data"}  # what only its run.json has


def load(folder: Path | str, device: str = "cpu", **others: Any) -> Loaded:
    """Load a run of any experiment at its last checkpoint.

    Args:
        folder: of one run; of icl, of one training.
        device: "cpu" or "cuda".
        others: icl takes `variant` and `seed` of one of its runs (the first, by default); vision takes `data`, where
            its images are.

    Raises:
        UserError: no trained run, or a damaged one.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_bytes())
        name = next(name for name, part in PARTS.items() if part in record)
    except (OSError, ValueError, TypeError, StopIteration) as error:
        raise UserError(
            f"{folder} is not the folder of one run of a small experiment: give one with {RECORD}"
        ) from error
    return importlib.import_module(f"small.{name}.loading").load(folder, device, **others)
