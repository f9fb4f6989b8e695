"""When checkpoints are written: the copy to host memory holds training up, the writing does not.

Stages: due (every so many steps, at a signal, at the end) -> all ranks gather the state, rank zero keeps it
(`state.py`) -> a thread writes it (`checkpoint.py`) while training goes on -> a failure is known to all ranks after the
next step.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from ..errors import StoppedError
from . import checkpoint as checkpoints
from .loop import set_progress, validated_next, whole_step
from .ranks import on_rank_zero
from .run import RunFolder
from .signals import SAVING
from .state import state_of

if TYPE_CHECKING:
    from .guards import Agreement, Guard
    from .measure import Measurements


class Writer:
    """Writes checkpoints in a thread of its own, one at a time."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.error: checkpoints.FullDiskError | None = None
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written, and nobody has asked for the error yet."""
        return self.error is not None

    def start(self, snapshot: checkpoints.Snapshot) -> None:
        """Write `snapshot` once the one before it is written."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_error(self) -> checkpoints.FullDiskError | None:
        """What went wrong, once."""
        error, self.error = self.error, None
        return error

    def _write(self, snapshot: checkpoints.Snapshot) -> None:
        settings = self.run.settings
        try:
            checkpoints.write(self.run.path / "checkpoints", snapshot, settings.keep_checkpoints, settings.keep_every)
        except checkpoints.FullDiskError as error:
            self.error = error


class Checkpoints(pl.Callback):
    """Writes a checkpoint every so many steps, at a signal and at the end; restores the one that the run goes on from.

    seconds: how long this life's training waited for checkpoints.
    """

    def __init__(
        self, run: RunFolder, writer: Writer, agreement: Agreement, guard: Guard, measurements: Measurements
    ) -> None:
        self.run, self.writer, self.agreement = run, writer, agreement
        self.guard, self.measurements = guard, measurements
        self.due, self.seconds = False, 0.0

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        resumed = self.run.resumed
        if resumed is None:
            return
        set_progress(trainer, resumed.step)
        if resumed.step < trainer.max_steps:
            checkpoints.restore(resumed, module.model, state_of(module.model, trainer.strategy, trainer.optimizers[0]))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not whole_step(trainer, batch_idx):
            return
        if self.agreement.write_failed:
            self._settle(trainer)
        stop = bool(self.agreement.signals.agreed & set(SAVING))
        in_time = trainer.global_step % self.run.settings.checkpoint_every == 0
        self.due = stop or (in_time and not self.guard.in_a_row)  # whose weights are lost would displace a good one
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
            self._finish(trainer)
            raise StoppedError(trainer.global_step, signal.Signals(min(came)).name)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """After the last validation, so that the last checkpoint knows all that the summary says."""
        state = self._write(trainer, module)
        self._finish(trainer)
        if trainer.global_step >= trainer.max_steps and trainer.is_global_zero:
            self.run.close(state)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.writer.wait()

    def _write(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        began = time.perf_counter()
        state = {
            "step": trainer.global_step,
            **self.measurements.state(trainer, module),
            **self.guard.state(),
            "validation_loss": module.validation_loss,
            "parameters": module.parameter_count,
            "identity": self.run.identity,
        }
        training = state_of(module.model, trainer.strategy, trainer.optimizers[0])
        weights, optimizer = training.snapshot(keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            self.writer.start(checkpoints.Snapshot(weights, optimizer, module.model.config, state))
        held_up = time.perf_counter() - began
        self.seconds += held_up
        self.measurements.skip(held_up)
        return state

    def _finish(self, trainer: pl.Trainer) -> None:
        """Wait until the last checkpoint is written; one that cannot be ends the run."""

        def wait() -> None:
            self.writer.wait()
            if error := self.writer.take_error():
                raise error

        on_rank_zero(trainer.strategy, wait)

    def _settle(self, trainer: pl.Trainer) -> None:
        """A checkpoint could not be written: stop, or say so and go on, as `run.on_full_disk` says."""
        if self.run.settings.on_full_disk == "stop":
            self._finish(trainer)
        elif error := self.writer.take_error():
            self.run.event("checkpoint not written", trainer.global_step, why=str(error))
            print(f"training goes on without a checkpoint: {error}", file=sys.stderr)
