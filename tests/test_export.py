"""`python -m llm export` and `generate`: the folder stands alone, and its logits are the trained model's."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from llm import export as exporting
from llm.cli import main
from llm.common.errors import UserError
from llm.data.tokenizer import encode_documents, load_tokenizer
from llm.model import DecoderConfig, DecoderForCausalLM
from llm.train import checkpoint as checkpoints

from .exported import byte_tokenizer, edit_config

Config = Callable[..., Path]
ALONE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import llm
    sys.exit("the project is importable here")
except ImportError:
    pass
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Mary gave the ball to", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
assert out.shape[1] == inputs["input_ids"].shape[1] + 5
model.save_pretrained(sys.argv[2])  # and once more, as a user who fine-tunes would
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
assert (again(**inputs).logits == model(**inputs).logits).all()
print(type(model).__module__, tokenizer.decode(out[0]))
"""


@pytest.fixture
def trained(tiny_config: Config, tmp_path: Path) -> Path:
    settings = {
        "decoder__stream": ["queries", "values"],
        "decoder__stream_weight": "head",
        "decoder__value_embedding": "values",
        "decoder__hidden_act": "nmda",
        "decoder__nmda_learnable": True,
        "decoder__tie_word_embeddings": True,
        "decoder__vocab_size": 576,
        "decoder__unpadded_vocab_size": 512,
        "decoder__parametrization": "completep",
        "decoder__base_hidden_size": 16,
        "decoder__base_num_hidden_layers": 1,
        "decoder__base_head_dim": 4,
    }
    assert main(["fit", "--config", str(tiny_config(trainer__max_steps=8, **settings))]) == 0
    return tmp_path / "run"


def test_the_folder_stands_alone(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["export", str(trained), str(out)]) == 0
    assert "reloaded logits equal" in capsys.readouterr().out
    assert oct(out.stat().st_mode & 0o777) == "0o755"
    kept = json.loads((out / "config.json").read_text())
    assert (kept["parametrization"], kept["base_hidden_size"], kept["base_head_dim"]) == ("completep", 16, 4)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "alone.py").write_text(isolated(ALONE))
    done = subprocess.run(
        [sys.executable, "-I", "-S", elsewhere / "alone.py", out, tmp_path / "again"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("transformers_modules")  # above it, what deepspeed prints on import
    facts = json.loads((out / "hippoformer.json").read_text())
    assert (facts["run"], facts["step"], facts["seed"]) == ("run", 8, 3)
    assert main(["generate", str(out), "--prompt", "One day, Mary", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.startswith("One day, Mary")
    assert main(["generate", str(out), "--prompt", "One day" * 50]) == 2
    assert "leave no room" in capsys.readouterr().err


def isolated(script: str) -> str:
    """With -S, site-packages are put on the path by hand and .pth files (the editable install) are not read."""
    packages = Path(torch.__file__).parents[1]
    return f"import sys\nsys.path.append({str(packages)!r})\n{script}"


def test_logits_are_those_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    exporting.export(trained, tmp_path / "out")
    saved = load_file(trained / "checkpoints" / "step-00000008" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in saved.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is not None
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    exporting.export(trained, tmp_path / "out")  # again: nothing to do
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    exporting.export(trained, tmp_path / "half", step=5, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "hippoformer.json").read_text())["step"] == 5
    with pytest.raises(UserError, match="not empty"):
        exporting.export(trained, tmp_path / "half", step=8, dtype=torch.bfloat16)


def test_an_export_that_differs_is_not_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A weight lost on the way to the folder: the reload must notice, and nothing may remain."""
    save = exporting.DecoderForCausalLM.save_pretrained

    def lossy(self: torch.nn.Module, folder: Path) -> None:
        save(self, folder)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.1.attention.stream.values_weight"
        save_file(tensors | {name: tensors[name] + 1e-3}, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(exporting.DecoderForCausalLM, "save_pretrained", lossy)
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert "logits differ" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_what_cannot_be_exported(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert main(["export", str(trained), str(tmp_path / "full")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", str(trained), str(tmp_path / "out"), "--step", "7"]) == 2
    assert "step-00000007" in capsys.readouterr().err
    for path in (trained / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert checkpoints.newest(trained / "checkpoints")[0] is None
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "llm export" in capsys.readouterr().err


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the reload in a fresh Python, which takes ten seconds a folder and is tested above."""
    monkeypatch.setattr(exporting, "check_reload", lambda *_: None)


def test_every_checkpoint_is_exported_to_the_runs_own_folder(
    trained: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture
) -> None:
    exports = trained / "exports"
    assert main(["export", str(trained)]) == 0  # the newest
    assert [path.name for path in exports.iterdir()] == ["step-00000008"]
    assert main(["export", str(trained), "--step", "5"]) == 0
    capsys.readouterr()
    shutil.rmtree(exports / "step-00000008")
    written = (exports / "step-00000005" / "model.safetensors").stat().st_mtime_ns
    assert main(["export", str(trained), "--all"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{exports}/step-00000005: step 5, ") and first.endswith("already there")
    assert second.startswith(f"{exports}/step-00000008: step 8, ") and second.endswith("reloaded logits equal")
    assert (exports / "step-00000005" / "model.safetensors").stat().st_mtime_ns == written
    saved = load_file(trained / "checkpoints" / "step-00000008" / "model.safetensors")
    exported = load_file(exports / "step-00000008" / "model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in saved.items())
    assert sorted(path.name for path in exports.iterdir()) == ["step-00000005", "step-00000008"]
    for words in (["out", "--all"], ["--all", "--step", "5"]):
        assert main(["export", str(trained), *words]) == 2
        assert "leave out OUT and --step" in capsys.readouterr().err


def test_as_transformers_it_is_a_llama_without_our_code(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, out = tmp_path / "plain", tmp_path / "llama"
    config = tiny_config(decoder__stream=[], run__folder=str(run), trainer__max_steps=5)
    assert main(["fit", "--config", str(config)]) == 0
    assert main(["export", str(run), "--format", "transformers", "--out", str(out)]) == 0
    assert main(["export", str(run), "--format", "transformers", "--out", str(out)]) == 0
    assert "already there" in capsys.readouterr().out
    assert not list(out.glob("*.py"))
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(theirs) is LlamaForCausalLM
    ours = DecoderForCausalLM(DecoderConfig.from_pretrained(run / "checkpoints" / "step-00000005")).eval()
    ours.load_state_dict(load_file(run / "checkpoints" / "step-00000005" / "model.safetensors"))
    ids = torch.randint(500, (2, 16))
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_switch_that_transformers_lacks_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["export", str(trained), "--format", "transformers"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "--format transformers: transformers has no model with stream" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 2
    assert "needs --out" in capsys.readouterr().err


def test_several_runs_are_exported_and_the_bad_one_is_named_afterwards(
    trained: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    assert main(["export", str(trained), str(other), "--step", "5"]) == 0
    assert all((run / "exports" / "step-00000005" / "config.json").exists() for run in (trained, other))
    assert main(["export", str(trained), str(tmp_path / "nowhere"), str(other)]) == 2
    said = capsys.readouterr()
    assert f"{tmp_path}/nowhere" in said.err
    assert all((run / "exports" / "step-00000008" / "config.json").exists() for run in (trained, other))
    assert main(["export", str(trained), str(other), "--out", str(tmp_path / "out")]) == 2
    assert "takes one run" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_all_passes_over_what_is_torn_and_refuses_what_is_stale(
    trained: Path, unchecked: None, capsys: pytest.CaptureFixture
) -> None:
    exports, torn = trained / "exports", trained / "checkpoints" / "step-00000005" / "model.safetensors"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["export", str(trained), "--all"]) == 0
    said = capsys.readouterr()
    assert f"passed over: {torn.parent} is not a complete checkpoint (model.safetensors has not the sha256" in said.err
    assert [path.name for path in exports.iterdir()] == ["step-00000008"]
    torn.write_bytes(whole)
    card = exports / "step-00000008" / "hippoformer.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"checkpoint_sha256": "0" * 64}))
    assert main(["export", str(trained), "--all"]) == 2  # the other is exported before it says so
    said = capsys.readouterr()
    assert f"output folder {exports}/step-00000008 is not empty" in said.err
    assert "step-00000005: step 5" in said.out
    for path in (trained / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    assert main(["export", str(trained), "--all"]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_the_card_says_what_the_run_was_trained_on(trained: Path, tmp_path: Path, unchecked: None) -> None:
    record = json.loads((trained / "run.json").read_text())
    out, written = exporting.export(trained, tmp_path / "out")
    facts = json.loads((out / "hippoformer.json").read_text())
    assert written and (facts["store_fingerprint"], facts["context"]) == (record["store_fingerprint"], 32)
    older = {name: value for name, value in record.items() if name not in ("store_fingerprint", "identity")}
    (trained / "run.json").write_text(json.dumps(older))
    assert exporting.export(trained, tmp_path / "out") == (tmp_path / "out", False)
    exporting.export(trained, tmp_path / "of-an-older-run")
    facts = json.loads((tmp_path / "of-an-older-run" / "hippoformer.json").read_text())
    assert facts["store_fingerprint"] is None and facts["context"] is None


def test_what_a_killed_export_left_is_removed_a_day_later(trained: Path, unchecked: None) -> None:
    exports = trained / "exports"
    exports.mkdir()
    old, new, others = (exports / f".step-0000000{name}.partial" for name in ("8-old", "8-new", "5-old"))
    for path in (old, new, others):
        path.mkdir()
    for path in (old, others):
        os.utime(path, (0, 0))
    exporting.export(trained)
    assert not old.exists() and new.exists() and others.exists()


# ---- Refused, and what a folder is like ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/proc/nowhere/out", "a file/out", "a file", "/dev/null/out", "o" * 300])
def test_where_nothing_can_be_written(
    trained: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture, place: str
) -> None:
    (tmp_path / "a file").write_text("mine")
    assert main(["export", str(trained), str(tmp_path / place)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and ("cannot be written" in said or "is not empty" in said)
    assert (tmp_path / "a file").read_text() == "mine"


@pytest.mark.parametrize("step", ["-7", "1.5", "x"])
def test_steps_that_cannot_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture, step: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path), "--step", step])
    assert stop.value.code == 2 and "argument --step" in capsys.readouterr().err


def test_what_is_damaged_is_said_in_one_sentence(
    trained: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(trained), str(out)]) == 0
    card = (out / "hippoformer.json").read_text()
    for content, words in (("{", "hippoformer.json"), ("[]", "hippoformer.json"), ("{}", "not empty")):
        (out / "hippoformer.json").write_text(content)
        assert main(["export", str(trained), str(out)]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    (out / "hippoformer.json").write_text(card)
    weights = load_file(out / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, out / "model.safetensors", {"format": "pt"})
    assert main(["export", str(trained), str(out)]) == 2
    assert f"the weights in {out} are not those that were exported" in capsys.readouterr().err
    (trained / "run.json").write_text("{}")
    assert main(["export", str(trained), str(tmp_path / "other")]) == 2
    assert "run.json" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_the_umask_decides(
    tiny_config: Config, tmp_path: Path, unchecked: None, umask: int, file: int, folder: int
) -> None:
    words = ["--trainer.max_steps", "2", "--run.checkpoint_every", "2"]
    before = os.umask(umask)
    try:
        assert main(["fit", "--config", str(tiny_config()), *words]) == 0
        assert main(["export", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    found = [path for kind in ("checkpoints", "exports") for path in (tmp_path / "run" / kind).rglob("*")]
    assert {path.suffix for path in found} >= {".safetensors", ".json", ".py"}
    assert {(path, path.stat().st_mode & 0o777) for path in found} == {
        (path, folder if path.is_dir() else file) for path in found
    }


# ---- The tokenizer ---------------------------------------------------------------------------------------------------


def template(single: str, ids: dict[str, int]) -> processors.PostProcessor:
    steps = [processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))]
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), *steps])


@pytest.mark.parametrize("begin", [None, 1])
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, LlamaTokenizer])
def test_a_prompt_begins_as_documents_did(tmp_path: Path, kind: type, around: str, begin: int | None) -> None:
    """Whatever the tokenizer put around a text when it was called; saved, and loaded by transformers."""
    before = byte_tokenizer()
    before.add_special_tokens({"eos_token": "</s>", "bos_token": "<s>"})
    ids = {token: before.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    before.backend_tokenizer.post_processor = template(around, ids)
    if kind is LlamaTokenizer:  # whose class decides anew what is put around a text
        before.save_pretrained(tmp_path / "llama")
        edit_config(tmp_path / "llama", "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True)
        before = load_tokenizer(tmp_path / "llama")
    wanted = ids["<s>"] if begin else None
    exporting.as_in_training(before, wanted).save_pretrained(tmp_path / "out")
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = encode_documents(before, ["Mary and John, 1984"])[0]
    assert after("Mary and John, 1984")["input_ids"] == ([wanted] if begin else []) + plain
    assert after.decode(plain) == "Mary and John, 1984"
    assert (after.bos_token, after.eos_token, after.pad_token) == ("<s>", "</s>", before.pad_token)


@pytest.mark.parametrize("recorded", [True, False])
def test_an_export_asks_the_run_how_documents_began(
    trained: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture, recorded: bool
) -> None:
    """A run of version 0.1 does not say it: then its store does, where it is."""
    file = trained / "run.json"
    record = json.loads(file.read_text())
    assert record["begin_of_document"] is None
    if recorded:
        file.write_text(json.dumps(record | {"begin_of_document": 0}))
    else:
        file.write_text(json.dumps({key: value for key, value in record.items() if key != "begin_of_document"}))
    assert main(["export", str(trained), str(tmp_path / "out")]) == 0
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Mary")["input_ids"]
    assert (ids[0] == 0) is recorded
    if not recorded:
        (trained / "config.yaml").write_text("data: {store: nowhere}")
        assert main(["export", str(trained), str(tmp_path / "other")]) == 0
        assert "note: the tokenizer puts around a text what it did before training" in capsys.readouterr().err
