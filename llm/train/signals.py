"""Signals: noted when they come, acted upon where the state of training is whole.

Ctrl-C ends a run after the micro-batch (on several devices: the step), a second one ends it wherever it is. SIGUSR1
(Slurm, before a time limit) and SIGTERM (pre-emption) end it after the step, with a checkpoint; see `checkpointing.py`.

Python would raise KeyboardInterrupt between any two instructions. Inside a logger's queue that loses a wake-up, and the
logger then waits for its thread for ever; and nothing can be saved from inside a handler while ranks are within a
collective.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl

SAVING = (signal.SIGUSR1, signal.SIGTERM)
SEEN = (*SAVING, signal.SIGINT)


class Signals(pl.Callback):
    """Notes signals: `came` counts those of `SEEN` on this rank, `agreed` are those of any, after the last step."""

    def __init__(self) -> None:
        self.came = dict.fromkeys(SEEN, 0)
        self.agreed: set[signal.Signals] = set()
        self._before: dict[int, Any] = {}
        self._speaks = True

    def install(self) -> None:
        """Note SIGUSR1 and SIGTERM from now on, also while the model is built: the first step then ends the run."""
        for number in SAVING:
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._note)

    def restore(self, *numbers: int) -> None:
        """Leave these signals, or all, to those who had them before."""
        for number, handler in self._before.items():
            if not numbers or number in numbers:
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._speaks = trainer.is_global_zero
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup, nor in a notebook
            self._before[signal.SIGINT] = signal.default_int_handler
            signal.signal(signal.SIGINT, self._note)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if signal.SIGINT in self.agreed or (trainer.world_size == 1 and self.came[signal.SIGINT]):
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.on_train_batch_end(trainer)

    def _note(self, number: int, _: Any) -> None:
        self.came[signal.Signals(number)] += 1
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            if self._speaks:  # not by print, which may be under way
                os.write(2, b"\nstopping as soon as this step is whole; Ctrl-C again stops at once\n")
