"""Asynchronous checkpoints: training waits for the copy to host memory only before its next update.

Stages: due (every so many steps, at a signal, at the end) -> a thread of each rank copies what the rank holds
(`state.py`) while the next step makes its gradients -> the threads send it to rank zero (`gathering.py`), whose thread
writes it (`checkpoint.py`) -> a failure is known to all ranks after the step that it falls in, and before the next
checkpoint.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

from ..common.errors import StoppedError
from . import checkpoint as checkpoints
from .agreement import Agreement
from .checkpoint_writer import Writer
from .lightning_loop import set_progress, validated_next, whole_step
from .loggers import MetricsFile
from .loss_guard import LossSpikeMonitor
from .metrics import Measurements
from .ranks import on_rank_zero
from .run_folder import RunFolder
from .signals import SAVING
from .state import state_of

T = TypeVar("T")
PATIENCE = 5.0  # seconds


class Checkpoints(pl.Callback):
    """Writes a checkpoint every so many steps, at a signal and at the end; restores the one that the run goes on from.

    seconds: how long this attempt's training waited for checkpoints.
    """

    def __init__(
        self, run: RunFolder, writer: Writer, agreement: Agreement, guard: LossSpikeMonitor, measurements: Measurements
    ) -> None:
        self.run, self.writer, self.agreement = run, writer, agreement
        self.guard, self.measurements = guard, measurements
        self.due, self.seconds = False, 0.0

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        training = state_of(module.model, trainer.strategy, trainer.optimizers[0])
        if trainer.world_size > 1 and not training.replicated:
            self.writer.group = torch.distributed.new_group(backend="gloo")
        resumed = self.run.resumed
        if resumed is None:
            return
        set_progress(trainer, resumed.step)
        if resumed.step < trainer.max_steps:
            checkpoints.restore(resumed, module.model, training)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self._hold_up(self.writer.wait_for_copies)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not whole_step(trainer, batch_idx):
            return
        if self.agreement.write_failed:
            self._handle_failed_write(trainer, self.run.settings.on_full_disk)
        stop = bool(self.agreement.signals.agreed & set(SAVING))
        settings, step = self.run.settings, trainer.global_step
        self.due = stop or step % settings.checkpoint_every == 0 or step in settings.keep_steps
        if not validated_next(trainer):
            self._act(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """After the validation of its step, whose row a resumed run would not make again."""
        if trainer.state.fn == "fit":
            self._act(trainer, module)

    def _act(self, trainer: pl.Trainer, module: Any) -> None:
        """Save where it is due, and stop where a signal asked for it; the last step is left to `on_train_end`."""
        if not self.due or trainer.global_step >= trainer.max_steps:
            return
        self._write(trainer, module)
        if came := self.agreement.signals.agreed & set(SAVING):
            self._finish(trainer, self.run.settings.on_full_disk)
            raise StoppedError(trainer.global_step, signal.Signals(min(came)).name)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """After the last validation, so that the last checkpoint knows all that the summary says."""
        state = self._write(trainer, module)
        self._finish(trainer, "stop")
        if trainer.global_step >= trainer.max_steps and trainer.is_global_zero:
            self.run.close(state)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.writer.done()

    def _write(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        return self._hold_up(partial(self._begin, trainer, module))

    def _begin(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        self._finish(trainer, self.run.settings.on_full_disk)  # before there is a second copy of the state
        state = {
            "step": trainer.global_step,
            **self.measurements.state(trainer, module),
            **self.guard.state(),
            "validation_loss": module.validation_loss,
            "parameters": module.parameter_count,
            "identity": self.run.identity,
        }
        training = state_of(module.model, trainer.strategy, trainer.optimizers[0])
        zero = trainer.is_global_zero
        for logger in trainer.loggers if zero else ():
            if isinstance(logger, MetricsFile):
                logger.sync()
        # While steps are being skipped the older ones stay: the weights may be lost already.
        keep = None if self.guard.in_a_row else self.run.settings.keep_checkpoints
        snapshot = partial(checkpoints.Snapshot, config=module.model.config, state=state)
        self.writer.start(training.shares(zero), list(training.parameters), snapshot if zero else None, keep)
        return state

    def _hold_up(self, work: Callable[[], T]) -> T:
        """Do something for which training waits."""
        began = time.perf_counter()
        result = work()
        held_up = time.perf_counter() - began
        self.seconds += held_up
        self.measurements.skip(held_up)
        return result

    def _wait(self, trainer: pl.Trainer) -> None:
        """Until nothing is being written; the other ranks ask every few seconds, so that no time-out ends them."""
        while not on_rank_zero(trainer.strategy, lambda: self.writer.done(PATIENCE)):
            pass

    def _finish(self, trainer: pl.Trainer, on_full_disk: str) -> None:
        """Wait until the last checkpoint is written, and see whether it is."""
        self._wait(trainer)
        self._handle_failed_write(trainer, on_full_disk)

    def _handle_failed_write(self, trainer: pl.Trainer, on_full_disk: str) -> None:
        """End the run where the last checkpoint could not be written; or say so and go on, where the disk is full."""

        def look() -> None:
            error, self.writer.error = self.writer.error, None
            if error is None:
                return
            if on_full_disk == "stop" or not isinstance(error, checkpoints.FullDiskError):
                raise error
            self.run.event("checkpoint not written", trainer.global_step, why=str(error))
            print(f"training continues without a checkpoint: {error}", file=sys.stderr)

        on_rank_zero(trainer.strategy, look)
