"""Tasks made ready: where their rows lie, and whether they can be asked at so many shots.

names -> definitions (`catalogue`) -> generated task YAML -> each task loaded and checked -> `Prepared`

A task is its own YAML, included by a generated one that only says where the rows lie: prompts, metrics and the rule for
few-shot examples stay official. Rows come from DIR/<task>/<split>.jsonl with the hub's columns (`python -m evals
prefetch DIR` writes them), or from where the task itself says; those of `stories`, of a text and of a token store are
written at run time. A task that cannot be had is left out with the reason, and the others are asked.

The rule for few-shot examples (`Task.fewshot_docs`): the split that the task names, else training, else validation. The
latter two are given only where they are not the evaluated one. An explicit `fewshot_split` would say the same and draw
other examples: without it lm-eval 0.4.13 draws one spare, and stock `lm_eval` on the hub's data would no longer give
these numbers.

lm-eval and datasets are imported where rows are read.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from evals.harness.catalogue import Definition, Group, find
from llm.common.errors import UserError
from llm.common.files import first_line, write_file

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

ROLES = ("training_split", "validation_split", "test_split")
READERS = ("json", "csv", "text", "parquet", "arrow", "xml")  # of `datasets`, for files that a YAML names
SHARED = 0.01  # of the evaluated items may be among the examples: official splits repeat a few rows


@dataclass(frozen=True)
class Protocol:
    """What is asked of every model.

    tasks: names and paths (see `catalogue`); shots: None asks each task at its own number; limit: only the first so
    many items of a task; batch_size: requests at once, or "auto".
    """

    tasks: tuple[str, ...]
    shots: tuple[int, ...] | None = (0,)
    limit: int | None = None
    batch_size: int | str = 16


class Rows(NamedTuple):
    """sha256 of the evaluated rows and of those that examples are drawn from, as the task has them."""

    evaluated: str
    examples: str

    def used(self, shots: int) -> str:
        """The sha256 of all that a result at so many shots rests on."""
        return hashlib.sha256((self.evaluated + self.examples).encode()).hexdigest() if shots else self.evaluated


class Prepared(NamedTuple):
    """Tasks that were loaded and checked.

    manager: a TaskManager that knows no others; keys: (task, shots) in the order asked; rows, versions, digests (of
    YAML that is not lm-eval's): by task; groups: those that were asked for; missing: what cannot be asked -> why.
    """

    manager: "TaskManager"
    keys: list[tuple[str, int]]
    rows: dict[str, Rows]
    versions: dict[str, Any]
    digests: dict[str, str]
    groups: dict[str, Group]
    missing: dict[str, str]


def prepare_tasks(protocol: Protocol, data: Path | None, work: Path) -> Prepared:
    """Write the tasks' YAML (and rows that are made here) under `work` and load each once, before any model is read.

    `data` is a folder of local files, or None for where the tasks say. What is missing is left out with the reason: an
    unknown task; a missing file, row or column; shots without a split to draw them from; an answer that is none of the
    choices. UserError: nothing is left.
    """
    from lm_eval.tasks import TaskManager

    found = find(protocol.tasks)
    missing = dict(found.missing)
    for name, definition in found.tasks.items():
        try:
            written = definition.yaml | _where_rows_lie(definition, data, protocol.limit, work)
        except UserError as error:
            missing[name] = str(error)
        else:
            write_file(work / "tasks" / f"{name}.yaml", yaml.safe_dump(written))
    with quiet():
        manager = TaskManager(include_path=work / "tasks", include_defaults=False)
        prepared = Prepared(manager, [], {}, {}, {}, found.groups, missing)
        for name, definition in found.tasks.items():
            if name not in missing:
                _prepare(definition, prepared, protocol)
    if not prepared.keys:
        raise UserError(lacking(missing))
    return prepared


def lacking(missing: Mapping[str, str]) -> str:
    """What was asked for and is not there, in one line: the reason of one, names and the first reason of several."""
    first, *others = missing
    if not others:
        return missing[first]
    named = ", ".join([first, *others[:9]]) + (f" and {len(others) - 9} more" if len(others) > 9 else "")
    return f"{len(missing)} of the tasks have no result: {named}; the first because {missing[first]}"


def _prepare(definition: Definition, prepared: Prepared, protocol: Protocol) -> None:
    """Load one task and note what it can be asked at."""
    name, shots = definition.name, definition.shots(protocol.shots)
    try:
        task = _load_task(prepared.manager, name)
        _check_answers(task, "evaluates", task.doc_iterator(limit=protocol.limit))
    except UserError as error:
        prepared.missing[name] = str(error)
        return
    usable: list[int] = []
    for number in shots:
        try:
            if number:
                _check_number(task, number)
            if number and not any(usable):  # once a task: both splits are read
                _check_pool(task, number, protocol.limit)
            usable.append(number)
        except UserError as error:
            prepared.missing[f"{name}, {number}-shot"] = str(error)
    prepared.keys.extend((name, number) for number in usable)
    examples = _digest(task.sampler.df) if any(usable) else ""
    prepared.rows[name] = Rows(_digest(task.eval_docs), examples)
    prepared.versions[name] = task.VERSION
    if definition.digest is not None:
        prepared.digests[name] = definition.digest


# ---- Where rows lie --------------------------------------------------------------------------------------------------


def _where_rows_lie(definition: Definition, data: Path | None, limit: int | None, work: Path) -> dict[str, Any]:
    """The part of a task's YAML that points it at local files; nothing where it stays with what it says itself."""
    if definition.rows is not None:
        folder = work / "data" / definition.name
        for split, rows in definition.rows(limit).items():
            write_file(folder / f"{split}.jsonl", jsonl(rows))
        return _local_splits(definition, folder, work / "cache")
    if data is None or reads_own_files(definition):
        return {}
    if "class" in definition.config:
        raise UserError(f"the rows of {definition.name} are read by code of lm-eval's own; leave --data out for it")
    return _local_splits(definition, data / definition.name, work / "cache")


def reads_own_files(definition: Definition) -> bool:
    """Whether a task makes its rows itself, or its YAML names files that are here."""
    path = definition.config.get("dataset_path")
    mine = definition.digest is not None and path is not None and Path(path).exists()
    return path in READERS or mine or "custom_dataset" in definition.config


def _local_splits(definition: Definition, folder: Path, cache: Path) -> dict[str, Any]:
    """The evaluated split and, where there is one, the split that few-shot examples come from: the one that the task
    names, else train, else validation; never another test split, whose answers are often withheld."""
    config, evaluated, named = definition.config, definition.evaluated, definition.examples
    if evaluated is None:
        raise UserError(f"{definition.name} has no test_split or validation_split to evaluate; name one in its YAML")
    for split in filter(None, (evaluated, named)):
        if not (folder / f"{split}.jsonl").is_file():
            what = "is evaluated on" if split == evaluated else "draws its examples from"
            raise UserError(
                f"{definition.name} {what} {folder / split}.jsonl, which is not there; put the hub's rows there with "
                f"`python -m evals prefetch {folder.parent}`"
            )
    roles = {"training_split": "train"} | {role: config[role] for role in ROLES if config.get(role)}
    others = [roles[role] for role in ROLES[:2] if role in roles and roles[role] != evaluated]
    others = [split for split in others if (folder / f"{split}.jsonl").is_file()][: 0 if named else 1]
    files = {split: folder / f"{split}.jsonl" for split in dict.fromkeys(filter(None, (*others, named, evaluated)))}
    columns: set[str] = set()
    for file in files.values():
        columns |= check_rows(file, columns)
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {s: str(f.resolve()) for s, f in files.items()}, "cache_dir": str(cache)},
        **{role: roles[role] if roles.get(role) in (*others, evaluated) else None for role in ROLES},
    }


def check_rows(file: Path, columns: Iterable[str] = ()) -> set[str]:
    """The columns of a .jsonl file. Refuse one with no rows, or with a row that is not an object with `columns` and
    those of the first row, by its line: `datasets` would fill in a None, and the prompt would read "None"."""
    known = set(columns)
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}, is not JSON; write one object a line") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}, is not a JSON object; write one object a line")
            known |= row.keys() if number == 1 else set()
            if absent := sorted(known - row.keys()):
                raise UserError(f"{file}, line {number}, lacks {', '.join(absent)}; give it the hub's columns")
    if not number:
        raise UserError(f"{file} is empty; put the hub's rows there, one JSON object a line")
    return known


def jsonl(rows: Iterable[Any]) -> str:
    """One JSON value a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _digest(rows: Iterable[Any]) -> str:
    """sha256 of rows in their order: the same for the hub's tables and for JSON lines of them."""
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return sha256.hexdigest()


# ---- Loading and checking --------------------------------------------------------------------------------------------


def _load_task(manager: "TaskManager", task: str) -> Any:
    """The task with its rows read; whatever `datasets` or the task's own code cannot read is a UserError."""
    try:
        return manager.load([task])["tasks"][task]
    except Exception as error:  # datasets, pyarrow, jinja and the task's process_docs raise kinds of their own
        raise UserError(
            f"the rows of {task} cannot be read ({first_line(error)}); give the hub's rows with --data DIR, which "
            "`python -m evals prefetch DIR` fetches"
        ) from error


def _pool(task: Any) -> str:
    """The split, or "samples" of the task's own, that examples come from, by lm-eval's rule."""
    config, own = task.config, task.fewshot_cfg.split or (task.fewshot_cfg.samples and "samples")
    return own or config.training_split or config.validation_split or config.test_split


def _check_number(task: Any, shots: int) -> None:
    """Refuse examples from the evaluated split, or too few of them."""
    config, pool = task.config, _pool(task)
    if pool == (config.test_split or config.validation_split):
        raise UserError(
            f"{task.task_name}, {shots}-shot, needs examples that are not evaluated and has only its {pool} split; "
            "put train.jsonl next to it, or ask for --shots 0"
        )
    spare = int(task.fewshot_cfg.split == config.test_split)  # see the module
    if shots + spare > len(task.sampler.df):
        raise UserError(
            f"{task.task_name} has {len(task.sampler.df)} rows to draw {shots} examples from; ask for fewer --shots"
        )


def _check_pool(task: Any, shots: int, limit: int | None) -> None:
    """Refuse examples without an answer, or equal to evaluated items."""
    pool, rows = _pool(task), list(task.fewshot_docs())
    if pool != "samples":
        _check_answers(task, f"draws examples from ({pool})", enumerate(rows))
    examples = {_content(task, row) for row in rows}
    items = [_content(task, row) for _, row in task.doc_iterator(limit=limit)]
    shared = sum(item in examples for item in items)
    if shared > SHARED * len(items):
        raise UserError(
            f"{task.task_name}, {shots}-shot: {shared} of {len(items)} evaluated items are among its examples too "
            f"(the {pool} split); give a {pool} split of other items, or ask for --shots 0"
        )
    if shared:
        print(f"{task.task_name}: {shared} of {len(items)} evaluated items are among its examples", file=sys.stderr)


def _content(task: Any, row: Any) -> str:
    """What a model is shown of an item, whatever its row is called: prompt, answer and any choices."""
    choices = task.doc_to_choice(row) if task.OUTPUT_TYPE == "multiple_choice" else None
    return json.dumps([task.doc_to_text(row), choices, task.doc_to_target(row)], default=str)


def _check_answers(task: Any, what: str, rows: Iterable[tuple[int, Any]]) -> None:
    """Refuse rows of a multiple-choice task whose answer is none of the choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, row in rows:
        if not _has_answer(task, row):
            raise UserError(
                f"row {number + 1} that {task.task_name} {what} has no answer among its choices; give a split with "
                "answers"
            )


def _has_answer(task: Any, row: Any) -> bool:
    """Whether the answer is a choice, or its number, or several of those; of a task with an input a choice, as
    WinoGrande, the number of the input is the answer."""
    try:
        choices = task.doc_to_choice(row)
        answer = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        answers = answer if isinstance(answer, list) else [answer]
        return bool(answers) and all(one in choices or one in range(len(choices)) for one in answers)
    except Exception:  # the task's own template finds no such choice in its own way
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Hide lm-eval's warnings about what is meant here (a loaded model, the shots that were asked for), one per item
    that is cut (they are counted), and the bars of `datasets`; lm-eval's own progress bar stays."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
