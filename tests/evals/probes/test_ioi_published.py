"""The authors' way: classic weights inside the model with the stream, dropout on, against one that is put together."""

import json

import numpy as np
import pytest
import torch

from evals.__main__ import main
from evals.probes import ioi_published
from evals.probes.ioi import OUTCOMES, ioi_prompts
from llm.model import DecoderConfig, DecoderForCausalLM
from tests.exported import write_export


@pytest.fixture
def pair(tmp_path, tokenizers):
    """A classic export, and one with a stream of values and weights of its own."""

    def make(**settings):
        folders = []
        for name, stream in (("classic", []), ("values", ["values"])):
            torch.manual_seed(len(folders))
            folders.append(write_export(tmp_path / name, {}, tokenizers["words"], stream=stream, **settings))
        return folders

    return make


def put_together(weights, config, tokenizer):
    """Probabilities [8, 2] of the weights of one folder in the model of another's configuration, in one seeded pass.

    Prompts go in as the command has them, the longest first, so that dropout draws the same."""
    config = DecoderConfig.from_pretrained(config)
    model = DecoderForCausalLM(config)
    model.load_state_dict(DecoderForCausalLM.from_pretrained(weights).state_dict())
    model.train()
    encoded = [tokenizer(prompt.text)["input_ids"] for prompt in ioi_prompts()]
    found = np.empty((8, 2))
    torch.manual_seed(ioi_published.SEED)
    for place in sorted(range(8), key=lambda place: -len(encoded[place])):
        with torch.no_grad():
            p = model(torch.tensor([encoded[place]])).logits[0, -1].softmax(-1)
        names = [tokenizer(getattr(ioi_prompts()[place], outcome))["input_ids"][0] for outcome in OUTCOMES]
        found[place] = [float(p[name]) for name in names]
    return found


def kept(folder):
    result = json.loads((folder / "evals/ioi_as_published.json").read_text())
    return np.array([[r[f"probability_{outcome}"] for outcome in OUTCOMES] for r in result["prompts"]]), result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_classic_weights_inside_the_model_with_the_stream(pair, tokenizers, capsys, monkeypatch, dropout):
    classic, values = pair(residual_dropout=dropout)
    monkeypatch.setattr(ioi_published, "PASSES", 1)
    assert main(["ioi", f"classic={classic}", f"values={values}", "--sentences", "0", "--as-published"]) == 0
    told = capsys.readouterr().out
    assert told.index("As published: models without a stream inside the one with the stream, dropout on.") > 0
    for folder in (classic, values):
        expected = put_together(folder, values, tokenizers["words"])
        found, result = kept(folder)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        means = expected.reshape(4, 2, 2).mean(axis=1)
        assert result["sentences"]["correct"] == pytest.approx(means[:, 0].tolist(), rel=1e-3)
    plain = json.loads((classic / "evals/ioi.json").read_text())
    assert plain["sentences"]["correct"] != pytest.approx(kept(classic)[1]["sentences"]["correct"], rel=1e-2)
    if not dropout:  # a model with a stream is then measured as it was trained
        own = json.loads((values / "evals/ioi.json").read_text())
        assert own["sentences"]["correct"] == pytest.approx(kept(values)[1]["sentences"]["correct"], rel=1e-4)


def test_passes_with_dropout_are_averaged_and_leave_the_random_state(pair):
    classic, values = pair(residual_dropout=0.3)
    state = torch.get_rng_state()
    assert main(["ioi", f"{classic}", f"{values}", "--sentences", "0", "--as-published"]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    found, result = kept(classic)
    assert result["as_published"]["passes"] == 16 and result["as_published"]["residual_dropout"] == 0.3
    assert (
        result["as_published"]["changes"]["stream"] == ["values"] and kept(values)[1]["as_published"]["changes"] == {}
    )
    assert main(["ioi", f"{classic}", f"{values}", "--sentences", "0", "--as-published"]) == 0
    np.testing.assert_array_equal(kept(classic)[0], found)


@pytest.mark.parametrize(
    ("chosen", "settings", "words"),
    [
        (("classic",), {}, "give exports of both kinds"),
        (("values",), {}, "give exports of both kinds"),
        (("classic", "values"), {"stream_weight": "layer"}, "has learned weights (layer)"),
        (("classic", "values"), {"stream_source": "first", "stream_own": 0.0}, "or leaves out projections"),
    ],
)
def test_what_cannot_be_measured_so(pair, tmp_path, capsys, chosen, settings, words):
    pair(**settings)
    assert main(["ioi", *(str(tmp_path / name) for name in chosen), "--as-published"]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.glob("*/evals"))
