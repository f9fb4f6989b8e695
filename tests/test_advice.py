"""Taking the advice of a refusal works: what the sentence names is given, and the command does what it was asked."""

import json
import re
from pathlib import Path

import pytest

from llm.cli import main

from .train.runs import Config

# words that are refused, what the sentence says of the way out, and the words that take it
FIT: dict[str, tuple[list[str], str, list[str]]] = {
    "head dim": (
        ["--decoder.num_attention_heads", "6"],
        "give head_dim",
        ["--decoder.num_attention_heads", "6", "--decoder.head_dim", "8"],
    ),
    "typing": (["--decoder.hiden_size", "48"], "did you mean decoder.hidden_size", ["--decoder.hidden_size", "48"]),
    "schedule": (
        ["--trainer.max_steps", "1"],
        "lower --model.schedule.warmup_steps and --model.schedule.cooldown_steps",
        ["--trainer.max_steps", "1", "--model.schedule.warmup_steps", "0", "--model.schedule.cooldown_steps", "0"],
    ),
    "cool-down": (
        ["--model.schedule.shape", "wsd", "--model.schedule.cooldown_steps", "0"],
        "set model.schedule.cooldown_steps",
        ["--model.schedule.shape", "wsd", "--model.schedule.cooldown_steps", "1"],
    ),
    "nothing to mask": (
        ["--data.packing", "per_document", "--data.mask_documents", "true"],
        "leave one out",
        ["--data.packing", "per_document"],
    ),
    "clipping": (["--trainer.gradient_clip_val", "0.1"], "give model.gradient_clip", ["--model.gradient_clip", "0.1"]),
    "accumulation": (
        ["--trainer.accumulate_grad_batches", "4"],
        "give data.batch_size and data.micro_batch_size",
        ["--data.batch_size", "8", "--data.micro_batch_size", "2"],
    ),
    "epochs": (["--trainer.max_epochs", "1"], "give trainer.max_steps", ["--trainer.max_steps", "3"]),
    "precision": (["--trainer.precision", "16-mixed"], "bf16-mixed", ["--trainer.precision", "bf16-mixed"]),
    "strategy": (["--trainer.strategy", "ddp"], "give strategy.name", ["--strategy.name", "ddp"]),
    "rounding": (
        ["--strategy.name", "ddp", "--strategy.communication_dtype", "bf16"],
        "set fp32, or trainer.precision bf16-mixed",
        ["--strategy.name", "ddp", "--strategy.communication_dtype", "bf16", "--trainer.precision", "bf16-mixed"],
    ),
    "multiple": (["--run.keep_every", "7"], "must be a multiple of run.checkpoint_every 5", ["--run.keep_every", "10"]),
    "logger": (["--run.loggers", "[papyrus]"], "give any of csv", ["--run.loggers", "[csv]"]),
    "clip": (["--model.gradient_clip", "0"], "or null for none", ["--model.gradient_clip", "null"]),
}


@pytest.mark.parametrize("name", FIT)
def test_fit(name: str, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused, advice, taken = FIT[name]
    fit = ["fit", "--config", str(tiny_config(trainer__max_steps=3))]
    assert main([*fit, *refused]) == 2
    assert advice in capsys.readouterr().err
    assert main([*fit, *taken]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())


def test_folders_of_runs(tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder that is in use, one that is a file, an export to resume from, an export to train further."""
    fit = ["fit", "--config", str(tiny_config(trainer__max_steps=3))]
    run, out = tmp_path / "run", tmp_path / "out"
    assert main([*fit, "--trainer.max_steps", "2", "--model.schedule.cooldown_steps", "0"]) == 0

    def said(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err

    assert "--resume auto, or give another --run.folder" in said(*fit)
    assert main([*fit, "--run.folder", str(tmp_path / "other")]) == 0
    (tmp_path / "file").write_text("")
    assert "give another --run.folder" in said(*fit, "--run.folder", str(tmp_path / "file"))
    assert "leave out OUT and --step" in said("export", str(run), "--all", "--step", "2")
    assert main(["export", str(run), "--all"]) == 0
    assert "--format transformers needs --out" in said("export", str(run), "--format", "transformers")
    assert main(["export", str(run), str(out)]) == 0
    further = [*fit, "--run.folder", str(tmp_path / "further")]
    assert f"give --init {out}" in said(*further, "--resume", str(out))
    wrong = [*further, "--init", str(out), "--decoder.hidden_size", "64"]
    (needed,) = re.findall(r"give decoder.hidden_size (\d+) \(not 64\)", said(*wrong))
    assert main([*wrong, "--decoder.hidden_size", needed]) == 0
    assert "shorten it" in said("generate", str(out), "--prompt", "Tom went home. " * 20)
    assert main(["generate", str(out), "--prompt", "Tom went home.", "--max-new-tokens", "2"]) == 0


def test_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "texts.jsonl"
    texts = [{"body": f"Story {n} of a cat that went home.", "book": f"b/{n % 5}"} for n in range(60)]
    source.write_text("\n".join(json.dumps(text) for text in texts))
    prepare = ["prepare", str(source), "--train-tokenizer", "300", "--workers", "1", "--out", str(tmp_path / "store")]

    def advised(advice: str, refused: list[str], taken: list[str]) -> None:
        assert main([*prepare, *refused]) == 2
        assert advice in capsys.readouterr().err
        store = tmp_path / f"store{len(list(tmp_path.glob('store?*')))}"
        assert main([*prepare, *taken, "--out", str(store)]) == 0
        assert (store / "store.json").is_file()

    body = ["--text-key", "body"]
    advised("name one with --text-key", [], body)
    advised("pass both", [*body, "--group-separator", "/"], [*body, "--group-by", "book", "--group-separator", "/"])
    advised(
        "pass another --group-separator",
        [*body, "--group-by", "book", "--group-separator", "|"],
        [*body, "--group-by", "book", "--group-separator", "/"],
    )
    advised("raise --max-document-bytes", [*body, "--max-document-bytes", "9"], [*body, "--max-document-bytes", "99"])
    advised(
        "smaller --validation-fraction",
        [*body, "--validation-fraction", "0.999999"],
        [*body, "--validation-fraction", "0.3"],
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    advised("name a new or empty folder with --out", [*body, "--out", str(tmp_path / "mine")], body)
