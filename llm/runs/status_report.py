"""The status of a run as a block of text: see `status.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..common.tables import clock, duration
from . import reading

if TYPE_CHECKING:
    from .run_status import Checkpoint, Status

WIDTH = 100  # columns
SHOWN = 10  # complete checkpoints; those with which something is wrong are all shown
SHOWABLE = ("skipped step", "loss spike")  # events whose batch says something


def block(status: Status) -> Iterator[str]:
    """The status of a run, some lines of at most `WIDTH` columns."""
    process = f" (process {status.process})" if status.state == "running" and status.process else ""
    yield f"{status.run}: {status.state}{process}"
    told = {
        "step": _progress(status),
        "loss": _losses(status),
        "evaluated": status.accuracies and f"step {status.evaluated_step:,}: {reading.in_percent(status.accuracies)}",
        "tokens": _tokens(status),
        "time": _time(status),
        "end": status.ends_at and f"in about {duration(status.seconds_left)}: {clock(status.ends_at)}",
        "attempts": _format_attempts(status.attempts),
        "events": _told_events(status),
        "checkpoints": _told_checkpoints(status.checkpoints),
    }
    for name, text in told.items():
        if text:
            yield _cut(f"  {name:13}{text}")
        if name == "events":
            yield from (_cut(f"    {line}") for line in _event_lines(status))
            yield from _batch_command(status)
        if name == "checkpoints":
            yield from (_cut(f"    {line}") for line in _checkpoint_lines(status.checkpoints))
    yield from (f"  note: {note}" for note in status.notes)


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _progress(status: Status) -> str:
    if not status.max_steps:
        return f"{status.step:,}"
    percent = int(1000 * status.step / status.max_steps) / 10  # 100% is the end alone
    return f"{status.step:,} of {status.max_steps:,}, {percent:g}%"


def _losses(status: Status) -> str:
    losses = (
        ("train", status.train_loss, status.train_loss_step),
        ("validation", status.validation_loss, status.validation_loss_step),
    )
    return ", ".join(f"{name} {loss:.4f} at step {step:,}" for name, loss, step in losses if loss is not None)


def _tokens(status: Status) -> str:
    seen = [f"{status.tokens:,} seen"] if status.tokens is not None else []
    return ", ".join(seen + ([f"{status.tokens_per_second:,.0f} a second"] if status.tokens_per_second else []))


def _time(status: Status) -> str:
    trained = [f"{duration(status.seconds)} of training"] if status.seconds is not None else []
    if status.written_seconds_ago is not None:
        new = status.step <= status.attempts[-1]["from_step"]
        what = "no row in this attempt yet, which started" if new else "last row"
        trained.append(f"{what} {duration(status.written_seconds_ago)} ago")
    return ", ".join(trained)


def _format_attempts(attempts: list[dict[str, Any]]) -> str:
    """The starts of a run, those in a row on one device together."""
    groups: list[tuple[str, list[str]]] = []
    for attempt in attempts:
        several = f"{attempt['devices']} x " if (attempt["devices"] or 1) > 1 else ""
        device = f"{several}{attempt['device'] or 'an unknown device'}"
        if not groups or groups[-1][0] != device:
            groups.append((device, []))
        groups[-1][1].append(f"{attempt['from_step']:,}")
    told = "; ".join(f"from step{'s' * (len(steps) > 1)} {_joined(steps)} on {device}" for device, steps in groups[-2:])
    return f"{len(attempts)}: {'... ' if len(groups) > 2 else ''}{told}"


def _joined(steps: list[str]) -> str:
    return ", ".join(steps if len(steps) <= 5 else [steps[0], "...", *steps[-3:]])


def _told_events(status: Status) -> str:
    """How many of each kind."""
    return ", ".join(f"{count:,} x {what}" for what, count in status.events.items())


def _event_lines(status: Status) -> Iterator[str]:
    for event in status.last_events:
        facts = [
            f"{name} {reading.fact(fact)}"
            for name, fact in event.items()
            if name not in ("time", "step", "event", "batch")
        ]
        when = f"{clock(str(event['time']))}  " if "time" in event else ""
        yield f"{when}step {event['step']:,}: {', '.join([event['event'], *facts])}"


def _batch_command(status: Status) -> Iterator[str]:
    """How to see the batch of the last event that has one; never cut."""
    steps = [event["step"] for event in status.last_events if event["event"] in SHOWABLE]
    if steps:
        yield f"    its text: python -m llm batch {status.run} --step {steps[-1]}"


def _told_checkpoints(checkpoints: list[Checkpoint]) -> str:
    if not checkpoints:
        return "none"
    counts = Counter(checkpoint.state for checkpoint in checkpoints)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{states}; {_bytes(sum(checkpoint.bytes for checkpoint in checkpoints))}"


def _checkpoint_lines(checkpoints: list[Checkpoint]) -> Iterator[str]:
    """The last few and all with which something is wrong."""
    whole = [checkpoint for checkpoint in checkpoints if checkpoint.state == "complete"]
    older = whole[:-SHOWN]
    if older:
        size = _bytes(sum(checkpoint.bytes for checkpoint in older))
        yield f"steps {older[0].step:,} to {older[-1].step:,}: {len(older)} complete, {size}"
    for checkpoint in checkpoints:
        if checkpoint not in older:
            problems = "".join(f"; {problem}" for problem in checkpoint.problems)
            aside = "superseded, " if checkpoint.state == "torn" and checkpoint.name.startswith("superseded") else ""
            size = _bytes(checkpoint.bytes)
            yield f"step {checkpoint.step:>9,}  {size:>10}  {aside}{checkpoint.state}{problems}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
