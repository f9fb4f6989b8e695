"""`python -m llm study run`: trains what is missing of a study, on this machine.

Stages: record and configs -> the runs of this task -> processes, as many at once as there are jobs, each `llm fit` in
its run folder -> a line for each that ends.

Any number of these commands may work on one study. The lock of a run folder says who trains it, and a command waits
for runs that another one trains if its own depend on them. All of it may be killed at any time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from ..common.errors import StoppedError, UserError, exit_status
from ..common.tables import duration
from ..common.threads import busy_machine, thread_count
from ..runs.study_record import StudyRecord, StudyRun, last_error, log_of
from ..train.cli import main as fit
from .inspection import Inspection
from .registration import is_ready, register
from .runs import config_path
from .status import seconds_left

START = "forkserver"  # its processes begin with everything imported
POLL = 2.0  # seconds between two looks at runs that others train
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def share(runs: Sequence[StudyRun], task: str | None) -> list[StudyRun]:
    """Return the runs of task I/N: every Nth chain, from the Ith on.

    Raises:
        UserError: it is not I/N with I from 1 to N.
    """
    if task is None:
        return list(runs)
    one, slash, all_of_them = task.partition("/")
    if not slash or not one.isdecimal() or not all_of_them.isdecimal() or not 1 <= int(one) <= int(all_of_them):
        raise UserError(f"--task {task}: give I/N with I from 1 to N, such as 3/24")
    chains = list(dict.fromkeys(run.chain for run in runs))[int(one) - 1 :: int(all_of_them)]
    return [run for run in runs if run.chain in chains]


def slot_environment(slot: int, jobs: int, threads: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the variables of the processes in slot `slot` of `jobs`: their share of the threads and of the GPUs."""
    variables = {"OMP_NUM_THREADS": str(max(1, threads // jobs))}
    if gpus:
        each = len(gpus) // jobs
        mine = gpus[slot * each : (slot + 1) * each] if each else [gpus[slot % len(gpus)]]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return variables


def train(inspection: Inspection, jobs: int, task: str | None) -> None:
    """Train what is missing.

    Raises:
        UserError: some runs failed, or wait for others that did; all others are done.
        StoppedError: SIGTERM or SIGUSR1 came; the runs have saved their states.
    """
    workers = Workers(inspection, jobs, task)
    if sentence := busy_machine(min(jobs * max(1, thread_count() // jobs), thread_count())):
        print(f"warning: {sentence}", file=sys.stderr)
    with _stopping():
        try:
            while workers.step():
                pass
        finally:
            workers.stop()
    workers.check()


class Workers:
    """The processes that train a study's runs here."""

    def __init__(self, inspection: Inspection, jobs: int, task: str | None) -> None:
        self.inspection, self.study, self.jobs = inspection, inspection.study, jobs
        self.record: StudyRecord = register(inspection)
        self.mine = share(self.record.runs, task)
        self.context: Any = multiprocessing.get_context(START)
        self.context.set_forkserver_preload(["llm.train.cli"])
        self.running: dict[Any, tuple[Any, StudyRun, int]] = {}  # sentinel -> process, its run, its slot
        self.tried: set[str] = set()  # begun here, ended here
        self.over: set[str] = set()

    def step(self) -> bool:
        """Start what can start, then wait for something to end; False once there is nothing to wait for."""
        if not self.record.choices and self.study.tune:
            self.record = register(self.inspection)
        self.over |= {run.name for run in self.record.runs if run.name not in self.over and self.record.state(run).over}
        waits = False
        for run in self.mine:
            if run.name in self.over | self.tried | self._here():
                continue
            if blockers := [run] if self._is_running(run) else self._blockers(run):
                waits |= any(map(self._is_running, blockers))
            elif len(self.running) < self.jobs:
                self._start(run)
        if self.running:
            for sentinel in connection.wait(list(self.running), POLL):
                self._ended(*self.running.pop(sentinel))
        elif waits:
            time.sleep(POLL)
        else:
            return False
        return True

    def _here(self) -> set[str]:
        return {run.name for _, run, _ in self.running.values()}

    def _is_running(self, run: StudyRun) -> bool:
        """Return whether a run is trained now, here or elsewhere."""
        return self.record.state(run).state == "running"

    def _blockers(self, run: StudyRun) -> list[StudyRun]:
        """Return the runs that have to come further before this one can start."""
        if not is_ready(self.study, self.record, run):
            return [other for other in self.record.runs if other.value is not None and other.name not in self.over]
        if run.trunk is None or run.trunk in self.over or self._checkpoint(run).is_dir():
            return []
        return [other for other in self.record.runs if other.name == run.trunk]

    def _checkpoint(self, run: StudyRun) -> Path:
        """Return the checkpoint that a branch starts from."""
        return self.study.folder / f"{run.trunk}/checkpoints/step-{run.start:08d}"

    def _start(self, run: StudyRun) -> None:
        slot = min(set(range(self.jobs)) - {taken for *_, taken in self.running.values()})
        log = log_of(self.study.folder, run)
        log.parent.mkdir(parents=True, exist_ok=True)
        found = self.inspection.of(run.size, run.arm)
        variables = slot_environment(slot, self.jobs, thread_count(), [] if found.on_cpu else _gpus())
        words = ["--config", str(config_path(self.study, run)), "--resume", "auto"]
        process = self.context.Process(target=_fit, args=(words, log, variables, not found.one_device))
        process.start()
        self.running[process.sentinel] = (process, run, slot)

    def _ended(self, process: Any, run: StudyRun, slot: int) -> None:
        process.join()
        state, log = self.record.state(run), log_of(self.study.folder, run)
        if state.state == "running":  # by another process, which was faster
            return
        self.tried.add(run.name)
        if not state.over and not last_error(log):
            name = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"status {process.exitcode}"
            with log.open("a") as stream:
                stream.write(f"\nerror: its process ended with {name}\n")
            state = self.record.state(run)
        self.over |= {run.name} if state.over else set()
        outcome = f"validation loss {state.loss:.4f}" if state.state == "done" else f"{state.state}: {state.reason}"
        left = seconds_left(self.record, self.mine)
        remaining = f"; about {duration(left / self.jobs)} left" if left and left >= self.jobs else ""
        done = sum(each.name in self.over for each in self.mine)
        print(f"[{done}/{len(self.mine)}] {run.name}: {outcome}{remaining}", file=sys.stderr)

    def stop(self) -> None:
        """Have the runs save and end."""
        for process, *_ in self.running.values():
            process.terminate()
        for process, *_ in self.running.values():
            process.join()

    def check(self) -> None:
        """Raise UserError if a run failed or could not start."""
        missing = [run for run in self.mine if run.name not in self.over]
        failed = [f"{run.name} ({self.record.state(run).reason})" for run in missing if run.name in self.tried]
        waiting = len(missing) - len(failed)
        if failed:
            also = f", {waiting} more wait for them" if waiting else ""
            raise UserError(f"{len(failed)} of {len(self.mine)} runs failed{also}: {'; '.join(failed)}")
        if waiting:
            raise UserError(f"{waiting} runs wait for runs of other tasks, which nobody trains now: run those first")


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def _stopping() -> Iterator[None]:
    """Raise StoppedError where SIGTERM or SIGUSR1 comes."""

    def stop(number: int, _: Any) -> None:
        raise StoppedError(0, signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fit(words: list[str], log: Path, variables: dict[str, str], several_devices: bool) -> None:
    """Train one run, in a process of its own that ends with the study's."""
    os.setpgid(0, 0)  # Ctrl-C reaches the study alone, which then has its runs save
    os.environ.update(variables)
    with log.open("a") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    if several_devices:  # Lightning starts the other ranks by this process's command line
        os.execv(sys.executable, [sys.executable, "-m", "llm", "fit", *words])
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # torch has read the variable already
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_stop_after, args=(parent.sentinel,), daemon=True).start()
    raise SystemExit(exit_status(lambda: fit("fit", words)))


def _stop_after(sentinel: int) -> None:
    """Have this process save and end once the study's is gone."""
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
