"""A run folder and the exported steps in it, read while it may still be training.

RUN/run.json, config.yaml, metrics.csv, summary.json     as `python -m llm fit` leaves them
RUN/exports/step-00001000                                exported steps, each with its own evals/
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.exports import Export, open_export
from llm.common.errors import UserError
from llm.runs import reading

STEP = re.compile(r"step-(\d+)")


class Curve(NamedTuple):
    """Values over tokens, of equal length."""

    tokens: list[float]
    values: list[float]


@dataclass(frozen=True)
class ExportedRun:
    """The records of a run folder; `summary` is None until the run is finished."""

    folder: Path
    record: dict[str, Any]  # run.json
    config: dict[str, Any]  # config.yaml
    metrics: list[dict[str, str]]  # the rows of metrics.csv, as they stand there
    summary: dict[str, Any] | None  # summary.json

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def side(self) -> str:
        """The name without its seed: what runs of several seeds have in common. A study names its runs
        ARM-seedN-BUDGET, with a number N of its own."""
        name = re.sub(r"[-_ ]seed\d+-[^-]+$", "", self.name)
        return name.removesuffix(str(self.seed)).removesuffix("seed").rstrip("-_ ") or self.name

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    @property
    def last_step(self) -> int:
        """The step of the summary. For a finished run."""
        assert self.summary is not None
        return int(self.summary["step"])

    @property
    def shared_its_cores(self) -> bool:
        """Whether other processes used the cores while the run trained, so that its time says nothing about cost."""
        return any(event["event"] == reading.BUSY for event in reading.events(self.folder)[0])

    def weights_sha256(self) -> str | None:
        """The digest of the last step's weights; None where its checkpoint is not there any more."""
        try:
            return reading.weights_sha256(self.folder / f"checkpoints/step-{self.last_step:08d}")
        except (OSError, ValueError, KeyError):
            return None

    def curve(self, measure: str, over: str = "tokens") -> Curve:
        """One column of metrics.csv over another, where both were measured."""
        pairs = [(reading.number(row, over), reading.number(row, measure)) for row in self.metrics]
        points = [(at, value) for at, value in pairs if at is not None and value is not None]
        return Curve([at for at, _ in points], [value for _, value in points])


def read_run(folder: str | Path) -> ExportedRun:
    """The run in `folder`, finished or not. Raises UserError where it is not a run folder."""
    folder = Path(folder)
    record = reading.record(folder)
    if lacking := [key for key in ("name", "seed", "store_fingerprint") if key not in record]:
        raise UserError(f"{folder}/run.json lacks {', '.join(lacking)}; give a folder that `python -m llm fit` wrote")
    return ExportedRun(folder, record, reading.config(folder), reading.metrics(folder), reading.summary(folder))


def exported_steps(folder: str | Path, trusted: bool = False) -> dict[int, Export]:
    """The exported steps of a run by step, ascending: RUN/exports/step-N."""
    found = {}
    for path in (Path(folder) / "exports").glob("step-*"):
        if (match := STEP.fullmatch(path.name)) and (path / "config.json").is_file():
            found[int(match[1])] = open_export(path, trusted)
    return dict(sorted(found.items()))


def step_folder(folder: str | Path, step: int) -> Path:
    """Where step `step` of a run is exported to."""
    return Path(folder) / "exports" / f"step-{step:08d}"
