"""The console script: every program under one name, the files that come with it, completion, and foreign packages."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import hippoformer
from llm.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def test_help_and_every_program_answer(capsys: pytest.CaptureFixture) -> None:
    assert hippoformer.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in (*COMMANDS, "evals", "small", "configs", "completion"))
    for words in (["plan"], ["evals", "compare"], *(["small", name, "train"] for name in ("grid", "icl", "tem"))):
        with pytest.raises(SystemExit) as end:
            hippoformer.main([*words, "--help"])
        assert end.value.code == 0 and "usage: " in capsys.readouterr().out
    assert hippoformer.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"hippoformer {importlib.metadata.version('hippoformer')}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage: hippoformer COMMAND"),
        (["dream"], "unknown command 'dream'"),
        (["small", "talk"], "give small grid or small icl"),
        (["small"], "give small grid or small icl"),
        (["completion", "fish"], "give bash or zsh"),
        (["configs", "--all"], "a folder to copy them to"),
    ],
)
def test_a_wrong_line_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert hippoformer.main(words) == 2
    assert said in capsys.readouterr().err


def test_configs_studies_and_scripts_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With this Python in the scripts; a second time, too, unless a file has been changed."""
    tracked = subprocess.run(
        ["git", "ls-files", "configs", "slurm"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = {name for name in tracked.stdout.split() if not name.startswith("slurm/logs/")}
    for _ in range(2):
        assert hippoformer.main(["configs", str(tmp_path)]) == 0
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == expected
    assert f"PYTHON=${{PYTHON:-{sys.executable}}}" in (tmp_path / "slurm" / "launch.sh").read_text()
    for script in tmp_path.glob("slurm/*.sh"):
        assert "-.venv/bin/python}" not in script.read_text()
        subprocess.run(["bash", "-n", script], check=True)
    (tmp_path / "configs" / "1b_values.yaml").write_text("mine")
    capsys.readouterr()
    assert hippoformer.main(["configs", str(tmp_path)]) == 2
    assert "configs/1b_values.yaml" in capsys.readouterr().err
    assert (tmp_path / "configs" / "1b_values.yaml").read_text() == "mine"
    assert hippoformer.main(["configs"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == expected


@pytest.mark.parametrize(
    ("line", "among", "not_among"),
    [
        ("hippoformer ", {"fit", "evals", "small", "configs"}, {"--help"}),
        ("hippoformer st", {"study", "status"}, {"fit"}),
        ("hippoformer small ", {"grid", "icl", "tem", "vision"}, {"fit"}),
        ("hippoformer small grid ", {"train", "sweep"}, {"--help"}),
        ("hippoformer study pl", {"plan"}, {"run"}),
        ("hippoformer fit --model.opt", {"--model.optimizer.name", "--model.optimizer.lr"}, {"--model.compile"}),
        ("hippoformer evals compare --de", {"--declare", "--device"}, {"--out"}),
        ("hippoformer export --f", {"--format"}, {"--out"}),
        ("hippoformer dream ", set(), {"fit"}),
    ],
)
def test_completion(line: str, among: set[str], not_among: set[str]) -> None:
    found = hippoformer.completions(line)
    assert among <= set(found) and not not_among & set(found)


@pytest.mark.parametrize("name", hippoformer.PACKAGES)
def test_a_foreign_distribution_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As pip writes one down: a folder of metadata with the list of its files."""
    metadata = tmp_path / f"{name}-9.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.1\n")
    (metadata / "RECORD").write_text(f"{name}/__init__.py,,\n{name}-9.1.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert hippoformer.main(["--help"]) == 2
    assert f"the distribution {name} 9.1 is installed too" in capsys.readouterr().err


def test_a_folder_that_hides_a_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "__init__.py").touch()
    paths = [str(tmp_path), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths}; import hippoformer; sys.exit(hippoformer.main())"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the package evals is found in {tmp_path}/evals/__init__.py, not in {ROOT}")
