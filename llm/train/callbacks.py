"""What happens around the steps of a run.

Order within a step: optimizer -> what all ranks agree on -> guard -> measurements -> checkpoint (after validation where
it is due), and the end where a signal asked for it -> Ctrl-C if it came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from .agreement import Agreement
from .allocator import FreedMemory
from .busy_machine import BusyMachine
from .checkpoint import Checkpoint
from .checkpoint_writer import Writer
from .checkpointing import Checkpoints
from .compilation import Compilation
from .evaluation import Evaluations
from .lightning_loop import without_lightnings_signals
from .loss_guard import LossSpikeMonitor
from .metrics import Measurements, ValidationBar
from .ranks import on_rank_zero, set_collective_timeout
from .run_folder import RunFolder
from .signals import Signals
from .strategy import STARTING


class OpenRunFolder(pl.Callback):
    """Opens the run's folder on rank zero, and tells the other ranks which checkpoint the run goes on from.

    Args:
        open_folder: finds and opens it, and returns the loggers; called on rank zero.
        timeout: seconds that a rank waits for the others, from the first step on.
    """

    def __init__(self, run: RunFolder, open_folder: Callable[[], list], timeout: float) -> None:
        self.run, self.open_folder, self.timeout = run, open_folder, timeout

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        if stage != "fit":
            return
        without_lightnings_signals(trainer)

        def begin() -> Checkpoint | None:
            trainer.loggers = self.open_folder()
            return self.run.resumed

        self.run.resumed = on_rank_zero(trainer.strategy, begin)

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Let DeepSpeed's groups, which the strategy has just made, wait as long as the first while the run starts."""
        set_collective_timeout(max(STARTING, self.timeout))

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        set_collective_timeout(self.timeout)


def callbacks(run: RunFolder, signals: Signals, evaluations: Evaluations | None = None) -> list[pl.Callback]:
    """The callbacks of a run, in the order in which they act within a step."""
    writer = Writer(run, evaluations)
    if evaluations is not None:
        evaluations.exported = writer.rotate
    agreement = Agreement(signals, writer)
    guard = LossSpikeMonitor(run, agreement)
    measurements = Measurements(run, agreement, guard)
    saving = Checkpoints(run, writer, agreement, guard, measurements)
    kept, watched = [FreedMemory(), Compilation(run)], [BusyMachine(run), ValidationBar()]
    return [*kept, agreement, guard, measurements, *watched, saving, signals]
