"""How a program and its commands declare themselves. Imports no torch, so that --help and --version answer at once."""

import argparse
import importlib.metadata
import textwrap
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
