"""The rows of tasks, fetched from the hub for machines without a network.

names -> each task's own definition -> `load_dataset` -> DIR/<task>/<split>.jsonl, DIR/<task>/source.json

`python -m evals run EXPORT --data DIR` then reads them. source.json says where the rows came from and holds the sha256
of each file. Files are written aside, source.json next, and then they are renamed: what agrees with it is whole.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.harness.catalogue import Definition, find
from evals.harness.results import locked
from evals.harness.tasks import ROLES, lacking, reads_own_files
from llm.common.errors import UserError
from llm.common.files import first_line, read_json, write_json
from llm.common.processes import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset


def prefetch(folder: Path, tasks: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Fetch the rows of `tasks` (see `catalogue`) to `folder`; a line on each, and what is lacking -> why.

    What is there and whole is not fetched again. UserError: `folder` is a file, or nothing could be fetched.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    found = find(tasks)
    lines, missing = [], dict(found.missing)
    with (
        locked(folder / ".prefetch.lock"),
        progress_bar(len(found.tasks), 0, "", "task", iterable=found.tasks.items()) as bar,
    ):
        for task, definition in bar:
            bar.set_description(task)
            try:
                lines.append(_fetch(definition, folder / task))
            except UserError as error:
                missing[task] = str(error)
    if not lines:
        raise UserError(lacking(missing))
    return lines, missing


def _fetch(definition: Definition, folder: Path) -> str:
    """One task's rows; returns what was done."""
    task, config = definition.name, definition.config
    if definition.rows is not None or reads_own_files(definition):
        return f"{task}: reads what is here, nothing to fetch"
    if "class" in config or not config.get("dataset_path"):
        raise UserError(f"the rows of {task} are read by code of lm-eval's own; run it where the hub can be reached")
    splits = list(dict.fromkeys(filter(None, [*(config.get(role) for role in ROLES), definition.examples])))
    source = {"dataset": config["dataset_path"], "name": config.get("dataset_name")}
    if arguments := _arguments(config):
        source["arguments"] = arguments
    kept = _read_source(folder)
    if kept is not None and {key: kept.get(key) for key in source} == source and whole(folder, splits):
        return f"{task}: there already, {_count(kept)}"
    if kept is None and (there := [split for split in splits if (folder / f"{split}.jsonl").exists()]):
        raise UserError(
            f"{folder / there[0]}.jsonl was put there by someone else (there is no source.json); move it away, or give "
            "another folder"
        )
    tables = _load(task, source, splits)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {split: _write(tables[split], folder / f"{split}.jsonl.part") for split in splits}
    written = source | {"datasets": version("datasets"), "splits": facts}
    write_json(folder / "source.json", written)
    for split in splits:
        (folder / f"{split}.jsonl.part").replace(folder / f"{split}.jsonl")
    return f"{task}: fetched {_count(written)}"


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a task gives to `load_dataset` beside path and name. No code of a data set is run (nor could it be, from
    datasets 4 on)."""
    return {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}


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


def _read_source(folder: Path) -> dict[str, Any] | None:
    """What source.json says; None where there is none."""
    path = folder / "source.json"
    if not path.is_file():
        return None
    try:
        return dict(read_json(path))
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete {folder} and fetch it again") from error


def _load(task: str, source: Mapping[str, Any], splits: Sequence[str]) -> "dict[str, Dataset]":
    """The data set that a task names, with all that it reads; as lm-eval itself asks for it."""
    from datasets import load_dataset

    path = source["dataset"]
    try:
        tables = load_dataset(path, source["name"], **source.get("arguments", {}))
    except Exception as error:  # datasets, huggingface_hub and httpx raise kinds of their own
        raise UserError(
            f"{path} cannot be fetched ({first_line(error)}); run this where the hub can be reached and HF_HUB_OFFLINE "
            "is not set, then copy the folder"
        ) from error
    if lacking_splits := [split for split in splits if split not in tables]:
        raise UserError(
            f"{path} has no {', '.join(lacking_splits)}, which {task} of lm-eval {version('lm_eval')} reads; install "
            "the lm-eval that this project was tested with"
        )
    return {split: tables[split] for split in splits}


def _write(table: "Dataset", file: Path) -> dict[str, Any]:
    """Write a table as JSON lines; returns its number of rows and the sha256 of the file."""
    sha256 = hashlib.sha256()
    with file.open("wb") as out:
        for row in table:
            try:
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            except TypeError as error:  # pictures, sound
                raise UserError(f"{file.parent.name} has rows that are no text ({error}); leave it out") from error
            sha256.update(line)
            out.write(line)
    return {"rows": len(table), "sha256": sha256.hexdigest()}


def _count(source: dict[str, Any]) -> str:
    return ", ".join(f"{facts['rows']:,} {split}" for split, facts in source["splits"].items())
