"""Commands of `python -m small.icl`: amicl, train, tables, sweep, bench.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import accept_old_name, add_command
from llm.common.files import write_json

from ..arguments import add_bench, add_device, device_of, run_command

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"variants": ("classic", "queries", "keys", "values"), "seeds": 4},
    "quick": {"variants": ("classic", "values"), "seeds": 2},
}
TASK = {
    "pairs": "object-label pairs in the context",
    "copies": "copies of each class in a bursty sequence",
    "classes": "number of known classes",
}
RATES = {
    "bursty": "fraction of the known-class sequences that are bursty",
    "novel": "fraction of sequences with novel classes",
    "noise": "noise of the objects, epsilon",
}
SIZES = {
    "layers": "number of attention layers",
    "key-width": "width of queries and keys",
    "neurons": "neurons per layer of the MLP",
}
DEFAULTS = {
    "pairs": 8, "copies": 2, "classes": 512, "bursty": 0.5, "novel": 0.5, "noise": 0.1, "layers": 2, "key-width": 128,
    "neurons": 128,
}  # fmt: skip


OLD_NAMES = {
    "--until": "--stop-accuracy", "--snapshot-every": "--evaluate-every", "--products": "--dtype",
    "--together": "--batch-runs",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.icl", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _amicl(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..folder import made_folder
    from ..plots import write
    from . import amicl, figures

    device = device_of(options)
    made_folder(options.out)
    with tqdm(total=amicl.EXPERIMENT_PARTS, desc="AMICL", unit=" points", dynamic_ncols=True) as bar:
        found = amicl.experiment(options.trials, options.seed, device, bar.update) | {"command": options.line}
    write_json(options.out / "amicl.json", found)
    print(amicl.report(found))
    for name, figure in (
        ("figure6", figures.matrices(seed=options.seed)),
        ("figure7", figures.weight_curves(found)),
        ("figure8", figures.size_curves(found)),
    ):
        print(write(figure, options.out / f"{name}.png"))


def _train(options: argparse.Namespace) -> None:
    from .train import train

    task, sizes, settings, machine = _asked(options)
    _show(train(options.out, task, sizes, settings, machine, options.line), options.out)


def _tables(options: argparse.Namespace) -> None:
    from ..folder import made_folder, read_record
    from .folder import PARTS, PROGRAM, joined, read_snapshots

    if options.joint is not None:
        snapshots = joined(options.folders)
        made_folder(options.joint)
        _show(snapshots, options.joint)
        return
    for folder in options.folders:
        read_record(folder, PROGRAM, PARTS)
        _show(read_snapshots(folder), folder)


def _show(snapshots: list[Any], folder: Path) -> None:
    """Print the tables, and keep them and Figure 3 in the folder."""
    from ..plots import show
    from . import figures, tables

    show(tables.report(snapshots), folder, "tables.txt", [("figure3", figures.training(snapshots))])


def _sweep(options: argparse.Namespace) -> None:
    from .sweep import Knob, points, sweep

    task, sizes, settings, machine = _asked(options)
    x, y = Knob.parse(options.x), Knob.parse(options.y)
    made = points(x, y, task, sizes, settings, options.threshold)
    print(sweep(x, y, made, options.out, options.threshold, machine, options.line))
    print(options.out / "phase.png")


def _bench(options: argparse.Namespace) -> None:
    from ..timing import benchmark
    from . import bench

    benchmark(lambda: bench.run(options.rounds, device_of(options), options.compile), options)


def _asked(options: argparse.Namespace) -> tuple[Any, ...]:
    """The task, sizes, settings and machine of a command line."""
    from .model import Sizes
    from .settings import Settings
    from .task import Task
    from .train import Machine

    preset = PRESETS[options.preset]
    task = Task(**{name: getattr(options, name) for name in (*TASK, *RATES)})
    sizes = Sizes(task.width, task.labels, options.key_width, options.neurons, options.layers)
    first, number = options.first_seed, preset["seeds"] if options.seeds is None else options.seeds
    settings = Settings(
        tuple(options.variants or preset["variants"]),
        tuple(range(first, first + number)),
        options.steps,
        options.batch,
        options.lr,
        snapshot_every=options.snapshot_every,
        evaluation=options.evaluation,
        until=options.until or None,
        products=options.products,
    )
    return task, sizes, settings, Machine(device_of(options), options.compile, options.together)


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m small.icl",
        description="In-context learning: the associative memory AMICL, and the two-layer transformer with residual "
        "attention streams (Burns et al. 2025, Sections 2 and 3).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_amicl, _add_train, _add_tables, _add_sweep, _add_bench):
        add(commands)
    return parser


def _add_amicl(commands: Any) -> None:
    command = add_command(
        commands,
        "amicl",
        "measure the associative memory AMICL: Figures 6, 7 and 8",
        "Measures the accuracy of AMICL against a, sequence length and token width, with noise and last key as in the "
        "paper and as in the authors' code, and of all memories (similarity x separation x projection) at a = 2. "
        "Prints tables; writes amicl.json, figure6.png, figure7.png and figure8.png.",
        "python -m small.icl amicl --out runs/icl/amicl",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs/icl/amicl"),
        metavar="DIR",
        help="output folder (default: runs/icl/amicl)",
    )
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
        "paper's rows and the t-tests; writes tables.txt, figure3.png and snapshots.csv. To resume a training, "
        "repeat the command. A variant is classic, or streams joined by + (queries, keys, values), followed by options "
        "joined by colons: previous, accumulated or first (what a stream carries), learned (the stream's weight is "
        "learned), nmdaALPHA (NMDA in the MLP).",
        "python -m small.icl train --preset quick --dtype bfloat16 --out runs/icl/quick\n"
        "  python -m small.icl train --variants classic queries keys values --seeds 4 --out runs/icl/paper\n"
        "  python -m small.icl train --variants classic values:accumulated queries+values:learned classic:nmda10 \\\n"
        "      --layers 4 --out runs/icl/deep",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="output folder of the training (required)"
    )
    _add_training(command)
    command.set_defaults(command=_train)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "print the tables of trainings and redraw Figure 3 from their snapshots",
        "Prints the tables and the t-tests; writes tables.txt and figure3.png. Also works during training. --joint "
        "merges trainings that differ in their seeds alone.",
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
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="output folder, with a folder per training (required)"
    )
    _add_training(command)
    command.set_defaults(command=_sweep)


def _add_bench(commands: Any) -> None:
    command = add_bench(commands, "small.icl", "the generator, the AMICL sweep and a training step", rounds=7)
    _add_machine(command)
    command.set_defaults(command=_bench)


def _add_training(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="defaults of --variants and --seeds (default: paper)",
    )
    command.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="variants to train (default: classic queries keys values; quick: classic values)",
    )
    command.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: 4; quick: 2)")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="first seed (default: 0)")
    command.add_argument(
        "--steps", type=int, default=75_000, metavar="N", help="maximum number of training steps (default: 75000)"
    )
    command.add_argument(
        "--stop-accuracy",
        dest="until",
        type=float,
        default=0.95,
        metavar="A",
        help="accuracy on IC and IC2 that ends the training; 0 trains all --steps (default: 0.95)",
    )
    command.add_argument("--batch", type=int, default=128, metavar="N", help="sequences per step (default: 128)")
    command.add_argument(
        "--lr", type=float, default=0.01, metavar="X", help="learning rate of plain SGD (default: 0.01)"
    )
    command.add_argument(
        "--evaluate-every",
        dest="snapshot_every",
        type=int,
        default=500,
        metavar="N",
        help="steps between snapshots (default: 500)",
    )
    command.add_argument(
        "--evaluation",
        type=int,
        default=10_000,
        metavar="N",
        help="sequences in each of the evaluation sets Test, IC, IC2 and IW (default: 10000)",
    )
    for name, text in (TASK | RATES | SIZES).items():
        default: Any = DEFAULTS[name]
        command.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            metavar="N" if isinstance(default, int) else "X",
            help=f"{text} (default: {default})",
        )
    command.add_argument(
        "--dtype",
        dest="products",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of activations and matrix products; weights, softmax and loss stay float32 (default: float32)",
    )
    _add_machine(command)
    command.add_argument(
        "--batch-runs",
        dest="together",
        action=argparse.BooleanOptionalAction,
        help="train all runs as one batched model (default: on for a GPU, off for a CPU)",
    )
    for old, new in OLD_NAMES.items():
        accept_old_name(command, old, new)
    accept_old_name(command, "--no-together", "--no-batch-runs")


def _add_machine(command: argparse.ArgumentParser) -> None:
    add_device(command)
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the training step, which takes about 15 s at startup (default: on)",
    )
