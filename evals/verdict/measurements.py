"""What was measured of two sides' exports, item by item, as arrays that can be paired.

EXPORT/evals of every run -> checked to be measured alike, on the same items -> one `Measure` a quantity: (seeds, items)

Two results are compared only where dtype, device, batch size, versions, limit and the items themselves are the same:
otherwise a difference could be the measurement's. What one export lacks is left out, and said.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evals.exports import ROUNDING, Export, check_numbers
from evals.harness import metrics
from evals.harness.results import alike
from llm.common.errors import UserError

# What the results of one quantity must share, where they say it.
PROTOCOL = (
    "n", "limit", "context", "batch_size", "task_version", "versions", "dtype", "device", "rows", "definition",
    "grouped_by",
)  # fmt: skip


class Measure(NamedTuple):
    """One quantity of both sides on the same items.

    first, second: (S, N) of S seeds and N items; weights: (N,) of a weighted mean, None where all count alike.
    better: 1 where more is better, -1 where less is. binary: each item is right (1) or wrong (0), shown in percent.
    family: of the tests that share one error rate: "primary" is the one quantity that the verdict is about, "tasks"
    each task, or group of tasks, at each number of shots, "others" what is no task or follows from several.
    task: the task's or group's name. groups: (N,) labels of what the items are parts of (the text of a chunk, the
    passage of a question), None where each stands alone.
    """

    name: str
    unit: str
    better: int
    first: np.ndarray
    second: np.ndarray
    weights: np.ndarray | None = None
    binary: bool = False
    family: str = "others"
    task: str = ""
    groups: np.ndarray | None = None

    @property
    def means(self) -> tuple[float, float]:
        """The mean of either side over seeds and items."""
        first, second = (np.average(side, axis=1, weights=self.weights).mean() for side in (self.first, self.second))
        return float(first), float(second)


Exports = Sequence[tuple[Export, Export]]  # of each pair: without the change, and with it


def read_measures(exports: Exports, stores: Mapping[str, float], metric: str) -> tuple[list[Measure], list[str]]:
    """All that can be paired, the validation loss first; and a sentence on each result that some export lacks.

    Args:
        exports: a tuple a seed.
        stores: those whose validation documents count: fingerprint -> share of the training data.
        metric: of the tasks that have it; others are compared in what stands for them (`metrics.primary`).
    """
    found: list[Measure] = []
    notes: list[str] = []
    for results in (
        _losses(exports, stores, notes),
        _tasks(exports, metric, notes),
        _generated_ioi(exports, notes),
        _in_context(exports, notes),
        _recall(exports, notes),
    ):
        for measure in results:
            if measure.first.shape[1] > 1:
                found.append(measure)
            else:
                notes.append(f"{measure.name} is left out: an interval needs two items at least.")
    return found, notes


def both(exports: Exports, name: str, notes: list[str]) -> list[tuple[Any, Any]] | None:
    """EXPORT/evals/`name`.json of all exports, checked to be measured alike; None where any lacks it."""
    results = [tuple(export.result(name) for export in pair) for pair in exports]
    return complete([(one, other) for one, other in results], exports, name, notes)


def complete(
    results: Sequence[tuple[Any, Any]], exports: Exports, what: str, notes: list[str]
) -> list[tuple[Any, Any]] | None:
    """`results` where all are there and were measured alike; None where none or only some are, the latter noted."""
    lacking = [
        export.folder
        for pair, kept in zip(exports, results, strict=True)
        for export, result in zip(pair, kept, strict=True)
        if result is None
    ]
    if len(lacking) == 2 * len(exports):
        return None
    if lacking:
        notes.append(f"{what} is left out: it was not measured for {', '.join(map(str, lacking))}.")
        return None
    for pair, kept in zip(exports, results, strict=True):
        for export, result in zip(pair, kept, strict=True):
            _check_weights(export, result, what)
    flat = [result for pair in results for result in pair]
    for result in flat[1:]:
        if differing := [
            f"{key} ({flat[0].get(key)} and {result.get(key)})"
            for key in PROTOCOL
            if not alike(key, flat[0].get(key), result.get(key))
        ]:
            raise UserError(
                f"{what} was measured with different {', '.join(differing)}; run `python -m evals` on all models alike"
            )
    return list(results)


def _check_weights(export: Export, result: Mapping[str, Any], what: str) -> None:
    """Refuse a result that was measured on other weights than the export now holds.

    Up to version 0.1 a result names the checkpoint that was exported, and so does the card of its export, which does
    not say what the weights were: there the two are compared.
    """
    mine = export.weights_sha256() if "weights_sha256" in export.info else export.info.get("checkpoint_sha256")
    of_model = result.get("model", {}).get("checkpoint_sha256")
    measured = result.get("weights") or result.get("weights_sha256") or of_model
    if mine and measured and measured not in (mine, export.weights_sha256()):
        raise UserError(f"{what} of {export.folder} was measured on other weights than it holds now; measure it again")


def _stack(results: Sequence[tuple[Any, Any]], values: Any) -> tuple[np.ndarray, np.ndarray]:
    """(S, N) of either side, by a function of one result."""
    first, second = (np.array([values(pair[side]) for pair in results], dtype=np.float64) for side in (0, 1))
    return first, second


# ---- Sources ---------------------------------------------------------------------------------------------------------


def _losses(exports: Exports, stores: Mapping[str, float], notes: list[str]) -> list[Measure]:
    """Nats per token of each validation document, weighted by its tokens; each store counts by its share."""
    what = "the validation loss per document"
    sides: list[tuple[np.ndarray, np.ndarray]] = []
    weights: list[np.ndarray] = []
    groups: list[np.ndarray | None] = []
    for store, share in stores.items():
        pairs = [(kept_losses(one, store), kept_losses(other, store)) for one, other in exports]
        results = complete(pairs, exports, what, notes)
        if results is None:
            return []
        same_items(results, ("documents", "tokens"), what)
        labels = results[0][0].get("groups")
        groups.append(None if labels is None else np.array(labels))
        sides.append(_stack(results, lambda result: np.divide(result["nats"], result["tokens"])))
        tokens = np.array(results[0][0]["tokens"], dtype=np.float64)
        weights.append(tokens * share / tokens.sum())
    if not sides:
        return []
    first, second = (np.concatenate([side[which] for side in sides], axis=1) for which in (0, 1))
    name = "validation loss per document"
    labels = joined_groups(groups, [len(each) for each in weights])
    return [
        Measure(name, "nats per token", -1, first, second, np.concatenate(weights), family="primary", groups=labels)
    ]


def joined_groups(groups: Sequence[np.ndarray | None], sizes: Sequence[int]) -> np.ndarray | None:
    """Labels of several sets of items together, a group in none of two; None where no set has any.

    An item of a set without groups is a group of its own.
    """
    if all(labels is None for labels in groups):
        return None
    parts, first = [], 0
    for labels, size in zip(groups, sizes, strict=True):
        numbers = np.arange(size) if labels is None else np.unique(labels, return_inverse=True)[1]
        parts.append(first + numbers)
        first += size
    return np.concatenate(parts)


def kept_losses(export: Export, store: str) -> dict[str, Any] | None:
    """What an export keeps of the validation documents of the store of this fingerprint."""
    results = export.result("losses", [])
    return next((r for r in results if (r["store_fingerprint"], r["split"]) == (store, "validation")), None)


Key = tuple[str, int]  # task, shots


def _tasks(exports: Exports, metric: str, notes: list[str]) -> list[Measure]:
    """Every task and number of shots, those of a group as one; and the mean of several accuracies at as many shots."""
    kept = [
        tuple({(r["task"], r["shots"]): r for r in export.result("lm_eval", [])} for export in pair) for pair in exports
    ]
    found: dict[Key, Measure] = {}
    for task, shots in sorted({key for pair in kept for results in pair for key in results}):
        pairs = [(one.get((task, shots)), other.get((task, shots))) for one, other in kept]
        if (results := complete(pairs, exports, f"{task}, {shots}-shot", notes)) is not None:
            measure = _task(exports, results[0][0], metric, notes)
            found |= {(task, shots): measure} if measure is not None else {}
    found = _grouped(exports[0][0], found, notes)
    means = []
    for shots in sorted({shots for _, shots in found}):
        tasks = [measure for (_, number), measure in found.items() if number == shots and measure.unit == "points"]
        if len(tasks) > 1:
            named = {measure.name.rpartition(", ")[2] for measure in tasks}
            called = named.pop() if len(named) == 1 else "accuracy"
            name = f"mean of {len(tasks)} tasks, {shots}-shot, {called}"
            means.append(_mean_of(tasks, [1.0] * len(tasks), name, "others"))
    return [*found.values(), *means]


def _task(exports: Exports, result: Mapping[str, Any], metric: str, notes: list[str]) -> Measure | None:
    """One task at one number of shots, of all exports; None, with a note, where its items have no values."""
    task, shots = result["task"], result["shots"]
    name = f"{task}, {shots}-shot"
    chosen = metrics.primary(result, metric)
    if chosen is None:
        names = ", ".join(metrics.of_result(result))
        notes.append(f"{name} is left out: {names} is not a mean over items, so no item has a value to pair.")
        return None
    kind = metrics.of_result(result)[chosen]
    items = [(read_samples(one, task, shots, chosen), read_samples(two, task, shots, chosen)) for one, two in exports]
    same_items(items, ("doc_id", "doc_hash", "prompt_hash"), name)
    weights = metrics.values(kind, items[0][0][chosen]).weights
    counted = slice(None) if weights is None else weights > 0
    first, second = _stack(items, lambda samples: metrics.values(kind, samples[chosen]).values[counted])
    passages = [passage for passage in items[0][0].get("passage", ()) if passage is not None]
    groups = None
    if len(passages) == len(items[0][0]["doc_id"]) and len(set(passages)) < len(passages):
        groups = np.unique(passages, return_inverse=True)[1][counted]
    binary = kind.share and bool(np.isin([first, second], (0, 1)).all())
    return Measure(
        f"{name}, {chosen if kind.kind in ('mean', 'bits_per_byte') else f'log {chosen}'}",
        metrics.unit(chosen, kind),
        kind.better if kind.kind == "mean" else -1,
        first,
        second,
        None if weights is None else weights[counted],
        binary,
        "tasks",
        task,
        groups,
    )


def _grouped(export: Export, found: Mapping[Key, Measure], notes: list[str]) -> dict[Key, Measure]:
    """The tasks of each group as one measure where all were measured in the same unit, averaged as lm-eval does.

    So a group of 67 tasks is one test among others, not 67 that lessen what the others can show.
    """
    left = dict(found)
    for name, group in export.result("groups", {}).items():
        for shots in sorted({shots for _, shots in found}):
            tasks = [found[task, shots] for task in group["tasks"] if (task, shots) in found]
            alike_in = {(task.unit, task.weights is None) for task in tasks}
            if len(tasks) < len(group["tasks"]) or len(alike_in) > 1 or tasks[0].weights is not None:
                continue
            sizes = [task.first.shape[1] if group["by_size"] else 1.0 for task in tasks]
            title = f"{name}, {shots}-shot, {tasks[0].name.rpartition(', ')[2]}"
            left[name, shots] = _mean_of(tasks, sizes, title, "tasks")._replace(task=name)
            notes.append(f"{name}, {shots}-shot, stands for its {len(tasks)} tasks.")
            for task in group["tasks"]:
                left.pop((task, shots), None)
    return left


def _mean_of(tasks: Sequence[Measure], counts: Sequence[float], name: str, family: str) -> Measure:
    """The mean of several tasks' scores, each counting as `counts` says however many items it has."""
    first, second = (np.concatenate([getattr(task, side) for task in tasks], axis=1) for side in ("first", "second"))
    weights = np.concatenate(
        [np.full(task.first.shape[1], count / task.first.shape[1]) for task, count in zip(tasks, counts, strict=True)]
    )
    groups = joined_groups([task.groups for task in tasks], [task.first.shape[1] for task in tasks])
    return Measure(name, tasks[0].unit, tasks[0].better, first, second, weights, family=family, groups=groups)


def read_samples(export: Export, task: str, shots: int, metric: str) -> dict[str, list[Any]]:
    """EXPORT/evals/samples/TASK-Nshot.jsonl as columns. UserError where it is missing or damaged."""
    path = export.results / "samples" / f"{task}-{shots}shot.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = {key: [row[key] for row in rows] for key in ("doc_id", "doc_hash", "prompt_hash", metric)}
        found["passage"] = [row.get("passage") for row in rows]
        values = [value for row in rows for value in row.get("loglikelihoods", ())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())}); run `python -m evals run {export.folder} "
            f"--tasks {task} --shots {shots} --overwrite`"
        ) from error
    check_numbers(values, f"log-likelihoods in {path}", most=ROUNDING)
    return found


def _generated_ioi(exports: Exports, notes: list[str]) -> list[Measure]:
    """The generated sentences of the indirect-object task: accuracy and logit difference.

    An item is a quadruple, four sentences of the same words (see `ioi_sentences`): they are no four independent ones.
    """
    results = both(exports, "ioi_generated", notes)
    if results is None:
        return []
    items = [(one["items"], other["items"]) for one, other in results]
    same_items(items, ("prompt", "correct", "incorrect", "quadruple"), "the generated indirect-object set")
    _, quadruple, size = np.unique(items[0][0]["quadruple"], return_inverse=True, return_counts=True)

    def means(of_sentences: np.ndarray) -> np.ndarray:
        """(S, sentences) -> (S, quadruples)."""
        return np.array([np.bincount(quadruple, seed) / size for seed in of_sentences])

    first, second = _stack(items, lambda item: item["logit_difference"])
    return [
        Measure("indirect object, accuracy", "points", 1, means(first > 0), means(second > 0)),
        Measure("indirect object, logit difference", "nats", 1, means(first), means(second)),
    ]


def _in_context(exports: Exports, notes: list[str]) -> list[Measure]:
    """The in-context score of each window: the loss late in it minus early in it; less is better."""
    results = both(exports, "incontext", notes)
    if results is None:
        return []
    same_items(results, ("store_fingerprint", "split", "windows"), "the in-context score")
    first, second = _stack(results, lambda result: result["score"]["per_window"])
    return [Measure("in-context score", "nats per token", -1, first, second)]


def _recall(exports: Exports, notes: list[str]) -> list[Measure]:
    """Key-value pairs, the mean over numbers of pairs and lengths; repeated tokens; a needle, the mean over depths."""
    results = both(exports, "recall", notes)
    if results is None:
        return []
    same_items(results, ("store_fingerprint", "split", "settings", "sequences", "seed"), "recall from the context")

    def of(values: Any) -> tuple[np.ndarray, np.ndarray]:
        """(S, N) of either side: the mean over the lists that `values` takes of a result."""
        return _stack(results, lambda result: np.mean(values(result), axis=0))

    return [
        Measure("key-value pairs recalled", "points", 1, *of(lambda r: [each["values"] for each in r["mqar"]])),
        Measure("second copy of random tokens", "nats per token", -1, *of(lambda r: [r["induction"]["values"]])),
        Measure("needle, gain", "nats per token", 1, *of(lambda r: [each["values"] for each in r["needle"]])),
    ]


def same_items(results: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], keys: Sequence[str], what: str) -> None:
    """Refuse results that are not of the same items in the same order."""
    first = results[0][0]
    for pair in results:
        for result in pair:
            if differing := [key for key in keys if result[key] != first[key]]:
                raise UserError(
                    f"{what} was measured on different items ({', '.join(differing)}); run `python -m evals` on all "
                    "models alike"
                )
