"""The run folder: everything one training run leaves behind.

RUN/
    tokenizer/      a copy of the store's, so that the run can be exported where the store is not
    config.yaml     the resolved config; `python -m llm fit --config RUN/config.yaml` is the same run
    run.json        name, seed, parameters, identity, store fingerprint, git commit, versions, device, and the lives:
                    when and where each start was and from which step it went on, with its commit and versions
    metrics.csv     one row a measurement (training) or validation
    tensorboard/    the same for TensorBoard
    checkpoints/    see `checkpoint.py`
    exports/        step-N, which transformers loads, with the results of its evaluations; see `evaluation.py`
    events.jsonl    what went wrong and was survived: steps skipped, loss spikes, checkpoints that could not be written
                    or were passed over, how a life ended; with the step, and the batch where there is one. And which
                    steps were evaluated
    summary.json    step, tokens_seen, validation_loss, seconds, parameters, peak_memory_bytes; written when the last
                    step is done
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from ..common.environment import environment, now, process_info
from ..common.errors import UserError
from ..common.files import write_file
from ..common.lock import hold
from ..data.shard import write_json
from ..runs.reading import finite, flat, metrics, renamed
from . import checkpoint as checkpoints

COLUMNS = (
    "step tokens train_loss perplexity learning_rate gradient_norm tokens_per_second mfu validation_loss seconds "
    "data_digest skipped_steps"
).split()
SUMMARY = ("step", "tokens_seen", "validation_loss", "seconds", "parameters", "peak_memory_bytes")
LOGGERS = ("csv", "tensorboard", "wandb")
ON_FULL_DISK = ("stop", "continue")


@dataclass
class RunSettings:
    """Where a run is kept and what it leaves there.

    Args:
        folder: the run folder; its last part is the run's name.
        checkpoint_every: optimizer steps between checkpoints; the last step always has one.
        keep_checkpoints: how many of the newest stay.
        keep_every: those whose step is a multiple of this stay too, for good.
        keep_steps: checkpoints are written at these steps too, and stay for good: other runs start from them.
        start_from: the checkpoint, perhaps of another run, that this run starts from as long as it has none of its own.
            Its rows of metrics up to there become this run's.
        on_full_disk: "stop" where a checkpoint cannot be written, or "continue" training without it.
        max_consecutive_skips: steps in a row whose loss or gradient is not finite, which end the run; one is skipped.
        spike_threshold: a loss so many robust standard deviations above the last 128 is logged with its batch.
        loggers: any of csv, tensorboard, wandb.
        peak_flops: FLOP/s of one device at this precision, for the utilisation of a device that `flops.py` does not
            name.
    """

    folder: str = "runs/unnamed"
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int | None = None
    keep_steps: list[int] = field(default_factory=list)
    start_from: str | None = None
    on_full_disk: str = "stop"
    max_consecutive_skips: int = 5
    spike_threshold: float = 10.0
    loggers: list[str] = field(default_factory=lambda: ["csv", "tensorboard"])
    peak_flops: float | None = None

    def check(self) -> None:
        """UserError naming every setting that cannot be used."""
        problems = [
            f"run.{name} {getattr(self, name)} must be at least 1"
            for name in ("checkpoint_every", "keep_checkpoints", "keep_every", "max_consecutive_skips")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.keep_every and self.keep_every % max(1, self.checkpoint_every):
            problems.append(
                f"run.keep_every {self.keep_every} must be a multiple of run.checkpoint_every {self.checkpoint_every}"
            )
        if min(self.keep_steps, default=1) < 1:
            problems.append(f"run.keep_steps {self.keep_steps} must be steps of at least 1")
        if self.on_full_disk not in ON_FULL_DISK:
            problems.append(f"run.on_full_disk {self.on_full_disk!r} is unknown: give {' or '.join(ON_FULL_DISK)}")
        if not self.spike_threshold > 0:
            problems.append(f"run.spike_threshold {self.spike_threshold} must be above 0")
        if unknown := sorted(set(self.loggers) - set(LOGGERS)):
            problems.append(f"run.loggers {unknown} is unknown: give any of {', '.join(LOGGERS)}")
        if "wandb" in self.loggers and importlib.util.find_spec("wandb") is None:
            problems.append("run.loggers asks for wandb, which is not installed: pip install wandb or leave it out")
        if problems:
            raise UserError("; ".join(problems))


class RunFolder:
    """One run's folder. Rank zero finds, opens, writes and closes it; the others know its settings.

    Args:
        settings: see `RunSettings`.
        identity: what must be the same for a checkpoint to continue this run (data, order, model).
    """

    def __init__(self, settings: RunSettings, identity: dict[str, Any] | None = None) -> None:
        settings.check()
        self.settings, self.identity = settings, identity or {}
        self.path = Path(settings.folder)
        self.resumed: checkpoints.Checkpoint | None = None
        self._held: TextIO | None = None
        self._telling = threading.Lock()

    def find(self, resume: str | None) -> list[str]:
        """Decide where the run starts: `resumed` is a checkpoint or None. Returns sentences on torn checkpoints.

        Args:
            resume: None for a new run in an empty folder; "auto" for the folder's newest checkpoint that verifies, or
                a new run where there is none; else the path of a checkpoint or of a run.

        Raises:
            UserError: the folder holds another run, or the checkpoint is of a different one.
        """
        skipped: list[str] = []
        occupied = self.path.exists() and (not self.path.is_dir() or any(map(_is_content, self.path.iterdir())))
        if resume is None:
            if occupied:
                raise UserError(
                    f"run folder {self.path} is not empty: continue its run with --resume auto, or give another "
                    "--run.folder"
                )
        elif resume == "auto":
            if occupied and not (self.path / "run.json").is_file():
                raise UserError(f"{self.path} is not empty and holds no run (no run.json): give another --run.folder")
            self.resumed, skipped = checkpoints.newest(self.path / "checkpoints")
            if skipped and self.resumed is None:  # to begin anew here would throw away what may still be mended
                raise UserError(
                    f"no checkpoint of {self.path} can be used ({'; '.join(skipped)}): mend one, or give another "
                    "--run.folder"
                )
        elif (Path(resume) / "checkpoints").is_dir():
            self.resumed = checkpoints.find(Path(resume))
        else:
            self.resumed = checkpoints.read(Path(resume))
        branches = self.resumed is None and self.settings.start_from is not None
        if branches:
            self.resumed = checkpoints.read(Path(str(self.settings.start_from)))
        if self.resumed is not None:
            own = self.resumed.path.parent.resolve() == (self.path / "checkpoints").resolve()
            if occupied and not branches and not own:
                raise UserError(
                    f"{self.resumed.path} is not of the run in {self.path}: give an empty --run.folder to start "
                    "another run from it"
                )
            self.check_identity(self.resumed, list(self.identity))
        return skipped

    def check_identity(self, checkpoint: checkpoints.Checkpoint, keys: list[str]) -> None:
        """UserError naming those of `keys` in which the checkpoint's run is another than this one."""
        theirs = checkpoint.state["identity"]
        different = [
            f"{key} ({theirs.get(key)} there, {self.identity.get(key)} here)"
            for key in keys
            if theirs.get(key) != self.identity.get(key)
        ]
        if different:
            raise UserError(
                f"{checkpoint.path} belongs to another run, it differs in {', '.join(different)}: give the same "
                "settings or another --run.folder"
            )

    def open(
        self,
        config_yaml: str,
        facts: dict[str, Any],
        tokenizer: Path | None = None,
        columns: Sequence[str] = ("epochs",),
        devices: int = 1,
    ) -> list[Logger]:
        """Write config.yaml and run.json, and return the loggers.

        A resumed run keeps its metrics up to the checkpoint; what was made beyond it is set aside; run.json gains a
        life. Settings that changed since are printed.

        Args:
            config_yaml: the resolved config.
            facts: what run.json says beside the identity and the environment.
            tokenizer: folder to copy.
            columns: of metrics.csv, beside those that every run has.
            devices: that this life runs on.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.hold()
        step = self.resumed.step if self.resumed else 0
        for kind in ("checkpoints", "exports"):
            for aside in checkpoints.archive_after(self.path / kind, step):
                print(f"set aside: {aside}", file=sys.stderr)
        (self.path / "summary.json").unlink(missing_ok=True)
        self._print_changes(config_yaml)
        known = self.path / "run.json"
        record = {"name": self.path.name, **facts, "identity": self.identity, **environment(), "lives": []}
        if self.resumed is not None and known.is_file():
            record = json.loads(known.read_text())
        life = {"from_step": step, "began": now(), "devices": devices, **process_info(), **environment()}
        write_json(known, record | {"lives": [*record["lives"], life]})
        (self.path / "config.yaml").write_text(config_yaml)
        if tokenizer is not None:
            shutil.copytree(tokenizer, self.path / "tokenizer", dirs_exist_ok=True)
        if self.resumed is not None and self.settings.start_from and not (self.path / "metrics.csv").is_file():
            with contextlib.suppress(FileNotFoundError):
                write_file(self.path / "metrics.csv", (self.resumed.path.parents[1] / "metrics.csv").read_bytes())
        makers = {
            "csv": lambda: MetricsFile(self.path / "metrics.csv", step, columns),
            "tensorboard": lambda: TensorBoardLogger(
                self.path, name="tensorboard", version="", purge_step=step + 1 if self.resumed else None
            ),
            "wandb": lambda: WandbLogger(
                name=self.path.name,
                save_dir=self.path,
                resume="allow",
                id=hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16],
            ),
        }
        return [makers[name]() for name in self.settings.loggers]

    def hold(self) -> None:
        """Hold the folder until `release` or the end of the process; UserError where another process holds it."""
        self._held = hold(self.path)

    def event(self, what: str, step: int, **facts: Any) -> None:
        """Add a line to events.jsonl, whichever life of the run it is; none where the folder is not made yet.

        From any thread.
        """
        if not self.path.is_dir():
            return
        line = {"time": now(), "step": step, "event": what, **finite(facts)}
        with self._telling:
            _append(self.path / "events.jsonl", json.dumps(line) + "\n")

    def release(self) -> None:
        """Let go of the folder."""
        if self._held is not None:
            self._held.close()

    def _print_changes(self, config_yaml: str) -> None:
        """Say which settings a resumed run changes."""
        before = self.path / "config.yaml"
        if self.resumed is None or not before.is_file():
            return
        old, new = (dict(flat(renamed(yaml.safe_load(text)))) for text in (before.read_text(), config_yaml))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                print(f"changed: {key} was {old.get(key)}, is {new.get(key)}", file=sys.stderr)

    def close(self, state: dict[str, Any]) -> None:
        """Write summary.json from the last checkpoint's state: the run is finished."""
        summary = {name: state.get(name) for name in SUMMARY}  # checkpoints of older runs lack the memory
        write_json(self.path / "summary.json", summary)


class MetricsFile(Logger):
    """metrics.csv: one row a call, flushed at once; rows after `step` are dropped, a resumed run makes them again.

    `columns` come after `COLUMNS`, then those that an earlier attempt had in addition. A metric with a new name adds
    its column to the file.
    """

    name, version = "csv", ""

    def __init__(self, path: Path, step: int, columns: Sequence[str] = ()) -> None:
        super().__init__()
        self.path = path
        rows = metrics(path.parent)
        found = rows[0] if rows else ()
        self.columns = list(dict.fromkeys([*COLUMNS, *columns, *found]))
        self.without_column: set[str] = set()  # metrics for which there was no room on the disk
        self._write([row for row in rows if int(row["step"]) <= step], self.columns)

    def _write(self, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> None:
        """Write the whole file, atomically."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.path, text.getvalue())

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if new := [name for name in metrics if name not in self.columns and name not in self.without_column]:
            self._add_columns(new)
        row = io.StringIO(newline="")
        csv.DictWriter(row, self.columns, extrasaction="ignore").writerow({"step": step, **metrics})
        _append(self.path, row.getvalue())

    def _add_columns(self, new: Sequence[str]) -> None:
        try:
            self._write(metrics(self.path.parent), [*self.columns, *new])
        except UserError as error:  # a full disk: the rows go on without them
            print(f"{', '.join(new)} are not logged: {error}", file=sys.stderr)
            self.without_column.update(new)
        else:
            self.columns += new

    def sync(self) -> None:
        """Have the rows on the disk, before a checkpoint says that they need not be made again."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """config.yaml holds them."""


def _is_content(path: Path) -> bool:
    """Return whether a file shows that a folder is in use: not what an attempt leaves that was killed as it began."""
    return path.name not in (".lock", "run.json.partial")


def _append(path: Path, text: str) -> None:
    """Add whole lines to a file; where the disk is full, none, and training goes on to what can be done about it."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", newline="") as stream:
            stream.write(text)
    except OSError as error:
        print(f"{path}: a line is missing ({error.strerror})", file=sys.stderr)
        with contextlib.suppress(OSError):
            os.truncate(path, size)
