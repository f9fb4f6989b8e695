"""The rows of the official tasks, fetched from the hub for machines without a network.

names -> lm-eval's definition of each -> `load_dataset` -> DIR/<task>/<split>.jsonl, DIR/<task>/source.json

`python -m evals run EXPORT --data DIR` then reads them. source.json says where the rows came from and holds the sha256
of each file. Files are written aside, source.json next, and then they are renamed: what agrees with it is whole.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from evals.harness.results import locked
from evals.harness.tasks import BUILT_IN, SPLITS, TASKS, official
from llm.common.errors import UserError
from llm.common.files import first_line, read_json, write_json

if TYPE_CHECKING:
    from datasets import Dataset


def prefetch(folder: Path, tasks: Sequence[str]) -> list[str]:
    """Fetch the rows of `tasks` to `folder`; a line on each. What is there and whole is not fetched again.

    UserError: no network, no such data set, a split or column that is not there, a file that is not of this command.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    lines = []
    with locked(folder / ".prefetch.lock"), tqdm(tasks, unit="task", file=sys.stderr) as bar:
        for task in bar:
            bar.set_description(task)
            lines.append(f"{task}: built in, nothing to fetch" if task in BUILT_IN else _fetch(task, folder / task))
    return lines


def _fetch(task: str, folder: Path) -> str:
    """One task's rows; returns what was done."""
    definition = official(task)
    splits = [split for split in SPLITS if definition.get(_key(split))]
    source = {"dataset": definition["dataset_path"], "name": definition.get("dataset_name")}
    kept = _read_source(folder)
    if kept is not None and {key: kept.get(key) for key in source} == source and whole(folder, splits):
        return f"{task}: there already, {_count(kept)}"
    if kept is None and (there := [split for split in splits if (folder / f"{split}.jsonl").exists()]):
        raise UserError(
            f"{folder / there[0]}.jsonl was put there by someone else (there is no source.json); move it away, or give "
            "another folder"
        )
    tables = _load(task, definition, splits)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {split: _write(tables[split], folder / f"{split}.jsonl.part") for split in splits}
    written = source | {"datasets": version("datasets"), "splits": facts}
    write_json(folder / "source.json", written)
    for split in splits:
        (folder / f"{split}.jsonl.part").replace(folder / f"{split}.jsonl")
    return f"{task}: fetched {_count(written)}"


def whole(folder: Path, splits: Sequence[str]) -> bool:
    """Whether each split's file is the one that source.json describes, to the byte."""
    kept = (_read_source(folder) or {}).get("splits", {})
    for split in splits:
        file = folder / f"{split}.jsonl"
        if split not in kept or not file.is_file():
            return False
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != kept[split].get("sha256"):
                return False
    return True


def _key(split: str) -> str:
    """What a task's definition calls a split."""
    return "training_split" if split == "train" else f"{split}_split"


def _read_source(folder: Path) -> dict[str, Any] | None:
    """What source.json says; None where there is none."""
    path = folder / "source.json"
    if not path.is_file():
        return None
    try:
        return dict(read_json(path))
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete {folder} and fetch it again") from error


def _load(task: str, definition: dict[str, Any], splits: Sequence[str]) -> "dict[str, Dataset]":
    """The data set that a task names, with all that it reads; as lm-eval itself asks for it."""
    from datasets import load_dataset

    path, name = definition["dataset_path"], definition.get("dataset_name")
    try:
        tables = load_dataset(path, name, **(definition.get("dataset_kwargs") or {}))
    except Exception as error:  # datasets, huggingface_hub and httpx raise kinds of their own
        raise UserError(
            f"{path} cannot be fetched ({first_line(error)}); run this where the hub can be reached and HF_HUB_OFFLINE "
            "is not set, then copy the folder"
        ) from error
    lacking = [split for split in splits if split not in tables] or [
        f"{split}.{column}"
        for split in splits
        for column in TASKS[task].columns
        if column not in tables[split].column_names
    ]
    if lacking:
        raise UserError(
            f"{path} has no {', '.join(lacking)}, which {task} of lm-eval {version('lm_eval')} reads; install the "
            "lm-eval that this project was tested with"
        )
    return {split: tables[split] for split in splits}


def _write(table: "Dataset", file: Path) -> dict[str, Any]:
    """Write a table as JSON lines; returns its number of rows and the sha256 of the file."""
    sha256 = hashlib.sha256()
    with file.open("wb") as out:
        for row in table:
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            sha256.update(line)
            out.write(line)
    return {"rows": len(table), "sha256": sha256.hexdigest()}


def _count(source: dict[str, Any]) -> str:
    return ", ".join(f"{facts['rows']:,} {split}" for split, facts in source["splits"].items())
