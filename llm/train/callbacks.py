"""What happens around the steps of a run: measurements, progress bar, checkpoints.

Order within a step: optimizer -> measurements -> checkpoint (after validation where it is due) -> Ctrl-C if it came.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from tqdm import tqdm

from ..data.rows import DIGESTS
from . import checkpoint as checkpoints
from .flops import device_peak, flops_per_token
from .run import MetricsFile, RunFolder


def whole_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the micro-batch that just ended completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Measurements(pl.Callback):
    """Loss, learning rate, gradient norm and throughput, every `trainer.log_every_n_steps` steps, to all loggers.

    train_loss is the mean over the steps since the last row; tokens_per_second is measured over the same steps,
    without validation and checkpoints; tokens are predicted tokens, padding not counted. mfu is model FLOPs per second
    over the peak of all devices, empty where the device's peak is not known; epochs count how often the run went
    through its store, or each of its stores.

    data_digest, in metrics.csv alone as it is no number to plot, is the sum of the digests of all rows of all steps
    since step 0 (see `rows.py`): two runs that agree in it have seen equal data up to there. A run that was begun
    before there were digests has none.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.bar = tqdm(disable=True)
        state = run.resumed.state if run.resumed else {}
        self.tokens_seen: int = state.get("tokens_seen", 0)
        self.seconds_before: float = state.get("seconds", 0.0)
        self.validated_at = -1
        self.losses = [torch.tensor(loss) for loss in state.get("window_losses", [])]
        known = "0" if self.run.resumed is None else state.get("data_digest")
        self.digest = None if known is None else int(known, 16)  # of all ranks, up to where they were last added up
        self.digest_since = 0  # of this rank, from there on

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.peak = self.run.settings.peak_flops or device_peak(module.device, "16" in str(trainer.precision))
        self.flops = flops_per_token(module.decoder_config, trainer.datamodule.context)
        self.bar = progress_bar(trainer.max_steps, trainer.global_step, "train", "step")
        self.started = time.perf_counter()
        self._start_clock()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.digest_since += batch["data_digest"]
        if not whole_step(trainer, batch_idx):
            return
        self.tokens_seen += batch["num_items_in_batch"]
        self.losses.append(module.step_loss)
        self.bar.update()
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._log_training(trainer, module)

    def _log_training(self, trainer: pl.Trainer, module: Any) -> None:
        loss = trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean").item()
        rate = (self.tokens_seen - self.clock_tokens) / (time.perf_counter() - self.clock)
        self._log(
            trainer,
            train_loss=loss,
            perplexity=math.exp(min(loss, 700.0)),  # exp(710) is beyond float64
            learning_rate=module.learning_rate,
            gradient_norm=module.gradient_norm.item(),
            tokens_per_second=rate,
            mfu=rate * self.flops / (self.peak * trainer.world_size) if self.peak else None,
            data_digest=self.data_digest(trainer, module),
        )
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self.losses = []
        self._start_clock()

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self.skip(time.perf_counter() - self.paused)
            self.validated_at = trainer.global_step
            self._log(trainer, validation_loss=module.validation_loss)
            tqdm.write(f"step {trainer.global_step}: validation loss {module.validation_loss:.4f}", file=sys.stderr)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.validated_at != trainer.global_step:
            validate_now(trainer)
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.bar.close()

    def seconds(self) -> float:
        """Seconds of training so far, validation and checkpoints included, over all lives of the run."""
        return self.seconds_before + time.perf_counter() - self.started

    def data_digest(self, trainer: pl.Trainer, module: Any) -> str | None:
        """The digest of the run's data so far, 16 hex digits; every rank has to ask for it together."""
        if self.digest is None:
            return None
        since = torch.tensor(self.digest_since % DIGESTS, device=module.device)
        self.digest = (self.digest + int(trainer.strategy.reduce(since, reduce_op="sum"))) % DIGESTS
        self.digest_since = 0
        return f"{self.digest:016x}"

    def skip(self, seconds: float) -> None:
        """Leave `seconds` out of the throughput."""
        self.clock += seconds

    def _start_clock(self) -> None:
        self.clock, self.clock_tokens = time.perf_counter(), self.tokens_seen

    def _log(self, trainer: pl.Trainer, **values: float | str | None) -> None:
        epochs = trainer.datamodule.epochs(trainer.global_step)
        row = {"tokens": self.tokens_seen, **epochs, **values, "seconds": self.seconds()}
        measured = {name: value for name, value in row.items() if value is not None}
        numbers = {name: value for name, value in measured.items() if not isinstance(value, str)}
        for logger in trainer.loggers:
            logger.log_metrics(measured if isinstance(logger, MetricsFile) else numbers, trainer.global_step)


class ValidationBar(pl.Callback):
    """A progress bar over the validation rows where they take more than a few seconds."""

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.bar = progress_bar(
            int(sum(map(int, trainer.num_val_batches))), 0, "validate", "batch", leave=False, delay=3
        )

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.bar.update()

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.bar.close()


class Checkpoints(pl.Callback):
    """Writes a checkpoint every so many steps and at the end; restores the one that the run continues from."""

    def __init__(self, run: RunFolder, measurements: Measurements) -> None:
        self.run, self.measurements, self.due = run, measurements, False

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        if self.run.resumed is not None:
            checkpoints.restore(self.run.resumed, module.model, trainer.optimizers[0])
            set_progress(trainer, self.run.resumed.step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        self.due = whole_step(trainer, batch_idx) and step % self.run.settings.checkpoint_every == 0
        validated_next = step % trainer.datamodule.validate_every == 0 and trainer.enable_validation
        if self.due and step < trainer.max_steps and not validated_next:
            self._write(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """After the validation of its step, whose row a resumed run would not make again."""
        if trainer.state.fn == "fit" and self.due and trainer.global_step < trainer.max_steps:
            self._write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """After the last validation, so that the last checkpoint knows all that the summary says."""
        state = self._write(trainer, module)
        if trainer.global_step >= trainer.max_steps:
            self.run.close(state)

    def _write(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        began = time.perf_counter()
        state = {
            "step": trainer.global_step,
            "tokens_seen": self.measurements.tokens_seen,
            "validation_loss": module.validation_loss,
            "seconds": self.measurements.seconds(),
            "parameters": module.model.num_parameters(),
            "window_losses": [loss.item() for loss in self.measurements.losses],  # since the last row of metrics
            "data_digest": self.measurements.data_digest(trainer, module),
            "identity": self.run.identity,
        }
        folder = self.run.path / "checkpoints"
        checkpoints.write(folder, module.model, trainer.optimizers[0], state, self.run.settings.keep_checkpoints)
        self.measurements.skip(time.perf_counter() - began)
        return state


class Interrupt(pl.Callback):
    """Ctrl-C ends a run between two micro-batches; a second one ends it wherever it is.

    Python would raise KeyboardInterrupt between any two instructions. Inside a logger's queue that loses a wake-up, and
    the logger then waits for its thread for ever.
    """

    def __init__(self) -> None:
        self.came = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup, nor in a notebook
            signal.signal(signal.SIGINT, self._note)  # in its teardown Lightning puts the former back

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        if self.came:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.on_train_batch_end()

    def _note(self, *_: Any) -> None:
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this micro-batch; Ctrl-C again stops at once\n")  # print may be under way


def callbacks(run: RunFolder) -> list[pl.Callback]:
    """The callbacks of a run, in the order in which they act within a step."""
    measurements = Measurements(run)
    return [measurements, ValidationBar(), Checkpoints(run, measurements), Interrupt()]


def validate_now(trainer: pl.Trainer) -> None:
    """Validate within `fit`, as Lightning does at its interval: the last step always has a validation loss."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def set_progress(trainer: pl.Trainer, step: int) -> None:
    """Make the trainer stand at `step`: its counters of optimizer steps, logged steps and micro-batches."""
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop.batch_progress.total.ready = step * trainer.accumulate_grad_batches
    loop._batches_that_stepped = step


def progress_bar(total: int, done: int, what: str, unit: str, **settings: Any) -> tqdm:
    """A bar with rate and time left; in a log file a line every half minute instead of ten a second."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=done, desc=what, unit=unit, mininterval=interval, dynamic_ncols=True, **settings)
