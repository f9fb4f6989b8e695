"""The folder of a training of a small experiment: what was asked for, a table of results, the tensors to go on from.

    FOLDER/
        run.json                 what was asked for; the lives: command, versions, commit, device, seconds
        a table in CSV           every result so far
        checkpoint.safetensors   all that the training goes on from, at the step of the table's last rows

Each file is written aside and renamed, the table before the tensors: what a kill leaves behind is the last checkpoint.
"""

import csv
import io
import json
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llm.common.environment import environment, now
from llm.common.errors import UserError
from llm.common.files import write_file, write_json
from llm.common.lock import acquire_lock

Row = TypeVar("Row", bound=tuple)  # a NamedTuple

RECORD, TENSORS = "run.json", "checkpoint.safetensors"


class TrainingFolder:
    """A training's folder, held while it is open: no other process trains there.

    Args:
        path: made where it is not there.
        program: the experiment's, as in "small.icl".
        asked: what is asked for now: part -> name -> value.
        may_change: PART.NAME of what may differ between two lives.
        table: name of the CSV file.

    Raises:
        UserError: on entry, where the folder is in use, not of a training, or of another one than is asked for.
    """

    def __init__(
        self, path: Path, program: str, asked: dict[str, dict[str, Any]], may_change: Collection[str], table: str
    ) -> None:
        self.path, self.program, self.may_change, self.table = path, program, may_change, path / table
        self._asked = json.loads(json.dumps(asked))  # tuples are lists in the file

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give another --out")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / RECORD).is_file():
            left = {entry.name for entry in self.path.iterdir()} - {".lock", f"{RECORD}.part"}  # of a killed start
            if left:
                raise UserError(f"{self.path} is not empty and holds no training (no {RECORD}): give another --out")
        made_folder(self.path)
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
            return self._asked | {"lives": []}
        record = read_record(self.path, self.program, self._asked)
        before, wanted = (self._flat(part) for part in (record, self._asked))
        different = [
            f"{key} ({before.get(key)} there, {value} asked for)"
            for key, value in wanted.items()
            if before.get(key) != value and key not in self.may_change
        ]
        if different:
            raise UserError(
                f"{self.path} holds other runs, they differ in {', '.join(different)}: give the same settings to go on "
                "with them, or another --out"
            )
        return record | self._asked

    def _flat(self, record: dict[str, Any]) -> dict[str, Any]:
        return {f"{part}.{key}": value for part in self._asked for key, value in record[part].items()}

    def restore_into(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Copy the last checkpoint into the named tensors; returns its step, 0 where there is none.

        Raises:
            UserError: it is damaged, or of other tensors.
        """
        return copy_into(tensors, self.path) if (self.path / TENSORS).is_file() else 0

    def begin(self, step: int, facts: dict[str, Any]) -> None:
        """A life begins at a step; `facts` go to its entry in run.json."""
        self._began = time.monotonic()
        self._record["lives"].append({"began": now(), "from_step": step, "to_step": step, "seconds": 0.0, **facts})
        self._record["lives"][-1] |= environment()
        write_json(self.path / RECORD, self._record)

    def write(self, rows: str, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """The whole table as it is now, and the tensors to go on from.

        Raises:
            UserError: the disk is full; what was written before is whole.
        """
        write_file(self.table, rows)
        kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors}
        write_file(self.path / TENSORS, save(kept, {"step": str(step)}))
        self._record["lives"][-1] |= {"to_step": step, "seconds": round(time.monotonic() - self._began, 1)}
        write_json(self.path / RECORD, self._record)


class TableFolder(TrainingFolder, Generic[Row]):
    """A training's folder whose table has a row for each measurement: a NamedTuple that begins with its step.

    Args:
        path, program, asked, table: as above; nothing may change between two lives.
        kind: of the rows. Where they are no plain numbers, a subclass says how they are read and written.
    """

    def __init__(self, path: Path, program: str, asked: dict[str, dict[str, Any]], table: str, kind: type[Row]) -> None:
        super().__init__(path, program, asked, (), table)
        self.kind = kind
        self.rows: list[Row] = []

    def read(self) -> list[Row]:
        """The whole table; UserError where there is none, or it is damaged."""
        return read_rows(self.table, self.kind)

    def as_text(self) -> str:
        """The rows as CSV."""
        return as_csv(self.kind._fields, self.rows)  # type: ignore[attr-defined]

    def done(self) -> int:
        """The step of the last checkpoint, 0 where there is none; UserError where it is damaged."""
        return checkpoint_step(self.path) if (self.path / TENSORS).is_file() else 0

    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Read the last checkpoint, and the rows up to its step, which is returned; 0 where there is none.

        Raises:
            UserError: it is damaged, or of other tensors.
        """
        step = self.restore_into(tensors)
        if (self.path / TENSORS).is_file():
            self.rows = [row for row in self.read() if row[0] <= step]
        return step

    def keep(self, row: Row | None, step: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """What there is to go on from at a step, with the row of its measurement where there was one."""
        self.rows += [row] if row is not None else []
        self.write(self.as_text(), tensors, step)


def copy_into(tensors: Iterable[tuple[str, Tensor]], path: Path) -> int:
    """Copy the checkpoint of a training's folder into the named tensors; returns its step.

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
    """The step of the checkpoint of a training's folder; UserError where there is none, or it is damaged."""
    return copy_into((), path)


def read_record(path: Path, program: str, parts: Iterable[str]) -> dict[str, Any]:
    """run.json of a training with these parts; UserError where there is none."""
    try:
        record = json.loads((path / RECORD).read_bytes())
        if not isinstance(record["lives"], list) or not all(isinstance(record[part], dict) for part in parts):
            raise ValueError("it is of something else")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no training of python -m {program} ({RECORD}: {error})") from error
    return record


def run_folders(out: Path, program: str, table: str) -> list[Path]:
    """The folders of the trainings in `out` that have a table, in the order of their names; `out` may be one itself.

    Raises:
        UserError: there is none.
    """
    folders = [out] if (out / RECORD).is_file() else sorted(path.parent for path in out.glob(f"*/{RECORD}"))
    found = [folder for folder in folders if (folder / table).is_file()]
    if not found:
        raise UserError(f"{out} holds no run of python -m {program} with a result: train first")
    return found


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The table at `path` as rows of a NamedTuple of numbers.

    Raises:
        UserError: it is not there yet, or damaged.
    """
    try:
        with path.open(newline="") as file:
            found = [
                kind(**{name: number(row[name]) for name, number in kind.__annotations__.items()})
                for row in csv.DictReader(file)
            ]
        if not found:
            raise ValueError("it has no rows")
        return found
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): train again with another --out") from error


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as text."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def made_folder(path: Path) -> None:
    """Make a folder for results; UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): give another --out") from error
