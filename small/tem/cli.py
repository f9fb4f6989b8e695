"""Commands of `python -m small.tem`: train, tables, figures, capacity, record, bench.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import accept_old_name, add_command
from llm.common.errors import UserError

from ..experiment.options import (
    add_bench,
    add_device,
    add_figures_out,
    add_folders,
    add_options,
    add_out,
    add_record,
    add_runs,
    check_figures_out,
    chosen,
    count,
    device_of,
    make_parser,
    run_command,
    seeds_of,
    shown,
)
from .settings import MODULES, PRESETS, MachineSizes, RecordingSettings, TemSettings, TransformerSizes

OF_ONE_MODEL = {"tem-t": ("separation", "store", "below"), "tem": ("rule", "matrix", "modules", "sensory")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.tem", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from ..experiment.runs import make_folder, one_by_one
    from .train import Run, train

    asked, device = _asked(options), device_of(options)
    for run in asked[: len(options.models)]:
        Run(run)  # says what cannot be before the first trains
    make_folder(options.out)
    for run in one_by_one(asked):
        train(options.out / run.label, run, device, options.line)
    _show(options.out)


def _asked(options: argparse.Namespace) -> list[Any]:
    """Return the runs of a command line."""
    from dataclasses import replace

    from .memory import RULES
    from .runs import Model, combinations

    preset = PRESETS[options.preset]
    modules = preset["modules"] if options.modules is None else options.modules
    settings = chosen(options, TemSettings, preset)
    if options.code is not None and modules:
        raise UserError(f"--code {options.code} and modules cannot both be: modules have {sum(MODULES)} (--no-modules)")
    if options.below is not None and options.store in (None, "all"):
        raise UserError("--below needs --store surprising or --store new: pass one of them, or drop --below")
    _check_read(options)
    rule = RULES[options.rule or preset["rule"]]
    rule = replace(rule, form="matrix") if options.matrix else rule
    split = {"code": sum(MODULES), "modules": MODULES} if modules else {}
    models = {
        "tem-t": Model(chosen(options, TransformerSizes, preset)),
        "tem": Model(chosen(options, MachineSizes, preset, **split), rule),
    }
    if len(set(options.models)) < len(options.models):
        raise UserError(f"a model is asked for twice: {', '.join(options.models)}")
    return combinations([models[name] for name in options.models], settings, seeds_of(options, preset))


def _check_read(options: argparse.Namespace) -> None:
    """Raise UserError if the line has an option that none of its models reads."""
    for model, names in OF_ONE_MODEL.items():
        given = [name for name in names if getattr(options, name)]
        if given and model not in options.models:
            raise UserError(f"--{given[0]} is read by {model} alone, which --models leaves out")


def _tables(options: argparse.Namespace) -> None:
    for folder in options.folders:
        _show(folder)


def _show(folder: Path) -> None:
    """Print the table of the runs in a folder; write it, Figure 4 and the page there."""
    from ..page import show
    from .gallery import of_training
    from .runs import read_runs
    from .tables import accuracy_table

    runs = read_runs(folder)
    show(accuracy_table(runs), folder, "tables.txt", of_training(runs), "small.tem", [folder])


def _figures(options: argparse.Namespace) -> None:
    from llm.common.processes import progress_bar

    from ..experiment.runs import make_folder
    from ..page import show
    from .cell_figures import unit_table
    from .gallery import of_training, of_units
    from .recording import record_once, room_of
    from .runs import read_runs
    from .walk import record_walk

    check_figures_out(options)
    how, device = chosen(options, RecordingSettings), device_of(options)
    every = {folder: read_runs(folder) for folder in options.folders}
    rooms = {run.folder: room_of(run, how) for runs in every.values() for run in runs}  # says what cannot be first
    for folder, runs in every.items():
        out = options.out or folder
        make_folder(out)
        each = [(run, trained) for run in runs for trained in (True, False)]
        asked = progress_bar(len(each), 0, "units", "model", iterable=each)
        units = {(run.folder, trained): record_once(run, how, device, trained) for run, trained in asked}
        of = [lambda run, trained=trained: units[run.folder, trained] for trained in (True, False)]  # noqa: B023
        made = [*of_training(runs), *of_units(runs, lambda run: rooms[run.folder], of[0])]
        record_walk(out, runs[0], of[0](runs[0]), device)
        show(unit_table(runs, *of), out, "cells.txt", made, "small.tem", [folder])


def _capacity(options: argparse.Namespace) -> None:
    from ..experiment.runs import make_folder
    from ..page import show
    from .capacity import capacity_table, measure_capacity
    from .gallery import of_capacity

    curves = measure_capacity(
        options.widths, options.memories, options.repeats, options.noise, options.seed, device_of(options)
    )
    make_folder(options.out)
    show(capacity_table(curves, options.memories), options.out, "capacity.txt", of_capacity(curves), "small.tem")


def _bench(options: argparse.Namespace) -> None:
    from ..experiment.bench import benchmark
    from . import bench

    benchmark(lambda: bench.run(options.rounds, device_of(options)), options)


# ---- Options ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "small.tem",
        "Path integration and memory: TEM-t and the Tolman-Eichenbaum Machine (Whittington et al. 2022).",
        (_add_train, _add_tables, _add_figures, _add_capacity, _add_record, _add_bench),
    )


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "train TEM-t and TEM on the same walks: zero-shot accuracy per step and per second (Figure 4)",
        "Trains each model with each seed, one after the other, each in a folder of its own, on walks in fresh "
        "environments of one structure. Tests it in other environments: on visited cells, and on unvisited transitions "
        "to visited cells (zero-shot links). Prints a table; writes tables.txt and learning_curves.png. To resume an "
        "interrupted training, repeat the command.",
        "python -m small.tem train --out runs/tem/small\n"
        "  python -m small.tem train --preset paper --transition relu --out runs/tem/paper\n"
        "  python -m small.tem train --models tem-t --spaces hex:5x5 hex:6x6 --store surprising --out runs/tem/hex\n"
        "  python -m small.tem train --models tem --rule code --modules --backprop 20 --out runs/tem/code\n"
        "  python -m small.tem train --models tem-t --spaces family:4 --separation linear --out runs/tem/linear",
    )
    add_out(command, "output folder, with a folder per run", "runs/tem")
    add_runs(command, PRESETS, "defaults of the options below: small for two CPU cores, or paper for a GPU")
    command.add_argument(
        "--models",
        nargs="+",
        choices=("tem-t", "tem"),
        default=("tem-t", "tem"),
        help="models to train (default: both)",
    )
    for settings in (TransformerSizes, MachineSizes, TemSettings):
        add_options(command, settings, PRESETS)
    rules = "one step with ReLU (paper), the corrected memory of the authors' code (code), or one linear step (linear)"
    command.add_argument(
        "--rule",
        choices=("paper", "code", "linear"),
        help=f"recall by TEM's memory: {rules} {shown('rule', None, PRESETS)}",
    )
    command.add_argument(
        "--matrix",
        action="store_true",
        help="compute TEM's memory as a matrix, as the paper writes it (default: as sums over memories)",
    )
    command.add_argument(
        "--modules",
        action=argparse.BooleanOptionalAction,
        help="split TEM's codes into five modules, as wide as those of the authors' code (default: off; paper: on)",
    )
    accept_old_name(command, "--test-every", "--evaluate-every")
    add_device(command)
    command.set_defaults(command=_train)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "print the table of runs and redraw Figure 4",
        "Prints the table; writes tables.txt and learning_curves.png. Also works during training.",
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
    add_options(command, RecordingSettings)
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
    add_out(command, "output folder", "runs/tem/capacity")
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
    command.set_defaults(command=_bench)


def _add_record(commands: Any) -> None:
    add_record(commands, "small.tem", "runs/tem/small/tem-t,seed=0")
