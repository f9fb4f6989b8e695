"""What the command lines of the small experiments have in common."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import add_command, add_version
from llm.common.errors import UserError, exit_status
from llm.common.threads import set_wait_policy, warn_if_busy


def run_command(program: str, parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the command that a line names, whose options know the whole `line`.

    Returns the exit status: 0, or 2 for input that cannot be used, said in one line on stderr.
    """
    set_wait_policy()
    add_version(parser)
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    if hasattr(options, "device"):  # a command that computes
        warn_if_busy()
    options.line = shlex.join(["python", "-m", program, *words])
    command: Callable[[argparse.Namespace], None] = options.command
    return exit_status(lambda: command(options))


def add_bench(commands: Any, program: str, parts: str, rounds: int) -> argparse.ArgumentParser:
    """The command `bench`, for `timing.benchmark`; `parts` says what is timed."""
    command = add_command(
        commands,
        "bench",
        f"time {parts}, next to straightforward implementations",
        "Times each part and a straightforward implementation of it. Both run in every round; the first round is not "
        "counted. Prints median times, and each ratio as the median over rounds with minimum and maximum.",
        f"python -m {program} bench --json benchmarks/results/{program.removeprefix('small.')}_cpu.json",
    )
    command.add_argument("--rounds", type=count, default=rounds, metavar="N", help=f"timed rounds (default: {rounds})")
    command.add_argument("--json", type=Path, metavar="FILE", help="JSON file for the full result (default: none)")
    return command


def add_folders(command: argparse.ArgumentParser) -> None:
    """The folders of trainings that a command reads."""
    command.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="--out folder of a training, or the folder of one run in it",
    )


def add_figures_out(command: argparse.ArgumentParser) -> None:
    """--out of figures, for `check_figures_out`."""
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the figures (default: the folder of the runs)"
    )


def check_figures_out(options: argparse.Namespace) -> None:
    """UserError where figures of several folders would go to one."""
    if options.out is not None and len(options.folders) > 1:
        raise UserError("--out is one folder, and there are several of runs: give one of them, or leave out --out")


def add_device(command: argparse.ArgumentParser) -> None:
    """--device, for `device_of`."""
    command.add_argument("--device", help="device: cpu or cuda (default: a GPU if available, else the CPU)")


def device_of(options: argparse.Namespace) -> str:
    """The device that is asked for; UserError where it is not there."""
    from llm.common.devices import (
        resolve_device,  # torch is imported by the command that needs it: --help answers at once
    )

    return str(resolve_device(options.device or "auto"))


def count(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
