"""Commands of `python -m small.icl`: amicl, train, tables, sweep, record, bench.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import accept_old_name, add_command
from llm.common.files import write_json

from ..experiment.options import (
    add_auto_dtype,
    add_bench,
    add_device,
    add_options,
    add_out,
    add_record,
    add_runs,
    chosen,
    device_of,
    make_parser,
    run_command,
    seeds_of,
)
from .settings import PRESETS, IclSettings, IclSizes, Task

OLD_NAMES = {
    "--until": "--stop-accuracy", "--snapshot-every": "--evaluate-every", "--products": "--dtype",
    "--together": "--batch-runs", "--no-together": "--no-batch-runs",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.icl", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _amicl(options: argparse.Namespace) -> None:
    from llm.common.processes import progress_bar

    from ..experiment.runs import make_folder
    from ..page import show_pictures
    from . import amicl
    from .gallery import of_amicl

    device = device_of(options)
    make_folder(options.out)
    with progress_bar(amicl.EXPERIMENT_PARTS, 0, "AMICL", " points") as bar:
        found = amicl.experiment(options.trials, options.seed, device, bar.update) | {"command": options.line}
    write_json(options.out / "amicl.json", found)
    print(amicl.format_amicl(found))
    show_pictures(options.out, of_amicl(found, options.seed), "small.icl")


def _train(options: argparse.Namespace) -> None:
    from .train import train

    _show(train(options.out, _asked(options), _machine(options), options.line), options.out, [options.out])


def _tables(options: argparse.Namespace) -> None:
    from ..experiment.runs import make_folder
    from .runs import joined, read_snapshots

    if options.joint is not None:
        snapshots = joined(options.folders)
        make_folder(options.joint)
        _show(snapshots, options.joint, options.folders)
        return
    for folder in options.folders:
        _show(read_snapshots(folder), folder, [folder])


def _show(snapshots: list[Any], folder: Path, runs: Sequence[Path]) -> None:
    """Print the tables; write them, Figure 3 and the page to the folder."""
    from ..page import show
    from .gallery import of_training
    from .tables import format_tables

    show(format_tables(snapshots), folder, "tables.txt", of_training(snapshots), "small.icl", runs)


def _sweep(options: argparse.Namespace) -> None:
    from ..page import show
    from .sweep import Knob, points, sweep

    x, y = Knob.parse(options.x), Knob.parse(options.y)
    made = points(x, y, _asked(options), options.threshold)
    table, picture = sweep(x, y, made, options.out, options.threshold, _machine(options), options.line)
    show(table, options.out, "sweep.txt", [picture], "small.icl", [options.out])


def _bench(options: argparse.Namespace) -> None:
    from ..experiment.bench import benchmark
    from . import bench

    benchmark(lambda: bench.run(options.rounds, device_of(options), options.compile), options)


def _asked(options: argparse.Namespace) -> Any:
    """Return the runs of a command line."""
    from dataclasses import replace

    from ..experiment.products import faster, take_auto
    from .runs import IclSpec
    from .train import one_step

    preset, task, auto = PRESETS[options.preset], chosen(options, Task), take_auto(options)
    sizes = chosen(options, IclSizes, width=task.width, labels=task.labels)
    spec = IclSpec(task, sizes, chosen(options, IclSettings, preset, seeds=tuple(seeds_of(options, preset))))
    if not auto:
        return spec
    machine = _machine(options)

    def step(products: str) -> Any:
        return one_step(replace(spec, settings=replace(spec.settings, products=products)), machine)

    products = faster([options.out, *options.out.glob("*/")], "small.icl", step, machine.device)
    return replace(spec, settings=replace(spec.settings, products=products))


def _machine(options: argparse.Namespace) -> Any:
    """Return where and how a command line trains."""
    from .train import Machine

    return Machine(device_of(options), options.compile, options.together)


# ---- Options ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "small.icl",
        "In-context learning: the associative memory AMICL, and the two-layer transformer with residual attention "
        "streams (Burns et al. 2025, Sections 2 and 3).",
        (_add_amicl, _add_train, _add_tables, _add_sweep, _add_record, _add_bench),
    )


def _add_amicl(commands: Any) -> None:
    command = add_command(
        commands,
        "amicl",
        "measure the associative memory AMICL: Figures 6, 7 and 8",
        "Measures the accuracy of AMICL against a, sequence length and token width, with noise and last key as in the "
        "paper and as in the authors' code, and of all memories (similarity x separation x projection) at a = 2. "
        "Prints tables; writes amicl.json and the figures.",
        "python -m small.icl amicl --out runs/icl/amicl",
    )
    add_out(command, "output folder", "runs/icl/amicl")
    command.add_argument(
        "--trials", type=int, default=1000, metavar="N", help="trials per point of a curve (default: 1000)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of classes and trials (default: 0)")
    add_device(command)
    command.set_defaults(command=_amicl)


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "train two-layer transformers on the pair task: Figure 3, Tables 1, 5 and 6",
        "Trains every variant with every seed and evaluates each run every --evaluate-every steps. Stops when all runs "
        "have exceeded --stop-accuracy on IC and IC2 in five snapshots in a row. Prints Tables 1, 5 and 6 with the "
        "paper's rows and the t-tests; writes tables.txt, learning_curves.png and snapshots.csv. To resume a training, "
        "repeat the command. A variant is classic, or streams joined by + (queries, keys, values), followed by options "
        "joined by colons: previous, accumulated or first (what a stream carries), learned (the stream's weight is "
        "learned), nmdaALPHA (NMDA in the MLP).",
        "python -m small.icl train --preset quick --dtype bfloat16 --out runs/icl/quick\n"
        "  python -m small.icl train --variants classic queries keys values --seeds 4 --out runs/icl/paper\n"
        "  python -m small.icl train --variants classic values:accumulated queries+values:learned classic:nmda10 \\\n"
        "      --layers 4 --out runs/icl/deep",
    )
    add_out(command, "output folder of the training")
    _add_training(command)
    command.set_defaults(command=_train)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "print the tables of trainings and redraw Figure 3 from their snapshots",
        "Prints the tables and the t-tests; writes tables.txt and learning_curves.png. Also works during training. "
        "--joint merges trainings that differ in their seeds alone.",
        "python -m small.icl tables runs/icl/paper\n"
        "  python -m small.icl tables runs/icl/paper runs/icl/paper_from_seed_4 --joint runs/icl/eight_seeds",
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output folder of a training")
    command.add_argument(
        "--joint",
        type=Path,
        metavar="DIR",
        help="folder for the tables of all trainings merged into one (default: tables of each training, in its folder)",
    )
    command.set_defaults(command=_tables)


def _add_sweep(commands: Any) -> None:
    command = add_command(
        commands,
        "sweep",
        "train over the values of two knobs and draw the phase plot",
        "Runs one training for every pair of values, in DIR/X=VALUE,Y=VALUE. Prints the step at which IC exceeds "
        "--threshold; writes it to sweep.csv and to phase.png, with one panel per variant. A knob is a number of the "
        "task, the sizes or the optimizer, or alpha (of NMDA in the MLP). To resume an interrupted sweep, repeat the "
        "command.",
        "python -m small.icl sweep --x noise=0,0.1,0.5 --y bursty=0.25,0.5,1 --variants classic values \\\n"
        "      --seeds 2 --steps 30000 --out runs/icl/noise-bursty",
    )
    command.add_argument(
        "--x", required=True, metavar="NAME=V,V,...", help="knob on the horizontal axis, with its values (required)"
    )
    command.add_argument(
        "--y", required=True, metavar="NAME=V,V,...", help="knob on the vertical axis, with its values (required)"
    )
    command.add_argument(
        "--threshold", type=float, default=0.9, metavar="A", help="accuracy on IC to exceed (default: 0.9)"
    )
    add_out(command, "output folder, with a folder per training")
    _add_training(command)
    command.set_defaults(command=_sweep)


def _add_bench(commands: Any) -> None:
    command = add_bench(commands, "small.icl", "the generator, the AMICL sweep and a training step", rounds=7)
    _add_compile(command)
    command.set_defaults(command=_bench)


def _add_training(command: argparse.ArgumentParser) -> None:
    add_runs(command, PRESETS, "defaults of --variants and --seeds")
    add_options(command, IclSettings, PRESETS)
    add_auto_dtype(command)
    add_options(command, Task)
    add_options(command, IclSizes)
    add_device(command)
    _add_compile(command)
    command.add_argument(
        "--batch-runs",
        dest="together",
        action=argparse.BooleanOptionalAction,
        help="train all runs as one batched model (default: on for a GPU, off for a CPU)",
    )
    for old, new in OLD_NAMES.items():
        accept_old_name(command, old, new)


def _add_compile(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the training step, which takes about 15 s at startup (default: on)",
    )


def _add_record(commands: Any) -> None:
    command = add_record(commands, "small.icl", "runs/icl/quick --variant values --seed 1")
    command.add_argument("--variant", metavar="NAME", help="variant of the run (default: the first)")
    command.add_argument("--seed", type=int, metavar="N", help="seed of the run (default: the first)")
    command.set_defaults(of_load=("variant", "seed"))
