"""Notices that other processes have the cores that a run trains on."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from tqdm import tqdm

from ..common.threads import CpuClock, busy_machine, is_crowded
from ..runs import reading
from .run_folder import RunFolder

SLOWER = 5  # steps that take so many times their CPU time per thread wait for cores
SECONDS = 1.0  # of steps that are judged together: the kernel counts CPU time in hundredths of a second
FIRST_STEPS = 3  # of an attempt: they compile and allocate, partly in other processes


class BusyMachine(pl.Callback):
    """Warns once, and records the event `busy_machine`, if a run on CPUs has to share its cores.

    At the start: other processes leave fewer cores than torch has threads. Later: a second of steps, validation and
    checkpoints left out, takes `SLOWER` times its CPU time per thread while other processes use the cores. `compare`
    does not count the time of such a run as a cost. Runs of one process only: the ranks of a run share a machine and
    wait for each other on purpose.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.noticed, self.batches = run, False, 0
        self.wall = self.own = self.others = 0.0  # seconds since the last judgement

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.watches = trainer.world_size == 1 and module.device.type == "cpu"
        if self.watches and (sentence := busy_machine(torch.get_num_threads())):
            self._record(trainer.global_step, sentence)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.watches and not self.noticed:
            self.before = CpuClock.now()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        if not self.watches or self.noticed or self.batches <= FIRST_STEPS:
            return
        now, threads = CpuClock.now(), torch.get_num_threads()
        wall, others = now.wall - self.before.wall, now.others_since(self.before)
        if others is None:
            return
        self.wall += wall
        self.own += (now.own - self.before.own) / threads
        self.others += others * wall
        if self.wall < SECONDS:
            return
        if self.wall > SLOWER * self.own and is_crowded(self.others / self.wall, threads):
            advice = "set OMP_NUM_THREADS=1" if threads > 1 else "wait for them"
            self._record(
                trainer.global_step,
                f"{self.wall:.1f} s of steps up to step {trainer.global_step} had {self.own:.1f} s of CPU time per "
                f"thread, while other processes used {self.others / self.wall:.1f} cores: the time of this run says "
                f"nothing about cost; {advice}",
            )
        self.wall = self.own = self.others = 0.0

    def _record(self, step: int, sentence: str) -> None:
        self.noticed = True
        tqdm.write(f"warning: {sentence}", file=sys.stderr)  # beside the progress bar
        self.run.event(reading.BUSY, step, why=sentence)
