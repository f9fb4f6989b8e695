"""Commands of `python -m small.icl`. torch is imported inside the command that needs it, so that --help answers at once."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.errors import exit_status

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"steps": 75_000, "seeds": 4, "variants": ["classic", "queries", "keys", "values"]},
    "quick": {"steps": 75_000, "seeds": 2, "variants": ["classic", "values"]},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for input that cannot be used, said in one line on stderr."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    options.line = shlex.join(["python", "-m", "small.icl", *words])
    return exit_status(lambda: options.command(options))


def _train(options: argparse.Namespace) -> None:
    from .train import train

    task, sizes, settings, machine = _asked(options)
    train(options.out, task, sizes, settings, machine, options.line)


def _asked(options: argparse.Namespace) -> tuple[Any, ...]:
    """The task, sizes, settings and machine of a command line."""
    import torch

    from .model import Sizes
    from .task import Task
    from .train import Machine, Settings

    preset = PRESETS[options.preset]
    task = Task(
        pairs=options.pairs, copies=options.copies, bursty=options.bursty, novel=options.novel, noise=options.noise
    )
    sizes = Sizes(task.width, task.labels, options.key_width, options.neurons, options.layers)
    seeds = preset["seeds"] if options.seeds is None else options.seeds
    settings = Settings(
        tuple(options.variants or preset["variants"]),
        tuple(range(options.first_seed, options.first_seed + seeds)),
        steps=options.steps or preset["steps"],
        batch=options.batch,
        lr=options.lr,
        snapshot_every=options.snapshot_every,
        evaluation=options.evaluation,
        until=options.until or None,
        products=options.products,
    )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return task, sizes, settings, Machine(device, options.compile, options.together)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m small.icl", description="In-context learning experiments.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = commands.add_parser("train", help="two-layer transformers on the pair task: Figure 3, Tables 1, 5, 6")
    command.add_argument("--out", type=Path, required=True)
    _add_training(command)
    command.set_defaults(command=_train)


def _add_training(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", choices=PRESETS, default="paper")
    command.add_argument("--variants", nargs="+")
    command.add_argument("--seeds", type=int)
    command.add_argument("--first-seed", type=int, default=0)
    command.add_argument("--steps", type=int)
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--lr", type=float, default=0.01)
    command.add_argument("--snapshot-every", type=int, default=500)
    command.add_argument("--evaluation", type=int, default=10_000)
    command.add_argument("--until", type=float, default=0.95)
    command.add_argument("--products", default="float32")
    for name, value in (("pairs", 8), ("copies", 2), ("key-width", 128), ("neurons", 128), ("layers", 2)):
        command.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("bursty", 0.5), ("novel", 0.5), ("noise", 0.1)):
        command.add_argument(f"--{name}", type=float, default=value)
    command.add_argument("--device")
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--together", type=int)
