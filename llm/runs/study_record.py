"""The record of a study, FOLDER/study.json, and how far each of its runs is. Without torch.

`llm study` writes it when the first run starts; whoever reads the runs of a study (status, a verdict) begins here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UserError
from ..common.files import read_json, write_json
from . import reading

RECORD = "study.json"
BENCH = "bench.json"  # step times of the arms, in the study's folder
NULL_ARM = "null"  # the baseline with other initial weights
SOURCE = "source"  # key of an arm in the YAML: the paper that it is from, and how it differs; for the page alone
BASE = "base: "  # before a change of the base config
TUNE, MAIN = "tune", "main"  # stages: the runs of a search, and those that are compared


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Args:
        name: SIZE/ARM-seedN-BUDGET, its folder below the study's.
        stage: "tune" or "main".
        size, arm, budget: their names.
        seed: seed_everything; runs of equal size, seed and budget are paired.
        steps: optimizer steps.
        tokens: D, seen over all of them.
        parameters: N, non-embedding, of the baseline at this size.
        flops: C, model FLOPs of a run from its first step.
        trunk: the run whose checkpoint of step `start` it starts from; None: it starts at step 0.
        value: of the tuned key, in the stage "tune".
    """

    name: str
    stage: str
    size: str
    arm: str
    budget: str
    seed: int
    steps: int
    tokens: int
    parameters: int
    flops: float
    trunk: str | None = None
    start: int = 0
    value: float | None = None

    @property
    def chain(self) -> str:
        """The run that it branches from, or itself: runs of a chain are trained one after the other."""
        return self.trunk or self.name

    @property
    def share(self) -> float:
        """The share of its steps that it trains itself."""
        return 1 - self.start / self.steps


@dataclass
class StudyRecord:
    """What is known of a study whose runs have begun.

    Args:
        folder: of the study.
        registered: "study" and "base" -> text of the YAML when the first run started, and "time".
        content: the YAML as it is now.
        changes: what was changed since, a sentence each.
        notes: what a reader of its result has to know, a sentence each.
        baseline, arms: names, the baseline among them.
        sizes: names, ascending.
        runs: all of them.
        choices: arm -> size -> the tuned value; empty until the stage "tune" is over.
    """

    folder: Path
    registered: dict[str, str]
    content: dict[str, Any]
    changes: list[str]
    notes: list[str]
    baseline: str
    arms: list[str]
    sizes: list[str]
    runs: list[StudyRun]
    choices: dict[str, dict[str, float]] = field(default_factory=dict)

    def write(self) -> None:
        """Write FOLDER/study.json, unless it says the same already."""
        content = asdict(self) | {"folder": str(self.folder)}
        path = self.folder / RECORD
        if not path.is_file() or read_json(path) != content:
            write_json(path, content)

    def state(self, run: StudyRun) -> RunState:
        """Return how far a run is. A branch whose trunk diverged before its first step has diverged with it."""
        state = run_state(self.folder, run)
        if state.state == "missing" and run.trunk is not None:
            trunk = self.state(next(other for other in self.runs if other.name == run.trunk))
            if trunk.state == "diverged" and trunk.step < run.start:
                return RunState("diverged", trunk.step, math.inf, f"with {run.trunk}, from which it branches")
        return state


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Args:
        state: done, diverged, running, failed, stopped, or missing.
        step: the last that left a row in metrics.csv.
        loss: the final validation loss of a run that is done; infinite if it diverged.
        reason: why it diverged, failed or stopped.
    """

    state: str
    step: int = 0
    loss: float | None = None
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether there is a result."""
        return self.state in ("done", "diverged")


def read_record(path: Path) -> StudyRecord:
    """Read the record of a study, given its YAML or its folder.

    Raises:
        UserError: none of its runs has been started, or the record cannot be read.
    """
    folder = path if path.is_dir() else _folder_of(path)
    if not (folder / RECORD).is_file():
        raise UserError(f"no run of {path} has been started: start them with python -m llm study run STUDY")
    content = read_json(folder / RECORD)
    try:
        known = {each.name: content[each.name] for each in fields(StudyRecord)}
        return StudyRecord(**known | {"folder": folder, "runs": [StudyRun(**run) for run in content["runs"]]})
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD} is not the record of a study ({error!r}): remove it and rerun") from error


def _folder_of(path: Path) -> Path:
    try:
        return Path(yaml.safe_load(path.read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{path} is neither the YAML of a study nor its folder: give one of them") from error


def changes_between(before: str, now: str, prefix: str = "") -> Iterator[str]:
    """Yield what differs between the YAML texts at registration and now, a sentence for each key."""
    old, new = (dict(reading.flat(yaml.safe_load(text))) for text in (before, now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{prefix}{key} was {old.get(key)} when the first run started, and is {new.get(key)} now"


def run_state(study: Path, run: StudyRun) -> RunState:
    """Return how far a run of the study in the folder `study` is."""
    folder = study / run.name
    summary = reading.summary(folder)
    if summary and summary.get("step") == run.steps:
        loss = summary.get("validation_loss")
        return RunState("done", run.steps, math.inf if loss is None or math.isnan(loss) else loss)
    rows = reading.metrics(folder)
    step = int(rows[-1]["step"]) if rows else 0
    if reading.lock(folder).held:
        return RunState("running", step)
    stopped = [event for event in reading.events(folder)[0] if event["event"] == "stopped"][-1:]
    for event in stopped:
        if event.get("diverged"):
            return RunState("diverged", event["step"], math.inf, str(event.get("why")))
    if error := last_error(log_of(study, run)):
        return RunState("failed", step, reason=error)
    if (folder / "run.json").is_file():
        return RunState("stopped", step, reason=str(stopped[0].get("why")) if stopped else "killed")
    return RunState("missing")


def log_of(study: Path, run: StudyRun) -> Path:
    """Return the file with the output of a run that `llm study run` started."""
    return study / "logs" / f"{run.name}.log"


def last_error(log: Path) -> str:
    """Return the error in the last line of a log; empty if there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    last = lines[-1] if lines else ""
    return last.removeprefix("error: ") if last.startswith("error: ") else ""
