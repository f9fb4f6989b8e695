"""lm-eval's numbers against plain forward passes and prompts written out here, on real items where they are at hand."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from evals.__main__ import main
from evals.exports import load_model, open_export
from evals.harness import catalogue, suites
from evals.harness import run as harness
from llm.common.errors import UserError

from ..rows import rows_of, write_rows


def hellaswag(row: dict) -> tuple[str, list[str], int]:
    """WikiHow's [marks] taken out, its titles made sentences, as in lm-eval's task."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    return clean(f"{row['activity_label']}: {context}"), [clean(e) for e in row["endings"]], int(row["label"])


LETTERS = {"A": 0, "B": 1, "C": 2, "D": 3}

# The official prompt, choices and answer of each task, written out from the tasks' papers and lm-eval's documentation.
BY_HAND = {
    "piqa": lambda row: (f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]),
    "hellaswag": hellaswag,
    "openbookqa": lambda row: (row["question_stem"], row["choices"]["text"], LETTERS[row["answerKey"]]),
    "arc_easy": lambda row: (
        f"Question: {row['question']}\nAnswer:",
        row["choices"]["text"],
        row["choices"]["label"].index(row["answerKey"]),
    ),
    "stories": lambda row: (row["ctx"], row["endings"], row["label"]),
}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every (prompt, choice) that lm-eval asks a model for."""
    asked: list[tuple[str, str]] = []
    original = harness.CountingHFLM.loglikelihood

    def record(self, instances, *args, **kwargs):
        asked.extend(instance.args for instance in instances)
        return original(self, instances, *args, **kwargs)

    monkeypatch.setattr(harness.CountingHFLM, "loglikelihood", record)
    return asked


def evaluate(folder: Path, data: Path | None, tmp_path: Path, task: str, shots: int, limit: int, **load):
    """(result, samples, loaded model) of one task."""
    protocol = harness.Protocol((task,), (shots,), limit, batch_size=3)
    prepared = harness.prepare_tasks(protocol, data, tmp_path / "work")
    loaded = load_model(open_export(folder), "cpu", **load)
    return *harness.evaluate_task(loaded, prepared.manager, task, shots, protocol), loaded


def loglikelihood(loaded, prompt: str, choice: str) -> float:
    """One unpadded forward pass, in float64 after the logits."""
    whole, start = loaded.tokenizer.encode(prompt + choice), len(loaded.tokenizer.encode(prompt))
    with torch.no_grad():
        logits = loaded.model(torch.tensor([whole[:-1]])).logits[0].double()
    return sum(torch.log_softmax(logits[i - 1], 0)[whole[i]].item() for i in range(start, len(whole)))


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def check_against_plain_passes(result, samples, loaded, asked, items):
    """Log-likelihoods to 1e-4, and both accuracies, recomputed from the requests that were made."""
    choices_of = [choices for _, choices, _ in items]
    start, right, right_by_length = 0, [], []
    for sample, choices, (_, _, answer) in zip(samples, choices_of, items, strict=True):
        pairs = asked[start : start + len(choices)]
        start += len(choices)
        assert [choice for _, choice in pairs] == [f" {choice}" for choice in choices]
        expected = [loglikelihood(loaded, *pair) for pair in pairs]
        assert sample["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
        right.append(int(np.argmax(expected)) == answer)
        right_by_length.append(int(np.argmax([e / len(c) for e, c in zip(expected, choices, strict=True)])) == answer)
    assert (result["acc"], result["acc_norm"]) == (np.mean(right), np.mean(right_by_length))
    assert result["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)
    assert result["n"] == len(items) and start == len(asked)


@pytest.mark.parametrize(
    ("task", "evaluated", "style", "shots"),
    [
        ("piqa", "validation", "gpt2", 0),
        ("piqa", "validation", "llama", 1),
        ("hellaswag", "validation", "llama", 0),
        ("hellaswag", "validation", "gpt2", 1),
        ("openbookqa", "test", "gpt2", 0),
        ("openbookqa", "test", "llama", 5),
    ],
)
def test_loglikelihoods_equal_plain_forward_passes(
    real_items, make_export, tmp_path, requests, task, evaluated, style, shots
):
    folder = make_export(style=style, tokenizer="gpt2", vocabulary=50304)
    result, samples, loaded = evaluate(folder, real_items, tmp_path, task, shots, limit=3)
    items = [BY_HAND[task](row) for row in rows_of(real_items / f"{task}/{evaluated}.jsonl")[:3]]
    check_against_plain_passes(result, samples, loaded, requests, items)
    assert all(prompt.endswith(item[0]) for (prompt, _), item in zip(requests[:: len(items[0][1])], items, strict=True))
    assert result["truncated"] == 0 and result["limit"] == 3
    assert result["chance"] == 1 / len(items[0][1])


def test_a_bf16_model_gets_a_softmax_in_fp32(make_export, data, tmp_path, requests):
    result, samples, loaded = evaluate(make_export(), data, tmp_path, "piqa", 0, limit=6, dtype="bfloat16")
    prompt, choice = requests[0]
    whole, start = loaded.tokenizer.encode(prompt + choice), len(loaded.tokenizer.encode(prompt))
    logits = loaded.model(torch.tensor([whole[:-1]])).logits[0].float().detach()
    expected = sum(torch.log_softmax(logits[i - 1], 0)[whole[i]].item() for i in range(start, len(whole)))
    # bf16 sums differ a little with padding; a softmax in bf16 itself would be off by whole units here
    assert samples[0]["loglikelihoods"][0] == pytest.approx(expected, rel=2e-3)
    assert result["dtype"] == "bfloat16"
    assert any(value != torch.tensor(value).bfloat16().item() for value in samples[0]["loglikelihoods"])


@pytest.mark.parametrize(
    ("dtype", "arguments"), [("float32", {}), ("bfloat16", {"dtype": "bfloat16", "softmax_dtype": "float32"})]
)
def test_stock_lm_eval_gives_the_same_numbers(make_export, data, tmp_path, dtype, arguments):
    folder = make_export()
    result, samples, _ = evaluate(folder, data, tmp_path, "arc_easy", 2, limit=5, dtype=dtype)
    manager = TaskManager(include_path=tmp_path / "work/tasks", include_defaults=False)
    stock = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(folder), "trust_remote_code": True, **arguments}, tasks=["arc_easy"], num_fewshot=2,
        limit=5, device="cpu", batch_size=3, task_manager=manager,
    )  # fmt: skip
    assert stock["results"]["arc_easy"]["acc_norm,none"] == result["acc_norm"] and result["dtype"] == dtype
    assert [[ll for ll, _ in s["filtered_resps"]] for s in stock["samples"]["arc_easy"]] == [
        sample["loglikelihoods"] for sample in samples
    ]


def test_what_does_not_fit_the_context_is_counted_or_refused(make_export, data, tmp_path, requests):
    result, _, loaded = evaluate(make_export(context=40), data, tmp_path, "piqa", 1, limit=6)
    lengths = [len(loaded.tokenizer.encode(prompt + choice)) for prompt, choice in requests]
    assert result["truncated"] == sum(length > 41 for length in lengths) > 0
    with pytest.raises(UserError, match="tokens and the model's context 4; leave this task out"):
        evaluate(make_export("short", context=4), data, tmp_path, "piqa", 0, limit=1)


# ---- Prompts and few-shot examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "evaluated"), [("piqa", "validation"), ("openbookqa", "test"), ("arc_easy", "test")])
def test_examples_come_from_the_other_split_and_prompts_are_official(
    request, make_export, data, tmp_path, requests, task, evaluated
):
    folder = data if task == "arc_easy" else request.getfixturevalue("real_items")
    result, _, _ = evaluate(make_export(context=4096), folder, tmp_path, task, 2, limit=6)
    items = [BY_HAND[task](row) for row in rows_of(folder / task / f"{evaluated}.jsonl")]
    examples = [BY_HAND[task](row) for row in rows_of(folder / task / "train.jsonl")]
    told = {f"{prompt} {choices[answer]}\n\n" for prompt, choices, answer in examples}
    expected = [item for item in items[:6] for _ in item[1]]  # one request a choice
    for (prompt, _), (question, _, _) in zip(requests, expected, strict=True):
        assert prompt.endswith(question)
        shown = prompt.removesuffix(question)
        parts = [part for part in told if part in shown]
        assert len(parts) == 2 and sum(map(len, parts)) == len(shown)
        assert not any(other in shown for other, _, _ in items if len(other) > 20)
    assert result["shots"] == 2 and result["n"] == 6


@pytest.mark.parametrize("task", ["piqa", "hellaswag", "openbookqa"])
def test_prompts_and_examples_equal_the_official_task_on_the_same_rows(real_items, tmp_path, task):
    official = load_yaml(catalogue.OFFICIAL / f"{task}/{task}.yaml")
    official.pop("tag", None)
    splits = {file.stem: datasets.Dataset.from_list(rows_of(file)) for file in (real_items / task).glob("*.jsonl")}
    if task == "openbookqa":
        official["validation_split"] = None  # there is no such file
    official |= {"custom_dataset": lambda **_: datasets.DatasetDict(splits), "metadata": {}}
    expected = ConfigurableTask(config=official)
    prepared = harness.prepare_tasks(harness.Protocol((task,), (2,)), real_items, tmp_path)
    ours = prepared.manager.load([task])["tasks"][task]
    for instance in (expected, ours):
        instance.set_fewshot_seed(1234)
    for (_, row), (_, same) in zip(expected.doc_iterator(limit=20), ours.doc_iterator(limit=20), strict=True):
        assert ours.doc_to_text(same) == expected.doc_to_text(row)
        assert ours.doc_to_choice(same) == expected.doc_to_choice(row)
        assert ours.doc_to_target(same) == expected.doc_to_target(row)
        assert ours.fewshot_context(same, num_fewshot=2) == expected.fewshot_context(row, num_fewshot=2)


def test_stories_are_scored_and_their_examples_are_not_evaluated(make_export, tmp_path, requests):
    result, samples, loaded = evaluate(make_export(context=4096), None, tmp_path, "stories", 1, limit=8)
    items, examples = (
        [BY_HAND["stories"](row) for row in rows_of(tmp_path / f"work/data/stories/{split}.jsonl")]
        for split in ("validation", "train")
    )
    assert {context for context, _, _ in items}.isdisjoint(context for context, _, _ in examples)
    check_against_plain_passes(result, samples, loaded, requests, items[:8])
    told = {f"{context} {endings[label]} " for context, endings, label in examples}
    assert all(prompt.removesuffix(items[i // 4][0]) in told for i, (prompt, _) in enumerate(requests))


# ---- State and results -----------------------------------------------------------------------------------------------


def test_modes_and_random_states_are_left_as_they_were(make_export, data, tmp_path):
    protocol = harness.Protocol(("piqa",), (1,), limit=4)
    prepared = harness.prepare_tasks(protocol, data, tmp_path / "work")
    loaded = load_model(open_export(make_export()), "cpu")
    loaded.model.train()
    loaded.model.transformer.h[0].eval()  # a frozen part of a model in training
    modes = [module.training for module in loaded.model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    padding = loaded.tokenizer.pad_token
    harness.evaluate_task(loaded, prepared.manager, "piqa", 1, protocol)
    assert [module.training for module in loaded.model.modules()] == modes
    assert loaded.tokenizer.pad_token == padding
    assert states == (
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    )  # fmt: skip


def test_command_merges_results_by_task_and_shots(make_export, data, capsys):
    folder = make_export(info={"run": "classic", "step": 1, "tokens_seen": 1, "parameters": 1, "seed": 0})
    command = ["run", str(folder), "--data", str(data), "--device", "cpu"]
    assert main([*command, "--tasks", "piqa", "--shots", "0", "1", "--limit", "3"]) == 0
    assert main([*command, "--tasks", "piqa", "arc_easy", "--limit", "4"]) == 0
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["classic", "piqa", "0", "4"],
        ["classic", "arc_easy", "0", "4"],
    ]
    results = json.loads((folder / "evals/lm_eval.json").read_text())
    assert [(r["task"], r["shots"], r["n"]) for r in results] == [("arc_easy", 0, 4), ("piqa", 0, 4), ("piqa", 1, 3)]
    assert results[0]["versions"]["torch"] == torch.__version__ and results[0]["device"] == "cpu"
    for result in results:
        samples = rows_of(folder / f"evals/samples/{result['task']}-{result['shots']}shot.jsonl")
        assert np.mean([sample["acc"] for sample in samples]) == result["acc"]
    assert not list(folder.rglob("*.part"))


def test_a_single_item_has_no_standard_error(make_export, data, capsys):
    folder = make_export()
    assert main(["run", str(folder), "--data", str(data), "--tasks", "piqa", "--limit", "1"]) == 0
    assert "±" not in capsys.readouterr().out
    (result,) = json.loads((folder / "evals/lm_eval.json").read_text())
    assert result["acc"] in (0.0, 1.0) and result["acc_stderr"] is None


def test_suites_and_what_replaces_their_parts():
    five = ("arc_easy", "arc_challenge", "piqa", "openbookqa", "hellaswag")
    assert suites.chosen("paper", None, None) == (five, (0, 1, 5))
    assert suites.chosen("paper", ["piqa", "piqa"], None) == (("piqa",), (0, 1, 5))
    assert suites.chosen("paper", None, [2]) == (five, (2,))
    assert suites.chosen(None, ["piqa"], None) == (("piqa",), None)
    assert suites.chosen(None, None, None) == (("stories",), (0,))
    assert suites.chosen(None, None, [1, 0, 1]) == (("stories",), (1, 0))


def test_names_and_help_need_no_torch():
    """`--help` answers at once; which tasks need a network is known before a library asks whether there is one."""
    code = "import sys, evals.__main__, evals.harness.tasks; print({'torch', 'lm_eval', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# ---- What the user gave cannot be used -------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a refusal comes only after a model was loaded."""
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("a model was loaded before the refusal"))


def break_rows(data: Path, change) -> None:
    """Change the third evaluated row of PIQA."""
    rows = rows_of(data / "piqa/validation.jsonl")
    change(rows[2])
    write_rows(data / "piqa", "validation", rows)


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda data: None, ["no_such_task"], "there is no task no_such_task: lm-eval has no task, group or tag"),
        (lambda data: None, ["hellaswag", "sciq"], "2 of the tasks have no result: hellaswag, sciq; the first because"),
        (lambda data: None, ["hellaswag"], "validation.jsonl, which is not there"),
        (lambda data: (data / "arc_easy/test.jsonl").unlink(), ["arc_easy"], "test.jsonl, which is not there"),
        (lambda data: (data / "piqa/train.jsonl").unlink(), ["piqa", "--shots", "1"], "has only its validation split"),
        (lambda data: None, ["piqa", "--shots", "12"], "has 12 rows to draw 12 examples from"),
        (lambda data: break_rows(data, lambda row: row.pop("sol2")), ["piqa"], "line 3, lacks sol2"),
        (lambda data: write_rows(data / "piqa", "validation", [{"goal": "x", "sol1": "y", "label": 0}]), ["piqa"],
         "validation.jsonl, line 1, lacks sol2; give it"),
        (lambda data: break_rows(data, lambda row: row.update(label=-1)), ["piqa"], "row 3 that piqa evaluates has no"),
        (lambda data: break_rows(data, lambda row: row.update(label="?")), ["piqa"], "piqa cannot be read"),
        (lambda data: write_rows(data / "piqa", "validation", []), ["piqa"], "validation.jsonl is empty"),
        (lambda data: (data / "piqa/train.jsonl").write_text("{"), ["piqa"], "line 1, is not JSON"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(make_export, data, capsys, no_model, spoil, arguments, message):
    folder = make_export()
    spoil(data)
    capsys.readouterr()
    assert main(["run", str(folder), "--data", str(data), "--tasks", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (folder / "evals").exists()


def test_a_tokenizer_larger_than_the_model(make_export, tokenizers, data, capsys, no_model):
    folder = make_export(vocabulary=len(tokenizers["words"]) - 1)
    assert main(["run", str(folder), "--data", str(data), "--tasks", "piqa"]) == 2
    ids = len(tokenizers["words"])
    assert f"the tokenizer has {ids} ids and the model {ids - 1}" in capsys.readouterr().err


def test_folders_that_hold_no_model(make_export, data, capsys, tmp_path):
    whole = make_export()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = make_export(f"without-{name}")
        (folder / name).unlink()
        assert main(["run", str(folder), "--data", str(data), "--tasks", "piqa"]) == 2
        assert f"without-{name}" in capsys.readouterr().err
    half = whole / "model.safetensors"
    half.write_bytes(half.read_bytes()[:5000])
    assert main(["run", str(whole), "--data", str(data), "--tasks", "piqa"]) == 2
    assert "does not load as a causal model" in capsys.readouterr().err


def test_weights_that_are_missing(make_export, data, capsys):
    from safetensors.torch import load_file, save_file

    folder = make_export()
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert main(["run", str(folder), "--data", str(data), "--tasks", "piqa"]) == 2
    assert "lacks 1 of the model's weights (the first: transformer.h.1.mlp.c_fc.weight)" in capsys.readouterr().err


def test_arguments_out_of_range(capsys):
    for arguments in (["--limit", "0"], ["--shots", "-1"], ["--batch-size", "0"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as stop:
            main(["run", "model", *arguments])
        assert stop.value.code == 2
