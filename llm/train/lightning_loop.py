"""The few places that reach into Lightning's loops."""

from __future__ import annotations

import lightning.pytorch as pl


def whole_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the micro-batch that just ended completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_logged(trainer: pl.Trainer, step: int) -> bool:
    """Whether metrics are logged after optimizer step `step`, counted from 1."""
    return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps


def validated_next(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the step that just ended."""
    return trainer.global_step % trainer.datamodule.validate_every == 0 and trainer.enable_validation


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


def without_lightnings_signals(trainer: pl.Trainer) -> None:
    """Leave signals to `signals.py`.

    Lightning's handler of SIGTERM is a collective, which other ranks may not be ready for; and it asks all ranks for
    one before every micro-batch, waiting for the device, where `loss_guard.py` does so once a step.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
