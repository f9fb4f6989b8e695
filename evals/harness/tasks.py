"""The multiple-choice tasks: lm-eval's own definitions, and where their rows lie.

suite, names, shots -> generated task YAML -> tasks loaded and checked -> `Prepared`

A task is lm-eval's own YAML, included by a generated one that only says where the rows lie: prompts, metrics and the
rule for few-shot examples stay official. Rows come from DIR/<task>/{train,validation,test}.jsonl with the hub's
columns (`python -m evals prefetch DIR` writes them), or from the hub; the built-in task `stories` is written from its
grammar at run time.

The rule for few-shot examples (`Task.fewshot_docs`): the training split, else the validation split. It is given both
only where they are not the evaluated one. An explicit `fewshot_split` would say the same and draw other examples:
without it lm-eval 0.4.13 draws one spare, and stock `lm_eval` on the hub's data would no longer give these numbers.

lm-eval and datasets are imported where rows are read: names and suites are known without them.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from llm.common.errors import UserError
from llm.common.files import first_line, write_file
from llm.data.stories import choice_items

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OFFICIAL = Path(str(getattr(find_spec("lm_eval"), "origin", ""))).parent / "tasks"
SPLITS = ("train", "validation", "test")


class TaskSource(NamedTuple):
    """Where a task is defined, the columns its prompt, choices and answer read, and what a figure calls it."""

    definition: Path
    columns: tuple[str, ...]
    title: str


TASKS = {
    "piqa": TaskSource(OFFICIAL / "piqa/piqa.yaml", ("goal", "sol1", "sol2", "label"), "PIQA"),
    "hellaswag": TaskSource(
        OFFICIAL / "hellaswag/hellaswag.yaml", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), "HellaSwag"
    ),
    "openbookqa": TaskSource(
        OFFICIAL / "openbookqa/openbookqa.yaml", ("question_stem", "choices", "answerKey"), "OpenBookQA"
    ),
    "arc_easy": TaskSource(OFFICIAL / "arc/arc_easy.yaml", ("question", "choices", "answerKey"), "ARC-Easy"),
    "arc_challenge": TaskSource(
        OFFICIAL / "arc/arc_challenge.yaml", ("question", "choices", "answerKey"), "ARC-Challenge"
    ),
    "stories": TaskSource(Path(__file__).parent / "task_files/stories.yaml", ("ctx", "endings", "label"), "stories"),
}
BUILT_IN = frozenset({"stories"})

# `stories`: seeds of its few-shot pool and of its evaluated items, and how many of each are made.
STORIES = {"train": (1_000_003, 200), "validation": (2_000_003, 1_000)}


SHARED = 0.01  # of the evaluated items may be among the examples: official splits repeat a few rows


class Suite(NamedTuple):
    """Tasks, and the numbers of examples before each item."""

    tasks: tuple[str, ...]
    shots: tuple[int, ...]


# paper: the tasks of Burns et al. 2025, Section 5.2 (single- and five-shot there), and no examples at all.
SUITES = {
    "paper": Suite(("arc_easy", "arc_challenge", "piqa", "openbookqa", "hellaswag"), (0, 1, 5)),
    "stories": Suite(("stories",), (0,)),
}


@dataclass(frozen=True)
class Protocol:
    """What is asked of every model. `limit`: only the first so many items of a task; `batch_size`: requests at once."""

    tasks: tuple[str, ...]
    shots: tuple[int, ...] = (0,)
    limit: int | None = None
    batch_size: int = 16


class Rows(NamedTuple):
    """sha256 of the evaluated rows and of those that examples are drawn from, as the task has them."""

    evaluated: str
    examples: str

    def used(self, shots: int) -> str:
        """The sha256 of all that a result at so many shots rests on."""
        return hashlib.sha256((self.evaluated + self.examples).encode()).hexdigest() if shots else self.evaluated


class Prepared(NamedTuple):
    """Tasks that were loaded and checked: a TaskManager that knows no others; their rows and versions by name."""

    manager: "TaskManager"
    rows: dict[str, Rows]
    versions: dict[str, Any]


def chosen(suite: str | None, tasks: Sequence[str] | None, shots: Sequence[int] | None) -> Suite:
    """What was asked for: the suite (None: `stories`), its tasks or shots replaced by those given, each once.

    UserError: a suite or a task that there is not.
    """
    if suite is not None and suite not in SUITES:
        raise UserError(f"there is no suite {suite}; the suites are {', '.join(SUITES)}")
    base = SUITES[suite or "stories"]
    names = base.tasks if tasks is None else tuple(dict.fromkeys(tasks))
    if unknown := [task for task in names if task not in TASKS]:
        raise UserError(f"there is no task {', '.join(unknown)}; the tasks are {', '.join(TASKS)}")
    if shots is None:
        return Suite(names, base.shots if suite is not None else (0,))
    return Suite(names, tuple(dict.fromkeys(shots)))


def official(task: str) -> dict[str, Any]:
    """lm-eval's definition of a task, what it includes filled in."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(TASKS[task].definition, resolve_func=False))


def prepare_tasks(protocol: Protocol, data: Path | None, work: Path) -> Prepared:
    """Write the tasks' YAML (and the rows of `stories`) under `work` and load each once, so that all can be refused
    before any model is read. `data` is a folder of local files, or None for the hub.

    UserError: an unknown task; a missing file, row or column; shots without a split to draw them from; an answer that
    is none of the choices.
    """
    from lm_eval.tasks import TaskManager

    chosen(None, protocol.tasks, protocol.shots)  # refuses an unknown one
    for task in protocol.tasks:
        definition: dict[str, Any] = {"include": str(TASKS[task].definition), "task": task}
        if task in BUILT_IN:
            definition |= _local_splits(task, _write_stories(work / "data" / task), work / "cache")
        elif data is not None:
            definition |= _local_splits(task, data / task, work / "cache")
        write_file(work / "tasks" / f"{task}.yaml", yaml.safe_dump(definition))
    manager = TaskManager(include_path=work / "tasks", include_defaults=False)
    prepared = Prepared(manager, {}, {})
    with quiet():
        for name in protocol.tasks:
            task = _load_task(manager, name)
            _check_task(task, protocol)
            prepared.rows[name] = Rows(_digest(task.eval_docs), _digest(task.sampler.df) if max(protocol.shots) else "")
            prepared.versions[name] = task.VERSION
    return prepared


def _local_splits(task: str, folder: Path, cache: Path) -> dict[str, Any]:
    """The part of a task's YAML that points it at local files: the evaluated split and, where there is one, the split
    that few-shot examples come from (train, else validation; never test, whose answers are often withheld)."""
    definition = official(task)
    evaluated = definition.get("test_split") or definition["validation_split"]
    if not (folder / f"{evaluated}.jsonl").is_file():
        raise UserError(
            f"{task} is evaluated on {folder / evaluated}.jsonl, which is not there; put the hub's rows there with "
            f"`python -m evals prefetch {folder.parent}`"
        )
    others = [
        split for split in ("train", "validation") if split != evaluated and (folder / f"{split}.jsonl").is_file()
    ]
    used = [evaluated, *others[:1]]
    files = {split: folder / f"{split}.jsonl" for split in SPLITS if split in used}
    for file in files.values():
        check_rows(file, TASKS[task].columns)
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {s: str(f.resolve()) for s, f in files.items()}, "cache_dir": str(cache)},
        "training_split": "train" if "train" in used else None,
        "validation_split": "validation" if "validation" in used else None,
        "test_split": "test" if "test" in used else None,
    }


def check_rows(file: Path, columns: Sequence[str]) -> None:
    """Refuse a .jsonl file with no rows, or with a row that is not an object with all of `columns`, by its line."""
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}, is not JSON; write one object a line") from error
            if missing := [column for column in columns if not isinstance(row, dict) or column not in row]:
                raise UserError(f"{file}, line {number}, lacks {', '.join(missing)}; give it the hub's columns")
    if not number:
        raise UserError(f"{file} is empty; put the hub's rows there, one JSON object a line")


def jsonl(rows: Iterable[Any]) -> str:
    """One JSON value a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _digest(rows: Iterable[Any]) -> str:
    """sha256 of rows in their order: the same for the hub's tables and for JSON lines of them."""
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return sha256.hexdigest()


def _write_stories(folder: Path) -> Path:
    """Write both splits of the built-in task; an example whose beginning is also evaluated is left out."""
    evaluated = list(choice_items(*STORIES["validation"]))
    seen = {item["ctx"] for item in evaluated}
    examples = [item for item in choice_items(*STORIES["train"]) if item["ctx"] not in seen]
    for split, items in (("train", examples), ("validation", evaluated)):
        write_file(folder / f"{split}.jsonl", jsonl(items))
    return folder


def _load_task(manager: "TaskManager", task: str) -> Any:
    """The task with its rows read; whatever `datasets` or the task's own code cannot read is a UserError."""
    try:
        return manager.load([task])["tasks"][task]
    except Exception as error:  # datasets, pyarrow, jinja and the task's process_docs raise kinds of their own
        raise UserError(
            f"the rows of {task} cannot be read ({first_line(error)}); give the hub's rows with --data DIR, which "
            "`python -m evals prefetch DIR` fetches"
        ) from error


def _check_task(task: Any, protocol: Protocol) -> None:
    """Refuse examples from the evaluated split, evaluated items among the examples, too few of them, and rows whose
    answer is none of the choices."""
    shots, config = max(protocol.shots), task.config
    pool = config.fewshot_split or config.training_split or config.validation_split  # lm-eval's rule
    if shots and pool == (config.test_split or config.validation_split):
        raise UserError(
            f"{task.task_name}, {shots}-shot, needs examples that are not evaluated and has only its {pool} split; "
            "put train.jsonl beside it, or ask for --shots 0"
        )
    if shots >= len(task.sampler.df):
        raise UserError(
            f"{task.task_name} has {len(task.sampler.df)} rows to draw {shots} examples from; ask for fewer --shots"
        )
    seen: list[set[str]] = []
    asked = [("evaluates", task.doc_iterator(limit=protocol.limit))]
    if shots:
        asked.append((f"draws examples from ({pool})", enumerate(task.fewshot_docs())))
    for what, rows in asked:
        seen.append(set())
        for number, row in rows:
            if not _has_answer(task, row):
                raise UserError(
                    f"row {number + 1} that {task.task_name} {what} has no answer among its choices; give a split with "
                    "answers"
                )
            seen[-1].add(_content(task, row))
    shared = len(set.intersection(*seen)) if shots else 0
    if shared > SHARED * len(seen[0]):
        raise UserError(
            f"{task.task_name}, {shots}-shot: {shared} of {len(seen[0])} evaluated items are among its examples too "
            f"(the {pool} split); give a {pool} split of other items, or ask for --shots 0"
        )
    if shared:
        print(f"{task.task_name}: {shared} of {len(seen[0])} evaluated items are among its examples", file=sys.stderr)


def _content(task: Any, row: Any) -> str:
    """What a model is shown of an item, whatever its row is called: prompt, choices and answer."""
    return json.dumps([task.doc_to_text(row), task.doc_to_choice(row), task.doc_to_target(row)], default=str)


def _has_answer(task: Any, row: Any) -> bool:
    try:
        return task.doc_to_target(row) in range(len(task.doc_to_choice(row)))
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
