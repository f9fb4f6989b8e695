"""How a program and its commands declare themselves. Imports no torch, so that --help and --version answer at once."""

import argparse
import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any


def version() -> str:
    """Return the project's name and its installed version, which pyproject.toml sets."""
    try:
        return f"hippoformer {importlib.metadata.version('hippoformer')}"
    except importlib.metadata.PackageNotFoundError:
        return "hippoformer (not installed)"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add --version to a program."""
    parser.add_argument("--version", action="version", version=version(), help="print the version and exit")


def add_command(commands: Any, name: str, summary: str, text: str, example: str) -> argparse.ArgumentParser:
    """A command with its description, folded, and an example."""
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(text, 100),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def share(text: str) -> float:
    """An argument type: a number between 0 and 1."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def positive(text: str) -> float:
    """An argument type: a finite number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and finite")
    return value


def count(least: int) -> Callable[[str], int]:
    """Return an argument type: a whole number, at least `least`."""

    def count(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return count


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add --trust-remote-code to a command that loads exported folders."""
    command.add_argument(
        "--trust-remote-code",
        dest="trusted",
        action="store_true",
        help="run Python files of the folder that are not this version's own (docs/security.md)",
    )


def accept_old_name(command: argparse.ArgumentParser, old: str, new: str) -> None:
    """Let an option keep its name of an earlier version, which --help does not show and which says what is new."""
    option = next(action for action in command._actions if new in action.option_strings)
    settings: dict[str, Any] = {
        "nargs": option.nargs,
        "type": option.type,
        "choices": option.choices,
        "default": argparse.SUPPRESS,
    }
    command.add_argument(
        old, dest=option.dest, action=_OldName, option=option, new=new, help=argparse.SUPPRESS, **settings
    )


class _OldName(argparse.Action):
    """Does what `option` does, and prints its name."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, option: argparse.Action, new: str, **settings: Any
    ) -> None:
        super().__init__(option_strings, dest, **settings)
        self.option, self.new = option, new

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(f"note: {option_string} is now called {self.new}; the old name works until version 0.3", file=sys.stderr)
        self.option(parser, namespace, values, self.new)
