"""W&B and Lightning's other loggers, apart from training: their servers may be slow or away.

An entry of `run.loggers` ({class_path, init_args}) -> `check_entry`, before a run begins -> `make_logger`, on rank zero
-> `BackgroundLogger`, whose thread hands on the rows.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.loggers import Logger, WandbLogger

from ..common.errors import UserError
from ..common.files import first_line
from .loggers import Tell
from .options import sentence

KEYS = {"class_path", "init_args", "dict_kwargs"}  # jsonargparse's; the last for arguments that the class passes on
MOST_WAITING = 10_000  # rows of about 1 kB
LONGEST_PAUSE = 600.0  # seconds between two tries of a logger that fails
PATIENCE = 60.0  # seconds that the end of a run waits for a logger to take what waits


def check_entry(entry: dict[str, Any]) -> str | None:
    """What is wrong with {class_path, init_args}: a sentence, or None. Imports the class if a config may name it."""
    try:
        _parse(entry)
    except UserError as error:
        return str(error)
    return None


def make_logger(entry: dict[str, Any]) -> Logger:
    """The logger that an entry describes.

    Raises:
        UserError: its package is missing.
        Exception: whatever its constructor raises.
    """
    parser, given = _parse(entry)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before version 4.49
    try:
        made: Logger = instantiate(given).logger
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:  # jsonargparse wraps what a constructor raises
            cause = cause.__cause__ or cause.__context__ or cause
        if not isinstance(cause, ImportError):
            raise cause from error
        raise UserError(
            f"run.loggers: {entry['class_path']} needs a package that is not installed ({first_line(cause)}): install "
            "it or leave the logger out"
        ) from error
    return made


def _parse(entry: dict[str, Any]) -> tuple[ArgumentParser, Namespace]:
    if set(entry) - KEYS or not isinstance(entry.get("class_path"), str):
        raise UserError(f"run.loggers {entry} is not a logger: give a name, or class_path and init_args")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Logger, "logger", required=True)
    try:
        return parser, parser.parse_object({"logger": entry})
    except ArgumentError as error:
        skipped = ("Parser key", "Problem with given", "Given value", "Does not validate", "Subtypes", "Errors:")
        lines = [line.strip(" -") for line in str(error).splitlines()]
        text = " ".join(line for line in lines if not line.startswith(skipped) and "NoneType" not in line)
        raise UserError(f"run.loggers: {entry['class_path']}: {sentence(text, [])}") from error


class BackgroundLogger(Logger):
    """A logger whose calls run in a thread, so that it can neither stop nor delay training.

    Rows that the logger does not take wait in memory, at most `MOST_WAITING`, and are offered again. A row that it
    rejects while it takes a later one is dropped. The end of the run reports how many rows were lost.

    Args:
        name: for messages.
        make: makes the logger.
        settings: of the run, for the logger's hyperparameters.
        tell: `RunFolder.event`.

    Raises:
        UserError: the logger's package is missing.
    """

    version = ""

    def __init__(self, name: str, make: Callable[[], Logger], settings: dict[str, Any], tell: Tell) -> None:
        super().__init__()
        self.label, self.make, self.settings, self.tell = name, make, settings, tell
        self.lost = 0
        self._inner: Logger | None = None
        self._why = ""  # the last failure
        self._pause, self._next_try = 1.0, 0.0  # seconds, and on the clock of `time.monotonic`
        self._rows: deque[tuple[dict[str, float], int]] = deque()
        self._status: str | None = None  # of the run, once it has ended
        self._lock, self._news = threading.Lock(), threading.Event()
        self._guarded(self._make, 0)
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.label

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self._lock:
            self._rows.append((dict(metrics), step or 0))
            if len(self._rows) > MOST_WAITING:
                self._rows.popleft()
                self.lost += 1
        self._news.set()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: `_begin` hands on the whole config."""

    def finalize(self, status: str) -> None:
        """Wait at most `PATIENCE` seconds for the waiting rows; report how many are lost."""
        if self._status is not None:  # Lightning finalizes twice after an error
            return
        self._status = status
        self._news.set()
        self._thread.join(PATIENCE)
        with self._lock:
            lost, step = self.lost + len(self._rows), self._rows[0][1] if self._rows else 0
        if lost:
            why = self._why or f"it did not answer within {PATIENCE:.0f} s"
            print(f"the logger {self.label} lost {lost} rows ({why})", file=sys.stderr)
            self.tell("logger lost rows", step, logger=self.label, rows=lost, why=why)

    def _run(self) -> None:
        """The thread: hand on rows until the run has ended, then close the logger."""
        ended = False
        while not ended:
            self._news.wait()
            self._news.clear()
            ended = self._status is not None
            if ended or time.monotonic() >= self._next_try:
                self._hand_on()
        if self._inner is not None:
            self._guarded(self._close, 0)

    def _hand_on(self) -> None:
        """Offer the waiting rows in order, until one fails."""
        if self._inner is None and not (self._guarded(self._make, 0) and self._inner is not None):
            return
        if self.settings and not self._guarded(self._begin, 0):
            return
        log = self._inner.log_metrics
        while True:
            with self._lock:
                first, last = (self._rows[0], self._rows[-1]) if self._rows else (None, None)
            if first is None or last is None:
                return
            if self._guarded(lambda: log(*first), first[1]):  # noqa: B023  # called within this turn
                self._drop(first)
            elif last is not first and self._guarded(lambda: log(*last), last[1]):  # noqa: B023
                self.lost += not self._guarded(lambda: log(*first), first[1])  # noqa: B023  # the server may be back
                self._drop(first, last)
            else:
                return

    def _drop(self, *rows: tuple[dict[str, float], int]) -> None:
        """Remove rows from those that wait; the oldest may have been removed to make room."""
        with self._lock:
            self._rows = deque(row for row in self._rows if all(row is not each for each in rows))

    def _make(self) -> None:
        self._inner = self.make()

    def _begin(self) -> None:
        assert self._inner is not None
        self._inner.log_hyperparams(self.settings)
        self.settings = {}

    def _close(self) -> None:
        assert self._inner is not None
        self._inner.finalize(str(self._status))
        if isinstance(self._inner, WandbLogger):  # at exit W&B would wait for its server without limit
            self._inner.experiment.finish(exit_code=int(self._status != "success"))

    def _guarded(self, call: Callable[[], object], step: int) -> bool:
        """Whether a call of the logger succeeds. The first failure is reported; further ones delay the next try."""
        try:
            call()
        except UserError:
            raise
        except Exception as error:  # no logger ends a run
            if not self._why:
                said = f"the logger {self.label} fails ({first_line(error)}); its rows wait, training continues"
                print(said, file=sys.stderr)
                self.tell("logger failed", step, logger=self.label, why=first_line(error))
            self._why = first_line(error)
            self._next_try, self._pause = time.monotonic() + self._pause, min(2 * self._pause, LONGEST_PAUSE)
            return False
        self._pause, self._next_try = 1.0, 0.0
        return True
