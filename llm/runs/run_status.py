"""The status of a run, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Checkpoint:
    """A folder below checkpoints/.

    Args:
        name: of the folder.
        step: of the run.
        bytes: of its files.
        state: complete, torn, superseded (complete, of a line of the run that it went back from), being written,
            left by a kill.
        problems: what is wrong with it, a sentence each.
    """

    name: str
    step: int
    bytes: int
    state: str
    problems: list[str]


@dataclass
class Status:
    """What is known of a run; None is unknown.

    Args:
        run: its folder.
        state: finished, running, stopped, or unknown where nothing says whether a process trains in it.
        process: the id of that process, where it is of this machine.
        step: the last optimizer step that left a row or a checkpoint.
        max_steps: where the run ends.
        tokens: seen up to the last row.
        train_loss, train_loss_step: the last that was logged, in nats per token, and its step.
        validation_loss, validation_loss_step: the same of the validation split.
        tokens_per_second: median of the last rows of this attempt, without validation and checkpoints.
        steps_per_second: over the last steps of this attempt, with both.
        seconds: of training so far, in all attempts.
        written_seconds_ago: since the last row; in an attempt without rows, since its start.
        seconds_left, ends_at: until the last step at `steps_per_second`, and when that is; of a run that goes on.
        attempts: from_step, device and devices of each start of the run.
        skipped_steps: of the line of steps that the run is on.
        events: how many of each kind, over all attempts; a step that was made twice counts once.
        last_events: the last lines of events.jsonl, but for evaluations that went well.
        evaluated_step, accuracies: the newest exported step that was evaluated, and "TASK, N-shot" -> accuracy.
        checkpoints: by step, those that were set aside last.
        notes: what a reader should know beside it, a sentence each.
    """

    run: str
    state: str
    process: int | None
    step: int
    max_steps: int | None
    tokens: int | None
    train_loss: float | None
    train_loss_step: int | None
    validation_loss: float | None
    validation_loss_step: int | None
    tokens_per_second: float | None
    steps_per_second: float | None
    seconds: float | None
    written_seconds_ago: float | None
    seconds_left: float | None = None
    ends_at: str | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: int | None = None
    events: dict[str, int] = field(default_factory=dict)
    last_events: list[dict[str, Any]] = field(default_factory=list)
    evaluated_step: int | None = None
    accuracies: dict[str, float] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
