"""Commands of `python -m small.grid`: train, sweep, tables, figures, bench.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import add_command
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
    "width": "D, of a token", "heads": "of attention", "head_dim": "width of a head",
    "neurons": "of the feed-forward network", "layers": "of the transformer", "code": "width of the recurrent code",
    "segment": "steps", "memory": "steps before it", "dropout": "share",
}  # fmt: skip
SETTINGS = {
    "letters": "different ones", "trials": "of training", "steps": "of a trial", "batch": "walkers", "lr": "of Adam",
    "clip": "greatest norm of a gradient", "walkers": "of an evaluation", "evaluate_every": "trials",
}  # fmt: skip


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
        description="Grid navigation with the NMDA activation: working and reference memory (Kim et al. 2023).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_sweep, _add_tables, _add_figures, _add_bench):
        add(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "navigators: both errors on familiar and novel maps",
        "Trains a navigator for every activation, number of maps and seed, one after the other, each in a folder of "
        "its own; after every trial both errors are measured on the maps of training and on as many others. Prints the "
        "last errors, and writes them to errors.txt and the figures of both errors. A killed training "
        "goes on from its last trial when the same command is given again.",
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
        "many runs at once, on the devices there are or in a Slurm array",
        "Trains like `train`, as many runs at once as there are GPUs, or cores of a CPU; of an array's task only its "
        "share. Killed, it goes on with the same command. At the end, one table of all runs that are there.",
        "python -m small.grid sweep --alpha 0 0.01 0.05 0.1 0.5 1 5 10 --maps 32 48 64 --out runs/grid/sweep\n"
        "  python -m small.grid sweep --alpha 0.1 1 10 --maps 64 --vary lr=1e-3,3e-4,1e-4 --out runs/grid/lr\n"
        "  python -m small.grid sweep --preset small --vary position=paper,actions --out runs/grid/positions\n"
        "  sbatch slurm/grid_sweep.sh",
    )
    command.add_argument("--task", metavar="I/N", help="only the share of task I of N")
    command.add_argument("--workers", type=count, metavar="N", help="runs at once (one a GPU, or one a core)")
    _add_training(command)
    command.set_defaults(command=_sweep)


def _add_training(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, default=Path("runs/grid"), metavar="DIR", help="folder of all runs (runs/grid)"
    )
    command.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="paper (11x11, 32 maps, alpha 10, 3 seeds; default) or small (for two CPU cores: 5x5, 16 maps, alpha 0, 1 "
        "and 10, 2 seeds, all targets of a segment at once)",
    )
    command.add_argument("--space", metavar="S", help="11x11, line:20, hex:9x9, 4x4x4, family:4, or a file")
    command.add_argument("--alpha", nargs="+", type=float, metavar="A", help="NMDA with these alphas")
    command.add_argument(
        "--magnesium", nargs="+", type=float, metavar="MM", help="NMDA with the alphas of these [Mg2+], in mM"
    )
    command.add_argument(
        "--act", nargs="+", metavar="NAME", help="other activations: gelu_sigmoid, leaky_relu:0.1, ..."
    )
    command.add_argument("--maps", nargs="+", type=int, metavar="N", help="maps of training, and as many others")
    command.add_argument("--seeds", type=count, metavar="N", help="how many")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="(0)")
    command.add_argument(
        "--objective",
        choices=("steps", "parallel"),
        help="a gradient step for every walking step, or for every segment",
    )
    command.add_argument(
        "--position", choices=("paper", "residual", "actions"), default="paper", help="of the recurrent code (paper)"
    )
    command.add_argument(
        "--transition", choices=("tanh", "relu", "identity"), default="tanh", help="of the code (tanh)"
    )
    command.add_argument("--streams", nargs="+", default=(), metavar="S", help="queries, keys, values (none)")
    command.add_argument(
        "--source", choices=("previous", "accumulated", "first"), default="previous", help="(previous)"
    )
    command.add_argument(
        "--products", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast to it (float32)"
    )
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="the transformer through torch.compile, which takes about a minute at the start (on a GPU yes, else no)",
    )
    fractional = {"dropout": float, "lr": float, "clip": float}
    for name, text in (SIZES | SETTINGS).items():
        command.add_argument(f"--{name.replace('_', '-')}", type=fractional.get(name, int), metavar="X", help=text)
    command.add_argument(
        "--vary", action="append", metavar="NAME=V,V", help="any field of sizes, variant or settings, as lr=1e-3,1e-4"
    )
    add_device(command)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "the last errors and the figures of trainings, anew",
        "Prints the errors and writes errors.txt and the figures; also while runs go on.",
        "python -m small.grid tables runs/grid/small",
    )
    add_folders(command)
    command.set_defaults(command=_tables)


def _add_figures(commands: Any) -> None:
    command = add_command(
        commands,
        "figures",
        "all figures that runs allow: errors, rate maps, place-cell scores, sparsity",
        "Records the neurons of every run along a walk over one map (kept in the run's folder) and draws every figure "
        "of the paper that the runs allow: 1, 3, 4, S2, S4 to S10, S13.",
        "python -m small.grid figures runs/grid/small",
    )
    add_folders(command)
    add_figures_out(command)
    command.add_argument(
        "--record-steps", type=count, default=100_000, metavar="N", help="of the walk that is recorded (100000)"
    )
    command.add_argument("--map", type=int, default=0, metavar="M", help="that is walked; from N on novel ones (0)")
    command.add_argument(
        "--normalisation", choices=("walk", "occupancy"), default="walk",
        help="of rate maps: by the moments of the walk (the paper; default) or by visits (its code)",
    )  # fmt: skip
    add_device(command)
    command.set_defaults(command=_figures)


def _add_bench(commands: Any) -> None:
    command = add_bench(commands, "small.grid", "walkers, scores and gradient steps", rounds=3)
    add_device(command)
    command.set_defaults(command=_bench)
