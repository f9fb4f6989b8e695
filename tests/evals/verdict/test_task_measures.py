"""Tasks of every kind in a comparison: what is paired, by which metric, which way is better, and groups as one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api import metrics as theirs

from evals.exports import open_export
from evals.page import comparison_page
from evals.verdict.measurements import Measure, read_measures
from evals.verdict.verdict import find

from ..made_up import MEASURED, make_export

Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    nats = np.full(20, 100.0)
    return make_export(tmp_path / "classic", nats), make_export(tmp_path / "values", nats)


def add(export: Path, task: str, kinds: dict[str, str], items: dict[str, list], shots: int = 0) -> None:
    """A result as `run` keeps it: metric -> kind, and what lm-eval gives for each item."""
    path = export / "evals/lm_eval.json"
    kept = json.loads(path.read_text()) if path.is_file() else []
    described = {
        name: {"kind": kind, "better": -1 if "per" in name else 1, "share": kind == "mean"}
        for name, kind in kinds.items()
    }
    count = len(next(iter(items.values())))
    result = {"task": task, "shots": shots, "n": count, "limit": None, "metrics": described, **MEASURED}
    path.write_text(json.dumps([*kept, result]))
    rows = [
        {"doc_id": n, "doc_hash": f"h{n}", "prompt_hash": f"p{n}"} | {name: values[n] for name, values in items.items()}
        for n in range(count)
    ]
    samples = export / f"evals/samples/{task}-{shots}shot.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(pair: Pair, metric: str = "acc_norm") -> tuple[dict[str, Measure], list[str]]:
    found, notes = read_measures([(open_export(pair[0]), open_export(pair[1]))], {}, metric)
    return {measure.name: measure for measure in found}, notes


def test_perplexities_are_paired_by_words_and_bytes(pair):
    numbers = np.random.default_rng(0)
    counts = numbers.integers(1, 300, 30)
    kinds = {"word_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
    items = [[[-float(n), int(c)] for n, c in zip(numbers.gamma(9, 20, 30), counts, strict=True)] for _ in pair]
    for export, own in zip(pair, items, strict=True):
        add(export, "wikitext", kinds, {name: [*own, [0.0, 0]] for name in kinds})  # and a page without text
    bits = read(pair)[0]["wikitext, 0-shot, bits_per_byte"]
    assert bits.means == pytest.approx([theirs.bits_per_byte(own) for own in items])
    assert (bits.unit, bits.better, bits.family, bits.first.shape) == ("bits per byte", -1, "tasks", (1, 30))
    words = read(pair, "word_perplexity")[0]["wikitext, 0-shot, log word_perplexity"]
    assert words.means == pytest.approx([math.log(theirs.weighted_perplexity(own)) for own in items])
    assert words.unit == "nats per word"


def test_the_metric_asked_for_is_taken_where_a_task_has_it(pair):
    right = (np.arange(20) % 3 > 0).astype(float)
    for side, export in enumerate(pair):
        add(export, "lambada", {"perplexity": "perplexity", "acc": "mean"},
            {"perplexity": [-2.0 - side] * 20, "acc": right.tolist()})  # fmt: skip
        add(export, "gsm8k", {"exact_match,strict": "mean"}, {"exact_match,strict": right.tolist()}, shots=5)
        add(export, "squad", {"f1": "mean"}, {"f1": (right / 3).tolist()})
    found, notes = read(pair)
    assert notes == []
    assert list(found) == [
        "gsm8k, 5-shot, exact_match,strict",
        "lambada, 0-shot, acc",
        "squad, 0-shot, f1",
        "mean of 2 tasks, 0-shot, accuracy",
    ]
    assert [measure.binary for measure in found.values()] == [True, True, False, False]
    logarithm = read(pair, "perplexity")[0]["lambada, 0-shot, log perplexity"]
    assert logarithm.means == (2, 3) and (logarithm.unit, logarithm.better) == ("nats per answer", -1)
    assert find([logarithm])[0].better == -1


def test_what_is_no_mean_over_items_is_told(pair):
    for export in pair:
        add(export, "cola", {"mcc": "matthews_corrcoef"}, {"unused": [0] * 20})
    found, notes = read(pair)
    assert found == {}
    assert notes == ["cola, 0-shot is left out: mcc is not a mean over items, so no item has a value to pair."]


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_one_test(pair, by_size):
    numbers = np.random.default_rng(1)
    sizes = {"blimp_a": 10, "blimp_b": 40, "blimp_c": 25}
    right = [{task: (numbers.random(size) < 0.6).astype(float) for task, size in sizes.items()} for _ in pair]
    for export, own in zip(pair, right, strict=True):
        for task, values in own.items():
            add(export, task, {"acc": "mean"}, {"acc": values.tolist()})
    assert len(read(pair)[0]) == 4  # three tasks and their mean
    groups = {"blimp": {"tasks": list(sizes), "by_size": by_size}, "more": {"tasks": [*sizes, "x"], "by_size": True}}
    for export in pair:
        (export / "evals/groups.json").write_text(json.dumps(groups))
    found, notes = read(pair)
    assert notes == ["blimp, 0-shot, stands for its 3 tasks."] and list(found) == ["blimp, 0-shot, acc"]
    group = found["blimp, 0-shot, acc"]
    expected = [
        np.concatenate(list(own.values())).mean() if by_size else np.mean([v.mean() for v in own.values()])
        for own in right
    ]
    assert group.means == pytest.approx(expected) and (group.family, group.task) == ("tasks", "blimp")


def test_the_page_says_how_well_a_task_tells_models_apart(pair):
    numbers = np.random.default_rng(2)
    for export in pair:
        for task in ("arc_easy", "sciq"):
            add(export, task, {"acc": "mean"}, {"acc": (numbers.random(400) < 0.6).astype(float).tolist()})
    findings = find(list(read(pair)[0].values()))
    table = comparison_page._noise(findings[:2])
    assert [row[:2] for row in table.rows] == [
        ["arc_easy, 0-shot, acc, points", "93"],
        ["sciq, 0-shot, acc, points", "–"],
    ]
    for row, finding in zip(table.rows, findings, strict=False):
        half = (finding.effect.high - finding.effect.low) / 2
        assert float(row[3]) == pytest.approx(100 * half, abs=0.006)
        assert float(row[4]) == pytest.approx(abs(finding.effect.difference) / half, abs=0.006)
        assert (float(row[4]) > 1) == (not finding.effect.low <= 0 <= finding.effect.high) or abs(
            float(row[4]) - 1
        ) < 0.1
