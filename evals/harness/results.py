"""Results of tasks beside the model they are of, and which of them need not be made again.

    EXPORT/evals/lm_eval.json                       a list of results, one for each task and number of shots
    EXPORT/evals/samples/<task>-<shots>shot.jsonl   a record for each of a result's items
    EXPORT/evals/groups.json                        the tasks of each group that was asked for, and their weighting

A result carries all that it rests on (`harness.conditions`, `fingerprint`): where these are the same, so would be the
numbers.
"""

import fcntl
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.exports import Export
from evals.harness import metrics
from evals.harness.catalogue import Group
from evals.harness.tasks import jsonl
from llm.common.errors import UserError
from llm.common.files import read_json, write_file, write_json
from llm.common.lock import HEARTBEAT, NO_LOCKS, Heartbeat
from llm.common.tables import text_table

Result = dict[str, Any]
Key = tuple[str, int]  # task, shots

# Files beside the weights that decide on the numbers: sizes, code, tokenizer and trained context.
FILES = ("config.json", "hippoformer.json", "*.py", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
         "vocab.*", "merges.txt", "*.model")  # fmt: skip
# Fields of a task's rows that several items may share: reading comprehension, and HellaSwag's videos and articles.
PASSAGES = ("passage", "paragraph", "article", "context", "story", "source_id")
# What two results of one task and number of shots must share to stand in one figure.
ALIKE = ("n", "limit", "batch_size", "dtype", "device", "task_version", "versions", "rows", "definition")


class Evaluation(NamedTuple):
    """One task at one number of shots: the line for `lm_eval.json`, and a record per item."""

    result: Result
    samples: list[dict[str, Any]]


def key_of(result: Mapping[str, Any]) -> Key:
    return result["task"], result["shots"]


def read(export: Export) -> dict[Key, Result]:
    """The results that are kept with a model; a UserError where the file is not what `save` writes."""
    path = export.results / "lm_eval.json"
    if not path.is_file():
        return {}
    repair = f"{path} is damaged; delete it, and `python -m evals run` makes its results again"
    try:
        return {key_of(result): result for result in read_json(path)}
    except (UserError, TypeError, KeyError) as error:
        raise UserError(repair) from error


def reusable(export: Export, kept: Mapping[Key, Result], conditions: Mapping[str, Any], dtype: str) -> bool:
    """Whether a kept result was measured under just these `conditions` (see `harness.conditions`) and its items are
    there, whole. `dtype`: as asked for; `auto` is what it was for the same folder."""
    result = kept.get(key_of(conditions))
    if result is None or any(key not in result or result[key] != value for key, value in conditions.items()):
        return False
    if dtype not in (result.get("dtype"), result.get("dtype_given")):
        return False
    samples = samples_file(export, result)
    return samples.is_file() and _sha256(samples.read_bytes()) == result.get("samples_sha256")


def save(export: Export, evaluation: Evaluation) -> Result:
    """Put a result in lm_eval.json, in the place of an older one of the same task and shots, and its items in their own
    file (first, so that a result never stands there without them); returns it as it stands there.

    A lock keeps two processes that evaluate one folder from writing over each other's results.
    """
    items = jsonl(evaluation.samples)
    result = evaluation.result | {"samples_sha256": _sha256(items.encode())}
    with locked(export.results / ".lm_eval.lock"):
        write_file(samples_file(export, result), items)
        kept = read(export) | {key_of(result): result}
        write_json(export.results / "lm_eval.json", [kept[key] for key in sorted(kept)])
    return result


def samples_file(export: Export, result: Mapping[str, Any]) -> Path:
    """Where the items of a result are kept."""
    return export.results / "samples" / f"{result['task']}-{result['shots']}shot.jsonl"


def fingerprint(export: Export) -> dict[str, str]:
    """What tells one model from another: sha256 of its `weights` and of its other `files` (see `FILES`)."""
    others = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in export.folder.glob(pattern) if path.is_file()}):
        others.update(f"{path.name} {_sha256(path.read_bytes())}\n".encode())
    return {"weights": export.weights_sha256(), "files": others.hexdigest()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: waits for whoever holds `path`. A killed process holds nothing.

    On a file system without locks a heartbeat next to `path` does, as in `llm.common.lock`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error.strerror}); give a folder that can be") from error
    heartbeat = None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{path} cannot be locked ({error.strerror}); give a folder elsewhere") from error
            heartbeat = Heartbeat.wait(path.with_suffix(HEARTBEAT))
        try:
            yield
        finally:
            if heartbeat is not None:
                heartbeat.close()


def alike(key: str, one: Any, other: Any) -> bool:
    """Whether two results agree in a condition they were measured under; cuda:1 is as good as cuda:0."""
    if key == "device":
        one, other = (str(device).partition(":")[0] for device in (one, other))
    return bool(one == other)


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """In which of `ALIKE` two results differ, each as `name (one and other)`."""
    return [
        f"{key} ({first.get(key)} and {second.get(key)})"
        for key in ALIKE
        if not alike(key, first.get(key), second.get(key))
    ]


def save_groups(export: Export, groups: Mapping[str, Group]) -> None:
    """Add groups to groups.json, in the place of older ones of the same name."""
    if groups:
        with locked(export.results / ".lm_eval.lock"):
            written = {name: group._asdict() for name, group in groups.items()}
            write_json(export.results / "groups.json", export.result("groups", {}) | written)


def of_groups(found: Iterable[Result], groups: Mapping[str, Group]) -> list[Result]:
    """The means of groups over their tasks, as lm-eval weights them, at numbers of shots where all tasks are there."""
    kept, means = {key_of(result): result for result in found}, []
    for name, group in groups.items():
        for shots in sorted({shots for _, shots in kept}):
            parts = [kept[task, shots] for task in group.tasks if (task, shots) in kept]
            if len(parts) == len(group.tasks):
                means.append({"task": name, "shots": shots} | _mean_of(parts, group.by_size))
    return means


def _mean_of(parts: Sequence[Result], by_size: bool) -> Result:
    """The means of what all these results have as a mean over items; standard errors are those of independent tasks."""
    counts = np.array([part["n"] if by_size else 1 for part in parts])
    shares = counts / counts.sum()
    described = [metrics.of_result(part) for part in parts]
    names = [name for name in described[0] if all(name in d and d[name].kind == "mean" for d in described)]
    mean: Result = {key: sum(part[key] for part in parts) for key in ("n", "truncated")}
    for name in names:
        errors = [part.get(f"{name}_stderr") for part in parts]
        mean[name] = float(shares @ [part[name] for part in parts])
        mean[f"{name}_stderr"] = None if None in errors else float(np.hypot.reduce(shares * errors))
    return mean | {"metrics": {name: described[0][name]._asdict() for name in names}}


def format_results(results: Iterable[tuple[str, Result]]) -> str:
    """A table of (model, result) with standard errors over items; accuracies and other shares in percent."""
    rows = list(results)
    names = list(dict.fromkeys(name for _, result in rows for name in metrics.of_result(result)))
    shares = {name: all(_share(result, name) for _, result in rows) for name in names}
    header = ["model", "task", "shots", "items", "cut", *(name + " %" * shares[name] for name in names)]
    lines = [
        [
            *(model, result["task"], str(result["shots"]), str(result["n"]), str(result["truncated"])),
            *(_cell(result, name, 100 if shares[name] else 1) for name in names),
        ]
        for model, result in rows
    ]
    return text_table(header, lines)


def _share(result: Result, name: str) -> bool:
    return name not in result or metrics.of_result(result)[name].share


def _cell(result: Result, name: str, scale: int) -> str:
    """A score with its standard error; empty where the task has no such metric."""
    if result.get(name) is None:
        return ""
    error = result.get(f"{name}_stderr")
    return percent(result[name], error) if scale == 100 else _plain(result[name], error)


def _plain(score: float, error: float | None) -> str:
    return f"{score:.4f}" + ("" if error is None else f" ± {error:.4f}")


def percent(share: float, error: float | None) -> str:
    """A share in percent, with its standard error where it has one."""
    return f"{100 * share:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def passage_of(doc: Mapping[str, Any]) -> str | None:
    """A digest of the passage that an item may share with others; None where its task has no field for one."""
    field = next((name for name in PASSAGES if isinstance(doc.get(name), str)), None)
    return None if field is None else hashlib.sha256(doc[field].encode()).hexdigest()[:16]
