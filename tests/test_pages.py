"""Pages say what is true: links lead somewhere, commands pass their own parsers, options exist."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import evals.__main__
from llm.cli import COMMANDS, parser_of
from llm.train.cli import parse
from llm.train.optim import Optimizer, Schedule

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "small/*/*.md",
        "small/notebooks/*.ipynb",
        "benchmarks/*.md",
        ".github/**/*.md",
    )
    for page in ROOT.glob(pattern)
)
RUN_AS_WRITTEN = Path("docs/extending.md")  # by test_extending.py: its options are there once its diffs are applied
SCRIPTS = sorted(path.relative_to(ROOT) for pattern in ("Makefile", "slurm/*.sh") for path in ROOT.glob(pattern))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python -m (llm|evals|benchmarks(?:\.\w+)?|small\.\w+)\b([^`|>&;)#]*)")
OPTION = re.compile(r"`(--[\w.-]+)[^`]*`")
FIT = ("fit", "validate")
SLURM = set(
    "--array --cpu-bind --distribution --gpu-bind --gpus-per-node --no-requeue --ntasks-per-node --signal --nodes "
    "--time".split()
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall((ROOT / page).read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / page.parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page}: {target}"


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [page for page in [*PAGES, *SCRIPTS] if page != RUN_AS_WRITTEN], ids=str)
def test_commands_pass_their_parsers(page: Path) -> None:
    measured = page.parts[0] == "benchmarks"  # with commands as they were given, some by names of then
    for program, words in _commands((ROOT / page).read_text()):
        assert not (problem := _problem(program, words, measured)), (
            f"{page}: python -m {program} {' '.join(words)}: {problem}"
        )


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(program, its words) of every command line; prose may name a program alone, or with a command."""
    text = re.sub(r"\\\n\s*", " ", text)
    for program, rest in COMMAND.findall(re.sub(r"\$\(BIN\)/python", "python", text)):
        line = rest.split("\n", 1)[0]
        try:
            words = shlex.split(line)
        except ValueError:  # a quotation mark of the prose around it
            words = line.split()
        yield program, [word.rstrip(",.:") for word in words if not word.startswith(("...", "[", "…", "$"))]


def _problem(program: str, words: list[str], old_names: bool) -> str | None:
    """What the program's own parser objects to."""
    if not words or words[0] in ("--help", "--version", "COMMAND") or program.startswith("benchmarks"):
        importlib.import_module(program)
        return None
    if program == "llm" and words[0] in FIT:
        return _fit_problem(words[1:])
    known = _options(program, words[0], old_names)
    if known is None:
        return "there is no such command"
    own, _, overrides = " ".join(words[1:]).partition(" -- ")  # behind it the keys of a config, as for fit
    unknown = [word for word in own.split() if word.startswith("--") and word.partition("=")[0] not in known]
    return f"unknown {unknown}" if unknown else _fit_problem(overrides.split())


def _fit_problem(words: list[str]) -> str | None:
    for word, value in zip(words, [*words[1:], ""], strict=False):
        if word == "--config" and value.startswith("configs/") and "$" not in value and not (ROOT / value).is_file():
            return f"there is no {value}"
    unknown = [word for word in words if word.startswith("--") and not _is_of_fit(word.partition("=")[0])]
    return f"unknown {unknown}" if unknown else None


def _is_of_fit(option: str) -> bool:
    """Whether fit has it, or a setting with parts of which it is one: --model.schedule.warmup_steps."""
    whole, _, part = option.rpartition(".")
    fields = {"--model.schedule": Schedule, "--model.optimizer": Optimizer}
    return option in _of_fit() or (whole in fields and part in fields[whole].__dataclass_fields__)


@cache
def _of_fit() -> set[str]:
    """The options of fit and validate; `evaluation.arguments` and mixtures take any."""
    parser = parse(["--config", str(ROOT / "configs/stories_values.yaml")], run=False).parser
    return {"--help", *(option for action in parser._actions for option in action.option_strings)}


@cache
def _options(program: str, command: str, hidden: bool = False) -> set[str] | None:
    """The options of one command, those that --help hides too if asked; None where there is no such command."""
    if program == "llm":
        if command not in COMMANDS:
            return None
        parser = parser_of(command)
    else:
        module = evals.__main__ if program == "evals" else importlib.import_module(f"{program}.cli")
        (commands,) = [a for a in module._parser()._actions if isinstance(a, argparse._SubParsersAction)]
        if command not in commands.choices:
            return None
        parser = commands.choices[command]
    parsers = [parser]
    for action in parser._actions:
        parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    actions = [action for each in parsers for action in each._actions]
    shown = [action for action in actions if hidden or action.help != argparse.SUPPRESS]
    return {option for action in shown for option in action.option_strings}


@cache
def _every_option() -> set[str]:
    """The options of all commands."""
    found = {"--version", *_of_fit()}
    for command in COMMANDS.keys() - set(FIT):
        found |= _options("llm", command) or set()
    for program in ("evals", "small.icl", "small.grid", "small.tem", "small.vision"):
        module = evals.__main__ if program == "evals" else importlib.import_module(f"{program}.cli")
        (commands,) = [a for a in module._parser()._actions if isinstance(a, argparse._SubParsersAction)]
        for command in commands.choices:
            found |= _options(program, command) or set()
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[0] in ("README.md", "docs", "small")], ids=str)
def test_options_that_are_named_exist(page: Path) -> None:
    """Those in code spans of the prose."""
    named = set(OPTION.findall((ROOT / page).read_text()))
    assert not named - _every_option() - SLURM
