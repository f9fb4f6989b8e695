"""Many runs packed on the devices there are, or shared out over the tasks of a Slurm array; one table of all.

    every combination of the knobs -> this task's share -> workers, each with a device -> tables of all that is there

A run is a folder that goes on where it was, so a sweep that was killed goes on with the same command, and tasks may
be given again in any order.
"""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from tqdm import tqdm

from llm.errors import UserError

from .model import Sizes, Variant
from .runs import Asked
from .train import Settings, train


class Knob(NamedTuple):
    """A field of `Sizes`, `Variant` or `Settings`, and its values."""

    name: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> "Knob":
        """NAME=V,V,...: lr=1e-3,1e-4 or position=paper,actions; streams joined by +, "none" for none.

        Raises:
            UserError: no such field, or values of another type.
        """
        name, equals, values = text.partition("=")
        if name not in _TYPES or not equals or not values:
            raise UserError(f"--vary {text!r}: give NAME=V,V,... with one of {', '.join(sorted(_TYPES))}")
        kind: Any = _streams if _TYPES[name] == tuple[str, ...] else _TYPES[name]
        try:
            return cls(name, tuple(map(kind, values.split(","))))
        except ValueError as error:
            raise UserError(f"--vary {text!r}: {error}") from error


_TYPES = {name: kind for part in (Sizes, Variant, Settings) for name, kind in get_type_hints(part).items()}


def _streams(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split("+"))


def share(runs: Sequence[Asked], task: str) -> list[Asked]:
    """The runs of task I of N, given as I/N: every Nth from the Ith on.

    Raises:
        UserError: it is not I/N with I from 1 to N.
    """
    one, slash, all_of_them = task.partition("/")
    if not slash or not one.isdecimal() or not all_of_them.isdecimal() or not 1 <= int(one) <= int(all_of_them):
        raise UserError(f"--task {task!r}: give I/N with I from 1 to N, as 3/24")
    return list(runs[int(one) - 1 :: int(all_of_them)])


def places(device: str, workers: int | None) -> list[str]:
    """A device for each worker: every GPU once and on, or the CPU's cores.

    Args:
        device: "cpu", "cuda" for all GPUs, or one of them.
        workers: how many; None is one for each GPU, and one for each core of a CPU, as small models run faster beside
            each other than one after the other on many cores.
    """
    found = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if device == "cuda" else [device]
    count = workers or (len(os.sched_getaffinity(0)) if device == "cpu" else len(found))
    return [found[n % len(found)] for n in range(count)]


def sweep(runs: Sequence[Asked], out: Path, devices: Sequence[str], command: str) -> None:
    """Train the runs in folders of `out`, as many at once as there are devices.

    Raises:
        UserError: some runs could not be trained; the others are.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
    failed = []
    with (
        ProcessPoolExecutor(len(devices), context, _take_place, (queue, threads)) as pool,
        tqdm(total=len(runs), desc="sweep", unit=" runs", dynamic_ncols=True) as bar,
    ):
        waiting = {pool.submit(_train, run, out / run.label, command): run.label for run in runs}
        for done in as_completed(waiting):
            try:
                done.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker was killed (for its memory?): give the same command to go on, with fewer --workers"
                ) from error
            except (UserError, RuntimeError, OSError) as error:
                failed.append(f"{waiting[done]} ({error})")
            bar.update()
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs could not be trained: {'; '.join(failed)}")


_place = "cpu"  # of this process, where it is a worker


def _take_place(queue: Any, threads: int) -> None:
    global _place
    _place = queue.get()
    torch.set_num_threads(threads)


def _train(run: Asked, folder: Path, command: str) -> None:
    train(folder, run.graph, run.sizes, run.variant, run.settings, _place, command, quiet=True)
