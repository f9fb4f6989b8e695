"""What a config may name in class_path: Lightning's classes and ours, or any with --allow-class-path."""

import sys
from pathlib import Path

import pytest
import yaml

from llm.cli import main

from .runs import Config, fit

CALLBACK = "lightning.pytorch.callbacks.LambdaCallback"


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported; returns the mark."""
    mark = tmp_path / "imported"
    module = tmp_path / "modules/stranger.py"
    module.parent.mkdir()
    module.write_text(
        f"from lightning.pytorch import Callback\nopen({str(mark)!r}, 'w').close()\n\n"
        "class Mine(Callback):\n    pass\n\ndef make() -> Callback:\n    return Mine()\n"
    )
    monkeypatch.syspath_prepend(module.parent)
    sys.modules.pop("stranger", None)
    return mark


@pytest.mark.parametrize(
    "trainer",
    [
        {"callbacks": [{"class_path": "stranger.Mine"}]},
        {"callbacks": ["stranger.Mine"]},
        {"callbacks": {"class_path": "stranger.make"}},
        {"plugins": [{"class_path": "stranger.Mine"}]},
        {"profiler": {"class_path": "stranger.Mine"}},
        {"callbacks": [{"class_path": CALLBACK, "init_args": {"on_fit_start": "stranger.make"}}]},
        {"callbacks": [{"class_path": CALLBACK, "init_args": {"on_fit_start": "os.system"}}]},
    ],
    ids=str,
)
def test_other_classes_are_not_imported(tiny_config: Config, stranger: Path, capsys, trainer) -> None:
    config = tiny_config()
    content = yaml.safe_load(config.read_text())
    content["trainer"] |= trainer
    config.write_text(yaml.safe_dump(content | {"allow_class_path": True}))  # as a stranger would
    assert fit(config) == 2
    said = capsys.readouterr().err
    assert "pass --allow-class-path" in said and said.count("error: ") == 1
    assert not stranger.exists()


def test_with_the_option_any_class_is(tiny_config: Config, stranger: Path, tmp_path: Path) -> None:
    words = ["--trainer.max_steps", "1", "--run.checkpoint_every", "1", "--trainer.callbacks", "stranger.Mine"]
    config = tiny_config(model__schedule={"warmup_steps": 0, "cooldown_steps": 0})
    assert fit(config, *words) == 2 and not stranger.exists()
    assert fit(config, *words, "--allow-class-path") == 0
    assert stranger.exists() and (tmp_path / "run/summary.json").is_file()
    assert "allow_class_path" not in (tmp_path / "run/config.yaml").read_text()
    assert main(["fit", "--config", str(config), *words]) == 2  # of that command alone


def test_lightnings_own_are(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(model__schedule={"warmup_steps": 0, "cooldown_steps": 0})
    words = ["--trainer.max_steps", "1", "--run.checkpoint_every", "1"]
    assert fit(config, *words, "--trainer.callbacks", "lightning.pytorch.callbacks.LambdaCallback") == 0
