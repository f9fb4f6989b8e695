"""Multiple-choice accuracy through lm-eval, on official prompts and metrics.

names, shots, data -> generated task YAML -> tasks loaded and checked -> model -> lm-eval -> OUT/evals

A task is lm-eval's own YAML, included by a generated one that only says where the rows lie: prompts, metrics and the
rule for few-shot examples stay official. Rows come from DIR/<task>/{train,validation,test}.jsonl with the hub's
columns, or from the hub; the built-in task `stories` is written from its grammar at run time.

The rule for few-shot examples (`Task.fewshot_docs`): the training split, else the validation split. It is given both
only where they are not the evaluated one. An explicit `fewshot_split` would say the same and draw other examples:
without it lm-eval 0.4.13 draws one spare, and stock `lm_eval` on the hub's data would no longer give these numbers.
"""

import copy
import itertools
import json
import logging
import platform
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import lm_eval
import numpy as np
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from evals.models import (
    Export,
    LoadedModel,
    check_tokenizer,
    first_line,
    load_model,
    resolve_device,
    write_file,
    write_json,
)
from evals.plots import text_table
from llm.data.stories import choice_items
from llm.errors import UserError

OFFICIAL = Path(lm_eval.__file__).parent / "tasks"
SPLITS = ("train", "validation", "test")


class TaskSource(NamedTuple):
    """Where a task is defined, and the columns its prompt, choices and answer read."""

    definition: Path
    columns: tuple[str, ...]


TASKS = {
    "piqa": TaskSource(OFFICIAL / "piqa/piqa.yaml", ("goal", "sol1", "sol2", "label")),
    "hellaswag": TaskSource(
        OFFICIAL / "hellaswag/hellaswag.yaml", ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    "openbookqa": TaskSource(OFFICIAL / "openbookqa/openbookqa.yaml", ("question_stem", "choices", "answerKey")),
    "arc_easy": TaskSource(OFFICIAL / "arc/arc_easy.yaml", ("question", "choices", "answerKey")),
    "arc_challenge": TaskSource(OFFICIAL / "arc/arc_challenge.yaml", ("question", "choices", "answerKey")),
    "stories": TaskSource(Path(__file__).parent / "tasks/stories.yaml", ("ctx", "endings", "label")),
}
BUILT_IN = frozenset({"stories"})

# `stories`: seeds of its few-shot pool and of its evaluated items, and how many of each are made.
STORIES = {"train": (1_000_003, 200), "validation": (2_000_003, 1_000)}


@dataclass(frozen=True)
class Protocol:
    """What is asked of every model. `limit`: only the first so many items of a task; `batch_size`: requests at once."""

    tasks: tuple[str, ...]
    shots: tuple[int, ...] = (0,)
    limit: int | None = None
    batch_size: int = 16


class Evaluation(NamedTuple):
    """One task at one number of shots: the line for `lm_eval.json`, and a record per item."""

    result: dict[str, Any]
    samples: list[dict[str, Any]]


def run(
    exports: Sequence[Export], protocol: Protocol, data: Path | None, device: str = "auto", dtype: str = "auto"
) -> list[tuple[str, dict[str, Any]]]:
    """Evaluate every model on every task and number of shots; (model's name, result) of each, kept as `save` says.

    `data`: a folder of local files, or None for the hub. `device`, `dtype`: see `load_model`. All that can be refused
    without a model is refused before the first is loaded.
    """
    resolve_device(device)
    with TemporaryDirectory() as work:
        manager = prepare_tasks(protocol, data, Path(work))
        for export in exports:
            check_tokenizer(export)
        return [
            (export.name, result)
            for export in exports
            for result in _evaluate(load_model(export, device, dtype), manager, protocol)
        ]


def _evaluate(loaded: LoadedModel, manager: TaskManager, protocol: Protocol) -> list[dict[str, Any]]:
    """Evaluate one model on every task and number of shots, and keep each result as soon as it is there."""
    results = []
    for task, shots in itertools.product(protocol.tasks, protocol.shots):
        print(f"{loaded.export.name}: {task}, {shots}-shot", file=sys.stderr)  # lm-eval's own bar does not say
        evaluation = evaluate_task(loaded, manager, task, shots, protocol)
        save(loaded.export, evaluation)
        results.append(evaluation.result)
    return results


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def prepare_tasks(protocol: Protocol, data: Path | None, work: Path) -> TaskManager:
    """Write the tasks' YAML (and the rows of `stories`) under `work` and load each once, so that all can be refused
    before any model is read. `data` is a folder of local files, or None for the hub.

    Returns a TaskManager that knows these tasks and no others. UserError: an unknown task; a missing file, row or
    column; shots without a split to draw them from; an answer that is none of the choices.
    """
    if unknown := [task for task in protocol.tasks if task not in TASKS]:
        raise UserError(f"there is no task {', '.join(unknown)}; the tasks are {', '.join(TASKS)}")
    for task in protocol.tasks:
        definition: dict[str, Any] = {"include": str(TASKS[task].definition), "task": task}
        if task in BUILT_IN:
            definition |= _local_splits(task, _write_stories(work / "data" / task), work / "cache")
        elif data is not None:
            definition |= _local_splits(task, data / task, work / "cache")
        write_file(work / "tasks" / f"{task}.yaml", yaml.safe_dump(definition))
    manager = TaskManager(include_path=work / "tasks", include_defaults=False)
    with _quiet():
        for task in protocol.tasks:
            _check_task(_load_task(manager, task), protocol)
    return manager


def _local_splits(task: str, folder: Path, cache: Path) -> dict[str, Any]:
    """The part of a task's YAML that points it at local files: the evaluated split and, where there is one, the split
    that few-shot examples come from (train, else validation; never test, whose answers are often withheld)."""
    official = load_yaml(TASKS[task].definition, resolve_func=False)
    evaluated = official.get("test_split") or official["validation_split"]
    if not (folder / f"{evaluated}.jsonl").is_file():
        raise UserError(
            f"{task} is evaluated on {folder / evaluated}.jsonl, which is not there; put the hub's rows there"
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


def _write_stories(folder: Path) -> Path:
    """Write both splits of the built-in task; an example whose beginning is also evaluated is left out."""
    evaluated = list(choice_items(*STORIES["validation"]))
    seen = {item["ctx"] for item in evaluated}
    examples = [item for item in choice_items(*STORIES["train"]) if item["ctx"] not in seen]
    for split, items in (("train", examples), ("validation", evaluated)):
        write_file(folder / f"{split}.jsonl", _jsonl(items))
    return folder


def _load_task(manager: TaskManager, task: str) -> Any:
    """The task with its rows read; whatever `datasets` or the task's own code cannot read is a UserError."""
    try:
        return manager.load([task])["tasks"][task]
    except Exception as error:  # datasets, pyarrow, jinja and the task's process_docs raise kinds of their own
        raise UserError(
            f"the rows of {task} cannot be read ({first_line(error)}); give the hub's rows with --data DIR"
        ) from error


def _check_task(task: Any, protocol: Protocol) -> None:
    """Refuse examples from the evaluated split, or too few of them, and rows whose answer is none of the choices."""
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
    for number, row in task.doc_iterator(limit=protocol.limit):
        if task.doc_to_target(row) not in range(len(task.doc_to_choice(row))):
            raise UserError(
                f"row {number + 1} that {task.task_name} evaluates has no answer among its choices; "
                "give a split with answers"
            )


# ---- Evaluation ------------------------------------------------------------------------------------------------------


class CountingHFLM(HFLM):
    """lm-eval's own model; it also counts what lm-eval cuts silently, and says what lm-eval only asserts."""

    truncated = 0  # requests whose beginning did not fit into the model's context

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        for (_, text), prompt, choice in requests:
            if len(choice) > self.max_length:
                raise UserError(
                    f"the choice {text[:60]!r} has {len(choice)} tokens and the model's context {self.max_length}; "
                    "leave this task out for this model"
                )
            self.truncated += len(prompt) + len(choice) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)


def evaluate_task(loaded: LoadedModel, manager: TaskManager, task: str, shots: int, protocol: Protocol) -> Evaluation:
    """One task at one number of shots, on a loaded model, through `lm_eval.simple_evaluate`.

    The model's training mode and the global random states (Python, numpy, torch) are afterwards what they were.
    """
    half = loaded.model.dtype in (torch.bfloat16, torch.float16)
    with _preserved(loaded.model), _quiet():
        lm = CountingHFLM(
            pretrained=loaded.model,
            tokenizer=copy.deepcopy(loaded.tokenizer),  # lm-eval gives it a padding token
            batch_size=protocol.batch_size,
            softmax_dtype="float32" if half else None,  # a log-softmax in bf16 has two digits
        )
        output = lm_eval.simple_evaluate(
            lm, tasks=[task], num_fewshot=shots, limit=protocol.limit, task_manager=manager, log_samples=True
        )
    assert output is not None  # None is for ranks other than 0
    scores, samples = output["results"][task], [_sample(sample) for sample in output["samples"][task]]
    result = {
        "task": task,
        "shots": shots,
        **{name: _number(scores[f"{name},none"]) for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")},
        "n": len(samples),
        "limit": protocol.limit,
        "dtype": loaded.dtype,
        "device": loaded.device,
        "batch_size": protocol.batch_size,
        "truncated": lm.truncated,
        "task_version": output["versions"][task],
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch")}
        | {"python": platform.python_version()},
    }
    return Evaluation(result, samples)


def _number(score: float | str) -> float | None:
    """A score; lm-eval says "N/A" for the standard error of a single item."""
    return score if isinstance(score, float) else None


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What a paired test needs of one item. `loglikelihoods`: nats, one a choice, summed over the choice's tokens;
    equal hashes mean that two models saw the same item and the same prompt, examples included."""
    return {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "target": sample["target"],
        "loglikelihoods": [loglikelihood for loglikelihood, _ in sample["filtered_resps"]],
        "acc": sample["acc"],
        "acc_norm": sample["acc_norm"],
    }


@contextmanager
def _preserved(model: torch.nn.Module) -> Iterator[None]:
    """HFLM leaves the model in evaluation mode and simple_evaluate seeds the global generators: undo both."""
    training = [(module, module.training) for module in model.modules()]
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's warnings about what is meant here (a loaded model, the shots that were asked for), one per item
    that is cut (they are counted), and the bars of `datasets`; lm-eval's own progress bar stays."""
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


# ---- Results ---------------------------------------------------------------------------------------------------------


def save(export: Export, evaluation: Evaluation) -> None:
    """Put a result in EXPORT/evals/lm_eval.json, in the place of an older one of the same task and shots, and its items
    in EXPORT/evals/samples/<task>-<shots>shot.jsonl (first, so that a result never stands there without them)."""
    key = (evaluation.result["task"], evaluation.result["shots"])
    write_file(export.results / "samples" / f"{key[0]}-{key[1]}shot.jsonl", _jsonl(evaluation.samples))
    kept = [result for result in export.result("lm_eval", []) if (result["task"], result["shots"]) != key]
    write_json(
        export.results / "lm_eval.json", sorted([*kept, evaluation.result], key=lambda r: (r["task"], r["shots"]))
    )


def format_results(results: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """A table of (model, result) in percent, with standard errors over items."""

    def percent(result: dict[str, Any], metric: str) -> str:
        error = result[f"{metric}_stderr"]
        return f"{100 * result[metric]:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")

    header = ["model", "task", "shots", "items", "cut", "acc %", "acc_norm %"]
    rows = [
        [
            *(model, result["task"], str(result["shots"]), str(result["n"]), str(result["truncated"])),
            *(percent(result, metric) for metric in ("acc", "acc_norm")),
        ]
        for model, result in results
    ]
    return text_table(header, rows)


def _jsonl(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
