"""Where each rank of a fit runs and what it holds: a callback that `slurm/first_minutes.sh` gives the trainer."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ..common.devices import device_name
from ..common.files import write_json
from ..common.processes import available_cores, peak_rss
from ..train.lightning_loop import whole_step


class Placement(pl.Callback):
    """Writes OUT/rank-N.json after the second step, and again at the end with the peak of memory.

    Args:
        out: a folder.
    """

    def __init__(self, out: str) -> None:
        self.out, self.steps = Path(out), 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += whole_step(trainer, batch_idx)
        if self.steps == 2 and whole_step(trainer, batch_idx):
            self._write(trainer, module.device)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._write(trainer, module.device)

    def _write(self, trainer: pl.Trainer, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        facts = {
            "host": os.environ.get("SLURMD_NODENAME", platform.node()),
            "process": os.getpid(),
            "device": device_name(str(device)),
            "device_id": str(torch.cuda.get_device_properties(device).uuid) if on_gpu else None,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_rss(),
            "open_files": len(list(Path("/proc/self/fd").iterdir())),
            "cores": available_cores(),
        }
        write_json(self.out / f"rank-{trainer.global_rank}.json", facts)
