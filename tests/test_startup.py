"""What answers without torch: every --help, and what a config alone rules out. One process shows it for all."""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import evals.__main__
from llm.cli import COMMANDS, parser_of
from llm.common.limits import LIMITS

from .test_advice_of_options import CONTRADICTIONS, as_options

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "lightning",
    "transformers",
    "scipy",
    "matplotlib",
    "pyarrow",
    "datasets",
    "lm_eval",
    "huggingface_hub",
}
SMALL = ("small.grid", "small.icl", "small.tem", "small.vision")
# Runs commands one after the other; prints of each its status and the heavy modules that are imported by then.
EACH = """
import contextlib, importlib, io, json, sys
mains = {"llm": "llm.cli", "evals": "evals.__main__", **{name: name + ".cli" for name in %r}}
for program, *words in json.loads(sys.stdin.read()):
    out, status = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = importlib.import_module(mains[program]).main(words)
        except SystemExit as end:
            status = end.code
    heavy = sorted(%r.intersection(sys.modules))
    print(json.dumps([status, heavy, out.getvalue()[-300:]]))
""" % (SMALL, HEAVY)  # noqa: UP031  # the code is full of braces


def helps() -> Iterator[list[str]]:
    """The words of every --help of every program."""
    for command in COMMANDS:
        yield ["llm", command, "--help"]
        if command not in ("fit", "validate"):
            yield from (["llm", command, *below, "--help"] for below in subcommands(parser_of(command)))
    parsers = {"evals": evals.__main__._parser()}
    parsers |= {name: importlib.import_module(f"{name}.cli")._parser() for name in SMALL}
    for program, parser in parsers.items():
        yield from ([program, *below, "--help"] for below in [[], *subcommands(parser)])


def subcommands(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, own in action.choices.items():
                yield [name]
                yield from ([name, *below] for below in subcommands(own))


def run_all(commands: list[list[str]]) -> list[tuple[int, list[str], str]]:
    done = subprocess.run(
        [sys.executable, "-c", EACH], cwd=ROOT, input=json.dumps(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_help_and_every_wrong_config_answers_without_torch(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("data: {store: x, contxt: 3}\n")
    config = "configs/stories_values.yaml"
    refused = [
        ["--config", str(wrong)],
        ["--config", str(tmp_path / "missing.yaml")],
        ["--config", config, "--decoder.hidden_sise", "5"],
        ["--config", config, "--data.context", "many"],
        ["--config", config, "--decoder.hidden_act", "sine"],
        ["--config", config, "--model.optimizer.name", "lamb"],
        ["--config", config, "--trainer.precision", "8"],
        ["--config", config, "--trainer.max_epochs", "3"],
        *(
            ["--config", config, f"--{key}", "-1"]
            for key in (*LIMITS, "decoder.hidden_size")
            if key != "run.keep_steps"
        ),
        ["--config", config, "--run.keep_steps", "[0]"],
        ["--config", config, "--model.optimizer.betas", "[0.9, 1.0]"],
        ["--config", config, "--decoder.attention_dropout", "1.0"],
        ["--config", config, "--decoder.num_key_value_heads", "3"],
        *(["--config", config, *as_options(words)] for words, _, _ in CONTRADICTIONS),
    ]
    commands = [*helps(), *(["llm", "fit", *words] for words in refused)]
    for command in ("plan", "bench", "bench-loss", "bench-growth", "bench-ranks"):
        out = ["--out", str(tmp_path / "out")] if command == "bench-growth" else []
        commands.append(["llm", command, "--config", config, *out, "--", "--data.contxt", "3"])
    for words, (status, heavy, text) in zip(commands, run_all(commands), strict=True):
        assert heavy == [], (words, heavy)
        assert status == (0 if words[-1] == "--help" else 2), (words, text)
        assert "Traceback" not in text and (status == 0 or "error: " in text), (words, text)


def test_help_shows_the_parts_first_and_what_is_followed_alone(capsys) -> None:
    from llm.cli import main
    from llm.train.options import FOLLOWED, OURS

    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{part}: ") for part in "decoder model data trainer strategy run evaluation".split()]
    assert places == sorted(places)
    assert all(f"--trainer.{name} " in text or f"--trainer.{name}," in text for name in FOLLOWED)
    assert not any(f"--trainer.{name}" in text.split() for name in OURS)
    assert "--model.optimizer.muon_momentum" in text and "names: queries, keys, values" in text.replace("\n", " ")
    assert "example: python -m llm fit" in text.split("evaluation: ")[-1]
