"""When checkpoints are written: the copy to host memory holds training up, the writing does not.

Stages: due (every so many steps, at a signal, at the end) -> all ranks gather the state, rank zero keeps it
(`state.py`) -> a thread writes it (`checkpoint.py`) while training goes on -> a failure is known to all ranks after the
step that it falls in, and before the next checkpoint.
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
from .run import MetricsFile, RunFolder
from .signals import SAVING
from .state import state_of

if TYPE_CHECKING:
    from .evaluation import Evaluations
    from .guards import Agreement, Guard
    from .measure import Measurements

PATIENCE = 5.0  # seconds


class Writer:
    """Writes checkpoints in a thread of its own, one at a time. `error` is why the last one is not there.

    What `evaluations` has not exported yet stays; it is rotated away as soon as it is exported.
    """

    def __init__(self, run: RunFolder, evaluations: Evaluations | None = None) -> None:
        self.run, self.evaluations = run, evaluations
        self.error: Exception | None = None
        self._keep: int | None = None
        self._thread: threading.Thread | None = None

    def start(self, snapshot: checkpoints.Snapshot, keep: int | None) -> None:
        """Write `snapshot`, and remove all but the newest `keep`; nothing else may be under way."""
        self._thread = threading.Thread(target=self._write, args=(snapshot, keep), name="checkpoint")
        self._thread.start()

    def done(self, seconds: float | None = None) -> bool:
        """Whether nothing is being written any more, after so many seconds at most."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _write(self, snapshot: checkpoints.Snapshot, keep: int | None) -> None:
        self.error, self._keep = None, keep
        pinned = self.evaluations.pinned() if self.evaluations is not None else ()
        try:
            checkpoints.write(self.run.path / "checkpoints", snapshot, keep, self.run.settings.keep_every, pinned)
            if self.evaluations is not None:
                self.evaluations.written(snapshot.state["step"])
        except Exception as error:  # whatever it is, the ranks have to know
            self.error = error

    def rotate(self) -> None:
        """Remove what an export has kept from being removed. From any thread."""
        if self.evaluations is not None:
            pinned = self.evaluations.pinned()
            checkpoints.rotate(self.run.path / "checkpoints", self._keep, self.run.settings.keep_every, pinned)


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
            self._settle(trainer, self.run.settings.on_full_disk)
        stop = bool(self.agreement.signals.agreed & set(SAVING))
        self.due = stop or trainer.global_step % self.run.settings.checkpoint_every == 0
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
        began = time.perf_counter()
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
        weights, optimizer = training.snapshot(keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.sync()
            # While steps are being skipped the older ones stay: the weights may be lost already.
            keep = None if self.guard.in_a_row else self.run.settings.keep_checkpoints
            self.writer.start(checkpoints.Snapshot(weights, optimizer, module.model.config, state), keep)
        held_up = time.perf_counter() - began
        self.seconds += held_up
        self.measurements.skip(held_up)
        return state

    def _wait(self, trainer: pl.Trainer) -> None:
        """Until nothing is being written; the other ranks ask every few seconds, so that no time-out ends them."""
        while not on_rank_zero(trainer.strategy, lambda: self.writer.done(PATIENCE)):
            pass

    def _finish(self, trainer: pl.Trainer, on_full_disk: str) -> None:
        """Wait until the last checkpoint is written, and see whether it is."""
        self._wait(trainer)
        self._settle(trainer, on_full_disk)

    def _settle(self, trainer: pl.Trainer, on_full_disk: str) -> None:
        """End the run where the last checkpoint could not be written; or say so and go on, where the disk is full."""

        def look() -> None:
            error, self.writer.error = self.writer.error, None
            if error is None:
                return
            if on_full_disk == "stop" or not isinstance(error, checkpoints.FullDiskError):
                raise error
            self.run.event("checkpoint not written", trainer.global_step, why=str(error))
            print(f"training goes on without a checkpoint: {error}", file=sys.stderr)

        on_rank_zero(trainer.strategy, look)
