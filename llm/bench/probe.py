"""What `bench-ranks` measures inside each process of a fit, as a callback that the command line gives the trainer.

Within a fit, in steps:

    3 warm up  |  S plain  |  S that begin with a checkpoint  |  3 under torch.profiler

Every time ends with the work on the device. Communication is the time during which at least one collective is under
way: on CPUs the spans `c10d::*` and `gloo:*`, from the call to the result, on GPUs the kernels of NCCL. It is the
sending and the waiting for a slower rank, which no clock in one process can tell apart. DDP sends while the backward
pass goes on: `alone` is the part of this time in which no other operation ran, on CPUs no `aten::*`. Both are over the
time of the profiled steps, which the profiler makes longer; no rate contains them.

Peak memory is that of the plain steps, and of both S (with rank zero's copy for the checkpoint): on CPUs the process's
high-water mark less what was resident before the strategy was set up, weights apart, so that about 50 MiB which
DeepSpeed 0.19.8 imports only then are in it; on GPUs what torch allocated.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..common.processes import peak_rss, resident
from ..train import checkpoint
from ..train.checkpointing import Checkpoints
from ..train.lightning_loop import whole_step
from .contenders import MIB, now
from .traffic import BackwardPasses, recorded, traffic

WARM_UP = PROFILED = 3  # as many, so that the second checkpoint is that of the run's end
WINDOW = "bench-ranks window"
Span = tuple[float, float]


class Probe(pl.Callback):
    """Measures one rank from inside `fit` and writes OUT/rank-N.json. It acts before the project's own callbacks.

    Args:
        out: an existing folder.
        steps: S of this file's first lines.
    """

    def __init__(self, out: str, steps: int) -> None:
        self.out, self.steps = Path(out), steps
        self.ends: list[float] = []  # of each step
        self.written: list[dict[str, Any]] = []  # checkpoints, on rank zero
        self.memory: dict[str, float] = {}
        self.passes: BackwardPasses | None = None  # those of the profiled steps

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        self.before = resident() - sum(parameter.nbytes for parameter in module.parameters())

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.saving = next(each for each in trainer.callbacks if isinstance(each, Checkpoints))  # type: ignore[attr-defined]
        write = checkpoint.write

        def timed(*args: Any) -> Path:
            began = time.perf_counter()
            path = write(*args)
            files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
            self.written.append({"seconds": time.perf_counter() - began, "bytes": files})
            return path

        checkpoint.write = timed  # type: ignore[assignment]  # this process is the fit's own

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not whole_step(trainer, batch_idx):
            return
        self.ends.append(now())
        step = len(self.ends)
        if step == WARM_UP + self.steps:
            self.memory["plain"] = self._peak(module)
        elif step == WARM_UP + 2 * self.steps:
            self.memory["with_checkpoint"] = self._peak(module)
            self.held_up = self.saving.seconds
            for thread in threading.enumerate():
                if thread.name == "checkpoint":  # `train/checkpointing.py` writes there; what follows is without it
                    thread.join()
            self._begin_profile(trainer, module)
        elif step == trainer.max_steps:
            self._write(trainer, self._end_profile(trainer.world_size))

    def _peak(self, module: Any) -> float:
        """MiB so far."""
        if module.device.type == "cuda":
            return torch.cuda.max_memory_allocated(module.device) / MIB
        return (peak_rss() - self.before) / MIB

    def _begin_profile(self, trainer: pl.Trainer, module: Any) -> None:
        """The window begins on all ranks at once: starting a profiler takes one longer than another."""
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profile, self.window = profile(activities=kinds), record_function(WINDOW)
        self.profile.start()
        self.passes = BackwardPasses(module.model.get_input_embeddings())
        trainer.strategy.barrier()
        self.since = time.time_ns()
        self.window.__enter__()

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: torch.Tensor) -> None:
        if self.passes is not None:
            self.passes.begin()

    def _end_profile(self, ranks: int) -> dict[str, Any]:
        self.window.__exit__(None, None, None)
        self.profile.stop()
        sent = dict.fromkeys(("sent_bytes", "sent_in_backward_bytes"), 0.0)
        if ranks > 1 and self.passes is not None:
            sent = traffic(recorded(), self.passes.spans, self.since, ranks)
            self.passes.end()
        return communication(self.profile.events() or []) | sent

    def _write(self, trainer: pl.Trainer, profiled: dict[str, Any]) -> None:
        took = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]  # of step 2 and on
        plain, saved = WARM_UP - 1, WARM_UP - 1 + self.steps
        result = {
            "rank": trainer.global_rank,
            "threads": torch.get_num_threads(),
            "plain_step_seconds": took[plain:saved],
            "with_checkpoint_step_seconds": took[saved : saved + self.steps],
            "held_up_seconds": self.held_up,
            "written": self.written[0] if self.written else None,
            "peak_memory_mib": self.memory,
            "profiled": profiled,
        }
        (self.out / f"rank-{trainer.global_rank}.json").write_text(json.dumps(result))


def communication(events: Iterable[Any]) -> dict[str, Any]:
    """Of the profiled steps: their seconds, those in collectives, and of these those without any other operation."""
    recorded = [(event, (event.time_range.start, event.time_range.end)) for event in events]
    window = next(span for event, span in recorded if event.name == WINDOW and event.device_type == DeviceType.CPU)
    device = DeviceType.CUDA if torch.cuda.is_available() else DeviceType.CPU
    sending: list[Span] = []
    computing: list[Span] = []
    for event, (start, end) in recorded:
        span = (max(start, window[0]), min(end, window[1]))
        if event.device_type != device or span[0] >= span[1]:
            continue
        if device == DeviceType.CPU:
            kind = {"c10d": sending, "gloo": sending, "aten": computing}.get(event.name.split(":")[0])
        else:
            kind = None if event.is_user_annotation else sending if event.name.startswith("nccl") else computing
        if kind is not None:
            kind.append(span)
    alone = min(covered(sending), covered(sending + computing) - covered(computing))  # but for rounding never more
    return {
        "steps": PROFILED,
        "seconds": (window[1] - window[0]) / 1e6,
        "communication_seconds": covered(sending) / 1e6,
        "alone_seconds": alone / 1e6,
        "collectives": len(sending),
    }


def covered(spans: Iterable[Span]) -> float:
    """The length of the union of spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
