"""What the command lines of the small experiments have in common."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from llm.errors import exit_status


def run_command(program: str, parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the command that a line names, whose options know the whole `line`.

    Returns the exit status: 0, or 2 for input that cannot be used, said in one line on stderr.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    options.line = shlex.join(["python", "-m", program, *words])
    command: Callable[[argparse.Namespace], None] = options.command
    return exit_status(lambda: command(options))


def add_command(commands: Any, name: str, short: str, long: str, example: str) -> argparse.ArgumentParser:
    """A command with its description, folded, and an example."""
    return commands.add_parser(
        name,
        help=short,
        description=textwrap.fill(long, 100),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """--device, for `device_of`."""
    command.add_argument("--device", help="cpu or cuda (a GPU where there is one)")


def device_of(options: argparse.Namespace) -> str:
    """The device that is asked for; UserError where it is not there."""
    from evals.models import resolve_device  # torch is imported by the command that needs it: --help answers at once

    return str(resolve_device(options.device or "auto"))


def count(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
