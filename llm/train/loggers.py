"""What keeps the measurements of a run: metrics.csv, and the same for TensorBoard.

A disk that is full ends no run here and loses no row: what finds no room waits in memory, and goes to the file with the
next row that does.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from ..common.errors import UserError
from ..common.files import first_line, write_file
from ..runs.reading import metrics

COLUMNS = (
    "step tokens train_loss perplexity learning_rate gradient_norm tokens_per_second mfu validation_loss seconds "
    "data_digest skipped_steps"
).split()

Tell = Callable[..., None]  # `RunFolder.event`


class GrowingFile:
    """A file that whole records are added to, from any thread.

    Args:
        path: of the file, which need not be there.
        tell: is told when records begin to wait for room, and when there is some; without one, standard error is.
    """

    def __init__(self, path: Path, tell: Tell | None = None) -> None:
        self.path, self.tell = path, tell
        self.waiting: list[bytes] = []
        self._full = False
        self._lock = threading.Lock()

    def add(self, record: bytes, step: int = 0) -> None:
        """Append a record, and before it those that have waited."""
        with self._lock:
            self.waiting.append(record)
            why = self._write()
        self.report(why, step)

    def flush(self, step: int = 0) -> None:
        """Append what has waited."""
        if self.waiting:
            with self._lock:
                why = self._write()
            self.report(why, step)

    def close(self) -> None:
        """Append what has waited; say what still finds no room, and is lost."""
        self.flush()
        if self.waiting:
            print(f"{self.path}: the last {len(self.waiting)} lines are lost, the disk is full", file=sys.stderr)

    def _write(self) -> str | None:
        """Write what waits, all or none. Returns why not."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("ab") as stream:
                stream.write(b"".join(self.waiting))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            return first_line(error)
        self.waiting.clear()
        return None

    def report(self, why: str | None, step: int) -> None:
        """Say that records wait, and why, or with None that none does; once each time."""
        if bool(why) == self._full:
            return
        self._full = bool(why)
        what = "lines wait in memory" if why else "waiting lines written"
        print(f"{self.path}: {what}{f' ({why})' if why else ''}", file=sys.stderr)
        if self.tell is not None:
            self.tell(what, step, file=self.path.name, **({"why": why} if why else {}))


class MetricsFile(Logger):
    """metrics.csv: one row a call, flushed at once; rows after `step` are dropped, a resumed run makes them again.

    `columns` come after `COLUMNS`, then those that an earlier attempt had in addition. A metric with a new name adds
    its column to the file.
    """

    name, version = "csv", ""

    def __init__(self, path: Path, step: int, columns: Sequence[str] = (), tell: Tell | None = None) -> None:
        super().__init__()
        self.path = path
        rows = metrics(path.parent)
        found = rows[0] if rows else ()
        self.columns = list(dict.fromkeys([*COLUMNS, *columns, *found]))
        self._file = GrowingFile(path, tell)
        self._rewrite([row for row in rows if int(row["step"]) <= step])
        self._late: list[dict[str, Any]] = []  # rows from the first with a new column on, for which there was no room

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if self._late or not row.keys() <= set(self.columns):
            self._late.append(row)
            self._add_columns(step or 0)
        else:
            self._file.add(self._as_line(row), step or 0)

    def sync(self) -> None:
        """Have the rows on the disk, before a checkpoint says that they need not be made again."""
        self._flush()
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def finalize(self, status: str) -> None:
        """Write what has waited for room."""
        self._flush()
        self._file.waiting += [self._as_line(row) for row in self._late]
        self._late.clear()
        self._file.close()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """config.yaml holds them."""

    def _flush(self) -> None:
        self._file.flush()
        if self._late:
            self._add_columns(0)

    def _add_columns(self, step: int) -> None:
        """Write the whole file with the columns of the late rows, and with these."""
        self._file.flush(step)
        if self._file.waiting:
            return
        before = self.columns
        self.columns = list(dict.fromkeys([*before, *(name for row in self._late for name in row)]))
        try:
            self._rewrite([*metrics(self.path.parent), *self._late])
        except UserError as error:
            self.columns = before
            self._file.report(first_line(error), step)
        else:
            self._late.clear()
            self._file.report(None, step)

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the whole file, atomically."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.path, text.getvalue())

    def _as_line(self, row: dict[str, Any]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, extrasaction="ignore").writerow(row)
        return text.getvalue().encode()


class TensorBoardFile(Logger):
    """Scalars for TensorBoard, a record each, in an event file of this attempt's own.

    TensorBoard's own writer raises from a thread of its where the disk is full, and loses what it held.

    Args:
        folder: of the event files.
        step: from which the run goes on: what an earlier attempt has logged beyond it is not shown.
    """

    name, version = "tensorboard", ""

    def __init__(self, folder: Path, step: int, tell: Tell | None = None) -> None:
        super().__init__()
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        earlier = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.[0-9]*")]
        order = max(
            [int(time.time()), *(number + 1 for number in earlier)]
        )  # they are read in the order of their names
        name = f"events.out.tfevents.{order:010d}.{platform.node()}.{os.getpid()}.0"
        self._file = GrowingFile(folder / name, tell)
        self._add(step + 1, file_version="brain.Event:2")
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in metrics.items():
            self._add(step or 0, summary=scalar(name, value))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """config.yaml holds them."""

    def finalize(self, status: str) -> None:
        """Write what has waited for room."""
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._file.add(record.getvalue(), step)
