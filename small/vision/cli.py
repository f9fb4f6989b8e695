"""Commands of `python -m small.vision`: train, tables, record.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import accept_old_name, add_command
from llm.common.errors import UserError

from ..experiment.options import (
    add_device,
    add_folders,
    add_options,
    add_record,
    add_runs,
    add_streams,
    chosen,
    device_of,
    make_parser,
    run_command,
    seeds_of,
)
from .settings import PRESETS, VisionSettings, VisionSizes

ALPHAS = (10.0, 0.0)  # of Table S1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.vision", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from ..experiment.runs import make_folder, one_by_one
    from ..variants import Variant
    from .datasets import DATASETS, load
    from .runs import VisionSpec, combinations
    from .train import check, train

    variant = Variant(streams=tuple(options.streams), source=options.source)
    settings = chosen(options, VisionSettings)
    if options.alpha and "nmda" not in options.act:
        print("note: --alpha is of nmda, which is not asked for")
    nmda = [f"nmda:{alpha!r}" for alpha in options.alpha or ALPHAS]
    acts = [each for act in options.act for each in (nmda if act == "nmda" else [act])]
    seeds = seeds_of(options, PRESETS["paper"])
    # What cannot be is said before the images are read.
    sizes = chosen(options, VisionSizes, side=DATASETS[options.dataset].side)
    combinations(VisionSpec({}, sizes, variant, settings), acts, seeds)
    device, out = device_of(options), options.out or Path("runs/vision") / options.dataset
    images = load(options.dataset, options.data)
    print(images.summary(), flush=True)
    sizes = chosen(options, VisionSizes, side=images.side, classes=len(images.classes))
    asked = combinations(VisionSpec(images.record, sizes, variant, settings), acts, seeds)
    for run in asked:  # all before the first, which may take hours
        check(out / run.label, images, run)
    make_folder(out)
    failed = []
    for run in one_by_one(asked):
        try:
            train(out / run.label, images, run, device, options.line)
        except UserError as error:
            failed.append(f"{run.label} ({error})")
    if len(failed) < len(asked):
        _show([out], out)
    if failed:
        raise UserError(f"{len(failed)} of {len(asked)} runs could not be trained: {'; '.join(failed)}")


def _tables(options: argparse.Namespace) -> None:
    _show(options.folders, options.out or options.folders[0])


def _show(folders: Sequence[Path], out: Path) -> None:
    """Print Table S1 of the runs in folders, with its tests; write it and the curves to `out`."""
    from ..experiment.runs import make_folder
    from ..page import show
    from .gallery import of_training
    from .runs import read_runs
    from .tables import table_s1

    runs = read_runs(folders)
    make_folder(out)
    show(table_s1(runs), out, "tables.txt", of_training(runs), "small.vision", folders)


# ---- Options ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "small.vision",
        "The NMDA activation in a Vision Transformer (Kim et al. 2023, Appendix A.9 and Table S1).",
        (_add_train, _add_tables, _add_record),
    )


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "train Vision Transformers on CIFAR-100 or TinyImageNet: Table S1",
        "Trains one transformer for every activation and seed, one after the other, each in a folder of its own, and "
        "measures test accuracy after every epoch. Prints Table S1 with the paper's row and the tests; writes "
        "tables.txt and accuracy.png. The table has the accuracy of the last epoch, not of the best. To resume an "
        "interrupted training, repeat the command. CIFAR-100 is read from its binary or Python archive or from "
        "parquet, TinyImageNet from its folder or zip archive.",
        "python -m small.vision train --dataset cifar100 --data cifar-100-python.tar.gz\n"
        "  python -m small.vision train --dataset tiny-imagenet --data ~/data --act gelu nmda --alpha 10\n"
        "  python -m small.vision train --dataset cifar100 --data ~/data --act gelu --streams values "
        "--out runs/vision/values",
    )
    command.add_argument("--dataset", choices=("cifar100", "tiny-imagenet"), required=True, help="data set (required)")
    command.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="PATH",
        help="folder or archive of the data set, or a folder with it under its published name (default: data)",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder, with a folder per run (default: runs/vision/DATASET)"
    )
    command.add_argument(
        "--act",
        nargs="+",
        default=("gelu", "nmda"),
        metavar="NAME",
        help="activations: gelu, nmda, relu, ... (default: gelu nmda)",
    )
    command.add_argument("--alpha", nargs="+", type=float, metavar="A", help="alphas of --act nmda (default: 10 0)")
    add_runs(command, PRESETS)
    add_streams(command)
    add_options(command, VisionSizes)
    add_options(command, VisionSettings)
    accept_old_name(command, "--products", "--dtype")
    add_device(command)
    command.set_defaults(command=_train)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "print Table S1 and the tests of runs and redraw the curves",
        "Prints the table and the tests; writes tables.txt and accuracy.png. Also works during training.",
        "python -m small.vision tables runs/vision/cifar100 runs/vision/tiny-imagenet --out runs/vision",
    )
    add_folders(command)
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the table and the curves (default: the first DIR)"
    )
    command.set_defaults(command=_tables)


def _add_record(commands: Any) -> None:
    command = add_record(commands, "small.vision", "runs/vision/cifar100/act=gelu,seed=0 --data ~/data")
    command.add_argument("--data", type=Path, required=True, metavar="PATH", help="images of the run (required)")
    command.set_defaults(of_load=("data",))
