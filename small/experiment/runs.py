"""A run of a small experiment: what it is asked to be, its folder, and what it goes on from.

    FOLDER/
        run.json                 what was asked for; the attempts: command, versions, commit, device, seconds
        a table in CSV           every result so far
        checkpoint.safetensors   all that the training resumes from, at the step of the table's last rows

Files are written atomically, the table before the tensors: a kill leaves the last checkpoint behind.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from llm.common.environment import environment, now
from llm.common.errors import UserError
from llm.common.files import with_attempts, write_file, write_json
from llm.common.lock import acquire_lock
from llm.common.processes import progress_bar

Row = TypeVar("Row", bound=tuple)  # a NamedTuple
Spec = TypeVar("Spec", bound="RunSpec")
Measured = TypeVar("Measured", bound=tuple)  # a NamedTuple of tensors

RECORD, TENSORS = "run.json", "checkpoint.safetensors"


@dataclass(frozen=True)
class RunSpec:
    """One run, as it is asked for. A subclass has the parts of run.json as its fields, `settings` among them."""

    program: ClassVar[str]  # as in "small.icl"
    label: str = field(default="", kw_only=True, compare=False)  # name of its folder

    @property
    def parts(self) -> dict[str, Any]:
        """The parts by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if not each.kw_only}

    def record(self) -> dict[str, dict[str, Any]]:
        """Return what run.json says of it, part -> name -> value; a part may have a `record` of its own."""
        return {
            name: part.record() if hasattr(part, "record") else dict(part) if isinstance(part, dict) else asdict(part)
            for name, part in self.parts.items()
        }

    def completed(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a record of an earlier version with the defaults of what settings have had since."""
        found = dict(record)
        for name, part in self.parts.items():
            if is_dataclass(part) and not hasattr(part, "record"):
                known = {each.name: each.default for each in fields(part) if each.default is not MISSING}
                found[name] = json.loads(json.dumps(known)) | record[name]
        return found

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the runs of a group share: every value but the seed."""
        return {name: value for part in self.record().values() for name, value in part.items() if name != "seed"}


@dataclass(frozen=True)
class SavedRun(Generic[Row]):
    """One run, as it is in its folder; a subclass is also a `RunSpec`."""

    folder: Path = field(kw_only=True)
    rows: Sequence[Row] = field(kw_only=True)

    @property
    def last(self) -> Row:
        """The last row."""
        return self.rows[-1]


def one_by_one(runs: Sequence[Spec]) -> Iterator[Spec]:
    """Yield runs one after the other, and print "n of m" and the name of each."""
    for number, run in enumerate(runs, start=1):
        print(f"{number} of {len(runs)}: {run.label}", flush=True)
        yield run


# ---- The folder ------------------------------------------------------------------------------------------------------


class TrainingFolder:
    """A training's folder, locked while it is open: no other process trains there.

    Args:
        path: made if it is not there.
        spec: what is asked for now.
        table: name of the CSV file.
        may_change: PART.NAME of what may differ between two attempts.

    Raises:
        UserError: on entry, if the folder is in use, not of a training, or of another one than is asked for.
    """

    def __init__(self, path: Path, spec: RunSpec, table: str, may_change: Collection[str] = ()) -> None:
        self.path, self.program, self.may_change, self.table = path, spec.program, may_change, path / table
        self._completed = spec.completed
        self._asked = json.loads(json.dumps(spec.record()))  # tuples are lists in the file

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give another --out")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / RECORD).is_file():
            left = {entry.name for entry in self.path.iterdir()} - {".lock", f"{RECORD}.part"}  # of a killed start
            if left:
                raise UserError(f"{self.path} is not empty and holds no training (no {RECORD}): give another --out")
        make_folder(self.path)
        try:
            self._lock = acquire_lock(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): give another --out") from error
        try:
            self._record = self._read_record()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _read_record(self) -> dict[str, Any]:
        if not (self.path / RECORD).is_file():
            return self._asked | {"attempts": []}
        record = read_record(self.path, self.program, self._asked)
        try:
            record = self._completed(record)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{self.path / RECORD} is of another version ({error}): give another --out") from error
        before, wanted = (self._flat(part) for part in (record, self._asked))
        different = [
            f"{key} ({before.get(key)} there, {value} asked for)"
            for key, value in wanted.items()
            if before.get(key) != value and key not in self.may_change
        ]
        if different:
            raise UserError(
                f"{self.path} holds runs with different settings ({', '.join(different)}): pass the same settings to "
                "resume them, or another --out"
            )
        return record | self._asked

    def _flat(self, record: dict[str, Any]) -> dict[str, Any]:
        return {f"{part}.{key}": value for part in self._asked for key, value in record[part].items()}

    def restore_into(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Copy the last checkpoint into the named tensors and return its step, 0 without a checkpoint.

        Raises:
            UserError: it is damaged, or of other tensors.
        """
        return copy_into(tensors, self.path) if (self.path / TENSORS).is_file() else 0

    def begin(self, step: int, facts: dict[str, Any]) -> None:
        """Begin an attempt at a step; `facts` go to its entry in run.json."""
        self._began = time.monotonic()
        self._record["attempts"].append({"began": now(), "from_step": step, "to_step": step, "seconds": 0.0, **facts})
        self._record["attempts"][-1] |= environment()
        write_json(self.path / RECORD, self._record)

    def write(self, rows: str, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Write the whole table as it is now, and the tensors to resume from.

        Raises:
            UserError: the disk is full; what was written before is complete.
        """
        write_file(self.table, rows)
        kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors}
        write_file(self.path / TENSORS, save(kept, {"step": str(step)}))
        self._record["attempts"][-1] |= {"to_step": step, "seconds": round(time.monotonic() - self._began, 1)}
        write_json(self.path / RECORD, self._record)


class TableFolder(TrainingFolder, Generic[Row]):
    """A training's folder whose table has a row for each measurement: a NamedTuple that begins with its step.

    Args:
        path, spec, table, may_change: see `TrainingFolder`.
        kind: of the rows. If they are not plain numbers, a subclass reads and writes them.
    """

    def __init__(
        self, path: Path, spec: RunSpec, table: str, kind: type[Row], may_change: Collection[str] = ()
    ) -> None:  # fmt: skip
        super().__init__(path, spec, table, may_change)
        self.kind = kind
        self.rows: list[Row] = []

    def read(self) -> list[Row]:
        """Return the whole table; UserError if there is none, or it is damaged."""
        return read_rows(self.table, self.kind)

    def as_text(self) -> str:
        """Return the rows as CSV."""
        return as_csv(self.kind._fields, self.rows)  # type: ignore[attr-defined]

    def done(self) -> int:
        """Return the step of the last checkpoint, 0 without one; UserError if it is damaged."""
        return checkpoint_step(self.path) if (self.path / TENSORS).is_file() else 0

    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Read the last checkpoint and the rows up to its step, and return the step; 0 without a checkpoint.

        Raises:
            UserError: it is damaged, or of other tensors.
        """
        step = self.restore_into(tensors)
        if (self.path / TENSORS).is_file():
            self.rows = [row for row in self.read() if row[0] <= step]
        return step

    @contextmanager
    def resumed(
        self, tensors: Iterable[tuple[str, Tensor]], command: str, device: str, steps: int, unit: str, quiet: bool,
        units: int = 1,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """Restore the last checkpoint, begin an attempt and show its progress: yields the step, and the bar.

        Args:
            tensors: see `restore`.
            command, device: of the attempt.
            steps: of the whole training; each counts as `units` of the bar, which it calls `unit`.
            quiet: without a progress bar.
        """
        done = self.restore(tensors)
        self.begin(done, {"command": command, "device": device})
        total = steps * units
        with progress_bar(total, done * units, self.path.name, f" {unit}", leave=False, disable=quiet) as bar:
            yield done, bar

    def keep(self, row: Row | None, step: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write what the training resumes from at a step, with the row of its measurement if there was one."""
        self.rows += [row] if row is not None else []
        self.write(self.as_text(), tensors, step)


def copy_into(tensors: Iterable[tuple[str, Tensor]], path: Path) -> int:
    """Copy the checkpoint of a training's folder into the named tensors and return its step.

    Raises:
        UserError: it is damaged, or of other tensors.
    """
    try:
        with safe_open(path / TENSORS, "pt") as file:
            step = int(file.metadata()["step"])
            with torch.no_grad():
                for name, tensor in tensors:
                    found = file.get_tensor(name)
                    if found.shape != tensor.shape or found.dtype != tensor.dtype:
                        raise ValueError(f"{name} is {found.dtype} of {tuple(found.shape)}, not of this training")
                    tensor.copy_(found)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path / TENSORS} cannot be read ({error}): delete it to train from the start") from error
    return step


def checkpoint_step(path: Path) -> int:
    """Return the step of the checkpoint of a training's folder; UserError if there is none, or it is damaged."""
    return copy_into((), path)


def read_record(path: Path, program: str, parts: Iterable[str]) -> dict[str, Any]:
    """Read run.json of a training with these parts; UserError if there is none."""
    try:
        record = with_attempts(dict(json.loads((path / RECORD).read_bytes())))
        if not isinstance(record["attempts"], list) or not all(isinstance(record[part], dict) for part in parts):
            raise ValueError("it is of something else")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no training of python -m {program} ({RECORD}: {error})") from error
    return record


def read_spec(path: Path, program: str, parts: Iterable[str], make: Callable[[dict[str, Any]], Spec]) -> Spec:
    """Make the spec of a run from its run.json; UserError if it is not of this version."""
    record = read_record(path, program, parts)
    try:
        return make(record)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path / RECORD} is of another version ({error}): train again with another --out") from error


def run_folders(out: Path, program: str, table: str) -> list[Path]:
    """Return the folders in `out` that have a table, in the order of their names; `out` may be one itself.

    Raises:
        UserError: there is none.
    """
    folders = [out] if (out / RECORD).is_file() else sorted(path.parent for path in out.glob(f"*/{RECORD}"))
    found = [folder for folder in folders if (folder / table).is_file()]
    if not found:
        raise UserError(f"{out} holds no run of python -m {program} with a result: train first")
    return found


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read a table whose rows are NamedTuples of numbers; see `read_table`."""
    numbers = kind.__annotations__.items()
    return read_table(path, lambda row: kind(**{name: number(row[name]) for name, number in numbers}))


def read_table(path: Path, read: Callable[[dict[str, str]], Row]) -> list[Row]:
    """Read the table at `path`, each row by `read`.

    Raises:
        UserError: it is not there yet, or damaged.
    """
    try:
        with path.open(newline="") as file:
            found = [read(row) for row in csv.DictReader(file)]
        if not found:
            raise ValueError("it has no rows")
        return found
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): train again with another --out") from error


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def make_folder(path: Path) -> None:
    """Make a folder for results; UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): give another --out") from error


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every weight the moments that Adam's first step would, so that a checkpoint can be copied into them."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            optimizer.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every weight and of its moments."""
    for name, weight in model.named_parameters():
        yield name, weight
        for kind, tensor in optimizer.state[weight].items():
            yield f"adam.{kind}.{name}", tensor


def measured_once(path: Path, kind: type[Measured], how: dict[str, Any], measure: Callable[[], Measured]) -> Measured:
    """Return the tensors of a file; if it is missing, incomplete or measured otherwise, measure and write them.

    Args:
        path: of a safetensors file.
        kind: a NamedTuple of tensors.
        how: all that they depend on, in terms of JSON.
        measure: makes them.
    """
    facts = {"how": json.dumps(how)}
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() == facts:
                return kind(*(file.get_tensor(name) for name in kind._fields))  # type: ignore[attr-defined]
    except (SafetensorError, OSError):  # none yet, or incomplete
        pass
    found = measure()
    tensors = {name: each.cpu().contiguous() for name, each in found._asdict().items()}  # type: ignore[attr-defined]
    write_file(path, save(tensors, facts))
    return kind(**tensors)
