"""Loss per document: against transformers' own loss, one document at a time, and what is kept of it."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from evals.__main__ import main
from evals.exports import LoadedModel, load_model, open_export
from evals.harness.results import fingerprint
from evals.probes import losses
from llm import export as exporting
from llm.cli import main as llm
from llm.common.errors import UserError
from llm.data.store import TokenStore
from tests.data.by_hand import BEGIN, END, write_store

from ..conftest import MakeExport

CONTEXT = 32


def some_documents(count: int = 21, longest: int = 60, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, BEGIN) for _ in range(draw.randrange(longest))] for _ in range(count)]


@pytest.fixture
def store(tmp_path: Path, tokenizers) -> Path:
    """Validation documents in two shards: some longer than the context, an empty one."""
    documents = [*some_documents(), []]
    return write_store(
        tmp_path / "store",
        [some_documents(5, seed=1)],
        tokenizer=tokenizers["words"],
        validation=[documents[:9], documents[9:]],
    )


def reference(folder: Path, rows: list[list[int]], context: int = CONTEXT) -> list[float]:
    """Nats of each row by transformers' own loss, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    found = []
    for row in rows:
        ids = torch.tensor([row[: context + 1]])
        with torch.no_grad():
            found.append(model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1))
    return found


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_each_document_as_transformers_counts_it(style: str, make_export: MakeExport, store: Path) -> None:
    folder = make_export(style=style, context=CONTEXT + 1)  # a row of context + 1 must pass the reference whole
    opened = TokenStore.open(store, "validation")
    found = losses.document_losses(load_model(open_export(folder)), opened, 1000, 4, CONTEXT)
    rows = [[END, *document, END] for document in [*some_documents(), []]]
    assert found.indices.tolist() == list(range(len(rows)))
    assert found.tokens.tolist() == [min(len(row) - 1, CONTEXT) for row in rows]
    assert max(found.tokens) == CONTEXT and min(found.tokens) == 1
    np.testing.assert_allclose(found.nats, reference(folder, rows), rtol=1e-4)
    some = losses.document_losses(load_model(open_export(folder)), opened, 3, 4, CONTEXT)
    assert some.indices.tolist() == drawn(3, len(rows))
    np.testing.assert_allclose(some.nats, found.nats[some.indices], rtol=1e-5)


def drawn(count: int, documents: int) -> list[int]:
    """The documents with the smallest SplitMix64 of their number, by Python's integers."""

    def split_mix(number: int) -> int:
        z = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    return sorted(sorted(range(documents), key=split_mix)[:count])


@given(st.integers(1, 60), st.integers(0, 200), st.sampled_from([1, 7, 64, 1000]))
def test_a_sample_of_documents_is_drawn_by_hash(count: int, documents: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "HASHED_AT_ONCE", at_once)
        found = losses.sampled_documents(count, documents).tolist()
    assert found == drawn(count, documents)
    assert set(found) >= set(losses.sampled_documents(count // 2, documents).tolist())


def test_a_sample_is_of_all_sources_in_proportion() -> None:
    """A source of 13% that stands first in the store has about 13% of the sample, not all of it."""
    found = losses.sampled_documents(1000, 100_000)
    assert stats.binomtest(int((found < 13_000).sum()), 1000, 0.13).pvalue > 0.01


def test_a_begin_of_document_id_takes_the_place_of_the_end_before(make_export, tmp_path, tokenizers) -> None:
    documents = some_documents(6)
    path = write_store(tmp_path / "begun", [documents], tokenizer=tokenizers["words"], begin=BEGIN)
    folder = make_export(context=CONTEXT + 1)
    opened = TokenStore.open(path, "train")
    found = losses.document_losses(load_model(open_export(folder)), opened, 6, 2, CONTEXT)
    rows = [[BEGIN, *document, END] for document in documents]
    np.testing.assert_allclose(found.nats, reference(folder, rows), rtol=1e-4)


@pytest.fixture(scope="module")
def hippoformer(story_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with streams, exported."""
    import yaml

    work = tmp_path_factory.mktemp("hippoformer")
    decoder = {"vocab_size": 576, "unpadded_vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
    decoder |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "stream": ["values"]}
    config = {
        "seed_everything": 3,
        "decoder": {**decoder, "hidden_act": "nmda"},
        "model": {"optimizer": {"lr": 3e-3}, "schedule": {"warmup_steps": 1, "cooldown_steps": 1}},
        "data": {"store": str(story_store), "context": 32, "batch_size": 8, "validate_every": 2, "validation_rows": 16},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1},
        "run": {"folder": str(work / "run"), "checkpoint_every": 2},
    }
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    assert llm(["fit", "--config", str(work / "config.yaml")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "check_reload", lambda *_: None)  # tested elsewhere, and slow
        exporting.export(work / "run", work / "out")
    return work / "out"


def test_an_exported_run(hippoformer: Path, story_store: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["losses", str(hippoformer), "--store", str(story_store), "--documents", "8", "--context", "48"]
    assert main(words) == 0
    (result,) = open_export(hippoformer).result("losses")
    opened = TokenStore.open(story_store, "validation")
    rows = [[opened.end_of_document, *opened.document_tokens(index).tolist()] for index in drawn(8, opened.documents)]
    np.testing.assert_allclose(result["nats"], reference(hippoformer, rows, 48), rtol=1e-4)
    assert result["store_fingerprint"] == opened.fingerprint and result["context"] == 48
    header, _, row = capsys.readouterr().out.splitlines()  # and no question, whether the folder's code is trusted
    assert header.split()[:3] == ["model", "documents", "tokens"]
    assert row.split()[:4] == ["run", "8", f"{sum(result['tokens']):,}", f"{result['loss']:.4f}"]
    assert row.split()[-1] == f"{math.exp(result['loss']):.2f}"


def test_parts_and_batches_change_nothing(make_export, store, monkeypatch) -> None:
    loaded = load_model(open_export(make_export(context=64)))
    opened = TokenStore.open(store, "validation")
    whole = losses.document_losses(loaded, opened, 1000, 64, CONTEXT)
    passed = []
    forward = loaded.model.forward
    monkeypatch.setattr(
        loaded.model, "forward", lambda **inputs: passed.append(len(inputs["input_ids"])) or forward(**inputs)
    )
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 3 * 33 * 400)
    monkeypatch.setattr(losses, "LOGITS_IN_FP32", 7 * 400)
    for batch_size in (1, 5, 64):
        some = losses.document_losses(loaded, opened, 1000, batch_size, CONTEXT)
        np.testing.assert_allclose(some.nats, whole.nats, rtol=1e-5)
        np.testing.assert_array_equal(some.tokens, whole.tokens)
    assert 1 < max(passed) < 22  # in parts, but not row by row


def test_a_model_that_knows_nothing_loses_log_v(make_export, store, tmp_path) -> None:
    folder = make_export(context=CONTEXT)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1, n_positions=CONTEXT))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    result = losses.measure_losses(open_export(folder), store)
    assert result["loss"] == pytest.approx(math.log(400), rel=1e-6)
    assert result["standard_error"] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(result["nats"], np.multiply(result["tokens"], math.log(400)), rtol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.integers(1, 64), batch_size=st.integers(1, 25), count=st.integers(1, 30))
def test_nats_are_additive(tiny: tuple[LoadedModel, TokenStore, list], context, batch_size, count) -> None:
    """What a document loses up to any cut is the sum over its tokens in one pass over the whole of it."""
    loaded, opened, cumulative = tiny
    found = losses.document_losses(loaded, opened, count, batch_size, context)
    assert found.indices.tolist() == drawn(count, len(cumulative))
    for nats, tokens, index in zip(found.nats, found.tokens, found.indices, strict=True):
        sums = cumulative[index]
        assert tokens == min(context, len(sums))
        assert nats == pytest.approx(sums[tokens - 1], rel=1e-5)


@pytest.fixture
def tiny(make_export, store) -> tuple[LoadedModel, TokenStore, list]:
    loaded = load_model(open_export(make_export(style="llama", context=64)))
    cumulative = []
    for document in [*some_documents(), []]:
        ids = torch.tensor([[END, *document, END]])
        with torch.no_grad():
            logits = loaded.model(input_ids=ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        cumulative.append(each.double().cumsum(0).tolist())
    return loaded, TokenStore.open(store, "validation"), cumulative


def test_half_precision_is_softmaxed_in_fp32(make_export, store) -> None:
    loaded = load_model(open_export(make_export(context=64)), dtype="bfloat16")
    ids = torch.tensor([[END, *some_documents()[0], END]])
    with torch.no_grad():
        logits = loaded.model(input_ids=ids[:, :-1]).logits[0]
    assert logits.dtype == torch.bfloat16
    expected = -logits.double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(losses.token_losses(loaded.model, ids)[0], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 8)), min_size=2, max_size=40))
def test_the_error_of_the_mean_is_that_of_a_ratio(pairs) -> None:
    """Weighted least squares through 0 estimates the same ratio; HC1 is its variance under unequal variances."""
    tokens = np.array([tokens for tokens, _ in pairs])
    nats = np.array([tokens * loss for tokens, loss in pairs])
    fit = sm.WLS(nats, tokens.astype(float), weights=1 / tokens).fit(cov_type="HC1")
    loss, error = losses.mean_loss(losses.DocumentLosses(np.arange(len(pairs)), tokens, nats))
    assert loss == pytest.approx(fit.params[0], rel=1e-9)
    assert error == pytest.approx(fit.bse[0], rel=1e-6, abs=1e-9)


def test_documents_of_groups_keep_them(make_export, tmp_path, tokenizers, monkeypatch, capsys) -> None:
    """Numbered within a result; the error is of the groups' sums; a store that gains groups is measured again."""
    documents = [document for document in some_documents(40) if document]
    folder = write_store(
        tmp_path / "store", [documents[:3]], tokenizer=tokenizers["words"], validation=[documents[:10], documents[10:]]
    )
    export = open_export(make_export(context=CONTEXT))
    alone = losses.measure_losses(export, folder, documents=20)
    assert "groups" not in alone and alone["grouped_by"] is None
    index = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(index | {"groups": "book", "validation_groups": 7}))
    labels = np.random.default_rng(0).integers(0, 2**63, 7).astype("<u8")[np.arange(len(documents)) % 7]
    labels[:10].tofile(folder / "validation/00000-part.groups")
    labels[10:].tofile(folder / "validation/00001-part.groups")
    found = losses.measure_losses(export, folder, documents=20)
    assert found["grouped_by"] == "book" and found["nats"] == alone["nats"] and found["loss"] == alone["loss"]
    of_documents = labels[found["documents"]]
    assert [found["groups"][a] == found["groups"][b] for a in range(20) for b in range(20)] == [
        bool(of_documents[a] == of_documents[b]) for a in range(20) for b in range(20)
    ]
    nats, tokens = np.array(found["nats"]), np.array(found["tokens"])
    groups = np.array(found["groups"])
    sums = [(nats - found["loss"] * tokens)[groups == n].sum() for n in set(found["groups"])]
    count = len(sums)
    expected = np.sqrt(count / (count - 1) * np.sum(np.square(sums))) / tokens.sum()
    assert found["standard_error"] == pytest.approx(expected) != pytest.approx(alone["standard_error"])
    assert f"20 in {count} groups" in losses.format_results(["one"], [found])
    monkeypatch.setattr(losses, "load_model", lambda *_: pytest.fail("measured again"))
    assert losses.measure_losses(export, folder, documents=20) == found


def test_what_was_measured_alike_is_kept(make_export, store, tmp_path, monkeypatch) -> None:
    export = open_export(
        make_export(context=CONTEXT, info={"run": "one", "checkpoint_sha256": "a", "dtype": "float32"})
    )
    loads = []
    monkeypatch.setattr(losses, "load_model", lambda *asked: loads.append(asked) or load_model(*asked))
    first = losses.measure_losses(export, store, documents=5)
    assert losses.measure_losses(export, store, documents=5, dtype="float32", device="cpu") == first and len(loads) == 1
    assert losses.measure_losses(export, store, documents=5, again=True) == first and len(loads) == 2
    with pytest.raises(UserError, match="keeps the losses of 5 documents, and 4 would replace them"):
        losses.measure_losses(export, store, documents=4)
    assert losses.measure_losses(export, store, documents=4, again=True)["n"] == 4 and len(loads) == 3
    assert losses.measure_losses(export, store, documents=4, split="train")["split"] == "train" and len(loads) == 4
    kept = export.result("losses")
    assert [(result["split"], result["n"]) for result in kept] == [("validation", 4), ("train", 4)]
    assert losses.measure_losses(export, store, documents=4) == kept[0] and len(loads) == 4
    (export.folder / "hippoformer.json").write_text(json.dumps(export.info | {"checkpoint_sha256": "b"}))
    losses.measure_losses(open_export(export.folder), store, documents=4)
    assert len(loads) == 5
    weights = load_file(export.folder / "model.safetensors")
    weights["transformer.wte.weight"][7, 7] += 0.5  # under the same card
    save_file(weights, export.folder / "model.safetensors", {"format": "pt"})
    losses.measure_losses(open_export(export.folder), store, documents=4)
    assert len(loads) == 6
    assert not list(export.results.glob("*.part"))


def test_weights_from_elsewhere_are_told_by_their_files(make_export) -> None:
    one, two = (open_export(make_export(name, seed=seed)) for name, seed in (("one", 0), ("two", 1)))
    same = open_export(make_export("same", seed=0))
    weights = [fingerprint(export)["weights"] for export in (one, same, two)]
    assert weights[0] == weights[1] != weights[2]


def test_the_context_of_training_where_it_is_known(make_export) -> None:
    config = GPT2Config(n_positions=CONTEXT)
    known = open_export(make_export("known", context=CONTEXT, info={"context": 20}))
    assert losses.model_context(known, config) == 20
    assert losses.model_context(known, config, 25) == 25
    assert losses.model_context(open_export(make_export("unknown", info={"context": None})), config) == CONTEXT
    with pytest.raises(UserError, match="32 positions"):
        losses.model_context(known, config, 33)


def test_nothing_else_changes(make_export, store) -> None:
    loaded = load_model(open_export(make_export(context=CONTEXT)))
    loaded.model.train()
    loaded.model.transformer.h[0].eval()
    modes = [module.training for module in loaded.model.modules()]
    state, files = torch.get_rng_state(), {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    first = losses.document_losses(loaded, TokenStore.open(store, "validation"), 5, 2)
    again = losses.document_losses(loaded, TokenStore.open(store, "validation"), 5, 2)
    np.testing.assert_array_equal(first.nats, again.nats)  # dropout is off
    assert [module.training for module in loaded.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == files


def test_names_tell_exports_apart(make_export, tmp_path) -> None:
    exports = [
        open_export(make_export("a/step-1", info={"run": "classic"})),
        open_export(make_export("a/step-2", info={"run": "classic"})),
        open_export(make_export("values")),
    ]
    assert losses.labels(exports) == ["classic (step-1)", "classic (step-2)", "values"]
    twins = [open_export(make_export(f"{parent}/step-1", info={"run": "classic"})) for parent in "bc"]
    assert losses.labels(twins) == [str(export.folder) for export in twins]


def refused(words: list[object], capsys: pytest.CaptureFixture) -> str:
    """The sentence of a command that is refused; above it may stand the bars of what was begun."""
    assert main([str(word) for word in words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_one_sentence(make_export, store, tmp_path, capsys) -> None:
    folder = make_export(context=CONTEXT)
    other = make_export("other", tokenizer="bytes", context=CONTEXT)
    assert "made with another tokenizer" in refused(["losses", other, "--store", store], capsys)
    assert str(other) in refused(["losses", other, "--store", store], capsys)
    assert "no token store" in refused(["losses", folder, "--store", tmp_path / "none"], capsys)
    assert "32 positions" in refused(["losses", folder, "--store", store, "--context", 64], capsys)
    (tmp_path / "store/store.json").unlink()
    assert "is not a finished token store" in refused(["losses", folder, "--store", store], capsys)
    assert not (folder / "evals").exists()


def test_no_documents_and_no_numbers(make_export, tokenizers, tmp_path, capsys) -> None:
    empty = write_store(tmp_path / "empty", [[[5, 6, 7]]], tokenizer=tokenizers["words"])
    folder = make_export(context=CONTEXT)
    assert "no validation documents" in refused(["losses", folder, "--store", empty], capsys)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.transformer.ln_f.bias, float("nan"))
    model.save_pretrained(folder)
    assert "impossible (the first is nan)" in refused(["losses", folder, "--store", empty, "--split", "train"], capsys)
    assert not (folder / "evals").exists()
