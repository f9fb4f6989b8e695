"""Whose code a folder runs: none of its own where it is this version's, and its own in each of two of one name."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from evals.__main__ import main as evals
from llm import pretrained
from llm.cli import main as llm
from llm.common.errors import UserError
from llm.model import DecoderForCausalLM

from .exported import append, edit_config, write_export

RELEASE = Path(__file__).parent / "release_0_1/export"
IDS = torch.arange(1, 9)[None]
HIGHER = """
_before = DecoderForCausalLM.forward
def _higher(self, *words, **settings):
    found = _before(self, *words, **settings)
    found.logits = found.logits + 1
    return found
DecoderForCausalLM.forward = _higher
"""


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def spring(folder: Path, file: str = "decoder.py") -> Path:
    """Have a file of the folder's code leave a mark where it is run; returns the mark."""
    mark = folder.parent / f"{folder.name}-ran"
    append(folder / file, f"open({str(mark)!r}, 'w').close()")
    return mark


def test_this_versions_export_runs_none_of_its_files(tmp_path, monkeypatch):
    folder = write_export(tmp_path / "model", stream=["values"])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", "/proc/nowhere")  # no HOME that could be written
    assert pretrained.foreign_code(folder) == []
    model = pretrained.load_model(folder)
    assert type(model) is DecoderForCausalLM and not model.training
    assert pretrained.load_tokenizer(folder)("a")["input_ids"] == pretrained.load_tokenizer(folder).encode("a")
    assert pretrained.foreign_code(RELEASE) == [] and type(pretrained.load_model(RELEASE)) is DecoderForCausalLM
    for path in folder.glob("*.py"):
        path.unlink()
    assert torch.equal(logits(pretrained.load_model(folder)), logits(model))


@pytest.mark.parametrize("file", ["decoder.py", "config.py", "activations.py"])
def test_other_code_is_asked_for(tmp_path, file):
    folder = write_export(tmp_path / "model")
    mark = spring(folder, file)
    for load in (pretrained.load_config, pretrained.load_tokenizer, pretrained.load_model):
        with pytest.raises(UserError, match=rf"\({file}\): read it, then pass --trust-remote-code"):
            load(folder)
    assert not mark.exists()
    model = pretrained.load_model(folder, trusted=True)
    assert mark.exists() and type(model).__module__.startswith("transformers_modules.model.")


def test_a_released_export_that_was_changed_is_asked_for(tmp_path):
    folder = shutil.copytree(RELEASE, tmp_path / "model")
    append(folder / "dropout.py", "EDITED = True")
    with pytest.raises(UserError, match="--trust-remote-code"):
        pretrained.load_model(folder)
    assert type(pretrained.load_model(folder, trusted=True)) is not DecoderForCausalLM


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "evil.Model"),
        ("config.json", {"auto_map": {"AutoConfig": "someone/repo--config.DecoderConfig"}}, "someone/repo--config"),
        ("config.json", {"model_type": "unheard-of"}, "decoder.DecoderConfig"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "evil.Tokenizer"),
        ("tokenizer_config.json", {"auto_map": ["evil.Tokenizer", None]}, "evil.Tokenizer"),
    ],
)
def test_a_configuration_that_names_other_code(tmp_path, file, changes, named):
    folder = write_export(tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    edit_config(folder, file, **changes)
    for load in (pretrained.load_config, pretrained.load_tokenizer, pretrained.load_model):
        with pytest.raises(UserError, match="--trust-remote-code") as refused:
            load(folder)
        assert named in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_two_folders_of_one_name_each_run_their_own_code(tmp_path):
    """By our loader and by transformers' own; also after a folder was saved once more."""
    first = write_export(tmp_path / "one/model")
    second = shutil.copytree(first, tmp_path / "two/model")
    append(second / "decoder.py", HIGHER)
    append(first / "loss.py", "EDITED = True")  # so that neither is this version's
    expected = logits(pretrained.load_model(first, trusted=True))
    torch.testing.assert_close(logits(pretrained.load_model(second, trusted=True)), expected + 1)
    assert torch.equal(logits(pretrained.load_model(first, trusted=True)), expected)
    for folder in (first, second):
        again = folder.parent / "again/model"
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
        higher = float(folder == second)
        for place in (folder, again):
            found = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
            torch.testing.assert_close(logits(found), expected + higher)


@pytest.mark.parametrize("command", ["generate", "run", "ioi", "losses", "incontext"])
def test_every_command_asks(tmp_path, story_store, capsys, command):
    folder = write_export(tmp_path / "model", card={"run": "model", "context": 64})
    mark = spring(folder)
    store = ["--store", str(story_store)]
    words = {"generate": ["--prompt", "a"], "run": ["--limit", "1"], "losses": store, "incontext": store}
    main = llm if command == "generate" else evals
    assert main([command, str(folder), *words.get(command, [])]) == 2
    said = capsys.readouterr().err
    assert "--trust-remote-code" in said and "decoder.py" in said and said.count("error: ") == 1
    assert not mark.exists()


def test_with_the_option_a_command_runs_them(tmp_path, capsys):
    folder = write_export(tmp_path / "model")
    mark = spring(folder)
    assert llm(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "2", "--trust-remote-code"]) == 0
    assert capsys.readouterr().out.startswith("a") and mark.exists()


def test_code_that_cannot_be_copied_is_said_so(tmp_path, monkeypatch, capsys):
    folder = write_export(tmp_path / "unwritable")
    spring(folder)
    for module in (dynamic_module_utils, pretrained):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", "/proc/nowhere/modules")
    assert llm(["generate", str(folder), "--prompt", "a", "--trust-remote-code"]) == 2
    said = capsys.readouterr().err
    assert "set HF_MODULES_CACHE to a folder that can be written" in said and "llm export" not in said
