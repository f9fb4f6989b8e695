"""The few places that reach into Lightning's loops."""

from __future__ import annotations

import lightning.pytorch as pl


def whole_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the micro-batch that just ended completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


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


def without_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Lightning tells all ranks of a SIGTERM before every micro-batch, waiting for the device; `guards.py` does so once
    a step, and lets no error pass unseen."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
