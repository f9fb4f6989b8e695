"""What all ranks know after a step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from .checkpoint_writer import Writer
from .lightning_loop import whole_step
from .signals import SEEN, Signals


class Agreement(pl.Callback):
    """What all ranks know after a step; the same on each. One collective a step, of five numbers.

    loss: of the global batch. write_failed: whether rank zero could not write the last checkpoint. And the signals that
    any rank had, as `signals.agreed`.
    """

    def __init__(self, signals: Signals, writer: Writer) -> None:
        self.signals, self.writer = signals, writer
        self.loss, self.write_failed = 0.0, False

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not whole_step(trainer, batch_idx):
            return
        flags = [float(self.signals.came[number]) for number in SEEN] + [float(self.writer.error is not None)]
        told = torch.cat([module.step_loss.double()[None], torch.tensor(flags, dtype=torch.float64).to(module.device)])
        loss, *counts, failed = trainer.strategy.reduce(told, reduce_op="sum").tolist()
        self.loss = loss / trainer.world_size
        self.signals.agreed = {number for number, count in zip(SEEN, counts, strict=True) if count}
        self.write_failed = failed > 0
