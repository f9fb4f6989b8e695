"""The run folder: everything one training run leaves behind.

RUN/
    tokenizer/      a copy of the store's, so that the run can be exported where the store is not
    config.yaml     the resolved config; `python -m llm fit --config RUN/config.yaml` is the same run
    run.json        name, seed, parameters, identity, store fingerprint, git commit, versions, device, and the attempts
                    (under "attempts"): when and where each started and from which step, with its commit and versions
    metrics.csv     one row a measurement (training) or validation
    tensorboard/    the same for TensorBoard
    checkpoints/    see `checkpoint.py`
    exports/        step-N, which transformers loads, with the results of its evaluations; see `evaluation.py`
    events.jsonl    what went wrong and was survived: steps skipped, loss spikes, checkpoints that could not be written
                    or were passed over, how an attempt ended; with the step, and the batch where there is one. And
                    which steps were evaluated
    summary.json    step, tokens_seen, validation_loss, seconds, parameters, peak_memory_bytes; written when the last
                    step is done
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger, WandbLogger

from ..common.environment import environment, now, process_info
from ..common.errors import UserError
from ..common.files import copy_files, write_file, write_json
from ..common.limits import config_problems
from ..common.lock import HEARTBEAT, LOCK, FolderLock, acquire_lock
from ..model import DecoderConfig
from ..runs import reading
from . import checkpoint as checkpoints
from .contradictions import of_interval
from .external_loggers import BackgroundLogger, check_entry, make_logger
from .loggers import GrowingFile, MetricsFile, TensorBoardFile

SUMMARY = ("step", "tokens_seen", "validation_loss", "seconds", "parameters", "peak_memory_bytes")
LOGGERS = ("csv", "tensorboard", "wandb")
ON_FULL_DISK = ("stop", "continue")
LOCKS = {LOCK, HEARTBEAT}
LEFT_OF_A_START = {*LOCKS, "run.json.part"}  # by an attempt that was killed before it wrote run.json


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
        loggers: any of csv, tensorboard, wandb; or a class of Lightning's loggers, {class_path, init_args}.
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
    loggers: list[str | dict] = field(default_factory=lambda: ["csv", "tensorboard"])
    peak_flops: float | None = None

    def check(self) -> None:
        """UserError naming every setting that cannot be used."""
        problems = config_problems("run", vars(self).get)
        problems += of_interval("run.keep_every", self.keep_every, self.checkpoint_every)
        if self.on_full_disk not in ON_FULL_DISK:
            problems.append(f"run.on_full_disk {self.on_full_disk!r} is unknown: give {' or '.join(ON_FULL_DISK)}")
        if unknown := sorted({each for each in self.loggers if isinstance(each, str)} - set(LOGGERS)):
            problems.append(f"run.loggers {unknown} is unknown: give any of {', '.join(LOGGERS)}")
        if "wandb" in self.loggers and importlib.util.find_spec("wandb") is None:
            problems.append("run.loggers asks for wandb, which is not installed: pip install wandb or leave it out")
        problems += filter(None, (check_entry(each) for each in self.loggers if isinstance(each, dict)))
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
        self._lock: FolderLock | None = None
        self._is_new = False
        self._events = GrowingFile(self.path / "events.jsonl")

    def acquire(self, resume: str | None) -> list[str]:
        """Lock the folder, and only then decide where the run starts: another attempt may have got further meanwhile.

        Args, returns and raises as `find`. A folder that is refused before is not touched.
        """
        self._is_new = not self.path.exists()
        if not self._is_new:
            self._check_folder(resume)
        self._acquire_lock()
        return self.find(resume)

    def find(self, resume: str | None) -> list[str]:
        """Decide where the run starts: `resumed` is a checkpoint or None. Returns sentences on damaged checkpoints.

        Args:
            resume: None for a new run in an empty folder; "auto" for the folder's newest checkpoint that verifies, or
                a new run where there is none; else the path of a checkpoint or of a run.

        Raises:
            UserError: the folder holds another run, or the checkpoint is of a different one.
        """
        skipped: list[str] = []
        occupied = self._check_folder(resume)
        if resume == "auto":
            checkpoints.recover_replaced(self.path / "checkpoints")
            self.resumed, skipped = checkpoints.newest(self.path / "checkpoints")
            if skipped and self.resumed is None:  # to begin again here would throw away what may still be repaired
                raise UserError(
                    f"no checkpoint of {self.path} can be used ({'; '.join(skipped)}): repair one, or give another "
                    "--run.folder"
                )
            if self.resumed is None and (left := self._left_of_checkpoints()):
                raise UserError(
                    f"{self.path} holds {left}, and none of its checkpoints: put them back into "
                    f"{self.path}/checkpoints, or give another --run.folder to start again from step 0"
                )
        elif resume is not None and (Path(resume) / "checkpoints").is_dir():
            self.resumed = checkpoints.find(Path(resume))
        elif resume is not None and (Path(resume) / "config.json").is_file() and not _is_checkpoint(Path(resume)):
            raise UserError(f"--resume {resume} is an exported model: give --init {resume} to start from its weights")
        elif resume is not None:
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
            fix = "give the same settings, or another --run.folder" if own else "give the same settings, or leave "
            fix += "" if own else "--resume out to start from step 0"
            self.check_identity(self.resumed, list(self.identity), fix)
        return skipped

    def _check_folder(self, resume: str | None) -> bool:
        """Whether the folder holds anything but a lock. Raises UserError where `resume` does not allow that."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run folder {self.path} is a file: give another --run.folder")
        occupied = self.path.is_dir() and any(path.name not in LEFT_OF_A_START for path in self.path.iterdir())
        if occupied and resume is None:
            raise UserError(
                f"run folder {self.path} is not empty: continue its run with --resume auto, or give another "
                "--run.folder"
            )
        known = (self.path / "run.json").is_file() or reading.folders(self.path / "checkpoints")
        if occupied and resume == "auto" and not known:
            raise UserError(f"{self.path} is not empty and holds no run (no run.json): give another --run.folder")
        return occupied

    def _left_of_checkpoints(self) -> str:
        """Name what only a run leaves that had a checkpoint. A run that was killed before its first left nothing."""
        record = self._record()
        left = [name for name in ("summary.json",) if (self.path / name).is_file()]
        left += ["exports"] if reading.folders(self.path / "exports") else []
        first = record.get("first_checkpoint")
        if first is not None or (
            not self.settings.start_from and any(attempt.get("from_step") for attempt in record["attempts"])
        ):
            left.append(f"the rows of a run with checkpoints{'' if first is None else f' from step {first} on'}")
        return " and ".join(left)

    def _record(self) -> dict[str, Any]:
        """The content of run.json; without attempts where it is not there or damaged, which is said."""
        try:
            record = reading.record(self.path)
            if isinstance(record.get("attempts"), list) and all(isinstance(each, dict) for each in record["attempts"]):
                return record
            problem = f"{self.path}/run.json lists no attempts"
        except UserError as error:
            problem = str(error).partition(":")[0]
        if (self.path / "run.json").exists():
            print(f"{problem}: it is written again, without earlier attempts", file=sys.stderr)
        return {"attempts": []}

    def check_identity(
        self, checkpoint: checkpoints.Checkpoint, keys: list[str], fix: str = "give the same settings"
    ) -> None:
        """UserError naming those of `keys` in which the checkpoint's run is another than this one, and the fix."""
        theirs, ours = (_with_defaults(identity) for identity in (checkpoint.state["identity"], self.identity))
        different = [
            f"{key} ({theirs.get(key)} there, {ours.get(key)} here)" for key in keys if theirs.get(key) != ours.get(key)
        ]
        if different:
            raise UserError(f"{checkpoint.path} belongs to another run, it differs in {', '.join(different)}: {fix}")

    def open(
        self,
        config_yaml: str,
        facts: dict[str, Any],
        tokenizer: Path | None = None,
        columns: Sequence[str] = ("epochs",),
        devices: int = 1,
        strategy: str = "auto",
    ) -> list[Logger]:
        """Write config.yaml and run.json, and return the loggers.

        A resumed run keeps its metrics up to the checkpoint; what was made beyond it is set aside; run.json gains an
        attempt. Settings that changed since are printed.

        Args:
            config_yaml: the resolved config.
            facts: what run.json says beside the identity and the environment.
            tokenizer: folder to copy.
            columns: of metrics.csv, beside those that every run has.
            devices: that this attempt runs on.
            strategy: how it is spread over them.
        """
        if self._lock is None:
            self._acquire_lock()
        step = self.resumed.step if self.resumed else 0
        external = self._external(yaml.safe_load(config_yaml) or {})
        for kind in ("checkpoints", "exports"):
            for aside in checkpoints.archive_after(self.path / kind, step):
                print(f"set aside: {aside}", file=sys.stderr)
        (self.path / "summary.json").unlink(missing_ok=True)
        self._print_changes(config_yaml)
        record = {"name": self.path.name, **facts, "identity": self.identity, **environment(), "attempts": []}
        record |= self._record() if self.resumed is not None else {}
        spread = {"devices": devices, "strategy": strategy}
        attempt = {"from_step": step, "began": now(), **spread, **process_info(), **environment()}
        write_json(self.path / "run.json", record | {"attempts": [*record["attempts"], attempt]})
        write_file(self.path / "config.yaml", config_yaml)
        if tokenizer is not None:
            copy_files(tokenizer, self.path / "tokenizer")
        if self.resumed is not None and self.settings.start_from and not (self.path / "metrics.csv").is_file():
            with contextlib.suppress(FileNotFoundError):
                write_file(self.path / "metrics.csv", (self.resumed.path.parents[1] / "metrics.csv").read_bytes())
        built_in: dict[str, Callable[[], Logger]] = {
            "csv": lambda: MetricsFile(self.path / "metrics.csv", step, columns, self.event),
            "tensorboard": lambda: TensorBoardFile(self.path / "tensorboard", step, self.event),
        }
        return [logger or built_in[str(name)]() for name, logger in external]

    def _external(self, settings: dict[str, Any]) -> list[tuple[str, Logger | None]]:
        """The names of run.loggers, with those loggers that are not this project's own.

        Raises:
            UserError: the package of one is missing.
        """
        found: list[tuple[str, Logger | None]] = []
        make: Callable[[], Logger]
        for entry in self.settings.loggers:
            if isinstance(entry, dict):
                name, make = str(entry["class_path"]).rpartition(".")[2], partial(make_logger, entry)
            elif entry == "wandb":
                name, make = entry, self._wandb
            else:
                found.append((entry, None))
                continue
            found.append((name, BackgroundLogger(name, make, settings, self.event)))
        return found

    def _wandb(self) -> Logger:
        own = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        return WandbLogger(name=self.path.name, save_dir=self.path, resume="allow", id=own)

    def _acquire_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be made ({error.strerror}): give another --run.folder") from error
        self._lock = acquire_lock(self.path)

    def event(self, what: str, step: int, **facts: Any) -> None:
        """Add a line to events.jsonl, in whichever attempt; none where the folder is not made yet.

        From any thread.
        """
        if self.path.is_dir():
            line = {"time": now(), "step": step, "event": what, **reading.finite(facts)}
            self._events.add(json.dumps(line).encode() + b"\n", step)

    def note_checkpoint(self, step: int) -> None:
        """Note in run.json that a checkpoint was written, the first time: a run that had one is not begun again."""
        with suppress(UserError):  # a full disk: the next checkpoint is noted
            record = reading.record(self.path)
            if "first_checkpoint" not in record:
                write_json(self.path / "run.json", record | {"first_checkpoint": step})

    def release(self) -> None:
        """Let go of the folder. One that was made for a run which was then refused is removed."""
        if self._lock is None:
            return
        self._events.close()
        if self._is_new and {path.name for path in self.path.iterdir()} <= LOCKS:
            with suppress(OSError):  # another process may have begun a run there this moment
                for name in LOCKS:
                    (self.path / name).unlink(missing_ok=True)
                self.path.rmdir()
        self._lock.close()
        self._lock = None

    def _print_changes(self, config_yaml: str) -> None:
        """Say which settings a resumed run changes."""
        if self.resumed is None or not (self.path / "config.yaml").is_file():
            return
        try:
            old = dict(reading.flat(reading.config(self.path)))
        except UserError as error:
            print(f"{str(error).rpartition(':')[0]}: it is written again", file=sys.stderr)
            return
        new = dict(reading.flat(yaml.safe_load(config_yaml)))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                print(f"changed: {key} was {old.get(key)}, is {new.get(key)}", file=sys.stderr)

    def close(self, state: dict[str, Any]) -> None:
        """Write summary.json from the last checkpoint's state: the run is finished."""
        summary = {name: state.get(name) for name in SUMMARY}  # checkpoints of older runs lack the memory
        write_json(self.path / "summary.json", summary)


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder has what only checkpoints have, if it is not whole."""
    return any((path / name).exists() for name in ("manifest.json", "state.json"))


def _with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity in which a decoder's switches are off that its version did not have yet."""
    defaults = DecoderConfig().to_diff_dict()
    defaults.pop("transformers_version", None)
    return identity | {"decoder": defaults | identity["decoder"]} if "decoder" in identity else identity
