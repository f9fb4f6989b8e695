"""Commands of `python -m small.grid`: train, sweep, tables, figures, bench.

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

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"space": "11x11", "maps": (32,), "alpha": (10.0,), "seeds": 3},
    "small": {
        "space": "5x5", "maps": (16,), "alpha": (0.0, 1.0, 10.0), "seeds": 2, "segment": 8, "memory": 8, "width": 64,
        "heads": 4, "head_dim": 16, "neurons": 256, "code": 32, "dropout": 0.0, "trials": 150, "steps": 256,
        "batch": 128, "lr": 2e-3, "clip": 1.0, "walkers": 256, "evaluate_every": 5, "objective": "parallel",
    },
}  # fmt: skip
SIZES = {
    "width": "token width (default: 512; small: 64)",
    "heads": "number of attention heads (default: 8; small: 4)",
    "head_dim": "width of an attention head (default: 64; small: 16)",
    "neurons": "feed-forward neurons per layer (default: 2048; small: 256)",
    "layers": "number of transformer layers (default: 2)",
    "code": "width of the recurrent position code (default: 128; small: 32)",
    "segment": "steps per segment (default: 32; small: 8)",
    "memory": "steps of memory before the segment (default: 32; small: 8)",
    "dropout": "dropout probability (default: 0.1; small: 0)",
}
SETTINGS = {
    "letters": "number of different letters (default: 10)",
    "trials": "number of training trials (default: 200; small: 150)",
    "steps": "walking steps per trial (default: 2048; small: 256)",
    "batch": "walkers per training trial (default: 512; small: 128)",
    "lr": "initial learning rate of Adam (default: 1e-4; small: 2e-3)",
    "clip": "maximum gradient norm (default: 0.25; small: 1)",
    "walkers": "walkers per evaluation and kind of maps (default: 512; small: 256)",
    "evaluate_every": "trials between evaluations (default: 1; small: 5)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.grid", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from ..folder import made_folder
    from .runs import read_runs
    from .train import train

    asked, device = _asked(options), device_of(options)
    made_folder(options.out)
    for number, run in enumerate(asked, start=1):
        print(f"{number} of {len(asked)}: {run.label}", flush=True)
        folder = options.out / run.label
        train(folder, run.graph, run.sizes, run.variant, run.settings, device, options.line, compiled=options.compile)
    _show(read_runs(options.out), options.out)


def _sweep(options: argparse.Namespace) -> None:
    from ..folder import made_folder
    from .runs import read_runs
    from .sweep import places, share, sweep

    asked = _asked(options)
    mine = share(asked, options.task) if options.task else asked
    device = device_of(options)
    devices = places("cuda" if options.device == "cuda" else device, options.workers)
    made_folder(options.out)
    print(f"{len(mine)} of {len(asked)} runs, {len(devices)} at once", flush=True)
    sweep(mine, options.out, devices, options.line, options.compile)
    if options.task:  # tasks that end together would write the tables at once
        print(f"when all tasks are done: python -m small.grid tables {options.out}")
    else:
        _show(read_runs(options.out), options.out)


def _tables(options: argparse.Namespace) -> None:
    from .runs import read_runs

    for folder in options.folders:
        _show(read_runs(folder), folder)


def _show(runs: Sequence[Any], folder: Path) -> None:
    """Print the table, and keep it and the figures of both errors in the folder."""
    from ..plots import show
    from .gallery import of_errors
    from .runs import table

    show(table(runs), folder, "errors.txt", ((name, draw()) for name, draw in of_errors(runs)))


def _figures(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..folder import made_folder
    from ..plots import write
    from .gallery import of_errors, of_neurons, without_runs
    from .recording import How, measured
    from .runs import read_runs

    check_figures_out(options)
    device, how = device_of(options), How(options.record_steps, options.map, options.normalisation)
    for folder in options.folders:
        runs, neurons = read_runs(folder), {}
        for run in tqdm(runs, desc="neurons", unit=" runs", dynamic_ncols=True):
            neurons[run.folder] = measured(run.folder, how, device)
        out = options.out or folder
        made_folder(out)
        made = [*of_errors(runs), *of_neurons(runs, lambda run: neurons[run.folder])]  # noqa: B023  # used here
        for name, draw in [*without_runs(), *made]:
            print(write(draw(), out / f"{name}.png"))


def _bench(options: argparse.Namespace) -> None:
    from ..timing import benchmark
    from . import bench

    benchmark(lambda: bench.run(options.rounds, device_of(options)), options)


def _asked(options: argparse.Namespace) -> list[Any]:
    """The runs of a command line."""
    from ..spaces import space
    from .biophysics import Receptor
    from .model import Sizes, Variant
    from .runs import combinations
    from .train import Settings

    preset = PRESETS[options.preset]

    def of(names: Sequence[str]) -> dict[str, Any]:
        """What the line says, or else the preset; what neither says is the paper's."""
        asked = {name: preset.get(name) if getattr(options, name) is None else getattr(options, name) for name in names}
        return {name: value for name, value in asked.items() if value is not None}

    alphas = [*(options.alpha or ()), *(Receptor(each).alpha for each in options.magnesium or ())]
    acts = [*(f"nmda:{alpha:g}" for alpha in alphas), *(options.act or ())]
    seeds = of(["seeds"])["seeds"]
    variant = Variant(
        position=options.position, transition=options.transition, streams=tuple(options.streams), source=options.source
    )
    knobs: dict[str, Sequence[Any]] = {
        "act": acts or [f"nmda:{alpha:g}" for alpha in preset["alpha"]],
        "maps": of(["maps"])["maps"],
        "seed": range(options.first_seed, options.first_seed + seeds),
    }
    if options.vary:
        from .sweep import Knob

        for knob in map(Knob.parse, options.vary):
            if knob.name in knobs:
                own = {"act": "--alpha or --act", "maps": "--maps", "seed": "--seeds"}.get(knob.name, "one --vary")
                raise UserError(f"--vary {knob.name} is asked for twice: give its values by {own}")
            knobs[knob.name] = knob.values
    settings = Settings(**of([*SETTINGS, "objective"]), products=options.products)
    return combinations(space(of(["space"])["space"]), Sizes(**of(list(SIZES))), variant, settings, knobs)


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m small.grid",
        description="Grid navigation with the NMDA activation: two kinds of memory, place cells (Kim et al. 2023).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_sweep, _add_tables, _add_figures, _add_bench):
        add(commands)
    return parser


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
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs/grid"),
        metavar="DIR",
        help="output folder, with a folder per run (default: runs/grid)",
    )
    command.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="defaults of the options below: paper, or small for two CPU cores (default: paper)",
    )
    command.add_argument(
        "--space",
        metavar="S",
        help="space to walk in: 11x11, line:20, hex:9x9, 4x4x4, family:4, or a file (default: 11x11; small: 5x5)",
    )
    command.add_argument(
        "--alpha",
        nargs="+",
        type=float,
        metavar="A",
        help="alphas of the NMDA activation (default without --magnesium and --act: 10; small: 0 1 10)",
    )
    command.add_argument(
        "--magnesium",
        nargs="+",
        type=float,
        metavar="MM",
        help="[Mg2+] in mM, each an NMDA activation with alpha = [Mg2+] / 3.57 mM (default: none)",
    )
    command.add_argument(
        "--act",
        nargs="+",
        metavar="NAME",
        help="further activations: gelu_sigmoid, leaky_relu:0.1, ... (default: none)",
    )
    command.add_argument(
        "--maps",
        nargs="+",
        type=int,
        metavar="N",
        help="numbers of training maps; each run is also tested on as many novel maps (default: 32; small: 16)",
    )
    command.add_argument("--seeds", type=count, metavar="N", help="number of seeds (default: 3; small: 2)")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="first seed (default: 0)")
    command.add_argument(
        "--objective",
        choices=("steps", "parallel"),
        help="gradient steps: one per walking step, or one per segment (default: steps; small: parallel)",
    )
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
    command.add_argument(
        "--streams",
        nargs="+",
        default=(),
        metavar="S",
        help="residual attention streams: any of queries, keys, values (default: none)",
    )
    command.add_argument(
        "--source",
        choices=("previous", "accumulated", "first"),
        default="previous",
        help="layers whose projection a stream carries: the previous one, the sum of all earlier ones, or the first "
        "(default: previous)",
    )
    command.add_argument(
        "--dtype",
        dest="products",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of matrix products; bfloat16 uses autocast (default: float32)",
    )
    accept_old_name(command, "--products", "--dtype")
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the transformer, which takes about a minute at startup (default: on for a GPU, off for a CPU)",
    )
    fractional = {"dropout": float, "lr": float, "clip": float}
    for name, text in (SIZES | SETTINGS).items():
        kind = fractional.get(name, int)
        metavar = "N" if kind is int else "X"
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
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
        "Records the neurons of every run while it walks one map, keeps the recording in the run's folder, and draws "
        "every figure of Kim et al. 2023 that the runs allow: 1, 3, 4, S2, S4 to S10, S13.",
        "python -m small.grid figures runs/grid/small",
    )
    add_folders(command)
    add_figures_out(command)
    command.add_argument(
        "--record-steps",
        type=count,
        default=100_000,
        metavar="N",
        help="walking steps to record, over all walkers (default: 100000)",
    )
    command.add_argument(
        "--map", type=int, default=0, metavar="M", help="map to walk: 0 to N-1 familiar, N to 2N-1 novel (default: 0)"
    )
    command.add_argument(
        "--normalisation", choices=("walk", "occupancy"), default="walk",
        help="divisor of a rate map: all recorded moments (walk, as in the paper) or the visits to the cell "
        "(occupancy, as in the authors' code) (default: walk)",
    )  # fmt: skip
    add_device(command)
    command.set_defaults(command=_figures)


def _add_bench(commands: Any) -> None:
    command = add_bench(commands, "small.grid", "walkers, place-cell scores and gradient steps", rounds=3)
    add_device(command)
    command.set_defaults(command=_bench)
