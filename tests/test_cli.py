"""The front door: help, unknown commands, and the benchmark."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from llm.bench import ratio
from llm.bench_contenders import Plan, Window, contender, random_store
from llm.cli import COMMANDS, main
from llm.train.cli import parse

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_an_example(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m llm {command}" in text.split("example")[-1], text[-500:]


def test_no_command_and_an_unknown_one() -> None:
    for words, status in (([], 2), (["trane"], 2), (["--help"], 0)):
        done = subprocess.run([sys.executable, "-m", "llm", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status
        assert "prepare" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_imports_go_one_way() -> None:
    """llm imports neither small nor evals, llm.model only torch, transformers and itself; evals no trainer."""
    for path in ROOT.glob("llm/**/*.py"):
        assert not re.search(r"^\s*(from|import) (small|evals)\b", path.read_text(), re.M), path
    for path in ROOT.glob("llm/model/*.py"):
        for line in re.findall(r"^\s*(?:from (\S+)|import (\S+))", path.read_text(), re.M):
            name = line[0] or line[1]
            own = name.startswith(".") and not name.startswith("..")
            assert own or name.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}, (path, name)
    for path in [*ROOT.glob("evals/*.py")]:
        text = re.sub(r"^from llm\.train import reading$", "", path.read_text(), flags=re.M)
        assert not re.search(r"^\s*(from|import) (llm\.train|llm\.model|lightning)\b", text, re.M), path


def test_inspect_shows_a_store_and_names_a_flipped_byte(
    story_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", str(story_store), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "400 documents" in text
    assert "verified" in text
    copy = tmp_path / "store"
    shutil.copytree(story_store, copy)
    shard = next((copy / "train").glob("*.tokens"))
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(copy), "--verify"]) == 2
    assert shard.stem in capsys.readouterr().err
    assert main(["inspect", str(copy), "--at", "100000000"]) == 2
    assert "error: " in capsys.readouterr().err


def test_bench_prints_both_ratios_and_memory(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own: it measures, so it must not share this one's threads."""
    out = tmp_path / "bench.json"
    words = ["--config", str(tiny_config(decoder__softmax_scale=1.0)), "--rounds", "2", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "llm", "bench", *words, "--json", str(out), "--", "--data.context", "16"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "classic to transformers: " in done.stdout
    assert "values to classic: " in done.stdout
    result = json.loads(out.read_text())
    assert result["context"] == 16
    assert all(len(rates) == 2 and min(rates) > 0 for rates in result["tokens_per_second"].values())
    assert all(memory > 0 for memory in result["peak_memory_mib"].values())
    for name in ("classic_to_transformers", "values_to_classic"):
        assert result[name]["least"] <= result[name]["median"] <= result[name]["greatest"]
        assert result[name]["interval"][0] <= result[name]["median"] <= result[name]["interval"][1]
    tokens = result["rows"] * result["context"]
    for name, rates in result["tokens_per_second"].items():
        for turn, rate in enumerate(rates):  # the parts are the whole step
            parts = {part: found[turn] for part, found in result["seconds_of_parts"][name].items()}
            assert sum(parts.values()) == pytest.approx(tokens / rate, rel=1e-6)
            assert all(parts[part] > 0 for part in ("data", "forward", "loss", "backward", "optimizer"))
            used = result["model_flop_utilisation"][name][turn] * result["matrix_flops_per_second"][turn]
            assert used == pytest.approx(rate * result["model_flops_per_token"])


def test_a_ratio_has_the_interval_of_its_logarithm() -> None:
    one, other = ([Window(rate, {}, 0.0) for rate in rates] for rates in ((4.0, 9.0, 6.0), (2.0, 3.0, 2.0)))
    found = ratio({"a": one, "b": other}, "a", "b")
    interval = stats.t.interval(0.95, 2, np.mean(np.log([2, 3, 3])), stats.sem(np.log([2, 3, 3])))
    assert (found["median"], found["least"], found["greatest"]) == (3, 2, 3)
    assert found["interval"] == pytest.approx(np.exp(interval))
    assert ratio({"a": one[:1], "b": other[:1]}, "a", "b")["interval"] is None


@pytest.mark.parametrize("part", ["forward", "loss", "backward", "optimizer"])
@pytest.mark.parametrize("name", ["classic", "transformers"])
def test_time_is_told_of_the_part_that_takes_it(part: str, name: str, tiny_config, tmp_path: Path, monkeypatch) -> None:
    """A wait of a second a step lengthens its own part."""
    cli = parse(["--config", str(tiny_config(decoder__softmax_scale=1.0))], run=False)
    random_store(tmp_path, cli.model.decoder_config.unpadded_vocab_size, 4 * 2 * 16 + 1)
    made = contender(name, Plan(cli.model, "32-true", 16, 2, "cpu", False, tmp_path))
    model = made.module.model if name == "classic" else made.model
    inside = {"forward": model.get_input_embeddings(), "loss": model.get_output_embeddings()}
    if part in inside:
        inside[part].register_forward_pre_hook(lambda *_: time.sleep(1))
    elif part == "backward":
        parameter = next(p for p in model.parameters() if p.ndim == 2)
        parameter.register_hook(lambda _: time.sleep(1))
    else:
        monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_, **__: time.sleep(1) or torch.tensor(1.0))
    parts = made.window(2, parts=True).parts
    assert parts[part] > 1 > 0.9 > sum(seconds for other, seconds in parts.items() if other != part)


def test_bench_compares_the_contenders_that_are_asked_for(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    words = ["--config", str(tiny_config()), "--rounds", "1", "--steps", "1", "--against", "none"]
    words += ["--contenders", "silu", "nmda", "queries_keys"]
    done = subprocess.run([sys.executable, "-m", "llm", "bench", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nmda to silu: " in done.stdout and "queries keys to silu: " in done.stdout
    assert "transformers" not in done.stdout


def test_bench_refuses_what_cannot_be(tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--config", str(tiny_config())]
    assert main([*words, "--contenders", "values", "values"]) == 2
    assert "--contenders has one twice" in capsys.readouterr().err
    assert main([*words, "--rounds", "0"]) == 2
    assert "--rounds, --steps and --rows must be at least 1" in capsys.readouterr().err


def test_output_that_nobody_reads_on_ends_quietly(story_store: Path) -> None:
    words = [sys.executable, "-m", "llm", "inspect", str(story_store), "--windows", "2000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 141
    assert "Traceback" not in told and "BrokenPipe" not in told
