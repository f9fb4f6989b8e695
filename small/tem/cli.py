"""Commands of `python -m small.tem`: train, tables, figures, capacity, bench.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import accept_old_name, add_command
from llm.common.errors import UserError

from ..arguments import (
    add_bench,
    add_device,
    add_figures_out,
    add_folders,
    check_figures_out,
    count,
    device_of,
    run_command,
)

SETTINGS = {
    "symbols": "number of different symbols (default: 45)",
    "steps": "number of gradient steps (default: 1000; paper: 20000)",
    "batch": "environments per gradient step (default: 64; paper: 16)",
    "walk_from": "walking steps at the first gradient step (default: 100; paper: 25)",
    "walk_to": "walking steps at the last gradient step (default: 100; paper: 300)",
    "lr": "learning rate of Adam (default: 1e-3)",
    "clip": "maximum gradient norm (default: 1)",
    "test_every": "gradient steps between tests (default: 50; paper: 250)",
    "tested": "environments per test (default: 96)",
    "tested_steps": "walking steps per environment of a test (default: 200)",
}
OF_ONE_MODEL = {"tem-t": ("separation", "store", "below"), "tem": ("rule", "matrix", "modules", "sensory")}
HOW = {
    "walkers": "walkers in the room of the codes (default: 512)",
    "steps": "recorded steps per walker, after 100 that are left out (default: 150)",
    "shuffles": "shuffles per unit (default: 100)",
    "environments": "environments for remapping (default: 4)",
    "probes": "walkers per environment for remapping (default: 64)",
}
# Options that a preset sets unless the command line does. The paper's appendix is not available: modules, code width,
# batch, number of gradient steps and the numbers of RULES["code"] are those of github.com/jbakermans/torch_tem; rooms
# and walk lengths are ours.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"spaces": ("5x5", "6x6", "7x7"), "rule": "paper"},
    "paper": {
        "spaces": ("8x8", "9x9", "10x10", "11x11"), "rule": "code", "modules": True, "code": 120, "steps": 20_000,
        "batch": 16, "walk_from": 25, "walk_to": 300, "test_every": 250,
    },
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.tem", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from ..folder import made_folder
    from .machine import MODULES, MachineSizes
    from .memory import RULES
    from .model import Sizes
    from .runs import combinations, read_runs
    from .train import Model, Run, Settings, train

    preset = PRESETS[options.preset]

    def of(*names: str) -> dict[str, Any]:
        """What the line says, or else the preset; what neither says is the default."""
        asked = {name: preset.get(name) if getattr(options, name) is None else getattr(options, name) for name in names}
        return {name: value for name, value in asked.items() if value is not None}

    settings = Settings(spaces=tuple(of("spaces")["spaces"]), **of(*SETTINGS))
    width, modules = of("code"), of("modules").get("modules")
    if options.code is not None and modules:
        raise UserError(f"--code {options.code} and modules cannot both be: modules have {sum(MODULES)} (--no-modules)")
    if options.below is not None and options.store in (None, "all"):
        raise UserError("--below is of a memory that keeps only some moments: give --store surprising or new")
    _check_read(options)
    rule = RULES[of("rule")["rule"]]
    rule = replace(rule, form="matrix") if options.matrix else rule
    sizes = Sizes(transition=options.transition, **width, **of("separation", "store", "below"))
    tem_width = {"code": sum(MODULES), "modules": MODULES} if modules else width
    machine = MachineSizes(transition=options.transition, **tem_width, **of("sensory"))
    models = {"tem-t": Model(sizes), "tem": Model(machine, rule)}
    if len(set(options.models)) < len(options.models):
        raise UserError(f"a model is asked for twice: {', '.join(options.models)}")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    asked, device = combinations([models[name] for name in options.models], settings, seeds), device_of(options)
    for run in asked[: len(options.models)]:
        Run(run.model, run.settings)  # what cannot be is said before the first trains
    made_folder(options.out)
    for number, run in enumerate(asked, start=1):
        print(f"{number} of {len(asked)}: {run.label}", flush=True)
        train(options.out / run.label, run.model, run.settings, device, options.line)
    _show(read_runs(options.out), options.out)


def _check_read(options: argparse.Namespace) -> None:
    """UserError where the line has an option that none of its models reads."""
    for model, names in OF_ONE_MODEL.items():
        given = [name for name in names if getattr(options, name)]
        if given and model not in options.models:
            raise UserError(f"--{given[0]} is read by {model} alone, which --models leaves out")


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


def _figures(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..folder import made_folder
    from ..plots import show
    from .cell_figures import drawn, table
    from .figures import learning_curves
    from .recording import How, measured, room_of
    from .runs import read_runs

    check_figures_out(options)
    given = {name: value for name in HOW if (value := getattr(options, name)) is not None}
    how, device = How(room=options.room, **given), device_of(options)
    every = {folder: read_runs(folder) for folder in options.folders}
    rooms = {run.folder: room_of(run, how) for runs in every.values() for run in runs}  # says what cannot be first
    for folder, runs in every.items():
        out = options.out or folder
        made_folder(out)
        asked = tqdm([(run, trained) for run in runs for trained in (True, False)], desc="units", dynamic_ncols=True)
        units = {(run.folder, trained): measured(run, how, device, trained) for run, trained in asked}
        of = [lambda run, trained=trained: units[run.folder, trained] for trained in (True, False)]  # noqa: B023
        made = drawn(runs, lambda run: rooms[run.folder], of[0])
        show(table(runs, *of), out, "cells.txt", [("figure4", learning_curves(runs)), *made])


def _capacity(options: argparse.Namespace) -> None:
    from ..folder import made_folder
    from ..plots import show
    from .capacity import measure, table
    from .figures import capacities

    curves = measure(options.widths, options.memories, options.repeats, options.noise, options.seed, device_of(options))
    made_folder(options.out)
    show(table(curves, options.memories), options.out, "capacity.txt", [("capacity", capacities(curves))])


def _bench(options: argparse.Namespace) -> None:
    from ..timing import benchmark
    from . import bench

    benchmark(lambda: bench.run(options.rounds, device_of(options)), options)


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m small.tem",
        description="Path integration and memory: TEM-t and the Tolman-Eichenbaum Machine (Whittington et al. 2022).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_tables, _add_figures, _add_capacity, _add_bench):
        add(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "train TEM-t and TEM on the same walks: zero-shot accuracy per step and per second (Figure 4)",
        "Trains each model with each seed, one after the other, each in a folder of its own, on walks in fresh "
        "environments of one structure. Tests it in other environments: on visited cells, and on unvisited transitions "
        "to visited cells (zero-shot links). Prints a table; writes tables.txt and figure4.png. To resume an "
        "interrupted training, repeat the command.",
        "python -m small.tem train --out runs/tem/small\n"
        "  python -m small.tem train --preset paper --transition relu --out runs/tem/paper\n"
        "  python -m small.tem train --models tem-t --spaces hex:5x5 hex:6x6 --store surprising --out runs/tem/hex\n"
        "  python -m small.tem train --models tem --rule code --modules --out runs/tem/code\n"
        "  python -m small.tem train --models tem-t --spaces family:4 --separation linear --out runs/tem/linear",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs/tem"),
        metavar="DIR",
        help="output folder, with a folder per run (default: runs/tem)",
    )
    command.add_argument(
        "--preset", choices=PRESETS, default="small",
        help="defaults of the options below: small for two CPU cores, or paper for a GPU (default: small)",
    )  # fmt: skip
    command.add_argument(
        "--models",
        nargs="+",
        choices=("tem-t", "tem"),
        default=("tem-t", "tem"),
        help="models to train (default: both)",
    )
    command.add_argument("--seeds", type=count, default=3, metavar="N", help="number of seeds (default: 3)")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="first seed (default: 0)")
    command.add_argument(
        "--spaces", nargs="+", metavar="S",
        help="spaces of one structure: 5x5, line:20, hex:5x5, family:4, 3x3x3, or files (default: 5x5 6x6 7x7; paper: "
        "8x8 9x9 10x10 11x11)",
    )  # fmt: skip
    command.add_argument(
        "--transition", choices=("identity", "relu"), default="identity",
        help="activation of the position codes (default: identity)",
    )  # fmt: skip
    command.add_argument("--code", type=int, metavar="C", help="width of a position code (default: 64; paper: 120)")
    command.add_argument(
        "--separation", choices=("softmax", "linear", "exponential", "polynomial"),
        help="function that separates TEM-t's memories (default: softmax)",
    )  # fmt: skip
    command.add_argument(
        "--store", choices=("all", "surprising", "new"),
        help="moments that TEM-t's memory keeps: all, those with an unexpected symbol (surprising), or those with a "
        "key unlike all kept ones (new) (default: all)",
    )  # fmt: skip
    command.add_argument(
        "--below", type=float, metavar="X",
        help="limit of --store: a moment is kept if the symbol's probability (surprising) or the largest cosine of the "
        "keys (new) is below it (default: 0.5)",
    )  # fmt: skip
    command.add_argument(
        "--rule", choices=("paper", "code", "linear"),
        help="recall by TEM's memory: one step with ReLU (paper), five clipped steps with decay (code), or one "
        "linear step (linear) (default: paper; --preset paper: code)",
    )  # fmt: skip
    command.add_argument("--sensory", type=int, metavar="N", help="number of TEM's sensory components (default: 10)")
    command.add_argument(
        "--matrix",
        action="store_true",
        help="compute TEM's memory as a matrix, as the paper writes it (default: as sums over memories)",
    )
    command.add_argument(
        "--modules", action=argparse.BooleanOptionalAction,
        help="split TEM's codes into five modules, as wide as those of the authors' code (default: off; paper: on)",
    )  # fmt: skip
    for name, text in SETTINGS.items():
        kind = float if name in ("lr", "clip") else int
        metavar = "N" if kind is int else "X"
        option = "--evaluate-every" if name == "test_every" else f"--{name.replace('_', '-')}"
        command.add_argument(option, dest=name, type=kind, metavar=metavar, help=text)
    accept_old_name(command, "--test-every", "--evaluate-every")
    add_device(command)
    command.set_defaults(command=_train)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "print the table of runs and redraw Figure 4",
        "Prints the table; writes tables.txt and figure4.png. Also works during training.",
        "python -m small.tem tables runs/tem/small",
    )
    add_folders(command)
    command.set_defaults(command=_tables)


def _add_figures(commands: Any) -> None:
    command = add_command(
        commands,
        "figures",
        "draw rate maps, grid and band scores, and remapping (Figures 1, 2b, 4, 5)",
        "Records the units of every run, with trained and with initial weights: its codes in a room, and its "
        "hippocampal units in several environments. Keeps the recordings in the run's folder. Prints how many units "
        "pass each score and how they remap; writes cells.txt. Draws maps of the first seed of each group, and the "
        "scores of all runs.",
        "python -m small.tem figures runs/tem/small\n"
        "  python -m small.tem figures runs/tem/small/tem-t,seed=0 --room 21x21 --out runs/tem/maps",
    )
    add_folders(command)
    add_figures_out(command)
    command.add_argument(
        "--room",
        metavar="S",
        help="room in which codes are recorded (default: 15x15 after squares, else the largest room of training)",
    )
    for name, text in HOW.items():
        command.add_argument(f"--{name}", type=int, metavar="N", help=text)
    add_device(command)
    command.set_defaults(command=_figures)


def _add_capacity(commands: Any) -> None:
    command = add_command(
        commands,
        "capacity",
        "measure recall against the number of stored memories",
        "Stores random codes with random symbols and queries one of them after each: with softmax, linear, exponential "
        "and polynomial attention, and with TEM's memory by three rules. Prints the number of memories at which recall "
        "falls below 0.9; writes capacity.txt and capacity.png.",
        "python -m small.tem capacity --out runs/tem/capacity\n"
        "  python -m small.tem capacity --widths 8 16 --noise 0.5 --out runs/tem/noisy",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs/tem/capacity"),
        metavar="DIR",
        help="output folder (default: runs/tem/capacity)",
    )
    command.add_argument(
        "--widths",
        nargs="+",
        type=count,
        default=(4, 8, 16, 32),
        metavar="K",
        help="widths of a code (default: 4 8 16 32)",
    )
    command.add_argument(
        "--memories", type=count, default=2048, metavar="N", help="maximum number of memories (default: 2048)"
    )
    command.add_argument(
        "--repeats", type=count, default=32, metavar="N", help="sets of memories to average over (default: 32)"
    )
    command.add_argument(
        "--noise", type=float, default=0.0, metavar="X",
        help="standard deviation of the noise on each query component; code components have 1 (default: 0)",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of codes and symbols (default: 0)")
    add_device(command)
    command.set_defaults(command=_capacity)


def _add_bench(commands: Any) -> None:
    command = add_bench(commands, "small.tem", "TEM's memory and gradient steps of both models", rounds=5)
    add_device(command)
    command.set_defaults(command=_bench)
