"""`python -m llm generate` where something is wrong: one sentence; and with models of other kinds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
)

from evals.__main__ import main as evals
from llm.cli import main

from .exported import byte_tokenizer, write_export


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("generate") / "model", card={"run": "model", "context": 16})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--seed", value) for value in ("-1", "4294967296", "x")),
        *(("--temperature", value) for value in ("nan", "inf", "-1", "1e-320", "1e320")),
        *(("--top-k", value) for value in ("0", "-3")),
        *(("--max-new-tokens", value) for value in ("0", "1.5")),
    ],
)
def test_options_out_of_range(folder, capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(folder), "--prompt", "a", option, value])
    assert stop.value.code == 2 and f"argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "words"), [("\udcff", "is not UTF-8"), ("", "no token"), ("a" * 16, "context of 16")]
)
def test_prompts_that_cannot_be_used(folder, capsys, prompt, words):
    """16 tokens is what the model was trained with, of 128 positions."""
    assert main(["generate", str(folder), "--prompt", prompt]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["0", "0.001", "1000"])
def test_it_ends_where_the_trained_context_does(folder, capsys, temperature):
    assert main(["generate", str(folder), "--prompt", "abc", "--temperature", temperature, "--top-k", "9999"]) == 0
    said = capsys.readouterr().out.removesuffix("\n")
    assert said.startswith("abc") and 3 < len(said) <= 16  # a byte is a token, and at most a character


@pytest.mark.parametrize("temperature", ["0", "0.8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_outputs_are_no_numbers(tmp_path, capsys, temperature, value):
    broken = write_export(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = value
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert main(["generate", str(broken), "--prompt", "a", "--temperature", temperature]) == 2
    assert "outputs are not numbers" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_torn_card(tmp_path, capsys, content):
    torn = write_export(tmp_path / "torn")
    (torn / "hippoformer.json").write_text(content)
    capsys.readouterr()
    for program, words in ((main, ["generate", str(torn), "--prompt", "a"]), (evals, ["run", str(torn)])):
        assert program(words) == 2
        said = capsys.readouterr().err
        assert f"{torn}/hippoformer.json" in said and said.count("\n") == 1


def test_a_prompt_begins_as_the_tokenizer_says(tmp_path, capsys, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    folder = write_export(tmp_path / "begins", tokenizer=tokenizer)
    seen = []
    embed = torch.nn.functional.embedding
    monkeypatch.setattr(
        torch.nn.functional, "embedding", lambda ids, *rest, **more: [seen.append(ids), embed(ids, *rest, **more)][1]
    )
    assert main(["generate", str(folder), "--prompt", "ab", "--max-new-tokens", "1"]) == 0
    assert seen[0][0].tolist() == [0, *byte_tokenizer()("ab")["input_ids"]]


SIZES = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1}


def bloom() -> torch.nn.Module:
    return BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=16, n_layer=1, n_head=2))


def mamba() -> torch.nn.Module:
    return MambaForCausalLM(MambaConfig(**SIZES, state_size=4))


def gemma3() -> torch.nn.Module:
    text = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16}
    image = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tokens = {"boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config={**image, "image_size": 28, "patch_size": 14}, **tokens)
    )


@pytest.mark.parametrize("make", [bloom, mamba, gemma3])
def test_models_of_other_kinds(tmp_path, story_store, capsys, make):
    """Without positions, without attention, with a configuration in parts: a result or a sentence."""
    folder = tmp_path / make.__name__
    torch.manual_seed(0)
    make().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert main(["generate", str(folder), "--prompt", "Mary", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Mary")
    assert evals(["run", str(folder), "--limit", "2", "--device", "cpu"]) == 0
    (result,) = json.loads((folder / "evals/lm_eval.json").read_text())
    assert result["n"] == 2
    assert evals(["ioi", str(folder), "--sentences", "4", "--device", "cpu"]) == 0
    for command in ("losses", "incontext"):
        capsys.readouterr()
        assert evals([command, str(folder), "--store", str(story_store), "--device", "cpu"]) == 2
        assert "tokenizer" in capsys.readouterr().err
