"""Commands of `python -m small.grid`: train, sweep, tables, figures, record, bench.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import accept_old_name, add_command
from llm.common.errors import UserError

from ..experiment.options import (
    add_auto_dtype,
    add_bench,
    add_device,
    add_figures_out,
    add_folders,
    add_options,
    add_out,
    add_record,
    add_runs,
    add_streams,
    check_figures_out,
    chosen,
    count,
    device_of,
    make_parser,
    run_command,
    seeds_of,
    shown,
)
from .settings import PRESETS, GridSettings, GridSizes, RecordingSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.grid", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from ..experiment.runs import make_folder, one_by_one
    from .train import train

    asked, device = _asked(options), device_of(options)
    make_folder(options.out)
    for run in one_by_one(asked):
        train(options.out / run.label, run, device, options.line, compiled=options.compile)
    _show(options.out)


def _sweep(options: argparse.Namespace) -> None:
    from ..experiment.runs import make_folder
    from .sweep import places, share, sweep

    asked = _asked(options)
    mine = share(asked, options.task) if options.task else asked
    device = device_of(options)
    devices = places("cuda" if options.device == "cuda" else device, options.workers)
    make_folder(options.out)
    print(f"{len(mine)} of {len(asked)} runs, {len(devices)} at once", flush=True)
    sweep(mine, options.out, devices, options.line, options.compile)
    if options.task:  # tasks that end together would write the tables at once
        print(f"when all tasks are done: python -m small.grid tables {options.out}")
    else:
        _show(options.out)


def _tables(options: argparse.Namespace) -> None:
    for folder in options.folders:
        _show(folder)


def _show(folder: Path) -> None:
    """Print the table of the runs in a folder; write it, the figures of both errors and the page there."""
    from ..page import show
    from .gallery import of_errors
    from .runs import read_runs
    from .tables import error_table

    runs = read_runs(folder)
    show(error_table(runs), folder, "errors.txt", of_errors(runs), "small.grid", [folder])


def _figures(options: argparse.Namespace) -> None:
    from llm.common.processes import progress_bar

    from ..experiment.runs import make_folder
    from ..page import show, show_pictures
    from .gallery import chosen_run, of_errors, of_neurons, without_runs
    from .recording import record_once
    from .runs import read_runs
    from .tables import neuron_table
    from .walk import record_walk

    check_figures_out(options)
    if not options.folders:
        if options.out is None:
            raise UserError("give the folders of trainings, or --out DIR for the figures that need no training")
        make_folder(options.out)
        show_pictures(options.out, without_runs(), "small.grid")
    device, how = device_of(options), chosen(options, RecordingSettings)
    for folder in options.folders:
        runs, neurons = read_runs(folder), {}
        asked = [(run, trained) for run in runs for trained in (True, False)]
        for run, trained in progress_bar(len(asked), 0, "neurons", " recordings", iterable=asked):
            neurons[run.folder, trained] = record_once(run.folder, how, device, trained)
        of = [lambda run, trained=trained: neurons[run.folder, trained] for trained in (True, False)]  # noqa: B023
        out = options.out or folder
        make_folder(out)
        made = [*without_runs(), *of_errors(runs), *of_neurons(runs, of[0])]
        walker = chosen_run(runs)
        record_walk(out, walker, of[0](walker), device)
        show(neuron_table(runs, *of), out, "cells.txt", made, "small.grid", [folder])


def _bench(options: argparse.Namespace) -> None:
    from ..experiment.bench import benchmark
    from . import bench

    benchmark(lambda: bench.run(options.rounds, device_of(options)), options)


def _asked(options: argparse.Namespace) -> list[Any]:
    """Return the runs of a command line."""
    from ..experiment.products import take_auto
    from ..spaces import space
    from .biophysics import Receptor
    from .model import Variant
    from .runs import combinations

    preset, auto = PRESETS[options.preset], take_auto(options)
    alphas = [*(options.alpha or ()), *(Receptor(each).alpha for each in options.magnesium or ())]
    acts = [*(f"nmda:{alpha:g}" for alpha in alphas), *(options.act or ())]
    variant = Variant(
        position=options.position, transition=options.transition, streams=tuple(options.streams), source=options.source
    )
    knobs: dict[str, Sequence[Any]] = {
        "act": acts or [f"nmda:{alpha:g}" for alpha in preset["alpha"]],
        "maps": options.maps or preset["maps"],
        "seed": seeds_of(options, preset),
    }
    if options.vary:
        from .sweep import Knob

        for knob in map(Knob.parse, options.vary):
            if knob.name in knobs:
                own = {"act": "--alpha or --act", "maps": "--maps", "seed": "--seeds"}.get(knob.name, "one --vary")
                raise UserError(f"--vary {knob.name} is asked for twice: give its values by {own}")
            knobs[knob.name] = knob.values
    if auto and ("products" in knobs or getattr(options, "task", None)):
        raise UserError("--dtype auto is one answer for all runs of a command: give --dtype float32 or bfloat16")
    sizes, settings = chosen(options, GridSizes, preset), chosen(options, GridSettings, preset)
    made = combinations(space(options.space or preset["space"]), sizes, variant, settings, knobs)
    return _of_faster_dtype(made, options) if auto else made


def _of_faster_dtype(asked: list[Any], options: argparse.Namespace) -> list[Any]:
    """The runs in the dtype that is faster here, or that those in the folder have."""
    from dataclasses import replace

    from ..experiment.products import faster
    from .train import one_step

    def settings_of(run: Any, products: str) -> Any:
        return replace(run, settings=replace(run.settings, products=products))

    device = device_of(options)
    chosen_dtype = faster(
        (options.out / run.label for run in asked),
        "small.grid",
        lambda products: one_step(settings_of(asked[0], products), device, options.compile),
        device,
    )
    return [settings_of(run, chosen_dtype) for run in asked]


# ---- Options ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "small.grid",
        "Grid navigation with the NMDA activation: two kinds of memory, place cells (Kim et al. 2023).",
        (_add_train, _add_sweep, _add_tables, _add_figures, _add_record, _add_bench),
    )


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "train navigators one after the other and measure their memory errors",
        "Trains one navigator for every activation, number of maps and seed, each in a folder of its own. Every "
        "--evaluate-every trials, measures working-memory and reference-memory errors on the training maps and on as "
        "many novel maps. Prints the final errors; writes errors.txt and the error figures. To resume an interrupted "
        "training, repeat the command.",
        "python -m small.grid train --preset small --out runs/grid/small\n"
        "  python -m small.grid train --alpha 0 1 10 --act gelu_sigmoid relu --maps 32 48 --out runs/grid/paper\n"
        "  python -m small.grid train --preset small --space maze.txt --alpha 10 --out runs/grid/maze",
    )
    _add_training(command)
    command.set_defaults(command=_train)


def _add_sweep(commands: Any) -> None:
    command = add_command(
        commands,
        "sweep",
        "train many runs in parallel, or the share of one Slurm array task",
        "Trains like `train`, with one run per GPU (or per CPU core) at a time. With --task, trains only that share of "
        "the runs; otherwise ends with a table of all runs in the folder. To resume an interrupted sweep, repeat the "
        "command.",
        "python -m small.grid sweep --alpha 0 0.01 0.05 0.1 0.5 1 5 10 --maps 32 48 64 --out runs/grid/sweep\n"
        "  python -m small.grid sweep --alpha 0.1 1 10 --maps 64 --vary lr=1e-3,3e-4,1e-4 --out runs/grid/lr\n"
        "  python -m small.grid sweep --preset small --vary position=paper,actions --out runs/grid/positions\n"
        "  sbatch slurm/grid_sweep.sh",
    )
    command.add_argument("--task", metavar="I/N", help="share of the runs to train: task I of N (default: all runs)")
    command.add_argument(
        "--workers", type=count, metavar="N", help="runs in parallel (default: one per GPU, or one per CPU core)"
    )
    _add_training(command)
    command.set_defaults(command=_sweep)


def _add_training(command: argparse.ArgumentParser) -> None:
    def several(name: str, kind: Any, metavar: str, text: str) -> None:
        command.add_argument(f"--{name}", nargs="+", type=kind, metavar=metavar, help=text)

    add_out(command, "output folder, with a folder per run", "runs/grid")
    add_runs(command, PRESETS, "defaults of the options below: paper, or small for two CPU cores")
    spaces = "space to walk in: 11x11, line:20, hex:9x9, 4x4x4, family:4, or a file"
    command.add_argument("--space", metavar="S", help=f"{spaces} {shown('space', None, PRESETS)}")
    alphas = shown("alpha", None, PRESETS).replace("default", "default without --magnesium and --act")
    several("alpha", float, "A", f"alphas of the NMDA activation {alphas}")
    several("magnesium", float, "MM", "[Mg2+] in mM, each an NMDA activation of alpha [Mg2+] / 3.57 mM (default: none)")
    several("act", str, "NAME", "further activations: gelu_sigmoid, leaky_relu:0.1, ... (default: none)")
    maps = "numbers of training maps; each run is also tested on as many novel maps"
    several("maps", int, "N", f"{maps} {shown('maps', None, PRESETS)}")
    command.add_argument(
        "--position",
        choices=("paper", "residual", "actions"),
        default="paper",
        help="position code: recurrent in one of two equivalent forms, or the last action alone (default: paper)",
    )
    command.add_argument(
        "--transition",
        choices=("tanh", "relu", "identity"),
        default="tanh",
        help="activation of the recurrent position code (default: tanh)",
    )
    add_streams(command)
    add_options(command, GridSizes, PRESETS)
    add_options(command, GridSettings, PRESETS)
    add_auto_dtype(command)
    accept_old_name(command, "--products", "--dtype")
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the transformer, which takes about a minute at startup (default: on for a GPU, off for a CPU)",
    )
    command.add_argument(
        "--vary",
        action="append",
        metavar="NAME=V,V",
        help="further field of sizes, variant or settings, with the values to compare, e.g. lr=1e-3,1e-4; may be "
        "repeated (default: none)",
    )
    add_device(command)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "print the latest errors of runs and redraw the error figures",
        "Prints the latest errors; writes errors.txt and the error figures. Also works during training.",
        "python -m small.grid tables runs/grid/small",
    )
    add_folders(command)
    command.set_defaults(command=_tables)


def _add_figures(commands: Any) -> None:
    command = add_command(
        commands,
        "figures",
        "draw errors, rate maps, place-cell scores and sparsity of runs",
        "Records the neurons of every run while it walks one map, with trained and with initial weights, and keeps the "
        "recordings in the run's folder. Prints scores next to their controls; writes cells.txt. Draws every figure of "
        "Kim et al. 2023 that the runs allow (1, 3, 4, S2, S4 to S10, S13) and Figure 5 of Kim et al. 2022. Without "
        "folders, draws Figures 1 and S2, which need no training.",
        "python -m small.grid figures runs/grid/small\n  python -m small.grid figures --out runs/grid/receptor",
    )
    add_folders(command, least=0)
    add_figures_out(command)
    add_options(command, RecordingSettings)
    add_device(command)
    command.set_defaults(command=_figures)


def _add_bench(commands: Any) -> None:
    command = add_bench(commands, "small.grid", "walkers, place-cell scores and gradient steps", rounds=3)
    command.set_defaults(command=_bench)


def _add_record(commands: Any) -> None:
    add_record(commands, "small.grid", "runs/grid/small/act=nmda:10,maps=16,seed=0")
