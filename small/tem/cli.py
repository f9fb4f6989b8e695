"""Commands of `python -m small.tem`: train, tables.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.arguments import add_command
from llm.errors import UserError

from ..arguments import add_device, count, device_of, run_command

SETTINGS = {
    "symbols": "different ones (45)", "steps": "gradient steps (1000)", "batch": "environments of a step (64)",
    "walk_from": "steps of a walk in the first gradient step (100)", "walk_to": "and in the last (100)",
    "lr": "of Adam (1e-3)", "clip": "greatest norm of a gradient (1)", "test_every": "gradient steps (50)",
    "tested": "environments of a test (96)", "tested_steps": "of their walks (200)",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.tem", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from ..folder import made_folder
    from .machine import MODULES, MachineSizes
    from .memory import CODE, Rule
    from .model import Sizes
    from .runs import combinations, read_runs
    from .train import Model, Settings, train

    given = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    settings = Settings(spaces=tuple(options.spaces), **given)
    transition, width = options.transition, {} if options.code is None else {"code": options.code}
    rule = Rule() if options.rule == "paper" else CODE
    tem_width = {"code": sum(MODULES), "modules": MODULES} if options.modules else width
    models = {
        "tem-t": Model(Sizes(transition=transition, separation=options.separation, **width)),
        "tem": Model(MachineSizes(transition=transition, **tem_width), rule),
    }
    if len(set(options.models)) < len(options.models):
        raise UserError(f"a model is asked for twice: {', '.join(options.models)}")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    asked, device = combinations([models[name] for name in options.models], settings, seeds), device_of(options)
    made_folder(options.out)
    for number, run in enumerate(asked, start=1):
        print(f"{number} of {len(asked)}: {run.label}", flush=True)
        train(options.out / run.label, run.model, run.settings, device, options.line)
    _show(read_runs(options.out), options.out)


def _tables(options: argparse.Namespace) -> None:
    from .runs import read_runs

    for folder in options.folders:
        _show(read_runs(folder), folder)


def _show(runs: Sequence[Any], folder: Path) -> None:
    """Print the table, and keep it and Figure 4 in the folder."""
    from ..plots import show
    from .figures import learning_curves
    from .runs import report

    show(report(runs), folder, "tables.txt", [("figure4", learning_curves(runs))])


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m small.tem",
        description="Path integration and memory: TEM-t and the Tolman-Eichenbaum Machine (tem-transformer).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_tables):
        add(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "TEM-t and TEM on the same walks: zero-shot accuracy per step and per second (Figure 4)",
        "Trains each model with each seed, one after the other, each in a folder of its own, on walks in fresh "
        "environments of one structure, and tests it in others: at cells seen before, and over zero-shot links, which "
        "were never taken and lead to such a cell. Prints a table, and writes it to tables.txt and Figure 4 to "
        "figure4.png. A killed training goes on from its last test when the same command is given again.",
        "python -m small.tem train --out runs/tem/small\n"
        "  python -m small.tem train --models tem-t --spaces hex:5x5 hex:6x6 --transition relu --out runs/tem/hex\n"
        "  python -m small.tem train --models tem --rule code --modules --out runs/tem/code\n"
        "  python -m small.tem train --models tem-t --spaces family:4 --separation linear --out runs/tem/linear",
    )
    command.add_argument(
        "--out", type=Path, default=Path("runs/tem"), metavar="DIR", help="folder of all runs (runs/tem)"
    )
    command.add_argument("--models", nargs="+", choices=("tem-t", "tem"), default=("tem-t", "tem"), help="(both)")
    command.add_argument("--seeds", type=count, default=3, metavar="N", help="how many (3)")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="(0)")
    command.add_argument(
        "--spaces", nargs="+", default=("5x5", "6x6", "7x7"), metavar="S",
        help="of one structure: 5x5, line:20, hex:5x5, family:4, 3x3x3, or files (5x5 6x6 7x7)",
    )  # fmt: skip
    command.add_argument("--transition", choices=("identity", "relu"), default="identity", help="of codes (identity)")
    command.add_argument("--code", type=int, metavar="C", help="width of a code (64)")
    command.add_argument(
        "--separation", choices=("softmax", "linear", "exponential", "polynomial"), default="softmax",
        help="how TEM-t tells memories apart (softmax)",
    )  # fmt: skip
    command.add_argument(
        "--rule", choices=("paper", "code"), default="paper",
        help="of TEM's memory: one step with ReLU, or the reference code's five with decay (paper)",
    )  # fmt: skip
    command.add_argument("--modules", action="store_true", help="TEM's codes in the reference code's five modules")
    for name, text in SETTINGS.items():
        kind = float if name in ("lr", "clip") else int
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    add_device(command)
    command.set_defaults(command=_train)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "table and Figure 4 of trainings, anew",
        "Prints the table and writes tables.txt and figure4.png; also while runs go on.",
        "python -m small.tem tables runs/tem/small",
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a training's --out, or one run in it")
    command.set_defaults(command=_tables)
