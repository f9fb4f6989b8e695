"""Compilation by torch during a run: the processes that it starts, and the variants that it makes."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from tqdm import tqdm

from .run_folder import RunFolder
from .signals import SAVING

# Variants of one function, beyond which torch runs it uncompiled; torch's default is 8. A block has one for each of:
# first or later layer, training or validation, recomputed or not, whole or odd batch.
RECOMPILE_LIMIT = 32
LOGGER = logging.getLogger("torch._dynamo.convert_frame")


def configure_compiler() -> None:
    """Set what torch compiles for a run: each block as one graph, in as many variants as a run can have."""
    config = torch._dynamo.config
    # Within DDP's forward pass torch would cut a graph at every 25 MB of parameters, so that their gradients can be
    # sent in between. A block is small enough to be waited for.
    config.optimize_ddp = False
    config.recompile_limit = RECOMPILE_LIMIT


class Compilation(pl.Callback):
    """Keeps signals from torch's compilers; says once how often it compiled, and warns where it gave up.

    torch compiles in processes of its own: g++ on a CPU, on a GPU a pool for Triton that lives as long as the run.
    Slurm signals every process of a job. A pool that dies of it leaves the run waiting for ever
    (pytorch/pytorch#189290), a g++ that dies ends it. So SIGUSR1 and SIGTERM are blocked in the thread that compiles,
    and the processes that it starts inherit that. The run itself gets them in another thread, or afterwards.

    Events: `compiled` after the first validation of an attempt, by when all variants have been met; `recompile limit`.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.variants: Counter[str] = Counter()  # of each function, by torch's number for it
        self.said = self.listening = self.gave_up = False
        self.warnings = LimitWarnings(self._warn)

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        if module.compiled or module.device.type == "cuda":  # where the loss is compiled always
            self.trainer, self.listening = trainer, True
            torch._dynamo.callback_handler.register_start_callback(self._begin)
            torch._dynamo.callback_handler.register_end_callback(self._end)
            LOGGER.addHandler(self.warnings)

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.listening:
            self.listening = False
            torch._dynamo.callback_handler.remove_start_callback(self._begin)
            torch._dynamo.callback_handler.remove_end_callback(self._end)
            LOGGER.removeHandler(self.warnings)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.on_fit_end(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.said or not self.variants or not trainer.is_global_zero:
            return
        self.said = True
        counts, limit = self.variants.values(), torch._dynamo.config.recompile_limit
        facts = {"functions": len(counts), "variants": sum(counts), "most": max(counts), "limit": limit}
        self.run.event("compiled", trainer.global_step, **facts)
        counted = f"{sum(counts)} variants of {len(counts)} functions, at most {max(counts)} of one"
        tqdm.write(f"compiled: {counted} (limit {limit})", file=sys.stderr)

    def _begin(self, args: Any) -> None:
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SAVING)

    def _end(self, args: Any) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        if args.callback_trigger.name == "DYNAMO" and not self.gave_up:
            self.variants[args.compile_id.partition("/")[0]] += 1  # "3/0" is the first variant of function 3
        self.gave_up = False

    def _warn(self, function: str) -> None:
        self.gave_up = True
        if self.trainer.is_global_zero:
            limit = torch._dynamo.config.recompile_limit
            self.run.event("recompile limit", self.trainer.global_step, function=function, limit=limit)
            tqdm.write(
                f"torch has compiled {function} in {limit} variants and gives up: batches of other shapes run it "
                "uncompiled, and slower; TORCH_LOGS=recompiles says why",
                file=sys.stderr,
            )


class LimitWarnings(logging.Handler):
    """Calls `met` with the function that torch warns about: it met the limit of variants."""

    def __init__(self, met: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.met = met

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "recompile_limit" in text and (function := re.search(r"function: (.*)", text)):
            self.met(function[1])
