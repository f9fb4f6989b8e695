"""What a model takes from its context: loss by position and its score against plain passes and scipy; one command."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from evals.__main__ import main
from evals.exports import load_model, open_export
from evals.probes import incontext, sparsity
from llm.common.errors import UserError
from llm.common.plots import as_svg
from llm.data.store import TokenStore
from tests.data.by_hand import BEGIN, joined, write_store

from ..conftest import MakeExport

CONTEXT = 32
PNG = b"\x89PNG"


def some_documents(count: int = 60, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, BEGIN) for _ in range(draw.randrange(40))] for _ in range(count)]


@pytest.fixture
def store(tmp_path: Path, tokenizers) -> Path:
    shards = [some_documents(30), some_documents(20, 1)]
    return write_store(tmp_path / "store", [some_documents(5, 2)], tokenizer=tokenizers["words"], validation=shards)


def stream() -> np.ndarray:
    """The validation split of `store`, worked out the plain way."""
    return joined([some_documents(30), some_documents(20, 1)])[0]


# ---- The measures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_losses_of_windows_as_transformers_counts_them(style: str, make_export: MakeExport, store: Path) -> None:
    folder = make_export(style=style, context=CONTEXT)
    opened = TokenStore.open(store, "validation")
    items = incontext.window_items(opened, 9, CONTEXT)
    found = incontext.window_losses(load_model(open_export(folder)), opened, items, CONTEXT, 4)
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), stream()
    for item, losses in zip(items, found, strict=True):
        row = torch.from_numpy(ids[item * CONTEXT : (item + 1) * CONTEXT + 1])[None]
        with torch.no_grad():
            out = model(input_ids=row[:, :-1], shift_labels=row[:, 1:], labels=row[:, 1:])
        assert losses.mean() == pytest.approx(out.loss.item(), rel=1e-5)
        expected = torch.nn.functional.cross_entropy(out.logits[0], row[0, 1:], reduction="none")
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)


def test_windows_are_spread_over_the_whole_split(store: Path) -> None:
    opened = TokenStore.open(store, "validation")
    count = (len(stream()) - 1) // CONTEXT
    assert incontext.window_items(opened, 10_000, CONTEXT) == list(range(count))
    some = incontext.window_items(opened, 7, CONTEXT)
    assert len(set(some)) == 7 and some[0] == 0
    assert {np.floor(count / 7), np.ceil(count / 7)} >= set(np.diff([*some, count]).tolist())
    with pytest.raises(UserError, match="too few for a window of 9,999; give a smaller --context"):
        incontext.window_items(opened, 7, 9999)


@pytest.mark.parametrize(
    ("context", "tokens"),
    [(512, (50, 500)), (1024, (50, 500)), (4096, (50, 500)), (256, (25, 250)), (32, (3, 31)), (7, (1, 7))],
)
def test_the_tokens_of_the_score(context: int, tokens: tuple[int, int]) -> None:
    assert incontext.score_tokens(context) == tokens


def test_the_score_by_hand() -> None:
    losses = np.zeros((3, 512), np.float32)
    losses[:, 49], losses[:, 499] = [4, 5, 6], [3, 3, 6]  # the 50th and the 500th token, counted from 1
    score = incontext.in_context_score(losses)
    assert (score["early"], score["late"], score["loss_early"], score["loss_late"]) == (50, 500, 5, 4)
    assert score["per_window"] == [-1, -2, 0] and score["value"] == -1
    assert score["standard_error"] == pytest.approx(1 / math.sqrt(3))
    assert incontext.in_context_score(losses[:1])["standard_error"] is None


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_means_and_errors_as_scipy_has_them(data) -> None:
    shape = (data.draw(st.integers(2, 20)), data.draw(st.integers(7, 40)))
    losses = data.draw(arrays(np.float32, shape, elements=st.floats(0, 16, width=32)))
    positions, score = incontext.by_position(losses), incontext.in_context_score(losses)
    np.testing.assert_allclose(positions["loss"], np.mean(losses.astype(float), axis=0), rtol=1e-12)
    np.testing.assert_allclose(positions["standard_error"], scipy.stats.sem(losses.astype(float)), atol=1e-9)
    early, late = incontext.score_tokens(shape[1])
    expected = losses[:, late - 1].astype(float) - losses[:, early - 1]
    assert score["value"] == pytest.approx(positions["loss"][late - 1] - positions["loss"][early - 1], abs=1e-9)
    np.testing.assert_allclose(score["per_window"], expected)
    assert score["standard_error"] == pytest.approx(scipy.stats.sem(expected), abs=1e-9)


@given(st.integers(1, 5000))
def test_bins_hold_each_token_once(positions: int) -> None:
    bins = incontext.position_bins(positions)
    assert [token for first, last in bins for token in range(first, last + 1)] == list(range(1, positions + 1))
    assert all(last - first + 1 >= 0.08 * first for first, last in bins if first > 16)  # none is one token


# ---- The command -----------------------------------------------------------------------------------------------------


def incontext_of(folders: list[Path], store: Path, *more: object) -> int:
    return main(["incontext", *map(str, folders), "--store", str(store), *map(str, more)])


def test_two_models_one_table_four_figures(make_export, store, tmp_path, capsys) -> None:
    folders = [make_export("classic", context=64), make_export("values", style="llama", context=64)]
    capsys.readouterr()
    assert incontext_of(folders, store, "--windows", 5, "--out", tmp_path / "figures") == 0
    header, _, *rows, positions, gini, prefix, previous = capsys.readouterr().out.splitlines()
    assert header.startswith("model") and len(rows) == 2
    for row, folder in zip(rows, folders, strict=True):
        result = open_export(folder).result("incontext")
        score, scores = result["score"], result["heads"]
        assert (result["windows"], result["context"], result["split"]) == (5, 64, "validation")
        assert (score["early"], score["late"]) == (6, 62) and len(score["per_window"]) == 5
        assert row.startswith(f"{folder.name}") and f"{score['value']:.4f} ± {score['standard_error']:.4f}" in row
        assert np.shape(scores["prefix_matching"]) == np.shape(scores["previous_token"]) == (2, 2)
        layer, head = np.unravel_index(np.argmax(scores["previous_token"]), (2, 2))
        assert f"{layer}.{head} ({np.max(scores['previous_token']):.2f})" in row
        assert len(result["gini"]) == 2 and f"{result['gini'][0]:.3f} / {result['gini'][1]:.3f}" in row
        assert len(result["positions"]["loss"]) == len(result["positions"]["standard_error"]) == 64
        assert (result["dtype"], result["batch_size"]) == ("float32", 16)
        assert result["store_fingerprint"] == TokenStore.open(store, "validation").fingerprint
    names = ["positions", "gini", "heads_prefix_matching", "heads_previous_token"]
    assert [positions, gini, prefix, previous] == [str(tmp_path / f"figures/{name}.png") for name in names]
    assert all((tmp_path / f"figures/{name}.png").read_bytes().startswith(PNG) for name in names)


def test_a_model_that_knows_nothing_learns_nothing_from_context(make_export, store) -> None:
    folder = make_export(context=CONTEXT)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1, n_positions=CONTEXT))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    (result,) = incontext.measure_incontext([open_export(folder)], store, windows=6)
    np.testing.assert_allclose(result["positions"]["loss"], [math.log(400)] * CONTEXT, rtol=1e-6)
    np.testing.assert_allclose(result["score"]["per_window"], [0] * 6, atol=1e-6)
    # Attention that knows nothing is even: token t of 1 + 2 * 15 sees t tokens.
    even = np.mean([1 / (t + 1) for t in range(1, 31)])
    assert result["heads"]["previous_token"] == [[pytest.approx(even, rel=1e-5)]]
    assert result["heads"]["length"] == 15
    assert result["heads"]["loss_second"] == pytest.approx(math.log(400), rel=1e-6)


def test_our_own_decoder(story_store: Path, tmp_path: Path) -> None:
    from llm.data.tokenizer import load_tokenizer
    from llm.model import DecoderConfig, DecoderForCausalLM

    sizes = {"vocab_size": 576, "unpadded_vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, "stream": ["values"]}
    model = DecoderForCausalLM(DecoderConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "ours")
    load_tokenizer(story_store / "tokenizer").save_pretrained(tmp_path / "ours")
    (result,) = incontext.measure_incontext([open_export(tmp_path / "ours")], story_store, windows=8, context=48)
    opened = TokenStore.open(story_store, "validation")
    items = incontext.window_items(opened, 8, 48)
    rows = torch.stack([torch.from_numpy(opened.read(item * 48, 49)) for item in items])
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none").double()
    np.testing.assert_allclose(result["positions"]["loss"], losses.mean(0), rtol=1e-4)
    np.testing.assert_allclose(result["score"]["per_window"], losses[:, 46] - losses[:, 4], atol=1e-4)
    assert np.shape(result["heads"]["prefix_matching"]) == (3, 4) and len(result["gini"]) == 3
    json.dumps(result, allow_nan=False)


def test_fewer_windows_and_no_sparsity_are_said(make_export, store, monkeypatch, capsys, tmp_path) -> None:
    def unknown(*_: object) -> None:
        raise UserError("no projections known")

    monkeypatch.setattr(sparsity, "ffn_gini", unknown)
    folder = make_export(context=CONTEXT)
    assert incontext_of([folder], store, "--windows", 9999) == 0
    captured = capsys.readouterr()
    count = (len(stream()) - 1) // CONTEXT
    assert f"holds {count} windows of 32 tokens, fewer than 9,999; all of them are measured" in captured.err
    assert "no projections known" in captured.err and "gini.png" not in captured.out
    assert open_export(folder).result("incontext")["gini"] is None
    assert (folder / "evals/positions.png").is_file() and not (folder / "evals/gini.png").exists()


def test_one_sentence(make_export, store, tmp_path, capsys) -> None:
    folder, other = make_export(context=CONTEXT), make_export("other", tokenizer="bytes", context=CONTEXT)
    capsys.readouterr()
    for words, expected in (
        ([[folder, other], store], f"{other} cannot be measured there: {store} was made with another tokenizer"),
        ([[folder], store, "--context", 99], "give --context 32 or less"),
        ([[folder], store, "--context", 6], "give --context 7 or more"),
        ([[folder], tmp_path / "none"], "there is no token store"),
    ):
        assert incontext_of(*words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line
    assert not (folder / "evals").exists()  # nothing was measured before all was known to fit


def test_lines_and_bands_of_the_figure() -> None:
    losses = {"classic": np.linspace(6, 3, 200).tolist(), "values": np.linspace(6, 2, 200).tolist()}
    figure = incontext.draw_positions(losses, {"values": [0.1] * 200})
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["classic", "values"] and len(axes.collections) == 1
    assert axes.get_xscale() == "log"
    centres, means = axes.lines[1].get_data()
    first, last = incontext.position_bins(200)[-1]
    assert first <= centres[-1] <= last
    assert means[-1] == pytest.approx(np.mean(losses["values"][first - 1 : last]))
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(means[-1] - 0.1) and band[:, 1].max() == pytest.approx(means[0] + 0.1)
    assert as_svg(figure, "loss by position").startswith("<svg")
