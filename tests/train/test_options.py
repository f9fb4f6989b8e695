"""The options that are read from source are those of the classes: names, types, defaults, verdicts."""

import builtins
import importlib
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.common.errors import UserError
from llm.train import cli, declarations, options

CONFIG = "configs/stories_values.yaml"


@pytest.fixture(scope="session")
def real() -> Any:
    """The parser of the classes, of `fit`."""
    found = SimpleNamespace()

    class Parsed(cli.CLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.parser = self._parser("fit")
            raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "CLI", Parsed)
        with pytest.raises(StopIteration):
            cli.parse(["fit"])
    return found.parser


def test_names_and_defaults_are_those_of_the_classes(real: Any) -> None:
    light = options.parser_of("fit")
    theirs = {action.dest: action for action in real._actions}
    ours = {action.dest: action for action in light._actions}
    linked = {f"{part}.{name}" for part, names in options.LINKED.items() for name in names}
    parts = {dest for dest in theirs if dest.endswith(".help")} | set(declarations.PARTS)
    assert theirs.keys() - parts == ours.keys() - parts
    for dest in ours.keys() - parts - linked - {"help", "config", "print_config"}:
        assert ours[dest].default == theirs[dest].default, dest


def test_types_are_those_of_the_classes(real: Any) -> None:
    """Where a name of Lightning's stands in a type, no type is demanded here."""
    known = 0
    for part in declarations.PARTS:
        for key in declarations.keys_of(part):
            action = next(action for action in real._actions if action.dest == f"{part}.{key.name}")
            if key.type is declarations.Unread or key.name in options.LINKED.get(part, ()) or action.dest in NESTED:
                continue
            known += 1
            kind = action._typehint if getattr(action, "_typehint", None) is not None else action.type
            assert set(typing.get_args(kind) or [kind]) == set(typing.get_args(key.type) or [key.type]), action.dest
    assert known > 80
    for name, (file, _) in declarations.NESTED.items():
        own = typing.get_type_hints(getattr(module_of(file), name))
        assert {key.name: key.type for key in declarations.nested_keys(name)} == own


NESTED = {f"model.{name.lower()}" for name in declarations.NESTED}


def module_of(file: str) -> Any:
    return importlib.import_module(f"llm.{file.removesuffix('.py').replace('/', '.')}")


def test_choices_are_those_of_the_modules() -> None:
    for key, places in declarations.CHOICES.items():
        wanted = [name for file, constant in places for name in getattr(module_of(file), constant)]
        assert declarations.choices(key, earlier=True) == wanted, key
    for file, constant in [("plan/plan.py", "DEVICES"), ("export.py", "DTYPES"), ("bench/step.py", "AGAINST")]:
        assert declarations.names(file, constant) == list(getattr(module_of(file), constant))


def test_every_key_is_described() -> None:
    for part in declarations.PARTS:
        assert [key.name for key in declarations.keys_of(part) if not key.text] == []
    for name in declarations.NESTED:
        assert [key.name for key in declarations.nested_keys(name) if not key.text] == []


KEYS = [f"{part}.{key.name}" for part in declarations.PARTS for key in declarations.keys_of(part)]
KEYS += [f"model.{name.lower()}.{key.name}" for name in declarations.NESTED for key in declarations.nested_keys(name)]
VALUES = "0 1 -1 3.5 1e-3 nan inf true null [] [1] [values] {} {a:\\ 1} x '' 99999999999999999999".replace("\\ ", " ")
VALUE = st.sampled_from([*VALUES.split(" "), "{a: 1}", "[0.9, 0.95]", "adamw", "auto", "32-true", "é\x1b"])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUE), min_size=1, max_size=3))
def test_what_is_refused_here_is_refused_there(real: Any, pairs: list[tuple[str, str]]) -> None:
    """And what passes here without a value of Lightning's classes passes there."""
    words = ["--config", CONFIG, *(f"--{key}={value}" for key, value in pairs)]
    light = problem(lambda: options.check("fit", words))
    there = problem(lambda: full(real, words))
    assert light is None or there is not None, (words, light)
    untyped = {f"trainer.{key.name}" for key in declarations.keys_of("trainer") if key.type is declarations.Unread}
    linked = {f"{part}.{name}" for part, names in options.LINKED.items() for name in names}
    if not any(key in untyped | linked for key, _ in pairs):
        assert (light is None) == (there is None), (words, light, there)


def full(real: Any, words: list[str]) -> None:
    """What the parser of the classes says, and of what it has parsed what `CLI` says of names."""
    with options.class_paths(any_path=False):
        parsed = real.parse_args(words)
    if problems := options.problems_of(parsed):
        raise UserError("; ".join(problems))


def problem(run: Any) -> str | None:
    try:
        run()
    except UserError as error:
        return str(error)
    return None


def watched(imported: list[str]) -> Any:
    before = builtins.__import__

    def watch(name: str, *rest: Any, **more: Any) -> Any:
        imported.append(name)
        return before(name, *rest, **more)

    return watch


def test_classes_by_path_are_left_to_the_real_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not imported here, wherever they stand."""
    named = "{class_path: stranger.Mine}"
    keys = (
        "trainer.callbacks",
        "trainer.plugins",
        "trainer.profiler",
        "trainer.accelerator",
        "decoder.rope_parameters",
    )
    monkeypatch.setattr("builtins.__import__", watched(imported := []))
    for key in keys:
        part, name = key.split(".")
        config = tmp_path / "config.yaml"
        content = yaml.safe_load(Path(CONFIG).read_text())
        content[part][name] = yaml.safe_load(named)
        config.write_text(yaml.safe_dump(content))
        problem(lambda: options.check("fit", ["--config", str(config)]))  # noqa: B023  # called within this turn
    assert "stranger" not in imported
    for words in (["--trainer.callbacks", "stranger.Mine"], ["--trainer.profiler", "simple"]):
        options.check("fit", ["--config", CONFIG, *words])
    assert options.CALLABLE == ("lightning", "llm")


def test_a_config_needs_no_schedule_and_no_decoder(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump({"data": {"store": "a", "context": 8, "batch_size": 2}, "trainer": {"max_steps": 9}})
    )
    options.check("fit", ["--config", str(config)])


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--model.optimizer.nam", "muon"], "did you mean model.optimizer.name"),
        (["--model.optimizer.betas", "[1, 2, 3]"], "model.optimizer.betas [1, 2, 3] is of the wrong type: give a list"),
        (["--decoder.stream", "values"], "decoder.stream values is of the wrong type: give a list, [a, b] or null"),
        (["--data.context", "x"], "data.context x is of the wrong type: give an integer"),
        (["--run.loggers", "[csv, paper]"], "run.loggers ['paper'] is unknown: give any of csv, tensorboard, wandb"),
        (["extra"], "extra belongs to no option"),
    ],
)
def test_sentences_name_the_key_and_the_fix(words: list[str], fix: str) -> None:
    with pytest.raises(UserError) as told:
        options.check("fit", ["--config", CONFIG, *words])
    assert fix in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"a: [", b"", b"- x"])
def test_a_file_that_is_no_config(content: bytes, tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"--config {path} "):
        options.check("fit", ["--config", str(path)])
