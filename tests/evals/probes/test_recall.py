"""Recall from the context: what is generated, scores against plain passes, models of known habits, and `compare`."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from evals.__main__ import main
from evals.exports import open_export
from evals.probes import recall
from evals.probes.heads import repeated
from evals.verdict.measurements import read_measures
from llm.common.errors import UserError
from llm.data.store import TokenStore
from tests.data.by_hand import END, write_store

from .test_losses import some_documents

CONTEXT = 64


class Habit(nn.Module):
    """A model of one habit: after a token that occurred before, it says what followed then ("copies"), else nothing."""

    def __init__(self, vocabulary: int, copies: bool = True) -> None:
        super().__init__()
        self.config, self.copies = GPT2Config(vocab_size=vocabulary, n_positions=512), copies
        self.place = nn.Parameter(torch.zeros(1))

    device = property(lambda self: self.place.device)
    dtype = property(lambda self: self.place.dtype)

    def forward(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist() if self.copies else []):
            follows = {}
            for at, token in enumerate(ids):
                if token in follows:
                    logits[row, at, follows[token]] = 20.0
                if at + 1 < len(ids):
                    follows[token] = ids[at + 1]
        return SimpleNamespace(logits=logits)


# ---- What is generated -----------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(2, 20), st.integers(0, 40), st.sampled_from([None, 0, 7]), st.integers(0, 2**32 - 1))
def test_every_pair_comes_once_and_once_more(pairs, between, first, seed):
    length = 4 * pairs + between + (first is not None)
    found = recall.mqar_sequences(400, pairs, length, 3, seed, first)
    assert found.ids.shape == (3, length)
    for row, places in zip(found.ids.tolist(), found.places.tolist(), strict=True):
        start = 0 if first is None else 1
        assert start == 0 or (row[0] == first and first not in row[1:])
        shown = row[start : start + 2 * pairs]
        assert len(set(shown)) == 2 * pairs
        told = [(row[place], row[place + 1]) for place in places]
        assert sorted(told) == sorted(zip(shown[::2], shown[1::2], strict=True))
        rest = [row[at] for at in range(start + 2 * pairs, length) if at not in {*places, *(p + 1 for p in places)}]
        assert len(rest) == between and not {*rest} & {*shown}
    again = recall.mqar_sequences(400, pairs, length, 3, seed, first)
    assert torch.equal(again.ids, found.ids)


@pytest.mark.parametrize(("vocabulary", "pairs", "length"), [(400, 1, 64), (400, 16, 63), (40, 20, 90)])
def test_pairs_that_do_not_fit(vocabulary, pairs, length):
    with pytest.raises(UserError, match=f"{pairs} pairs in {length} tokens of .* cannot be"):
        recall.mqar_sequences(vocabulary, pairs, length, 1, 0)


@pytest.fixture
def store(tmp_path, tokenizers):
    return write_store(
        tmp_path / "store", [some_documents(3, seed=1)], tokenizer=tokenizers["words"],
        validation=[some_documents(90)],
    )  # fmt: skip


def test_a_needle_is_put_in_and_told_at_the_end(store):
    opened = TokenStore.open(store, "validation")
    found = recall.needle_sequences(opened, 4, CONTEXT)
    stream = opened.read(0, opened.tokens).tolist()
    span = 2 * found.predicted
    assert found.with_needle.shape == found.without.shape == (len(recall.DEPTHS), 4, CONTEXT + 1) and span == 10
    for depth, text, other in zip(recall.DEPTHS, found.with_needle, found.without, strict=True):
        for row, (ids, control) in enumerate(zip(text.tolist(), other.tolist(), strict=True)):
            needle = ids[-span:]
            cut = round(depth * (CONTEXT + 1 - 2 * span))
            assert ids[cut : cut + span] == needle == control[-span:]
            assert control[cut : cut + span] == found.with_needle[0, row - 1, -span:].tolist() != needle
            around = ids[:cut] + ids[cut + span : -span]
            assert around == control[:cut] + control[cut + span : -span]
            for part in (around, needle):  # text of the store
                assert any(stream[at : at + len(part)] == part for at in range(len(stream)))
    with pytest.raises(UserError, match="too short for a needle"):
        recall.needle_sequences(opened, 4, 23)
    with pytest.raises(UserError, match="needles take four"):
        recall.needle_sequences(opened, 4, 1000)


# ---- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [2, 9])
def test_who_copies_recalls_all_and_who_knows_nothing_is_at_chance(pairs):
    queries = recall.mqar_sequences(97, pairs, 60, 400, 0, 0)
    right, losses = recall.mqar_scores(Habit(97), queries, 16)
    assert (right == 1).all() and losses.max() < 1e-3
    right, losses = recall.mqar_scores(Habit(97, copies=False), queries, 16)
    assert losses == pytest.approx(math.log(97)) and right.mean() == pytest.approx(1 / pairs)  # always the first value
    ids = repeated(97, 5, 20, 0, 0)
    copied = recall.copy_losses(Habit(97), ids, 20, 3)
    assert copied[:, 0] == pytest.approx(math.log(97)) and copied[:, 1].max() < 1e-3


def test_the_gain_of_a_needle_is_the_copier_s(store):
    needles = recall.needle_sequences(TokenStore.open(store, "validation"), 4, CONTEXT)
    assert recall.needle_gains(Habit(400, copies=False), needles, 4) == pytest.approx(0, abs=1e-6)
    gains = recall.needle_gains(Habit(400), needles, 4)
    assert gains.shape == (len(recall.DEPTHS), 4) and gains.mean() > 4  # of ln 400 = 6; text has repetitions of its own


def test_scores_equal_a_slow_loop(make_export):
    folder = make_export(context=CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    queries = recall.mqar_sequences(256, 4, CONTEXT, 3, 5)
    right, losses = recall.mqar_scores(model, queries, 2)
    for row, (ids, places) in enumerate(zip(queries.ids, queries.places, strict=True)):
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        values = [int(ids[place + 1]) for place in places]
        best = [max(values, key=lambda value, at=place: float(log_p[at, value])) for place in places]
        assert right[row] == pytest.approx(np.mean([one == other for one, other in zip(best, values, strict=True)]))
        nats = [-float(log_p[place, value]) for place, value in zip(places, values, strict=True)]
        assert losses[row] == pytest.approx(np.mean(nats), rel=1e-4)


# ---- The command -----------------------------------------------------------------------------------------------------


def test_results_are_kept_told_and_compared(make_export, store, capsys):
    folders = [make_export(name, context=CONTEXT, seed=seed) for seed, name in enumerate(("one", "two"))]
    command = ["recall", *map(str, folders), "--store", str(store), "--sequences", "6", "--pairs", "2", "5"]
    assert main([*command, "--lengths", "30", "64"]) == 0
    told = capsys.readouterr().out
    assert "5 pairs in 64 tokens, right %" in told and "20.00" in told and "needle at 50% of the text" in told
    kept = [json.loads((folder / "evals/recall.json").read_text()) for folder in folders]
    assert kept[0]["settings"] == [[2, 30], [2, 64], [5, 30], [5, 64]]
    assert kept[0]["induction"]["chance"] == pytest.approx(math.log(400)) and kept[0]["induction"]["copy"] == 31
    exports = [(open_export(folders[0]), open_export(folders[1]))]
    measures, notes = read_measures(exports, {}, "acc_norm")
    assert notes == [] and [measure.name for measure in measures] == [
        "key-value pairs recalled", "second copy of random tokens", "needle, gain",
    ]  # fmt: skip
    for measure, better in zip(measures, (1, -1, 1), strict=True):
        assert measure.first.shape == (1, 6 if "needle" not in measure.name else len(kept[0]["needle"][0]["values"]))
        assert measure.better == better
    pairs = [np.mean([each["accuracy"] for each in result["mqar"]]) for result in kept]
    assert measures[0].means == pytest.approx(tuple(pairs))
    assert measures[2].means[1] == pytest.approx(np.mean([each["gain"] for each in kept[1]["needle"]]))
    kept[1]["seed"] = 9
    (folders[1] / "evals/recall.json").write_text(json.dumps(kept[1]))
    with pytest.raises(UserError, match="recall from the context was measured on different items"):
        read_measures(exports, {}, "acc_norm")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pairs", "40"], "40 pairs in 64 tokens"),
        (["--lengths", "65"], "--lengths 65 is more than the context of 64"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(
    make_export, store, capsys, monkeypatch, arguments, words
):
    folder = make_export(context=CONTEXT)
    monkeypatch.setattr(recall, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["recall", str(folder), "--store", str(store), *arguments]) == 2
    assert words in capsys.readouterr().err and not (folder / "evals/recall.json").exists()


def test_random_state_and_training_mode_stay():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=64, n_embd=8, n_layer=1, n_head=1)).train()
    state = torch.get_rng_state()
    recall.mqar_scores(model, recall.mqar_sequences(60, 2, 12, 2, 0, END), 2)
    assert model.training and torch.equal(torch.get_rng_state(), state)
