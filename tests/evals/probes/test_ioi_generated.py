"""The generated IOI set: its balance counted from its texts, its numbers against single passes of transformers."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.__main__ import main
from evals.exports import LoadedModel, open_export
from evals.probes import ioi, ioi_sentences
from evals.probes.ioi_sentences import NAMES, PLACES, THINGS, generate
from llm.common.errors import UserError

KNOWN = ["Amy", "Dan", "Emily", "James", "John", "Mary", "Sam", "Tom"]  # to the tokenizer `words`
PAPER = [prompt.text for prompt in ioi.ioi_prompts()]


def mentions(text: str) -> list[str]:
    """The names of a prompt in their order."""
    return re.findall(rf"\b({'|'.join(NAMES)})\b", text)


# ---- The sentences ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 700), seed=st.integers(-3, 10**9), names=st.integers(3, len(NAMES)))
def test_every_set_is_balanced(count, seed, names):
    sentences = generate(count, seed, NAMES[-names:], PAPER)
    assert len(sentences) == 4 * math.ceil(count / 4)
    found = [(s, mentions(s.text)) for s in sentences]
    right, wrong, first, second = (
        Counter(of(s, m) for s, m in found)
        for of in (
            lambda s, m: s.correct.strip(),
            lambda s, m: s.incorrect.strip(),
            lambda s, m: m[0],
            lambda s, m: m[1],
        )
    )
    assert right == wrong == first == second
    most, least = max(right.values()), min((right[name] for name in NAMES[-names:]), default=0)
    assert most - least <= (2 if names % 2 == 0 else 4)  # two in a quadruple; an odd name out sits out in turn
    orders = Counter((s.template, m[2] == m[0]) for s, m in found)
    assert all(orders[template, True] == orders[template, False] for template, _ in orders)
    per_template = Counter(s.template for s in sentences)
    assert max(per_template.values()) - min(per_template[t] for t in range(1, 9)) <= 4


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 700), seed=st.integers(0, 10**9))
def test_prompts_hold_the_answer_once_and_occur_once(count, seed):
    sentences = generate(count, seed, NAMES, PAPER)
    assert len({s.text for s in sentences}) == len(sentences)
    assert not {s.text for s in sentences} & set(PAPER)
    frames = Counter()
    for s in sentences:
        people = mentions(s.text)
        assert len(people) == 3 and set(people) == {s.correct.strip(), s.incorrect.strip()}
        assert s.text.count(s.correct) == 1 and s.text.count(s.incorrect) == 2  # also within longer words
        assert people[2] == s.incorrect.strip() and (s.giver == 1) == (people[0] == people[2])
        assert s.text.endswith(" to") and re.search(r"\ban [aeiou]|\ba [^aeiou]|\bthe ", s.text.split(people[2])[-1])
        frame = s.text.replace(s.correct, " *").replace(s.incorrect, " *")
        frames[frozenset(people), frame, tuple(name == people[0] for name in people), people[0]] += 1
    assert set(frames.values()) == {1}
    quadruples = Counter((pair, frame) for pair, frame, *_ in frames)
    assert set(quadruples.values()) == {4} and len(quadruples) == len(sentences) / 4


def test_no_name_is_within_another_word_of_the_set():
    words = [*PLACES, *THINGS, *" ".join(ioi_sentences.TEMPLATES).split()]
    assert len(set(NAMES)) == len(NAMES) == 32
    for name in NAMES:
        assert not [other for other in (*NAMES, *words) if name.lower() in other.lower() and other != name]


def test_the_set_is_a_pure_function_of_seed_and_count():
    assert generate(40, 7) == generate(40, 7) != generate(40, 8)
    command = "from evals.probes.ioi_sentences import *; print(fingerprint(generate(40, 7)))"
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    there = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == ioi_sentences.fingerprint(generate(40, 7))
    assert ioi_sentences.fingerprint(generate(40, 7)) != ioi_sentences.fingerprint(generate(40, 7)[::-1])


def test_the_papers_prompts_are_left_out():
    every = [s.text for four in ioi_sentences._quadruples(("John", "Mary"), 1, 0, ()) for s in four]
    without = [s.text for four in ioi_sentences._quadruples(("John", "Mary"), 1, 0, PAPER) for s in four]
    assert set(PAPER[:2]) < set(every) and len(every) == 4 * len(PLACES) * len(THINGS)
    assert len(without) == len(every) - 4 and not set(without) & set(PAPER)


def test_as_many_as_there_are_and_no_more():
    most = 4 * 28 * (len(PLACES) * len(THINGS) - len(PAPER))
    assert len({s.text for s in generate(most, 3, KNOWN, PAPER)}) == most
    with pytest.raises(UserError, match=f"8 names make {most:,} sentences, not {most + 1:,}; give a smaller"):
        generate(most + 1, 3, KNOWN, PAPER)


# ---- Names of one token ----------------------------------------------------------------------------------------------


def names_of(sentences) -> set[str]:
    return {s.correct.strip() for s in sentences}


def test_names_are_one_token_for_every_model_where_enough_are(make_export):
    words, more, raw = (
        open_export(make_export(name, tokenizer=tokenizer))
        for name, tokenizer in (("a", "words"), ("b", "words"), ("c", "bytes"))
    )
    sentences = ioi.generate_for([words, more], 240, 0)
    assert names_of(sentences) == set(KNOWN) and sentences == ioi.generate_for([words], 240, 0)
    tokenizer = AutoTokenizer.from_pretrained(words.folder)
    for s in sentences:  # the answer is the very token that stands in the prompt
        ids, answer, giver = (tokenizer.encode(text) for text in (s.text, s.correct, s.incorrect))
        assert len(answer) == len(giver) == 1 and ids.count(answer[0]) == 1 and ids.count(giver[0]) == 2
    for exports in ([raw], [words, raw], [raw, words]):
        assert names_of(ioi.generate_for(exports, 240, 0)) == set(NAMES)


def test_seven_names_of_one_token_are_too_few():
    assert ioi_sentences.usable_names(set(NAMES) - set(KNOWN)) == [name for name in NAMES if name in KNOWN]
    assert ioi_sentences.usable_names(set(NAMES) - set(KNOWN[1:])) == list(NAMES)


def test_all_names_are_one_token_of_gpt2(tokenizers):
    if "gpt2" not in tokenizers:
        pytest.skip("the published tokenizer is not there")
    assert all(len(tokenizers["gpt2"].encode(f" {name}")) == 1 for name in NAMES)


# ---- Values ----------------------------------------------------------------------------------------------------------


def loaded(folder: Path, model=None) -> LoadedModel:
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    return LoadedModel(open_export(folder), model, AutoTokenizer.from_pretrained(folder))


def by_hand(model, tokenizer, prompt: str, name: str) -> float:
    """Log-probability of the tokens of `name` after `prompt`: one plain pass for each, in float64."""
    ids, total = tokenizer.encode(prompt), 0.0
    for token in tokenizer.encode(name):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(0)).item()
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_batched_values_equal_single_passes(make_export, style, tokenizer):
    model = loaded(make_export(style=style, tokenizer=tokenizer))
    sentences = ioi.generate_for([model.export], 24, 1)
    result = ioi.evaluate_generated(model, sentences, 1, batch_size=7)
    items = result["items"]
    assert [s.text for s in sentences] == items["prompt"] and result["sentences"] == 24
    for n, s in enumerate(sentences):
        right, wrong = (by_hand(model.model, model.tokenizer, s.text, name) for name in (s.correct, s.incorrect))
        assert math.log(items["probability_correct"][n]) == pytest.approx(right, abs=1e-5)
        assert math.log(items["probability_incorrect"][n]) == pytest.approx(wrong, abs=1e-5)
        assert items["logit_difference"][n] == pytest.approx(right - wrong, abs=1e-5)
    assert result["names_of_several_tokens"] == ([] if tokenizer == "words" else sorted(names_of(sentences)))
    for size in (1, 64):
        other = ioi.evaluate_generated(model, sentences, 1, batch_size=size)["items"]
        assert other["logit_difference"] == pytest.approx(items["logit_difference"], abs=1e-5)


def test_of_one_token_the_difference_is_of_logits(make_export):
    model = loaded(make_export())
    sentences = ioi.generate_for([model.export], 8, 0)
    result = ioi.evaluate_generated(model, sentences, 0, batch_size=8)
    for s, difference in zip(sentences, result["items"]["logit_difference"], strict=True):
        ids, right, wrong = (model.tokenizer.encode(text) for text in (s.text, s.correct, s.incorrect))
        logits = model.model(torch.tensor([ids])).logits[0, -1]
        assert difference == pytest.approx((logits[right[0]] - logits[wrong[0]]).item(), abs=1e-5)


def test_random_state_and_training_mode_stay(make_export):
    model = loaded(make_export())
    sentences = ioi.generate_for([model.export], 8, 0)
    state = torch.get_rng_state()
    model.model.train()
    ioi.evaluate_generated(model, sentences, 0, 4)
    assert model.model.training and torch.equal(state, torch.get_rng_state())


class Habit(torch.nn.Module):
    """Always says the name that `choose` picks from the ids of the three names in a prompt; else knows nothing."""

    dtype, device, config = torch.float32, torch.device("cpu"), SimpleNamespace()

    def __init__(self, tokenizer, choose) -> None:
        super().__init__()
        self.names, self.choose = {tokenizer.encode(f" {name}")[0] for name in KNOWN}, choose

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 400)
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            if (said := self.choose([token for token in ids if token in self.names])) is not None:
                row[-1, said] = 5.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("choose", "accuracy", "giver_first", "giver_second"),
    [
        (lambda names: min(names, key=names.count), 1.0, 1.0, 1.0),
        (lambda names: names[0], 0.5, 0.0, 1.0),
        (lambda names: names[1], 0.5, 1.0, 0.0),
        (lambda names: names[2], 0.0, 0.0, 0.0),
        (lambda names: max(names), 0.5, 0.5, 0.5),  # one name is always preferred to another
        (lambda names: None, 0.0, 0.0, 0.0),
    ],
    ids=["perfect", "first", "second", "last", "favourite", "ignorant"],
)
def test_habits_get_the_accuracy_they_must(make_export, choose, accuracy, giver_first, giver_second):
    folder = make_export()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    habit = loaded(folder, Habit(tokenizer, choose))
    sentences = ioi.generate_for([habit.export], 200, 4)
    result = ioi.evaluate_generated(habit, sentences, 4, 16)
    assert result["mean"]["accuracy"] == accuracy
    assert result["accuracy_by_order"] == {"giver_first": giver_first, "giver_second": giver_second}
    assert result["mean"]["logit_difference"] == pytest.approx(0.0 if result["ties"] else 5 * (2 * accuracy - 1))
    assert result["ties"] == (200 if choose([1, 2, 1]) is None else 0)
    high = math.exp(5) / (math.exp(5) + 399)
    if accuracy == 1.0:
        assert result["mean"]["probability_correct"] == pytest.approx(high, rel=1e-5)


def test_probabilities_that_are_no_numbers_are_refused(make_export):
    model = loaded(make_export())
    torch.nn.init.constant_(model.model.transformer.ln_f.weight, math.nan)
    with pytest.raises(UserError, match=r"impossible .*give --dtype float32"):
        ioi.evaluate_generated(model, ioi.generate_for([model.export], 8, 0), 0, 4)


# ---- Sums ------------------------------------------------------------------------------------------------------------


def made_up(seed: int, quadruples: int) -> dict[str, list]:
    random = np.random.default_rng(seed)
    return {
        "logit_difference": random.normal(0.3, 1, 4 * quadruples).tolist(),
        "probability_correct": random.uniform(0, 1, 4 * quadruples).tolist(),
        "probability_incorrect": random.uniform(0, 1, 4 * quadruples).tolist(),
        "giver": [1, 2, 1, 2] * quadruples,
    }


@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4), quadruples=st.integers(1, 9))
def test_table_holds_means_and_deviations(seeds, quadruples):
    models = [made_up(seed, quadruples) for seed in seeds]
    (row,) = ioi_sentences.summarise({"group": models})
    for items in models:
        items["accuracy"] = [float(d > 0) for d in items["logit_difference"]]
        for order in (1, 2):
            chosen = [a for a, giver in zip(items["accuracy"], items["giver"], strict=True) if giver == order]
            items[{1: "giver_first", 2: "giver_second"}[order]] = chosen
    assert row["models"] == len(models) and set(row["mean"]) == {*models[0]} - {"giver"}
    for name, mean in row["mean"].items():
        of_models = [statistics.fmean(items[name]) for items in models]
        assert mean == pytest.approx(statistics.fmean(of_models))
        if len(models) > 1:
            expected = statistics.pstdev(of_models)
        elif quadruples > 1:
            expected = scipy.stats.sem(np.reshape(models[0][name], (quadruples, -1)).mean(axis=1))
        else:
            assert row["spread"] is None
            continue
        assert row["spread"][name] == pytest.approx(expected, abs=1e-12)
    assert row["spread_over"] == ("models" if len(models) > 1 else "quadruples")


# ---- The command -----------------------------------------------------------------------------------------------------


def test_command_keeps_every_value_of_every_model(make_export, capsys, monkeypatch):
    bars, bar = [], ioi.progress_bar
    monkeypatch.setattr(ioi, "progress_bar", lambda *given, **more: bars.append(given[2]) or bar(*given, **more))
    info = {"run": "values-seed1", "step": 10, "seed": 1}
    a, b, c = make_export("a", seed=1), make_export("b", seed=2), make_export("c", "llama", "bytes", info=info)
    arguments = ["--sentences", "30", "--seed", "5", "--batch-size", "9"]
    assert main(["ioi", f"classic={a},{b}", str(c), *arguments]) == 0
    captured = capsys.readouterr()
    assert {"IOI, a", "IOI, b", "IOI, c"} <= set(bars)
    results = [json.loads((folder / "evals/ioi_generated.json").read_text()) for folder in (a, b, c)]
    assert len({r["sentences_sha256"] for r in results}) == 1  # whatever the tokenizer
    assert results[2]["model"] == {"folder": "c", **info}
    several = [set(NAMES) - set(KNOWN), set(NAMES) - set(KNOWN), set(NAMES)]
    for result, split in zip(results, several, strict=True):
        settings = [result[key] for key in ("device", "dtype", "batch_size", "seed", "sentences")]
        assert settings == ["cpu", "float32", 9, 5, 32]
        items = result["items"]
        assert {len(column) for column in items.values()} == {32} and set(items) >= {"prompt", "template", "giver"}
        assert set(result["names_of_several_tokens"]) == split & {n.strip() for n in items["correct"]}
        for measure in ("logit_difference", "probability_correct", "probability_incorrect"):
            assert result["mean"][measure] == pytest.approx(statistics.fmean(items[measure]))
        assert result["mean"]["accuracy"] == statistics.fmean(d > 0 for d in items["logit_difference"])
    shares = [100 * result["mean"]["accuracy"] for result in results[:2]]
    shown = captured.out[captured.out.index("32 generated sentences") :]
    assert f"{statistics.fmean(shares):.2f} ± {statistics.pstdev(shares):.2f}" in shown
    assert "giver first, %" in shown and "standard deviation (of the population)" in shown
    assert "standard error over its 8 sets of four" in shown
    assert re.search(r"^16 of 16 names are several tokens for some model", shown, re.MULTILINE)


def test_without_the_generated_set_nothing_else_changes(make_export, capsys):
    folder = make_export()
    assert main(["ioi", str(folder), "--sentences", "0"]) == 0
    only = capsys.readouterr().out
    alone = (folder / "evals/ioi.json").read_bytes()
    assert "generated" not in only and not (folder / "evals/ioi_generated.json").exists()
    assert main(["ioi", str(folder), "--sentences", "8"]) == 0
    assert capsys.readouterr().out.startswith(only) and (folder / "evals/ioi.json").read_bytes() == alone


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"context": 20}, [], "does not fit the model's context of 20"),  # the paper's prompts do
        ({}, ["--sentences", "20000"], "8 names make 17,920 sentences, not 20,000"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(make_export, capsys, settings, arguments, message):
    folder = make_export(**settings)
    capsys.readouterr()
    assert main(["ioi", str(folder), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and not (folder / "evals").exists()


def test_ties_are_told(make_export, capsys):
    folder = make_export()
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.transformer.wte.weight)  # tied to the head: every logit is 0
    model.save_pretrained(folder)
    assert main(["ioi", str(folder), "--sentences", "12"]) == 0
    assert "12 ties, two names of one probability, count as wrong" in capsys.readouterr().out
