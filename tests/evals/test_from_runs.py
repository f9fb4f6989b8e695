"""From two trained runs to the page, with nothing made up: fit, compare, and what it makes on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evals.__main__ import main
from evals.probes.losses import sampled_documents
from llm.cli import main as llm
from llm.data.store import TokenStore
from tests.browser import check_page

Train = Callable[..., list[str]]


@pytest.fixture
def train(tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train two runs that differ in the stream, and export some of them here, which takes less time than elsewhere."""

    def pair(exported: int, **settings: object) -> list[str]:
        folders = [tmp_path / "classic", tmp_path / "values"]
        for folder, stream in zip(folders, ([], ["values"]), strict=True):
            settings |= {"decoder__stream": stream, "run__folder": str(folder), "run__checkpoint_every": 10}
            assert llm(["fit", "--config", str(tiny_config(**settings))]) == 0
        monkeypatch.setattr("llm.export.check_reload", lambda model, folder: None)  # the tests of exports reload them
        for folder in folders[:exported]:
            assert llm(["export", str(folder), "--all"]) == 0
        return [str(folder) for folder in folders]

    return pair


@pytest.fixture
def no_network() -> None:
    """Exports are made in a process of their own; nothing here asks for a network."""


def test_two_runs_become_a_page(train, tiny_config, story_store, tmp_path, capsys):
    """One of them is exported by the comparison itself."""
    pair, out = train(exported=1), tmp_path / "out"
    assert main(["compare", *pair, "--out", str(out), "--documents", "40", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    content = json.loads((out / "results.json").read_text())
    assert content["verdict"] == said[-1] and content["change"] == {"decoder.stream": [[], ["values"]]}
    finding = content["findings"][0]
    assert finding["measure"] == "validation loss per document" and finding["family"] == "primary"
    assert finding["low"] <= finding["difference"] <= finding["high"]
    asked = {"device": "cpu", "dtype": "float32", "batch_size": 16, "context": 32}
    assert content["losses_measured"].items() >= asked.items()
    # 2 layers of D (2 H + 2 G) K attention and 3 D F gated feed-forward, a head of D V, and attention's own products
    weights = 2 * (32 * (2 * 4 + 2 * 2) * 8 + 3 * 32 * 64) + 32 * 512
    flops = content["to_loss"][0]["reached"][0]["flops"] / content["to_loss"][0]["reached"][0]["tokens"]
    assert flops == pytest.approx(6 * weights + 12 * 2 * 4 * 8 * 32)
    exports = [Path(run) / "exports/step-00000020" for run in pair]
    assert finding["means"] == pytest.approx([loss(export, story_store, 40) for export in exports], abs=1e-5)
    assert finding["difference"] == pytest.approx(finding["means"][1] - finding["means"][0], abs=1e-12)
    check_page(out / "report.html", pictures=4)

    null = tmp_path / "null"
    config = str(tiny_config(decoder__stream=[], run__folder=str(null), run__checkpoint_every=10))
    assert llm(["fit", "--config", config, "--initializer_seed", "9"]) == 0
    assert llm(["export", str(null), "--all"]) == 0
    words = ["--documents", "40", "--device", "cpu", "--null", str(null)]
    assert main(["compare", *pair, "--out", str(tmp_path / "beside"), *words]) == 0
    content = json.loads((tmp_path / "beside" / "results.json").read_text())
    luck = loss(null / "exports/step-00000020", story_store, 40) - loss(exports[0], story_store, 40)
    assert content["null"]["difference"] == pytest.approx(luck, abs=1e-5) and luck != 0
    assert "with other initial weights (null arm) differs by" in content["verdict"]
    capsys.readouterr()

    before = {file: file.stat().st_mtime_ns for run in pair for file in Path(run).rglob("*") if file.is_file()}
    assert main(["compare", *pair, "--out", str(out), "--documents", "40", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said[-1]
    assert {file: file.stat().st_mtime_ns for file in before} == before  # neither exported nor measured again


def loss(export: Path, store: Path, documents: int) -> float:
    """Nats per token of the sampled validation documents, each after an end-of-document id, cut at 33 ids."""
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    split = TokenStore.open(store, "validation")
    nats = tokens = 0.0
    for index in sampled_documents(documents, split.documents):
        ids = np.array([split.end_of_document, *split.document_tokens(int(index))])[:33]
        with torch.no_grad():
            logits = model(torch.tensor(ids[None, :-1])).logits[0].double()
        nats -= logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()
        tokens += len(ids) - 1
    return nats / tokens


def test_two_runs_on_a_mixture(train, story_store, tmp_path, capsys):
    """A quarter of the documents, and of the verdict, is of the store that is a quarter of the data."""
    other = tmp_path / "other"
    words = ["prepare", "stories:7", "--documents", "200", "--tokenizer", str(story_store / "tokenizer"), "--workers"]
    assert llm([*words, "1", "--out", str(other)]) == 0
    pair, out = train(exported=2, data__store={str(story_store): 3, str(other): 1}), tmp_path / "out"
    arguments = ["compare", *pair, "--out", str(out), "--documents", "8", "--device", "cpu"]
    assert main(arguments) == 0
    finding = json.loads((out / "results.json").read_text())["findings"][0]
    exports = [Path(run) / "exports/step-00000020" for run in pair]
    means = [0.75 * loss(export, story_store, 6) + 0.25 * loss(export, other, 2) for export in exports]
    assert finding["items"] == 8 and finding["means"] == pytest.approx(means, abs=1e-5)
    capsys.readouterr()
    assert main([*arguments, "--store", str(story_store)]) == 2
    assert "was trained on 2 store(s); give as many with --store, in order" in capsys.readouterr().err


def test_another_store_is_refused(train, tmp_path, capsys):
    pair, other = train(exported=2), tmp_path / "other"
    words = ["prepare", "stories", "--documents", "60", "--train-tokenizer", "300", "--workers", "1"]
    assert llm([*words, "--out", str(other)]) == 0
    capsys.readouterr()
    arguments = ["compare", *pair, "--store", str(other), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "is not the store that" in error and "give that one with --store" in error
    assert not (tmp_path / "out").exists()
