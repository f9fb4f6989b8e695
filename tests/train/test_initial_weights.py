"""`fit --init`: a run starts from the weights of an export, or of a model of transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from llm import export as exporting
from llm.cli import main
from llm.common.errors import UserError
from llm.model import DecoderConfig, DecoderForCausalLM
from llm.train.initial_weights import read_source, start_from

from .runs import Config, fit, metrics

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
LLAMAS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 12}),
}
SILENT = {"stream": ["values", "queries"], "stream_weight": "head", "stream_arriving": 0.0}


def published(name: str, folder: Path) -> hf.PreTrainedModel:
    """A model of transformers with random weights, biases and norms among them."""
    torch.manual_seed(0)
    if name == "gpt2":
        model: Any = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=32, resid_pdrop=0.0, attn_pdrop=0.0
            )
        )
    else:
        config, kind, settings = LLAMAS[name]
        model = kind(config(**(SIZES | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", [*LLAMAS, "gpt2"])
def test_a_silent_stream_leaves_the_source_as_it_is(name: str, tmp_path: Path) -> None:
    theirs = published(name, tmp_path / "source")
    source = read_source(str(tmp_path / "source"))
    settings = source.model.config.to_diff_dict() | SILENT | {"initializer_seed": 7}
    settings.pop("transformers_version")
    ours = DecoderForCausalLM(DecoderConfig(**settings)).eval()
    notes = start_from(source, ours)
    assert "have no counterpart" in notes[1] and len(notes) == 2  # the streams' weights, and no warning
    ids = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))
    a, b = theirs(ids, labels=ids), ours(ids, labels=ids)
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-5, atol=2e-5)
    assert abs(a.loss - b.loss) < 1e-5
    b.loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in ours.named_parameters() if n.endswith("_weight"))  # they do learn


def test_sizes_and_parts_that_differ_are_all_named(tmp_path: Path) -> None:
    published("qwen3", tmp_path / "source")
    source = read_source(str(tmp_path / "source"))
    with pytest.raises(UserError, match="needs its own sizes and parts") as said:
        start_from(source, DecoderForCausalLM(DecoderConfig(**SIZES | {"hidden_size": 64, "vocab_size": 96})))
    for words in ("decoder.vocab_size 97 (not 96)", "decoder.hidden_size 32 (not 64)", "decoder.qk_norm True"):
        assert words in str(said.value)
    one_set_of_values = {"stream": ["values"], "stream_source": "first", "stream_own": 0.0}
    settings = source.model.config.to_diff_dict() | one_set_of_values
    settings.pop("transformers_version")
    with pytest.raises(UserError, match=r"v_proj.weight, for which this decoder has no place"):
        start_from(source, DecoderForCausalLM(DecoderConfig(**settings)))
    changed = DecoderForCausalLM(DecoderConfig(**settings | {"stream_own": 1.0, "hidden_act": "nmda"}))
    *_, first, second = start_from(source, changed)
    assert "decoder.hidden_act nmda" in first and "stream_arriving 0" in second


def test_what_cannot_be_a_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is a run or a checkpoint: give an export"):
        read_source(str(tmp_path / "run"))
    with pytest.raises(UserError, match="nobody/nothing is no folder, and the hub gives no such model"):
        read_source("nobody/nothing")
    config = hf.MistralConfig(**SIZES, sliding_window=8)
    hf.MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    with pytest.raises(UserError, match="sliding window"):
        read_source(str(tmp_path / "mistral"))


def test_a_run_starts_from_an_export_and_resumes_without_it(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate of nothing its validation loss is that of the exported run."""
    monkeypatch.setattr(exporting, "check_reload", lambda *_: None)
    first, second, export = tmp_path / "first", tmp_path / "second", tmp_path / "export"
    assert fit(tiny_config(run__folder=str(first), decoder__stream=[])) == 0
    assert main(["export", str(first), "--out", str(export)]) == 0
    settings = {f"decoder__{key}": value for key, value in SILENT.items()}
    settings |= {"model__optimizer": {"lr": 1e-12, "weight_decay": 0.0}, "init": str(export), "seed_everything": 9}
    config = tiny_config(**settings, run__folder=str(second), trainer__max_steps=10)
    capsys.readouterr()
    assert fit(config) == 0
    said = capsys.readouterr().err
    assert f"init: the run starts from the weights of {export}" in said and "is not checked" not in said
    ends = [
        [float(row["validation_loss"]) for row in metrics(run) if row["validation_loss"]][-1] for run in (first, second)
    ]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)
    record = json.loads((second / "run.json").read_text())
    assert record["init_sha256"] == record["identity"]["init_sha256"] == read_source(str(export)).sha256
    kept = load_file(export / "model.safetensors")

    other = tmp_path / "other"
    shutil.copytree(export, other)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(other / "tokenizer.json"))
    refused = tiny_config(**settings | {"init": str(other)}, run__folder=str(tmp_path / "third"))
    assert fit(refused) == 2
    assert "has another tokenizer than the store" in capsys.readouterr().err and not (tmp_path / "third").exists()

    assert main(["fit", "--config", str(config), "--run.folder", str(tmp_path / "r"), "--resume", str(export)]) == 2
    assert f"is an exported model: give --init {export}" in capsys.readouterr().err

    shutil.rmtree(export)
    longer = tiny_config(**settings, run__folder=str(second), trainer__max_steps=12)
    assert fit(longer, "--resume", "auto") == 0
    saved = load_file(second / "checkpoints" / "step-00000012" / "model.safetensors")
    assert all(torch.allclose(saved[name], tensor, atol=1e-6) for name, tensor in kept.items())
    assert fit(tiny_config(**settings | {"init": None}, run__folder=str(second)), "--resume", "auto") == 2
    assert "differs in init_sha256" in capsys.readouterr().err
