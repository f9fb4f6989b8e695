"""Many runs packed on the devices there are, or shared out over the tasks of a Slurm array; one table of all.

    every combination of the knobs -> this task's share -> workers, each with a device -> tables of all that is there

A run is a folder that resumes where it was, so the same command resumes a sweep that was killed, and tasks may
be given again in any order.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

from llm.common.errors import UserError
from llm.common.processes import available_cores, progress_bar

from .model import Variant
from .runs import GridSpec
from .settings import GridSettings, GridSizes
from .train import train


class Knob(NamedTuple):
    """A field of `GridSizes`, `Variant` or `GridSettings`, and its values."""

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


_TYPES = {name: kind for part in (GridSizes, Variant, GridSettings) for name, kind in get_type_hints(part).items()}


def _streams(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split("+"))


def share(runs: Sequence[GridSpec], task: str) -> list[GridSpec]:
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
    count = workers or (available_cores() if device == "cpu" else len(found))
    return [found[n % len(found)] for n in range(count)]


def sweep(
    runs: Sequence[GridSpec], out: Path, devices: Sequence[str], command: str, compiled: bool | None = None
) -> None:
    """Train the runs in folders of `out`, as many at once as there are devices, each in a process of its own.

    Raises:
        UserError: some runs could not be trained; the others are.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small.grid.train"])  # a run's process starts at once, without importing torch
    threads = max(1, available_cores() // len(devices))
    free, waiting, failed = list(devices), list(runs), []
    running: dict[int, tuple[Any, Any, str, GridSpec]] = {}  # by the sentinel of its process
    try:
        with progress_bar(len(runs), 0, "sweep", " runs") as bar:
            while waiting or running:
                while waiting and free:
                    run, device = waiting.pop(0), free.pop(0)
                    receiver, sender = context.Pipe(duplex=False)
                    work = (run, out / run.label, device, threads, command, compiled, sender)
                    process = context.Process(target=_train, args=work, daemon=True)
                    process.start()
                    sender.close()
                    running[process.sentinel] = (process, receiver, device, run)
                for sentinel in connection.wait(list(running)):
                    process, receiver, device, run = running.pop(sentinel)  # type: ignore[arg-type]
                    process.join()
                    free.append(device)
                    if process.exitcode:
                        failed.append(f"{run.label} ({_why(process.exitcode, receiver)})")
                    bar.update()
    finally:  # Ctrl-C, too
        for process, *_ in running.values():
            process.terminate()
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs could not be trained: {'; '.join(failed)}")


def _why(code: int, receiver: Any) -> str:
    """What a process that failed said of it."""
    try:
        if receiver.poll():
            return receiver.recv()
    except EOFError:
        pass
    name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"its process ended by {name}: if for its memory, give fewer --workers"


def _train(
    run: GridSpec, folder: Path, device: str, threads: int, command: str, compiled: bool | None, sender: Any
) -> None:
    """In a process of its own, which ends with the sweep's: a run whose sweep is gone would hold its folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the sweep ends them
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        train(folder, run, device, command, True, compiled)
    except (UserError, RuntimeError, OSError) as error:
        sender.send(str(error))
        raise SystemExit(2) from error


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
