"""`python -m llm study status`: how far the runs of a study are. Without torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from ..common.tables import duration, text_table
from ..runs import reading
from ..runs.study_record import RunState, StudyRecord, StudyRun

STATES = ("done", "diverged", "running", "failed", "stopped", "missing")
TOLD = ("running", "diverged", "failed", "stopped")  # runs with a line of their own


def status_lines(record: StudyRecord) -> Iterator[str]:
    """Yield the status of a study, line by line."""
    states = {run: record.state(run) for run in record.runs}
    rows = []
    for (stage, size), group in groupby(record.runs, key=lambda run: (run.stage, run.size)):
        runs = list(group)
        counts = Counter(states[run].state for run in runs)
        left = seconds_left(record, runs)
        name = f"{size}, search" if stage == "tune" else size
        rows.append([name, str(len(runs)), *(str(counts[state] or "") for state in STATES), _in_words(left)])
    yield text_table(["size", "runs", *STATES, "compute left"], rows)
    for run, state in states.items():
        if state.state in TOLD:
            yield f"{run.name}: {_sentence(run, state)}"
    for arm, values in record.choices.items():
        yield f"chosen for {arm}: " + ", ".join(f"{value:g} at {size}" for size, value in values.items())
    yield from (f"note: {note}" for note in record.notes)
    yield from (f"changed: {change}" for change in record.changes)


def _sentence(run: StudyRun, state: RunState) -> str:
    where = f"step {state.step:,} of {run.steps:,}"
    return f"{state.state} at {where}" + (f": {state.reason}" if state.reason else "")


def _in_words(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return duration(seconds) if seconds else ""


def seconds_left(record: StudyRecord, runs: Sequence[StudyRun]) -> float | None:
    """Return the seconds of training that these runs still need, one after the other; None if nothing tells it.

    A size needs as long for a token as its other runs have needed so far, validation and checkpoints included.
    """
    total, paces = 0.0, {}
    for run in runs:
        state = record.state(run)
        if state.over:
            continue
        if run.size not in paces:
            paces[run.size] = _seconds_per_token(record, run.size)
        pace = paces[run.size]
        if pace is None:
            return None
        total += pace * run.tokens * (run.steps - max(state.step, run.start)) / run.steps
    return total


def _seconds_per_token(record: StudyRecord, size: str) -> float | None:
    paces = []
    for run in record.runs:
        if run.size == size and (rows := reading.metrics(record.folder / run.name)):
            seconds, tokens = (reading.number(rows[-1], name) for name in ("seconds", "tokens"))
            if seconds and tokens:
                paces.append(seconds / tokens)
    return statistics.median(paces) if paces else None


def tokens_per_second(record: StudyRecord, size: str) -> float | None:
    """Return the throughput of one device that the runs of a size measured; None if none did."""
    rates = []
    for run in record.runs:
        folder = record.folder / run.name
        if run.size != size or not (rows := reading.metrics(folder)):
            continue
        measured = [rate for row in rows if (rate := reading.number(row, "tokens_per_second"))]
        devices = reading.record(folder).get("attempts", [{}])[-1].get("devices") or 1
        rates += [statistics.median(measured) / devices] if measured else []
    return statistics.median(rates) if rates else None
