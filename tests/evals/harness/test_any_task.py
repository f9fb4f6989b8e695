"""A task of each kind through prefetch and run, on local repositories of the hub's form: stock lm-eval's numbers, and
numbers worked out here from plain forward passes."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import datasets
import lm_eval
import lm_eval.evaluator
import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from evals.__main__ import main
from evals.exports import LoadedModel, load_model, open_export
from evals.harness import catalogue
from evals.harness import run as harness

from ..rows import arc_rows, rows_of, write_rows
from .test_run import loglikelihood

NAMES = ["Ann", "Bob", "Eve", "Tom"]


def sentences(count: int) -> list[str]:
    return [
        f"{NAMES[n % 4]} gave the bag to {NAMES[(n + 1 + n // 4) % 4]} at the park, {n} times." for n in range(count)
    ]


# task -> the hub's repository, its config, rows by split
HUB = {
    "lambada_openai": ("EleutherAI/lambada_openai", "default", {"test": [{"text": text} for text in sentences(7)]}),
    "wikitext": (
        "EleutherAI/wikitext_document_level",
        "wikitext-2-raw-v1",
        {
            split: [{"page": " ".join(sentences(n + start))} for n in range(1, 5)]
            for start, split in enumerate(("train", "validation", "test"))
        },
    ),
    "winogrande": (
        "allenai/winogrande",
        "winogrande_xl",
        {
            split: [
                {"sentence": f"{NAMES[n % 4]} met Max {start + n} times and _ smiled at the drink.", "option1": "Max",
                 "option2": NAMES[n % 4], "answer": str(n % 2 + 1)}
                for n in range(8)
            ]
            for start, split in ((0, "validation"), (50, "train"))
        },
    ),
    "gsm8k": (
        "openai/gsm8k",
        "main",
        {
            split: [{"question": f"{n} + {k}?", "answer": f"So #### {n + k}"} for n in range(9 - 3 * k)]
            for k, split in ((1, "train"), (2, "test"))
        },
    ),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a repository for each task, a cache of its own, and no look at the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda *_: None)
    for repository, config, splits in HUB.values():
        files = [{"split": split, "path": f"data/{split}.parquet"} for split in splits]
        for split, rows in splits.items():
            path = Path(repository) / f"data/{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(path)
        card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
        (Path(repository) / "README.md").write_text(f"---\n{card}---\n")
    return tmp_path


def ours(folder: Path, task: object, *words: str) -> tuple[dict, list[dict]]:
    """The one result and its items of `python -m evals run`."""
    assert main(["run", str(folder), "--tasks", str(task), "--device", "cpu", "--batch-size", "3", *words]) == 0
    (result,) = json.loads((folder / "evals/lm_eval.json").read_text())
    return result, rows_of(folder / f"evals/samples/{result['task']}-{result['shots']}shot.jsonl")


def stock(folder: Path, task: str) -> tuple[dict, list[dict]]:
    """lm-eval's own scores and items, from its own definition and the repository."""
    place = catalogue.official_names()[task].parent
    manager = TaskManager(include_path=place, include_defaults=False)
    output = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(folder), "trust_remote_code": True}, tasks=[task], device="cpu", batch_size=3,
        task_manager=manager, bootstrap_iters=0,
    )  # fmt: skip
    return output["results"][task], output["samples"][task]


QUESTIONS = [{"question": "Why?", "options": ["a", "b"], "answer": 1} for _ in range(3)]


def write_task(folder: Path, name: str, rows: list[dict] = QUESTIONS, **changes: object) -> Path:
    """A multiple-choice task of the user's with rows next to it, with `changes` to its YAML."""
    config = {
        "task": name, "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(write_rows(folder, name, rows))}}, "doc_to_text": "question",
        "doc_to_choice": "options", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (config | changes).items() if value is not None}))
    return path


GENERATE = {"output_type": "generate_until", "doc_to_choice": None, "metric_list": [{"metric": "exact_match"}]}


@pytest.fixture
def loaded(make_export: Callable[..., Path]) -> LoadedModel:
    return load_model(open_export(make_export(context=700)), "cpu")


def by_hand_lambada(model: LoadedModel, result: dict, samples: list[dict], rows: list[dict]) -> None:
    split = [row["text"].rpartition(" ") for row in rows]
    expected = [loglikelihood(model, prompt, f" {last}") for prompt, _, last in split]
    assert [sample["loglikelihoods"] for sample in samples] == [[pytest.approx(nats, abs=1e-4)] for nats in expected]
    assert result["perplexity"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)
    assert (result["chance"], result["metrics"]["acc"]["share"]) == (None, True)


def by_hand_wikitext(model: LoadedModel, result: dict, samples: list[dict], rows: list[dict]) -> None:
    """No page needs lm-eval's detokenizer here but for the commas, nor more than a window."""
    nats = [loglikelihood(model, "<|endoftext|>", row["page"]) for row in rows]
    assert [sample["loglikelihoods"] for sample in samples] == [[pytest.approx(n, rel=1e-6)] for n in nats]
    count = sum(len(row["page"].encode()) for row in rows)
    assert result["bits_per_byte"] == pytest.approx(-sum(nats) / count / math.log(2), rel=1e-5)
    words = sum(len(row["page"].split()) for row in rows)
    assert result["word_perplexity"] == pytest.approx(math.exp(-sum(nats) / words), rel=1e-5)
    assert not result["metrics"]["bits_per_byte"]["share"] and result["metrics"]["bits_per_byte"]["better"] == -1


def by_hand_winogrande(model: LoadedModel, result: dict, samples: list[dict], rows: list[dict]) -> None:
    right = []
    for row, sample in zip(rows, samples, strict=True):
        before, after = row["sentence"].split("_")
        expected = [loglikelihood(model, before + row[f"option{n}"], after) for n in (1, 2)]
        assert sample["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
        right.append(int(np.argmax(expected)) + 1 == int(row["answer"]))
    assert (result["acc"], result["chance"], [s["acc"] for s in samples]) == (np.mean(right), 0.5, right)


def by_hand_gsm8k(model: LoadedModel, result: dict, samples: list[dict], rows: list[dict]) -> None:
    """Greedy, one token after the other without a cache; the prompts' examples are checked against stock lm-eval."""
    assert list(result["metrics"]) == ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert result["shots"] == 5 and all(len(sample["responses"]) == 1 for sample in samples)
    assert all(sample["exact_match,strict-match"] in (0.0, 1.0) for sample in samples)


BY_HAND = {
    "lambada_openai": by_hand_lambada,
    "wikitext": by_hand_wikitext,
    "winogrande": by_hand_winogrande,
    "gsm8k": by_hand_gsm8k,
}


@pytest.mark.parametrize("task", BY_HAND)
def test_numbers_of_each_kind_of_task(hub, loaded, task, capsys):
    folder = loaded.export.folder
    assert main(["prefetch", "data", "--tasks", task]) == 0
    evaluated = "validation" if task == "winogrande" else "test"
    assert rows_of(hub / f"data/{task}/{evaluated}.jsonl") == HUB[task][2][evaluated]
    scores, items = stock(folder, task)
    (hub / HUB[task][0].partition("/")[0]).rename(hub / "gone")  # what was fetched is all that is read
    result, samples = ours(folder, task, "--data", "data")
    for name, metric in result["metrics"].items():
        key = name if "," in name else f"{name},none"
        assert result[name] == pytest.approx(scores[key], rel=1e-5), (name, metric)
    kept = {sample["doc_id"]: sample for sample in samples}
    assert len(kept) == len(HUB[task][2][evaluated])
    for item in items:
        own, responses = kept[item["doc_id"]], [repeats[0] for repeats in item["resps"]]
        assert (own["prompt_hash"], own["doc_hash"]) == (item["prompt_hash"], item["doc_hash"])
        if task == "gsm8k":
            assert own["responses"] == responses
        else:
            nats = [answer[0] if isinstance(answer, tuple) else answer for answer in responses]
            assert own["loglikelihoods"] == pytest.approx(nats, abs=1e-4, rel=0)
    BY_HAND[task](loaded, result, samples, HUB[task][2][evaluated])
    name = next(iter(result["metrics"]))
    assert name in capsys.readouterr().out


def test_what_is_generated_is_the_likeliest(loaded, tmp_path):
    """Greedy, one token after the other, without a cache or a batch, from prompts of several lengths."""
    expected = {}
    for prompt in ("When John", "When Mary and John went to", "After that, an apple"):
        ids = loaded.tokenizer.encode(prompt)
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
        whole = loaded.tokenizer.decode(ids[start:])
        expected[prompt] = whole.partition("<|endoftext|>")[0].partition("\n\n")[0]
    rows = [{"question": q, "answer": text if q == "When John" else "x"} for q, text in expected.items()]
    short = {"max_gen_toks": 6, "until": ["\n\n"]}
    result, samples = ours(
        loaded.export.folder, write_task(tmp_path, "go-on", rows, **GENERATE, generation_kwargs=short)
    )
    assert [sample["responses"] for sample in samples] == [[text] for text in expected.values()]
    assert result["exact_match"] == pytest.approx(1 / 3) and [s["exact_match"] for s in samples] == [1, 0, 0]


def test_bits_per_byte_of_a_text_and_of_a_store(make_export, story_store, tmp_path):
    """The store's own tokenizer need not be the model's: its documents are read as text."""
    folder = make_export(context=600)
    model = load_model(open_export(folder), "cpu")
    (tmp_path / "two.txt").write_text("One apple.\n<|endoftext|>\nTwo balls, “é”.\n")
    words = ["run", str(folder), "--tasks", str(tmp_path / "two.txt"), str(story_store), "--limit", "3"]
    assert main([*words, "--device", "cpu"]) == 0
    results = {result["task"]: result for result in json.loads((folder / "evals/lm_eval.json").read_text())}
    assert {name: result["n"] for name, result in results.items()} == {
        "two.txt": 2, f"{story_store.parent.name}-{story_store.name}": 3
    }  # fmt: skip
    texts = ["One apple.", "Two balls, “é”."]
    nats = -sum(loglikelihood(model, "<|endoftext|>", text) for text in texts)
    assert results["two.txt"]["bits_per_byte"] == pytest.approx(nats / (10 + 20) / math.log(2), rel=1e-5)


# ---- What lacks does not stop what is there --------------------------------------------------------------------------


def test_other_tasks_run_and_the_last_line_says_what_lacks(make_export, data, capsys):
    folder = make_export(context=64)
    rows = arc_rows("item", 4)
    rows[2]["choices"]["text"][1] = "far " * 80  # more tokens than the model's context
    write_rows(data / "arc_easy", "test", rows)
    words = ["run", str(folder), "--data", str(data), "--tasks", "no_such_task", "arc_easy", "hellaswag", "piqa"]
    assert main([*words, "--shots", "0", "12", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    kept = [(r["task"], r["shots"]) for r in json.loads((folder / "evals/lm_eval.json").read_text())]
    assert kept == [("piqa", 0)] and "piqa" in captured.out
    last = captured.err.splitlines()[-1]
    assert last.startswith(
        "error: 5 of the tasks have no result: no_such_task, hellaswag, piqa, 12-shot, arc_easy, 0-shot, "
    )
    assert "arc_easy, 12-shot, of model; the first because there is no task no_such_task: lm-eval has no task" in last
    assert main(["prefetch", str(data), "--tasks", "no_such_task", "stories"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == "stories: reads what is here, nothing to fetch\n"
        and "there is no task no_such_task" in captured.err
    )


def test_what_a_task_cannot_do_with_a_model(make_export, tmp_path, capsys):
    """Examples that are evaluated, more new tokens than the context, and code of the user's that fails."""
    write_task(tmp_path, "long", [{"question": "Why?", "answer": "So."}], **GENERATE)
    (tmp_path / "code.py").write_text("def score(doc, results):\n    raise KeyError('no such key')\n")
    with write_task(tmp_path, "broken").open("a") as file:
        file.write("process_results: !function code.score\n")
    write_task(tmp_path, "leak", fewshot_split="test")
    folder = make_export(context=64)
    for name, why in (
        ("leak", "leak, 1-shot, needs examples that are not evaluated and has only its test split"),
        ("long", "asks for up to 256 new tokens and the model's context is 64; include the task in a YAML of your own"),
        ("broken", "lm-eval cannot do broken: KeyError: 'no such key'"),
    ):
        words = ["run", str(folder), "--tasks", str(tmp_path / f"{name}.yaml"), "--device", "cpu"]
        assert main([*words, "--shots", str(int(name == "leak"))]) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "evals/lm_eval.json").exists()


def test_a_task_of_the_users_is_asked_again_where_its_yaml_changed(make_export, tmp_path, monkeypatch):
    made: list[str] = []
    evaluate = harness.evaluate_task
    monkeypatch.setattr(harness, "evaluate_task", lambda *args: made.append(args[2]) or evaluate(*args))
    folder = make_export()
    for prompt, times in (("question", 1), ("question", 1), ("{{question}} Because", 2)):
        ours(folder, write_task(tmp_path, "mine", doc_to_text=prompt))
        assert made == ["mine"] * times


@pytest.mark.parametrize("by_size", [True, False])
def test_groups_have_lm_evals_mean(make_export, tmp_path, capsys, monkeypatch, by_size):
    """A group of the user's, with tasks of unlike size; what was measured before is taken for it."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda *_: None)
    for name, count in (("one", 3), ("two", 8)):
        rows = [{"question": f"Why {n}?", "options": [f"{n}", "b"], "answer": n % 2} for n in range(count)]
        write_task(tmp_path / "mine", name, rows)
    means = [{"metric": "acc", "weight_by_size": by_size}]
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": means}
    (tmp_path / "mine/both.yaml").write_text(yaml.safe_dump(group))
    folder = make_export()
    ours(folder, tmp_path / "mine/one.yaml")
    capsys.readouterr()
    words = ["run", str(folder), "--tasks", str(tmp_path / "mine/both.yaml"), "--device", "cpu", "--batch-size", "3"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "1 of 2 results are kept from before" in captured.err
    manager = TaskManager(include_path=tmp_path / "mine", include_defaults=False)
    model = {"pretrained": str(folder)}
    stock = lm_eval.simple_evaluate("hf", model, tasks=["both"], device="cpu", batch_size=3, task_manager=manager)
    expected = stock["results"]["both"]["acc,none"]
    last = captured.out.splitlines()[-1].split()
    assert last[:5] == ["model", "both", "0", "11", "0"] and last[5] == f"{100 * expected:.2f}"
    assert json.loads((folder / "evals/groups.json").read_text()) == {
        "both": {"tasks": ["one", "two"], "by_size": by_size}
    }


def test_batch_size_auto(make_export, data, tmp_path, capsys):
    """On a GPU lm-eval seeks it; forced here on the CPU, where the command takes 16."""
    folder = make_export(context=64)
    prepared = harness.prepare_tasks(harness.Protocol(("piqa",)), data, tmp_path / "work")
    model = load_model(open_export(folder), "cpu")
    found = [
        harness.evaluate_task(model, prepared.manager, "piqa", 0, harness.Protocol(("piqa",), batch_size=size))
        for size in (1, "auto")
    ]
    for one, other in zip(*(each.samples for each in found), strict=True):
        assert one["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-4)
    assert capsys.readouterr().out == ""  # lm-eval prints the size that it found
    words = ["run", str(folder), "--tasks", "piqa", "--data", str(data), "--device", "cpu", "--batch-size", "auto"]
    assert main(words) == 0
    (result,) = json.loads((folder / "evals/lm_eval.json").read_text())
    assert (found[1].result["batch_size"], result["batch_size"]) == ("auto", 16)
