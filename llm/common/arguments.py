"""How a command of a program declares itself."""

import argparse
import textwrap
from typing import Any


def add_command(commands: Any, name: str, summary: str, text: str, example: str) -> argparse.ArgumentParser:
    """A command with its description, folded, and an example."""
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(text, 100),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
