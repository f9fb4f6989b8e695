"""The front doors: help, unknown commands, versions."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm.cli import COMMANDS, main
from llm.common.arguments import version

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


@pytest.mark.parametrize("program", ["llm", "evals", "small.grid", "small.icl", "small.tem", "small.vision"])
def test_every_program_prints_the_version_without_torch(program: str) -> None:
    words = [sys.executable, "-X", "importtime", "-m", program, "--version"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"hippoformer {importlib.metadata.version('hippoformer')}\n"
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "llm.common.arguments" in imported and "torch" not in imported


def test_a_checkout_without_an_install_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert version() == "hippoformer (not installed)"


def test_the_model_imports_torch_and_transformers_alone() -> None:
    """Its files travel with an export. Who imports whom elsewhere: the contracts of import-linter, `make lint`."""
    for path in ROOT.glob("llm/model/*.py"):
        for line in re.findall(r"^\s*(?:from (\S+)|import (\S+))", path.read_text(), re.M):
            name = line[0] or line[1]
            own = name.startswith(".") and not name.startswith("..")
            assert own or name.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}, (path, name)


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


def test_output_that_nobody_reads_on_ends_quietly(story_store: Path) -> None:
    words = [sys.executable, "-m", "llm", "inspect", str(story_store), "--windows", "2000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 141
    assert "Traceback" not in told and "BrokenPipe" not in told
