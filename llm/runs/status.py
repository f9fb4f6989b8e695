"""`python -m llm status RUN...`: progress of runs, whether they are still running, and what went wrong.

Stages: a run folder's records, rows, events, checkpoints and lock (`reading.py`) -> `Status` -> a block of text
(`status_report.py`), or JSON. Nothing is written and no lock is taken: a run does not notice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..common.errors import UserError, printable
from ..common.processes import progress_bar
from ..common.tables import duration
from . import reading
from .run_status import Checkpoint, Status
from .status_report import block

ROWS = 20  # the last rows of which tokens_per_second is the median
TURNS = 3  # of the longest of validate_every and checkpoint_every: the steps that the predicted end rests on
PATIENCE = 3  # a run that writes nothing for so many times its longest pause, and a minute, may hang
MINUTE = 60.0
EVENTS = 3  # the last ones that are shown
CHECKPOINT = re.compile(r"(?P<aside>superseded-)?step-(?P<step>\d+)(?P<partial>(\.replaced)?\.partial)?")


# ---- What is read ----------------------------------------------------------------------------------------------------


def status_of(run: Path, hashed: Callable[[int], object] | None = None) -> Status:
    """Read a run folder.

    Args:
        run: its path.
        hashed: compare the sha256 of every file of its checkpoints, and be told of the bytes read; None: their sizes.

    Raises:
        UserError: it is not a run folder.
    """
    record, summary, lock, rows = reading.record(run), reading.summary(run), reading.lock(run), reading.metrics(run)
    notes = []
    try:
        config = reading.config(run)
    except UserError as error:
        config = {}
        notes.append(str(error))
    attempts = _attempts(record)
    latest = [row for row in rows if int(row["step"]) >= attempts[-1]["from_step"]]
    window = _window(rows, latest, config)
    checkpoints = list(_checkpoints(run, lock.held, hashed))
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.state == "complete"]
    steps += [int(row["step"]) for row in rows[-1:]]
    told, unreadable = reading.events(run)
    if unreadable:
        notes.append(f"events.jsonl has {unreadable} line(s) that cannot be read")
    status = Status(
        run=str(run),
        state="finished" if summary else {True: "running", False: "stopped", None: "unknown"}[lock.held],
        process=lock.process,
        step=max([attempts[-1]["from_step"], *steps]),
        max_steps=_setting(config, "trainer", "max_steps"),
        tokens=_whole(_last(rows, "tokens")),
        train_loss=_last(rows, "train_loss"),
        train_loss_step=_last(rows, "train_loss", "step"),
        validation_loss=_last(rows, "validation_loss"),
        validation_loss_step=_last(rows, "validation_loss", "step"),
        tokens_per_second=_median(window, "tokens_per_second"),
        steps_per_second=_rate(window),
        seconds=_last(rows, "seconds"),
        written_seconds_ago=_age(run),
        attempts=attempts,
        skipped_steps=_whole(_last(rows, "skipped_steps")),
        events=dict(Counter(what for _, what in dict.fromkeys((each["step"], each["event"]) for each in told))),
        last_events=[event for event in told if event["event"] != "evaluated"][-EVENTS:],
        checkpoints=checkpoints,
        notes=notes,
    )
    if summary:  # all there is of a run without the csv logger
        status.tokens, status.seconds = (summary.get(name) for name in ("tokens_seen", "seconds"))
        status.validation_loss, status.validation_loss_step = (
            summary.get(name) for name in ("validation_loss", "step")
        )
    status.evaluated_step, status.accuracies = _evaluated(run)
    _predict(status, _pause(latest))
    return status


def _setting(config: dict[str, Any], section: str, name: str) -> int | None:
    """A whole number above 0 of the config; None where it has none there."""
    values = config.get(section)
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, int) and value > 0 else None


def _attempts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """From which step each attempt went on, and on what. What the first does not say of itself, run.json says of it."""
    unknown = {"from_step": 0, "device": None, "devices": None}
    listed = record.get("attempts") or [{}]
    if not (isinstance(listed, list) and all(isinstance(each, dict) for each in listed)):
        listed = [{}]
    first, *others = listed
    of_first = {name: record[name] for name in ("device", "devices") if name in record}
    attempts = [of_first | first, *others]
    return [unknown | {name: each[name] for name in unknown if name in each} for each in attempts]


def _last(rows: Sequence[dict[str, str]], name: str, what: str | None = None) -> Any:
    """The last value of a column, or what the column `what` says in the same row; None where there is none."""
    for row in reversed(rows):
        if (value := reading.number(row, name)) is not None:
            return value if what is None else int(row[what])
    return None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _window(rows: list[dict[str, str]], attempt: list[dict[str, str]], config: dict[str, Any]) -> list[dict[str, str]]:
    """The rows that say how fast the run is: those of this attempt, where it has two steps, and of its last few turns.

    A turn is the longer of the intervals between validations and between checkpoints: an end predicted from fewer steps
    would have them too often, or not at all.
    """
    rows = attempt if _several(attempt) else rows
    intervals = [_setting(config, "data", "validate_every"), _setting(config, "run", "checkpoint_every")]
    turn = max(filter(None, intervals), default=None)
    if not rows or not turn:
        return rows
    recent = [row for row in rows if int(row["step"]) >= int(rows[-1]["step"]) - TURNS * turn]
    return recent if _several(recent) else rows


def _several(rows: list[dict[str, str]]) -> bool:
    return len({row["step"] for row in rows}) > 1


def _median(rows: list[dict[str, str]], name: str) -> float | None:
    values = [value for row in rows if (value := reading.number(row, name)) is not None]
    return statistics.median(values[-ROWS:]) if values else None


def _clocked(rows: list[dict[str, str]]) -> list[tuple[int, float]]:
    """(step, seconds of training) of each row that has both."""
    return [(int(row["step"]), value) for row in rows if (value := reading.number(row, "seconds")) is not None]


def _rate(rows: list[dict[str, str]]) -> float | None:
    """Steps a second from the first of these rows to the last."""
    times = _clocked(rows)
    if not times:
        return None
    steps, seconds = times[-1][0] - times[0][0], times[-1][1] - times[0][1]
    return steps / seconds if steps > 0 and seconds > 0 else None


def _pause(rows: list[dict[str, str]]) -> float | None:
    """The longest time between two rows, in seconds."""
    times = [seconds for _, seconds in _clocked(rows)]
    return max((after - before for before, after in pairwise(times)), default=None)


def _age(run: Path) -> float | None:
    """Seconds since metrics.csv was written, by the clock of its file system; without one, since run.json was."""
    for name in ("metrics.csv", "run.json"):
        with contextlib.suppress(OSError):
            return max(0.0, time.time() - (run / name).stat().st_mtime)
    return None


def _predict(status: Status, pause: float | None) -> None:
    """When a run that goes on will end; a note where it seems to hang, or to go on elsewhere."""
    age = status.written_seconds_ago
    late = None if age is None or pause is None else age > PATIENCE * pause + MINUTE
    if status.state == "running" and late:
        status.notes.append(f"no row for {duration(age)}, and {duration(pause)} was the longest so far: it may hang")
    elif status.state == "stopped" and late is False and not _said_so(status):
        status.notes.append(
            "its last row is new: where machines do not see each other's locks, it may be running on another"
        )
    elif status.state == "unknown":
        status.notes.append("its lock cannot be seen from here: whether it is running, only the age of its rows says")
    going = status.state == "running" or (status.state == "unknown" and not late)
    if going and not late and status.max_steps and status.steps_per_second:
        left = (status.max_steps - status.step) / status.steps_per_second - (age or 0.0)
        status.seconds_left = max(0.0, left)
        ends = datetime.fromtimestamp(time.time() + status.seconds_left).astimezone()
        status.ends_at = ends.isoformat(timespec="minutes")


def _said_so(status: Status) -> bool:
    """Whether the last event is that a signal stopped the run."""
    return any(event["event"] == "stopped" and event["step"] >= status.step for event in status.last_events[-1:])


def _evaluated(run: Path) -> tuple[int | None, dict[str, float]]:
    """The newest exported step with accuracies, and those."""
    for path in reversed(reading.folders(run / "exports")):
        if accuracies := reading.accuracies(path):
            return reading.step_of(path), accuracies
    return None, {}


def _checkpoints(run: Path, held: bool | None, hashed: Callable[[int], object] | None) -> Iterator[Checkpoint]:
    """The checkpoints of a run, by step; those that were set aside come last."""
    found = []
    with contextlib.suppress(OSError):
        for path in (run / "checkpoints").iterdir():
            if match := CHECKPOINT.fullmatch(path.name):
                found.append((bool(match["aside"]), int(match["step"]), path, bool(match["partial"])))
    for aside, step, path, partial in sorted(found):
        problems = [] if partial else reading.checkpoint_problems(path, hashed)
        size = _size(path)
        if size is None:  # removed by the run since
            continue
        if partial:
            state = {True: "being written", False: "left by a kill", None: "being written or left by a kill"}[held]
        else:
            state = "torn" if problems else "superseded" if aside else "complete"
        yield Checkpoint(path.name, step, size, state, problems)


def _size(folder: Path) -> int | None:
    """Bytes of a folder's files; None where there is no such folder any more."""
    size = 0
    try:
        for file in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                size += file.stat().st_size
    except FileNotFoundError:
        return None
    return size


# ---- Command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm status`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--verify", action="store_true", help="hash every file of every checkpoint again")
    parser.add_argument("--json", action="store_true", help="print a JSON list, one object a run")
    parser.epilog = "example: python -m llm status runs/stories/classic runs/stories/values"


def run(args: argparse.Namespace) -> None:
    """Print the status of each run.

    Raises:
        UserError: one of the folders is none of a run; the others are shown first.
    """
    every: list[dict[str, Any]] = []
    wrong: list[str] = []
    for folder in args.runs:
        try:
            with _bar(folder, args.verify) as hashed:
                status = status_of(folder, hashed)
        except UserError as error:
            wrong.append(str(error))
            continue
        if not args.json:
            print(*([""] if every else []), *map(printable, block(status)), sep="\n")
        every.append(reading.finite(asdict(status)))
    if args.json:
        print(json.dumps(every, indent=1, allow_nan=False))
    if wrong:
        raise UserError("; ".join(wrong))


@contextlib.contextmanager
def _bar(folder: Path, verify: bool) -> Iterator[Callable[[int], object] | None]:
    """What is told of the bytes that were hashed, shown where it takes a while."""
    if not verify:
        yield None
        return
    size = sum(file.stat().st_size for file in (folder / "checkpoints").glob("*step-*/*") if file.is_file())
    with progress_bar(size, 0, f"verify {folder.name}", "B", unit_scale=True, delay=2, leave=False) as bar:
        yield bar.update
