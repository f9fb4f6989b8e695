"""The front door: help, unknown commands, and the benchmark."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.cli import COMMANDS, main

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
