"""The IOI task against a computation written out here, and Table 2 against `statistics`."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.__main__ import main
from evals.probes import ioi
from llm.common.errors import UserError

# Burns et al. 2025, Section 4.2, written out: (prompt, correct, incorrect).
PAPER = [
    ("When John and Mary went to the shops, John gave the bag to", " Mary", " John"),
    ("When John and Mary went to the shops, Mary gave the bag to", " John", " Mary"),
    ("When Tom and James went to the park, Tom gave the ball to", " James", " Tom"),
    ("When Tom and James went to the park, James gave the ball to", " Tom", " James"),
    ("When Dan and Emily went to the shops, Dan gave an apple to", " Emily", " Dan"),
    ("When Dan and Emily went to the shops, Emily gave an apple to", " Dan", " Emily"),
    ("After Sam and Amy went to the park, Sam gave a drink to", " Amy", " Sam"),
    ("After Sam and Amy went to the park, Amy gave a drink to", " Sam", " Amy"),
]


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def by_hand(model, tokenizer, prompt: str, name: str) -> float:
    """Probability of the tokens of `name` after `prompt`: one step at a time, in float64."""
    ids, product = tokenizer.encode(prompt), 1.0
    for token in tokenizer.encode(name):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0, -1].double()
        product *= (logits - logits.max()).exp()[token].item() / (logits - logits.max()).exp().sum().item()
        ids = [*ids, token]
    return product


@pytest.mark.parametrize(("style", "tokenizer"), [("gpt2", "words"), ("llama", "words"), ("gpt2", "bytes")])
def test_probabilities_equal_a_computation_by_hand(make_export, style, tokenizer):
    model, tokens = load(make_export(style=style, tokenizer=tokenizer))
    records = ioi.ioi_probabilities(model, tokens)
    assert [(r["prompt"], r["correct"], r["incorrect"]) for r in records] == PAPER
    assert [(r["sentence"], r["variant"]) for r in records] == [(s, v) for s in (1, 2, 3, 4) for v in (1, 2)]
    for record in records:
        for outcome in ("correct", "incorrect"):
            expected = by_hand(model, tokens, record["prompt"], record[outcome])
            assert record[f"probability_{outcome}"] == pytest.approx(expected, rel=1e-4)
            assert "".join(record[f"tokens_{outcome}"]) == record[outcome]
    names = ["Amy", "Dan", "Emily", "James", "John", "Mary", "Sam", "Tom"]
    assert ioi.split_names(records) == ([] if tokenizer == "words" else names)


def test_softmax_is_fp32_over_the_whole_vocabulary_of_a_bf16_model(make_export):
    model, tokens = load(make_export())
    model = model.bfloat16()
    record = ioi.ioi_probabilities(model, tokens)[0]
    logits = model(torch.tensor([tokens.encode(record["prompt"])])).logits[0, -1]
    expected = torch.softmax(logits.float(), 0)[tokens.encode(" Mary")[0]].item()
    assert logits.dtype == torch.bfloat16 and record["probability_correct"] == pytest.approx(expected, rel=1e-6)


def test_training_mode_is_left_as_it_was(make_export):
    model, tokens = load(make_export())
    for training in (True, False):
        model.train(training)
        ioi.ioi_probabilities(model, tokens)
        assert model.training is training


def test_a_tokenizer_that_ends_the_prompt_is_refused(make_export):
    from tokenizers.processors import TemplateProcessing

    model, tokens = load(make_export())
    tokens.backend_tokenizer.post_processor = TemplateProcessing("$A <|endoftext|>", None, [("<|endoftext|>", 0)])
    with pytest.raises(UserError, match="does not keep the tokens of"):
        ioi.ioi_probabilities(model, tokens)


def test_the_context_of_training_counts_where_there_are_more_positions(make_export, capsys):
    folder = make_export(context=512, info={"run": "model", "context": 8})
    assert main(["ioi", str(folder), "--device", "cpu"]) == 2
    assert "does not fit the model's context of 8" in capsys.readouterr().err


def test_a_context_too_short_for_the_prompt_is_refused(make_export):
    with pytest.raises(UserError, match="does not fit the model's context of 8"):
        ioi.ioi_probabilities(*load(make_export(context=8)))


def records_of(values: list[float]) -> list[ioi.Record]:
    """Eight records with these sixteen probabilities, correct before incorrect."""
    return [
        {"sentence": i // 2 + 1, "variant": i % 2 + 1, "probability_correct": c, "probability_incorrect": w}
        for i, (c, w) in enumerate(zip(values[::2], values[1::2], strict=True))
    ]


@given(st.lists(st.lists(st.floats(0, 1), min_size=16, max_size=16), min_size=1, max_size=4))
def test_table_is_mean_and_population_deviation_over_models(models):
    rows = ioi.summarise({"group": [records_of(values) for values in models]})
    for offset, row in enumerate(rows):
        # a model's value for sentence s: the mean over its two variants, at 4 s and 4 s + 2 of its sixteen numbers
        per_model = [[(v[4 * s + offset] + v[4 * s + 2 + offset]) / 2 for s in range(4)] for v in models]
        columns = [*zip(*per_model, strict=True), [statistics.fmean(values) for values in per_model]]
        assert row["mean"] == pytest.approx([statistics.fmean(column) for column in columns], abs=1e-12)
        if len(models) == 1:
            assert row["std"] is None
        else:
            assert row["std"] == pytest.approx([statistics.pstdev(column) for column in columns], abs=1e-9)


def test_command_prints_groups_and_keeps_every_value(make_export, capsys):
    info = {"run": "values-seed1", "step": 10, "tokens_seen": 100, "parameters": 5, "seed": 1}
    a, b, c = make_export("a", seed=1), make_export("b", seed=2), make_export("c", "llama", "bytes", info=info)
    assert main(["ioi", f"classic={a},{b}", str(c), "--sentences", "0"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[2].split()[:3] == ["classic", "2", "correct"] and lines[2].count("±") == 5
    assert lines[4].split()[:3] == ["values-seed1", "1", "correct"] and "±" not in lines[4]
    assert "more than one token" in lines[-1]
    results = [json.loads((folder / "evals/ioi.json").read_text()) for folder in (a, b, c)]
    assert results[2]["model"] == {"folder": "c", **info} and results[0]["dtype"] == "float32"
    assert results[0]["device"] == "cpu" and len(results[0]["prompts"]) == 8
    first = [statistics.fmean(p["probability_correct"] for p in r["prompts"][:2]) for r in results[:2]]
    shown = f"{100 * statistics.fmean(first):.2f} ± {100 * statistics.pstdev(first):.2f}"
    assert shown in lines[2]


def test_out_keeps_the_folders_untouched(make_export, tmp_path, capsys):
    folder = make_export()
    assert main(["ioi", str(folder), "--out", str(tmp_path / "all.json"), "--sentences", "8"]) == 0
    assert not (folder / "evals").exists()
    outcome = json.loads((tmp_path / "all.json").read_text())
    assert set(outcome) == {"table", "models", "generated"} and set(outcome["generated"]) == {"table", "models"}


def test_bare_folders_of_one_name_stay_two_groups(make_export):
    folders = [str(make_export("x/export")), str(make_export("y/export"))]
    assert list(ioi.parse_groups(folders)) == ["export", folders[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is not a folder"),
        (["g=missing,"], "missing is not a folder"),
        (["{model}", "g={model}"], "is given twice"),
        (["{model}", "--device", "warp"], "device warp cannot be used here"),
    ],
)
def test_errors_are_one_line_and_status_2(make_export, capsys, arguments, message):
    model = make_export()
    capsys.readouterr()
    assert main(["ioi", *(a.format(model=model) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (model / "evals").exists()
