"""What of two sides' exports is paired, with which weights and signs; and what is refused as not measured alike."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evals.exports import open_export
from evals.verdict.compare import read_table_2
from evals.verdict.measurements import Measure, read_measures
from evals.verdict.verdict import find
from llm.common.errors import UserError

from ..made_up import add_incontext, add_ioi, add_task, make_export

Paths = list[tuple[Path, Path]]
RIGHT = np.arange(20) % 3 > 0


def make_exports(root: Path, seeds: int = 1, documents: int = 20, tokens: Any = None) -> Paths:
    """Of every seed an export without the change and one with it; their losses are random."""
    numbers = np.random.default_rng(0)
    return [
        (
            make_export(root / f"classic{seed}", numbers.gamma(9, 20, documents), seed=seed, tokens=tokens),
            make_export(root / f"values{seed}", numbers.gamma(9, 20, documents), seed=seed, tokens=tokens),
        )
        for seed in range(1, seeds + 1)
    ]


def read(paths: Paths, stores: Mapping[str, float] | None = None, metric: str = "acc_norm") -> dict[str, Measure]:
    """All measures by name; nothing may be left out."""
    found, notes = read_measures([(open_export(a), open_export(b)) for a, b in paths], stores or {}, metric)
    assert notes == []
    return {measure.name: measure for measure in found}


def edit(export: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Let `change` alter, in place, what EXPORT/evals/`name`.json holds."""
    path = export / f"evals/{name}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def kept_losses(export: Path) -> Any:
    return json.loads((export / "evals/losses.json").read_text())


# ---- Losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_per_token_and_a_document_counts_by_its_tokens(tmp_path):
    """Long documents have the higher loss here, so that neither the mean of documents nor a mean length will do."""
    tokens = [10, 20, 30, 400]
    paths = make_exports(tmp_path, seeds=2, documents=4, tokens=tokens)
    nats = np.array([[[20.0, 50, 90, 2000], [21.0, 48, 99, 1900]], [[22.0, 51, 87, 1990], [19.0, 44, 93, 2010]]])
    for pair, of_pair in zip(paths, nats, strict=True):
        for export, of_export in zip(pair, of_pair, strict=True):
            edit(export, "losses", lambda kept, values=of_export: kept[0].update(nats=values.tolist()))
    loss = read(paths, {"f1": 1.0})["validation loss per document"]
    per_token = [[[n / t for n, t in zip(row, tokens, strict=True)] for row in of_pair] for of_pair in nats]
    np.testing.assert_allclose(loss.first, [pair[0] for pair in per_token])
    np.testing.assert_allclose(loss.second, [pair[1] for pair in per_token])
    totals = nats.sum(axis=2) / 460  # of each model: all nats over all tokens
    assert loss.means == pytest.approx(tuple(totals.mean(axis=0)))
    assert (loss.family, loss.better, loss.unit, loss.binary) == ("primary", -1, "nats per token", False)
    assert find([loss])[0].effect.difference == pytest.approx(totals[:, 1].mean() - totals[:, 0].mean())


def add_store(export: Path, store: str, nats: list[float], tokens: list[int], split: str = "validation") -> None:
    documents = {"documents": list(range(len(nats))), "n": len(nats), "nats": nats, "tokens": tokens}
    one_more = {**kept_losses(export)[0], "store_fingerprint": store, "split": split, **documents}
    edit(export, "losses", lambda kept: kept.insert(0, one_more))


def test_two_stores_count_by_their_shares_however_many_tokens_of_each_are_measured(tmp_path):
    [(one, other)] = paths = make_exports(tmp_path, documents=2, tokens=[50, 150])
    for export, factor in ((one, 1.0), (other, 1.1)):
        edit(export, "losses", lambda kept, by=factor: kept[0].update(nats=[100 * by, 450 * by]))  # 2.75 a token
        add_store(export, "f2", [40.0 * factor, 60 * factor, 20 * factor], [10, 10, 20])  # 3.0 a token
        add_store(export, "f2", [1000.0], [10], split="train")  # another split is no part of it
        add_store(export, "f3", [1000.0], [10])  # nor is a store that the run did not have
    expected = 0.2 * 2.75 + 0.8 * 3.0
    loss = read(paths, {"f1": 0.2, "f2": 0.8})["validation loss per document"]
    assert loss.first.shape == loss.second.shape == (1, 5)
    assert loss.means == pytest.approx((expected, 1.1 * expected))
    assert find([loss])[0].effect.difference == pytest.approx(0.1 * expected)
    swapped = read(paths, {"f2": 0.8, "f1": 0.2})["validation loss per document"]
    assert swapped.means == pytest.approx(loss.means)
    assert read(paths, {"f2": 1.0})["validation loss per document"].means == pytest.approx((3.0, 3.3))


def test_a_store_that_was_not_measured_everywhere_leaves_no_loss(tmp_path):
    [(one, other)] = make_exports(tmp_path)
    add_store(one, "f2", [1.0, 2.0], [10, 10])
    pair = (open_export(one), open_export(other))
    found, notes = read_measures([pair], {"f1": 0.5, "f2": 0.5}, "acc_norm")
    assert found == [] and len(notes) == 1
    assert "the validation loss per document is left out" in notes[0] and str(other) in notes[0]
    assert read_measures([pair], {}, "acc_norm") == ([], [])


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def test_each_task_counts_alike_in_the_mean_however_many_items_it_has(tmp_path):
    paths = make_exports(tmp_path, seeds=2)
    numbers = np.random.default_rng(1)
    sizes = {"piqa": 10, "arc_easy": 200, "hellaswag": 50}
    means = np.zeros((2, 2))  # (seed, side): of the tasks' accuracies
    for pair, of_pair in zip(paths, means, strict=True):
        for side, export in enumerate(pair):
            for task, size in sizes.items():
                right = numbers.random(size) < 4 / np.sqrt(size) / 2
                add_task(export, task, 0, right)
                of_pair[side] += right.mean() / 3
            add_task(export, "piqa", 5, RIGHT)
    found = read(paths)
    mean = found["mean of 3 tasks, 0-shot, acc_norm"]
    assert mean.means == pytest.approx(tuple(means.mean(axis=0)))
    assert find([mean])[0].effect.difference == pytest.approx(means[:, 1].mean() - means[:, 0].mean())
    assert (mean.family, mean.binary, mean.better) == ("others", False, 1)  # it follows from the tasks
    assert [name for name in found if name.startswith("mean")] == [mean.name]  # one task has no mean
    tasks = {name for name, measure in found.items() if measure.family == "tasks"}
    assert tasks == {f"{task}, 0-shot, acc_norm" for task in sizes} | {"piqa, 5-shot, acc_norm"}
    assert all(found[name].binary and found[name].better == 1 and found[name].unit == "points" for name in tasks)
    assert found["piqa, 5-shot, acc_norm"].means == pytest.approx((RIGHT.mean(), RIGHT.mean()))


def test_the_metric_is_the_one_asked_for(tmp_path):
    paths = make_exports(tmp_path)
    for export in paths[0]:
        add_task(export, "piqa", 0, RIGHT)
        samples = export / "evals/samples/piqa-0shot.jsonl"
        samples.write_text(samples.read_text().replace('"acc": 1.0', '"acc": 0.0'))
    assert read(paths, metric="acc")["piqa, 0-shot, acc"].means == (0, 0)
    assert read(paths)["piqa, 0-shot, acc_norm"].means == pytest.approx((RIGHT.mean(), RIGHT.mean()))


# ---- Indirect objects and context ------------------------------------------------------------------------------------


def test_a_quadruple_of_sentences_is_one_item(tmp_path):
    """Those of one quadruple need not stand side by side; the items' order is the same on both sides."""
    paths = make_exports(tmp_path, seeds=2)
    differences = np.random.default_rng(2).normal(0.3, 1, (2, 2, 24))  # (seed, side, sentence)
    for pair, of_pair in zip(paths, differences, strict=True):
        for export, values in zip(pair, of_pair, strict=True):
            add_ioi(export, 0.1, 0.1, values)
            edit(export, "ioi_generated", lambda kept: kept["items"].update(quadruple=[n % 6 for n in range(24)]))
    found = read(paths)
    for name, of_sentences in (
        ("indirect object, accuracy", (differences > 0).astype(float)),
        ("indirect object, logit difference", differences),
    ):
        quadruples = np.stack([of_sentences[:, :, n::6].mean(axis=2) for n in range(6)], axis=2)
        np.testing.assert_allclose(found[name].first, quadruples[:, 0])
        np.testing.assert_allclose(found[name].second, quadruples[:, 1])
        assert find([found[name]])[0].effect.items == 6
        assert not found[name].binary and found[name].family == "others" and found[name].weights is None


def test_the_papers_sentences_have_intervals_over_seeds(tmp_path):
    paths = make_exports(tmp_path, seeds=3)
    for pair, (classic, values) in zip(paths, ((0.1, 0.3), (0.2, 0.5), (0.4, 0.4)), strict=True):
        for export, correct in zip(pair, (classic, values), strict=True):
            add_ioi(export, correct, 0.1, np.zeros(4))
    exports = [(open_export(one), open_export(other)) for one, other in paths]
    sides = read_table_2(exports, "ioi", [], 0.9)
    for side, values in zip(sides, ((0.1, 0.2, 0.4), (0.3, 0.5, 0.4)), strict=True):
        low, high = stats.t.interval(0.9, 2, np.mean(values), stats.sem(values))
        assert side["correct"]["mean"] == pytest.approx([np.mean(values)] * 4)
        assert side["correct"]["half_width"] == pytest.approx([(high - low) / 2] * 4)
        assert side["incorrect"]["half_width"] == pytest.approx([0] * 4)
    alone = read_table_2(exports[:1], "ioi", [], 0.9)
    assert alone[0]["correct"]["half_width"] is None


@pytest.mark.parametrize("gain", [0.5, -0.5])
def test_which_way_is_better(tmp_path, gain):
    """The second side has the lower loss, scores lower late in a window than early, and tells the names apart."""
    paths = make_exports(tmp_path, seeds=3)
    numbers = np.random.default_rng(3)
    nats, differences = numbers.gamma(9, 20, 20), numbers.normal(0, 1, 400)
    scores, chance = numbers.normal(-1, 0.3, 60), numbers.random(400)
    for pair in paths:
        for export, by in zip(pair, (0.0, gain + 0.01 * numbers.standard_normal()), strict=True):
            edit(export, "losses", lambda kept, by=by: kept[0].update(nats=(nats - 100 * by).tolist()))
            add_ioi(export, 0.1, 0.1, differences + by)
            add_incontext(export, scores - by)
            add_task(export, "piqa", 0, chance < 0.5 + 0.5 * by)
    found = find(list(read(paths, {"f1": 1.0}).values()))
    assert [finding.measure.name for finding in found] == [
        "validation loss per document",
        "piqa, 0-shot, acc_norm",
        "indirect object, accuracy",
        "indirect object, logit difference",
        "in-context score",
    ]
    assert {finding.better for finding in found} == {1 if gain > 0 else -1}
    words = {finding.measure.name: finding.word for finding in found}
    assert words["validation loss per document"] == words["in-context score"] == ("lower" if gain > 0 else "higher")
    assert words["indirect object, accuracy"] == ("higher" if gain > 0 else "lower")
    expected = {
        "validation loss per document": -gain,
        "in-context score": -gain,
        "indirect object, logit difference": gain,
    }
    for finding in found:
        if finding.measure.name in expected:
            assert finding.effect.difference == pytest.approx(expected[finding.measure.name], abs=0.03)


# ---- Measured alike --------------------------------------------------------------------------------------------------

HOW = {
    "dtype": "bfloat16",
    "device": "cuda:0",
    "batch_size": 4,
    "n": 19,
    "limit": 7,
    "context": 16,
    "task_version": 2.0,
    "versions": {"torch": "1.0"},
    "rows": {"sha256": "other"},
}


@pytest.mark.parametrize("key", HOW)
@pytest.mark.parametrize("where", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_results_measured_in_another_way_are_refused(tmp_path, key, where):
    """Whichever of four exports it is, that of another seed too."""
    paths = make_exports(tmp_path, seeds=2)
    for seed, pair in enumerate(paths):
        for side, export in enumerate(pair):
            changes = {key: HOW[key]} if (seed, side) == where else {}
            add_task(export, "piqa", 1, RIGHT, **changes)
    with pytest.raises(UserError, match=rf"^piqa, 1-shot was measured with different {key} \(.*on all models alike$"):
        read(paths)


@pytest.mark.parametrize("name", ["losses", "ioi_generated", "incontext"])
def test_of_every_kind_of_result(tmp_path, name):
    paths = make_exports(tmp_path)
    for export in paths[0]:
        add_ioi(export, 0.1, 0.1, np.arange(8) - 3.5)
        add_incontext(export, np.arange(5.0))
    assert len(read(paths, {"f1": 1.0})) == 4
    edit(paths[0][1], name, lambda kept: (kept[0] if name == "losses" else kept).update(dtype="bfloat16"))
    with pytest.raises(UserError, match=r"measured with different dtype \(float32 and bfloat16\)"):
        read(paths, {"f1": 1.0})


def test_one_gpu_is_as_good_as_another(tmp_path):
    paths = make_exports(tmp_path)
    for number, export in enumerate(paths[0]):
        add_task(export, "piqa", 1, RIGHT, device=f"cuda:{number}")
    assert list(read(paths)) == ["piqa, 1-shot, acc_norm"]


# ---- The same items --------------------------------------------------------------------------------------------------


def refusal(paths: Paths) -> str:
    """The sentence with which these exports are refused."""
    with pytest.raises(UserError) as refused:
        read(paths, {"f1": 1.0})
    return str(refused.value)


@pytest.mark.parametrize(("key", "value"), [("store_fingerprint", "f2"), ("split", "train"), ("windows", 7)])
@pytest.mark.parametrize("where", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_windows_of_other_text_are_refused(tmp_path, key, value, where):
    paths = make_exports(tmp_path, seeds=2)
    for pair in paths:
        for export in pair:
            add_incontext(export, np.arange(5.0))
    edit(paths[where[0]][where[1]], "incontext", lambda kept: kept.update({key: value}))
    assert f"was measured on different items ({key})" in refusal(paths)


@pytest.mark.parametrize("key", ["prompt", "correct", "incorrect", "quadruple"])
@pytest.mark.parametrize("where", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_other_generated_sentences_are_refused(tmp_path, key, where):
    paths = make_exports(tmp_path, seeds=2)
    for pair in paths:
        for export in pair:
            add_ioi(export, 0.1, 0.1, np.arange(8) - 3.5)

    def change(kept: dict[str, Any]) -> None:
        kept["items"][key][5] = 0 if key == "quadruple" else "another"

    edit(paths[where[0]][where[1]], "ioi_generated", change)
    assert f"was measured on different items ({key})" in refusal(paths)


@pytest.mark.parametrize("key", ["documents", "tokens"])
@pytest.mark.parametrize("where", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_losses_of_other_documents_are_refused(tmp_path, key, where):
    paths = make_exports(tmp_path, seeds=2, tokens=np.arange(100, 120))
    edit(paths[where[0]][where[1]], "losses", lambda kept: kept[0][key].reverse())
    assert f"was measured on different items ({key})" in refusal(paths)


@pytest.mark.parametrize("key", ["doc_id", "doc_hash", "prompt_hash"])
def test_other_questions_are_refused(tmp_path, key):
    paths = make_exports(tmp_path, seeds=2)
    for pair in paths:
        for export in pair:
            add_task(export, "piqa", 1, RIGHT)
    samples = paths[1][1] / "evals/samples/piqa-1shot.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows[3][key], rows[4][key] = rows[4][key], rows[3][key]  # the same, in another order
    samples.write_text("\n".join(map(json.dumps, rows)))
    assert f"was measured on different items ({key})" in refusal(paths)


# ---- The same weights ------------------------------------------------------------------------------------------------


def told(where: str, digest: str) -> dict[str, Any]:
    """A digest of the weights, where one of the commands puts it."""
    return {"model": {"checkpoint_sha256": digest}} if where == "model" else {where: digest}


@pytest.mark.parametrize("where", ["weights", "weights_sha256", "model"])
@pytest.mark.parametrize("name", ["losses", "lm_eval", "ioi_generated", "incontext"])
@pytest.mark.parametrize("side", [0, 1])
def test_results_of_other_weights_are_refused(tmp_path, where, name, side):
    """An export that was made again from another checkpoint may hold what was measured before."""
    paths = make_exports(tmp_path)
    for number, export in enumerate(paths[0]):
        add_task(export, "piqa", 1, RIGHT)
        add_ioi(export, 0.1, 0.1, np.arange(8) - 3.5)
        add_incontext(export, np.arange(5.0))
        card = json.loads((export / "hippoformer.json").read_text())
        (export / "hippoformer.json").write_text(json.dumps({**card, "checkpoint_sha256": f"sha{number}"}))

    def measured_on(digest: str) -> None:
        edit(
            paths[0][side],
            name,
            lambda kept: (kept[0] if isinstance(kept, list) else kept).update(told(where, digest)),
        )

    measured_on(f"sha{side}")
    assert len(read(paths, {"f1": 1.0})) == 5
    measured_on(f"sha{1 - side}")
    with pytest.raises(UserError, match="was measured on other weights than it holds now; measure it again") as error:
        read(paths, {"f1": 1.0})
    assert str(paths[0][side]) in str(error.value)
