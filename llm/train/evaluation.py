"""Evaluation in the background of training: every so many steps, in processes of its own.

Stages: the checkpoint of a due step is written (`checkpointing.py`) -> `python -m llm export RUN --step N` -> the
checkpoint may be rotated away -> `python -m evals run RUN/exports/step-N ...` -> a line in events.jsonl. One process at
a time and in order; exports go first, as each holds a checkpoint on the disk that is three times its size.

Training shares nothing with it but files and the machine, so no bit of a run depends on it. Each command runs below
this module run as a program (`supervise`), which imports no torch: it lowers the priority and, when training is gone
however it went, ends the command. It finds that out by asking for its parent's id: the signal that Linux can send at a
parent's death follows the thread that started the process, and no other system has it.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..common.errors import UserError
from ..common.limits import config_problems
from ..runs import reading
from .contradictions import of_interval

if TYPE_CHECKING:  # it imports torch, which the program below does without
    from .run_folder import RunFolder

PATIENCE = 5.0  # seconds that a command has to clean up after itself when it is ended
LOOK = 0.2  # seconds between two looks of the program that watches over a command
STDERR_LINE = 300  # characters
# A launcher's words on ranks: accelerate, which lm-eval asks, would wait for those ranks.
OF_LAUNCHERS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "PL_", "TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "NODE_RANK")
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass
class EvaluationSettings:
    """What is asked of the model in the background of training.

    Args:
        every: optimizer steps between evaluations, a multiple of run.checkpoint_every; the last step is evaluated too.
            None evaluates nothing.
        arguments: of `python -m evals run EXPORT`; without --device, it runs on the CPU.
        threads: of the processes that export and evaluate.
        nice: their niceness, 0 to 19.
    """

    every: int | None = None
    arguments: str = "--tasks stories --limit 200"
    threads: int = 1
    nice: int = 19

    def problems(self, checkpoint_every: int) -> list[str]:
        """Settings that cannot be, each a sentence."""
        problems = config_problems("evaluation", vars(self).get)
        if self.every is None:
            return problems
        problems += of_interval("evaluation.every", self.every, checkpoint_every)
        try:
            shlex.split(self.arguments)
        except ValueError as error:
            problems.append(f"evaluation.arguments {self.arguments!r} are no words: {str(error).lower()}")
        return problems

    def command(self, export: Path) -> list[str]:
        """The words of the evaluation. The device comes first, so that one in `arguments` prevails."""
        return ["-m", "evals", "run", str(export), "--device", "cpu", *shlex.split(self.arguments)]

    def on_cpu(self) -> bool:
        """Whether `arguments` names no other device."""
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--device")
        return str(parser.parse_known_args(self.command(Path()))[0].device) == "cpu"

    def check(self, folder: Path) -> None:
        """Ask `python -m evals` before training whether it takes the arguments, instead of a thousand steps later.

        It is given an export that is not there, which is what it says where it finds nothing else wrong.

        Raises:
            UserError: it does not take them.
        """
        command = [sys.executable, *self.command(folder / "step-00000000")]
        asked = subprocess.run(
            command, env=_environment(self.threads, self.on_cpu()), capture_output=True, text=True, errors="replace"
        )
        why = (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
        if f"{folder / 'step-00000000'} is not a folder" not in why:
            why = why.partition("error: ")[2] or why
            raise UserError(
                f"evaluation.arguments {self.arguments!r}: {why} (python -m evals run --help tells what can be given)"
            )


class Evaluations:
    """The exports and evaluations of one attempt at a run, on rank zero; see the stages above.

    Args:
        run: its folder, which this process holds from `begin` on.
        settings: with `every` given.
    """

    def __init__(self, run: RunFolder, settings: EvaluationSettings) -> None:
        self.run, self.settings = run, settings
        self.exports = run.path / "exports"
        self.log = self.exports / "evaluation.log"
        self.exported: Callable[[], None] = lambda: None  # called after each export
        self._changed = threading.Condition()  # guards what follows
        self._to_export: list[int] = []  # steps, ascending; the one that is being exported among them
        self._to_evaluate: list[int] = []
        self._process: subprocess.Popen | None = None
        self._ended = False
        self._last_step = 0
        self._thread: threading.Thread | None = None

    # ---- Which steps -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """UserError where the arguments cannot be used."""
        self.settings.check(self.exports)

    def begin(self, step: int, last_step: int) -> None:
        """Start, with what earlier attempts left to do up to `step`, from which this one goes on to `last_step`."""
        self._last_step = last_step
        self._to_export, self._to_evaluate = self.unfinished(step, last_step)
        self._thread = threading.Thread(target=self._work, name="evaluation", daemon=True)
        self._thread.start()

    def unfinished(self, step: int, last_step: int) -> tuple[list[int], list[int]]:
        """Due steps up to `step` that were not evaluated to the end: those to export first, and those exported."""
        told, _ = reading.events(self.run.path)
        finished = {event["step"] for event in told if event["event"] == "evaluated"}
        left: tuple[list[int], list[int]] = ([], [])
        for path in reading.folders(self.exports):
            if (path / "hippoformer.json").is_file():
                done = reading.step_of(path) in finished and reading.accuracies(path)
                left[1].extend([] if done else [reading.step_of(path)])
        for path in reading.folders(self.run.path / "checkpoints"):
            if not self.path(reading.step_of(path)).exists() and not reading.checkpoint_problems(path):
                left[0].append(reading.step_of(path))
        to_export, to_evaluate = (
            [each for each in steps if each <= step and self._is_due(each, last_step)] for steps in left
        )
        return to_export, to_evaluate

    def written(self, step: int) -> None:
        """The checkpoint of `step` is there: where it is due, it is exported and evaluated. From any thread."""
        with self._changed:
            if self._is_due(step, self._last_step) and step not in self._to_export:
                bisect.insort(self._to_export, step)
                self._changed.notify_all()

    def pinned(self) -> set[int]:
        """The steps whose checkpoints are still to be exported: they must stay."""
        with self._changed:
            return set(self._to_export)

    def path(self, step: int) -> Path:
        """Where a step is exported to."""
        return self.exports / f"step-{step:08d}"

    def _is_due(self, step: int, last_step: int) -> bool:
        return step > 0 and (step % (self.settings.every or 1) == 0 or step == last_step)

    # ---- The end -----------------------------------------------------------------------------------------------------

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Until nothing is left to do, or `stop()`; says what it waits for. Returns whether nothing is left."""
        with self._changed:
            if left := self._left():
                _say(f"waiting for the evaluation of {_of(left)} (see {self.log}); Ctrl-C ends without it")
            while self._left() and not stop():
                self._changed.wait(LOOK)
            return not self._left()

    def end(self) -> None:
        """End what is under way, with all it has started; begin nothing more. What is half written is removed."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            if self._process is not None:
                self._process.terminate()
        if self._thread is None:
            return
        self._thread.join(2 * PATIENCE)
        if self._thread.is_alive() and self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._thread.join()

    def _left(self) -> list[int]:
        return sorted({*self._to_export, *self._to_evaluate})

    # ---- The thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._left())
                if self._ended:
                    return
                exporting = bool(self._to_export)
                step = (self._to_export or self._to_evaluate)[0]
            began = time.monotonic()
            try:
                why = self._export(step) if exporting else self._evaluate(step)
            except Exception as error:  # no room for the log, no process to be had: never the end of training
                why = " ".join(str(error).split()) or type(error).__name__
            with self._changed:
                if self._ended:
                    return
                (self._to_export if exporting else self._to_evaluate).remove(step)
                if exporting and not why and step not in self._to_evaluate:
                    bisect.insort(self._to_evaluate, step)
                self._changed.notify_all()
            if exporting:
                self.exported()
            if why:
                self.run.event("evaluation failed", step, why=why)
                _say(f"step {step}: evaluation failed ({why}); training continues; see {self.log}")
            elif not exporting:
                results = reading.in_percent(reading.accuracies(self.path(step)))
                self.run.event("evaluated", step, results=results, seconds=round(time.monotonic() - began, 1))

    def _export(self, step: int) -> str | None:
        words = ["-m", "llm", "export", str(self.run.path), "--step", str(step)]
        return self._supervised(step, words, on_cpu=True)

    def _evaluate(self, step: int) -> str | None:
        return self._supervised(step, self.settings.command(self.path(step)), self.settings.on_cpu())

    def _supervised(self, step: int, words: list[str], on_cpu: bool) -> str | None:
        """Run a command of this Python to its end, its output in the log. Returns why it failed, None where not."""
        self.exports.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            waiting = [each for each in self._left() if each != step]
            queue = f"; {_of(waiting)} waiting" if waiting else ""
            when = datetime.now(UTC).isoformat(timespec="seconds")
            log.write(f"{when} step {step}: python {shlex.join(words)}{queue}\n".encode())
            log.flush()
            before = log.tell()
            watching = ["-m", __name__, str(os.getpid()), str(self.settings.nice)]
            with self._changed:
                if self._ended:
                    return None
                self._process = subprocess.Popen(
                    [sys.executable, *watching, sys.executable, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment(self.settings.threads, on_cpu),
                    start_new_session=True,
                )
            status = self._process.wait()
        return _last_line(self.log, before) or f"exit status {status}" if status else None


def _environment(threads: int, on_cpu: bool) -> dict[str, str]:
    """This process's, without what says that it is one of several ranks."""
    kept = {
        name: value for name, value in os.environ.items() if name not in OF_RANKS and not name.startswith(OF_LAUNCHERS)
    }
    return kept | dict.fromkeys(THREADS, str(threads)) | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


def _last_line(log: Path, start: int) -> str:
    """The last line from byte `start` on; a progress bar's states are lines too."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((" ".join(line.split())[:STDERR_LINE] for line in reversed(lines) if line.strip()), "")


def _of(steps: Sequence[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps)}"


def _say(sentence: str) -> None:
    tqdm.write(sentence, file=sys.stderr)  # not into the midst of the progress bar


# ---- The program that watches over a command -------------------------------------------------------------------------


def supervise(parent: int, nice: int, command: Sequence[str]) -> int:
    """Run `command` until it ends, or until `parent` is gone or sends SIGTERM: its exit status.

    A command is ended by Ctrl-C's signal, at which Python cleans up; what is left after `PATIENCE` is killed.
    """
    os.nice(nice)
    # Slurm signals every process of a job. The command ignores these two, and is told to end by this process alone;
    # of SIGINT, which a shell ignores for what it starts in the background, it takes notice again.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    while (status := process.poll()) is None:
        if asked or os.getppid() != parent:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            os.killpg(0, signal.SIGKILL)  # what it has started, and this process
        time.sleep(LOOK)
    if status < 0:
        print(f"ended by {signal.Signals(-status).name}", flush=True)
    return abs(status)


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
