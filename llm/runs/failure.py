"""`python -m llm.runs.failure LOGS ATTEMPT JOB fit ...`: why a Slurm job's attempt failed, and whether to try again.

Stages: the log of each rank since `slurm/rank.py` began this attempt, and what srun said -> one sentence for each rank
that says why -> the job's log (standard output) and the run's events.jsonl -> exit status 0 if the job is worth another
attempt, else 1. Called by `slurm/launch.sh`; imports no torch.

A process that NCCL's watchdog aborts, that the kernel kills, or that hangs cannot say so in events.jsonl itself.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..common.errors import UserError
from . import reading

# As `slurm/rank.py` and `exit_status` write them: perhaps after a progress bar, which ends in "]" and no new line.
BEGIN = re.compile(r"\d{4}-\d\d-\d\d \S+ attempt (\d+), rank \d+ on (\S+)$", re.M)
OURS = re.compile(r"(?:^|\])(error: .*)", re.M)
CAUSE = re.compile(
    r"^.*(?:[Ww]atchdog caught|NCCL error|CUDA error|HIP error|Fatal Python error).*"
    r"|^(?:\w+\.)*\w*(?:Error|Exception): .*",
    re.M,
)
PREFIX = re.compile(r"^\[rank\d+\]:\s?", re.M)  # torch's, before each line of a traceback
TIMED_OUT = re.compile(r"[Tt]imed out|operation timeout")  # gloo, NCCL: waited for another rank
LOST = re.compile(r"lost contact|closed by peer|remote process exited", re.I)  # another rank has gone
AFTER_SIGTERM = ", after SIGTERM"  # Slurm ends the ranks that are left, and wakes those that were stopped
ENDED = re.compile(r"^srun: error: (\S+: tasks? [^\n]*)", re.M)
SHOWN, WIDTH = 4, 400  # sentences; characters of each
EVENT = "attempt failed"


class Rank(NamedTuple):
    """One rank's end: its node, and the line of its log that says why, empty where none does."""

    number: int
    node: str
    why: str


class Failure(NamedTuple):
    """The end of an attempt: a sentence per line, and whether it is one that the user has to mend first."""

    sentences: list[str]
    of_the_user: bool


def read_ranks(logs: str, attempt: str) -> list[Rank]:
    """Return the ranks that took part in the attempt. `logs` is what their logs' names begin with."""
    found = []
    for path in Path(logs).parent.glob(f"{Path(logs).name}-rank*.log"):
        text = PREFIX.sub("", path.read_text(errors="replace"))  # a carriage return ends a line as well
        begins = [match for match in BEGIN.finditer(text) if match[1] == attempt]
        if begins:
            said = text[begins[-1].end() :]
            why = (OURS.findall(said) or [""])[-1] or (CAUSE.search(said) or [""])[0]
            found.append(Rank(int(path.stem.rpartition("-rank")[2]), begins[-1][2], why.strip()[:WIDTH]))
    return sorted(found)


def explain(ranks: Sequence[Rank], srun: str) -> Failure:
    """Return why the attempt ended.

    Args:
        ranks: of the attempt.
        srun: its messages; the first that names a task is of the rank that ended first.
    """
    groups: dict[str, list[Rank]] = {}
    for rank in ranks:
        if rank.why:
            groups.setdefault(re.sub(r"\d+", "#", rank.why), []).append(rank)
    sentences = [f"srun: {line}" for line in ENDED.findall(srun)[:1]]
    for same in list(groups.values())[:SHOWN]:
        others = f" (and {len(same) - 1} more ranks)" if len(same) > 1 else ""
        sentences.append(f"rank {same[0].number} on {same[0].node}{others}: {same[0].why}")
    if missed := missed_ranks(ranks):
        names = ", ".join(f"rank {rank.number} on {rank.node}" for rank in missed)
        sentences.append(f"the others waited for {names}: hung or killed")
    mistakes = [rank for rank in ranks if rank.why.startswith("error: ") and "lost contact" not in rank.why]
    last = (srun.strip() or "no message").splitlines()[-1].removeprefix("srun: ")
    return Failure(sentences or [f"srun: {last}"], bool(mistakes))


def missed_ranks(ranks: Sequence[Rank]) -> list[Rank]:
    """Return those that others waited for or lost; with gloo perhaps also some that lost one which had timed out.

    A rank that was stopped finds that it has waited too long as well, once Slurm wakes it to end it.
    """
    timed_out = [rank for rank in ranks if TIMED_OUT.search(rank.why)]
    if timed_out and len(timed_out) < len(ranks):
        return [rank for rank in ranks if rank not in timed_out]
    if timed_out:
        woken = [rank for rank in ranks if AFTER_SIGTERM in rank.why]
        return woken if len(woken) < len(ranks) else []
    return [rank for rank in ranks if not rank.why] if any(LOST.search(rank.why) for rank in ranks) else []


def run_folder(arguments: Sequence[str]) -> Path | None:
    """Return `run.folder` of a command line of `llm fit`, None where neither it nor its config names one."""
    folder, configured = None, None
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option == "--run.folder":
            folder = value
        elif option == "--config":
            try:
                configured = dict(reading.flat(yaml.safe_load(Path(value).read_text()))).get("run.folder", configured)
            except (OSError, ValueError, AttributeError, yaml.YAMLError):
                continue
    found = folder or configured
    return Path(found) if found else None


def last_attempt(run: Path) -> dict[str, Any]:
    """Return what run.json says of the run's last attempt, empty if it says nothing."""
    try:
        return dict(reading.record(run)["attempts"][-1])
    except (UserError, KeyError, IndexError, TypeError):
        return {}


def new_checkpoint(run: Path, last: dict[str, Any]) -> int | None:
    """Return the step of the newest complete checkpoint if attempt `last` got further than all before it, else None.

    A job that fails again without one would fail at the same place for ever.
    """
    before = [int(event.get("checkpoint") or 0) for event in reading.events(run)[0] if event["event"] == EVENT]
    complete = [path for path in reading.folders(run / "checkpoints") if not reading.checkpoint_problems(path)]
    newest = max(map(reading.step_of, complete), default=0)
    return newest if newest > max([int(last["from_step"]), *before]) else None


def record_event(run: Path, why: str, job: str, checkpoint: int | None) -> None:
    """Add the failure to events.jsonl."""
    steps = [int(row["step"]) for row in reading.metrics(run)]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    event = {"time": now, "step": max(steps, default=0), "event": EVENT, "why": why, "slurm_job": job}
    try:
        with (run / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(event | {"checkpoint": checkpoint}) + "\n")
    except OSError as error:
        print(f"{run}/events.jsonl: a line is missing ({error.strerror})")


def main(logs: str, attempt: str, job: str, arguments: Sequence[str]) -> int:
    """Print and record why the attempt failed; return 0 if the job is worth another attempt, else 1.

    Args:
        logs: what the names of the job's logs begin with.
        attempt: its number, how often Slurm has restarted the job.
        job: SLURM_JOB_ID.
        arguments: of `python -m llm`.
    """
    messages = Path(f"{logs}-srun")
    srun = messages.read_text(errors="replace") if messages.is_file() else ""
    failure = explain(read_ranks(logs, attempt), srun)
    for sentence in failure.sentences:
        print(f"failed: {sentence}")
    run = run_folder(arguments)
    last = last_attempt(run) if run else {}
    checkpoint = None
    if run and last.get("slurm_job") == job:  # else the job ended before it opened the run
        if last.get("slurm_restarts") == attempt:
            checkpoint = new_checkpoint(run, last)
        record_event(run, "; ".join(failure.sentences), job, checkpoint)
    if failure.of_the_user:
        print("not queued again: fix the error, then submit the job again to resume")
    elif checkpoint is None:
        print("not queued again: this attempt wrote no checkpoint beyond earlier ones; submit the job again to resume")
    return 0 if checkpoint is not None and not failure.of_the_user else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
