"""Every command, with words that its own parser suggests: extremes of each type, and files that are something else.

Whatever comes is an exit status of 0, 2, 75 or 130 and a sentence, never a traceback. What would work for long is
interrupted, as Ctrl-C does. HIPPOFORMER_FUZZ=1000 tries so many command lines, other ones each time.
"""

import argparse
import importlib
import os
import pkgutil
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

import evals
import llm
import llm.cli
import small
from llm.train import declarations

from .exported import write_export

PROGRAMS = {"llm": "llm.cli", "evals": "evals.__main__"}
PROGRAMS |= {f"small.{name}": f"small.{name}.cli" for name in ("grid", "icl", "tem", "vision")}
MANY = int(os.environ.get("HIPPOFORMER_FUZZ", "0"))
INTERRUPTED_AFTER = 0.5  # seconds
MEMORY = 3 << 30  # bytes that a command may take beyond what the tests have

INTEGERS = ["0", "-1", "1", "3", "-7", "2147483648", "99999999999999999999", "1.5", "x", ""]
NUMBERS = ["0", "-1", "0.5", "nan", "inf", "-inf", "1e-320", "1e308", "x", ""]
TEXTS = ["", "x", "é", "\x1b[31m", "a\nb", "\udcff", "[1", "{a: 1}", "0", "a=b", "a" * 300, "../x", "cpu", "1/2", "3/2"]
PROCESSES = ["0", "-1", "x", "1.5", "99999999999999999999"]  # few, or so many that they are refused
OF_PROCESSES = {"workers", "processes", "threads", "jobs", "data.workers", "evaluation.threads"}
LAUNCHING = {"trainer.devices", "trainer.num_nodes", "trainer.accelerator", "strategy.name", "trainer.plugins"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, story_store: Path) -> list[str]:
    """Paths: a store, an exported folder, and what is none of a store, run, study, config, data set or file."""
    root = tmp_path_factory.mktemp("fuzz")
    write_export(root / "export")
    contents = {
        "empty": b"",
        "binary": b"\xff\xfe\x00\x80" * 40,
        "list.json": b"[]",
        "number.json": b"3",
        "torn.json": b'{"a": ',
        "text.txt": b"one\ntwo\n",
        "lines.jsonl": b'{"text": "one"}\n{"text": 3}\n',
        "torn.jsonl.zst": b"(\xb5/\xfd",
        "torn.jsonl.gz": b"\x1f\x8b\x08",
        "torn.parquet": b"PAR1PAR1",
        "keys.yaml": b"a: {b: [1, 2]}\n",
        "torn.zip": b"PK\x03\x04",
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
    folders = {
        "run": {"run.json": "{}", "config.yaml": "a: 1", "metrics.csv": "step\nx\n", "events.jsonl": "3\n"},
        "run2": {
            "run.json": "[]",
            "config.yaml": "",
            "summary.json": "[]",
            "checkpoints/step-00000001/state.json": "[]",
        },
        "store": {"store.json": "{}", "plan.json": "[]", "tokenizer/tokenizer.json": "{}"},
        "store2": {"store.json": '{"train": {}, "vocab_size": "x"}'},
        "model": {"config.json": "{}", "hippoformer.json": "[]"},
        "model2": {"config.json": '{"model_type": "hippoformer"}', "tokenizer.json": "[]"},
        "runs": {"a/run.json": "{}", "a/errors.csv": "", "b/run.json": '{"settings": 3}'},
        "nothing": {},
    }
    for folder, inside in folders.items():
        (root / folder).mkdir()
        for name, text in inside.items():
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_text(text)
    odd = ["/proc/x", f"{root}/empty/below", f"{root}/missing", f"{root}/{'n' * 300}", "nul\udcff", "", "-"]
    return [str(story_store), *(str(path) for path in sorted(root.iterdir())), *odd]


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported() -> None:
    """An interrupt within an import would leave half of it."""
    for package in (llm, evals, small):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") or module.name.startswith("evals"):
                importlib.import_module(module.name)
    for name in (
        "datasets",
        "lm_eval.evaluator",
        "matplotlib.pyplot",
        "networkx",
        "pyarrow.parquet",
        "kornia.augmentation",
    ):
        importlib.import_module(name)


def commands() -> Iterator[tuple[list[str], argparse.ArgumentParser | None]]:
    """The words and the parser of every command; None of fit and validate."""
    for command in llm.cli.COMMANDS:
        if command in ("fit", "validate"):
            yield ["llm", command], None
        else:
            yield from leaves(["llm", command], llm.cli.parser_of(command))
    for program in [name for name in PROGRAMS if name != "llm"]:
        yield from leaves([program], importlib.import_module(PROGRAMS[program])._parser())


def leaves(words: list[str], parser: argparse.ArgumentParser) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield words, parser
    for action in below:
        for name, own in action.choices.items():
            yield from leaves([*words, name], own)


def values(action: argparse.Action, files: list[str]) -> st.SearchStrategy[str]:
    """What a word of an option may be: of its type, and not."""
    if action.choices:
        return st.sampled_from([*map(str, action.choices), "x"])
    if action.dest in OF_PROCESSES:
        return st.sampled_from(PROCESSES)
    if action.type is int or (action.type is not None and "count" in getattr(action.type, "__name__", "")):
        return st.sampled_from(INTEGERS)
    if action.type is float:
        return st.sampled_from(NUMBERS)
    if action.type is Path or (action.type is None and not action.option_strings):
        return st.sampled_from(files)
    return st.sampled_from([*TEXTS, *INTEGERS, *files[:3]])


@st.composite
def words_of(draw: st.DrawFn, parser: argparse.ArgumentParser, files: list[str]) -> list[str]:
    """Words for a parser: what it demands, and up to three options."""
    needed = [a for a in parser._actions if a.option_strings and a.required]
    free = [a for a in parser._actions if a.option_strings and not a.required and a.dest not in ("help", "version")]
    chosen = [*needed, *draw(st.lists(st.sampled_from(free), max_size=3, unique=True))] if free else needed
    for group in parser._mutually_exclusive_groups:
        if group.required and not set(group._group_actions) & set(chosen):
            chosen.append(draw(st.sampled_from(group._group_actions)))
    words: list[str] = []
    for action in parser._actions:
        if not action.option_strings and action.dest != "overrides":
            words += [draw(values(action, files)) for _ in range(draw(st.integers(1, 2)) if action.nargs else 1)]
    for action in chosen:
        count = action.nargs if isinstance(action.nargs, int) else 1
        word = "--config" if action.dest == "config" else draw(st.sampled_from(action.option_strings))
        words += [word, *(draw(values(action, files)) for _ in range(count))]
    return words


@st.composite
def config_words(draw: st.DrawFn, config: str, files: list[str]) -> list[str]:
    """A sound config, or none, and up to three keys with any value."""
    parts = {part: declarations.keys_of(part) for part in declarations.PARTS}
    keys = [f"{part}.{key.name}" for part, own in parts.items() for key in own]
    keys += [
        f"model.{name.lower()}.{key.name}" for name in declarations.NESTED for key in declarations.nested_keys(name)
    ]
    keys = [key for key in [*keys, "resume", "seed_everything", "initializer_seed"] if key not in LAUNCHING]
    words = ["--config", draw(st.sampled_from([config] * 6 + files))]
    for key in draw(st.lists(st.sampled_from(keys), max_size=3, unique=True)):
        pool = (
            PROCESSES
            if key in OF_PROCESSES
            else [*INTEGERS, *NUMBERS, *TEXTS, "true", "null", "[]", "[values]", *files]
        )
        words.append(f"--{key}={draw(st.sampled_from(pool))}")
    return words


@contextmanager
def interrupted() -> Iterator[list[int]]:
    """Ctrl-C comes after a while, and then again and again; less memory than the machine has."""
    came: list[int] = []

    def interrupt(*_: object) -> None:
        came.append(1)
        signal.raise_signal(signal.SIGINT)

    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, interrupt)
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, INTERRUPTED_AFTER, 5.0)
    try:
        yield came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


COMMANDS = {" ".join(words): parser for words, parser in commands()}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_words_make_a_traceback(
    command: str,
    files: list[str],
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    parser = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    config = str(tiny_config())
    strategy = config_words(config, files) if parser is None else words_of(parser, [config, *files])
    program, *first = command.split()
    main = importlib.import_module(PROGRAMS[program]).main

    @hypothesis.settings(
        max_examples=max(1, MANY // len(COMMANDS)) if MANY else (25 if parser is None else 6),
        derandomize=not MANY,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def tried(words: list[str]) -> None:
        with interrupted() as came:
            try:
                status = main([*first, *words])
            except SystemExit as stop:
                status = stop.code
            except KeyboardInterrupt:  # outside what says so: a traceback
                pytest.fail(f"{command} {words}: {traceback.format_exc()[-1500:]}")
        said = capfd.readouterr().err
        assert status in (0, 2, 75, 130, None), (command, words, status, said[-500:])
        assert status != 130 or came, (command, words, said[-500:])
        assert "Traceback" not in said, (command, words, said[-3000:])
        assert status != 2 or "error: " in said, (command, words, said[-500:])

    tried()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert str(Path.cwd()) == str(tmp_path) and "pytest" in sys.modules
