"""Commands of `python -m small.vision`: train, tables.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import add_command
from llm.common.errors import UserError

from ..arguments import add_device, add_folders, count, device_of, run_command

SIZES = {
    "patch": "side of a patch, in pixels (an eighth of the image)", "width": "D, of a token (192)",
    "heads": "of attention (12)", "neurons": "of the feed-forward network (384)", "layers": "of the transformer (9)",
    "dropout": "share (0)",
}  # fmt: skip
SETTINGS = {
    "epochs": "over the training images (100)", "batch": "images of a step (128)", "lr": "of AdamW at its peak (1e-3)",
    "weight_decay": "of matrices (0.05)", "warmup": "epochs (10)", "smoothing": "of the labels (0.1)",
}  # fmt: skip
ALPHAS = (10.0, 0.0)  # of Table S1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 or 2."""
    return run_command("small.vision", _parser(), arguments)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from ..folder import made_folder
    from ..variants import Variant
    from .datasets import DATASETS, load
    from .model import Sizes
    from .runs import combinations, read_runs
    from .train import Settings, check, train

    def given(names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(options, name)) is not None}

    variant = Variant(streams=tuple(options.streams), source=options.source)
    settings = Settings(**given([*SETTINGS]), augmentation=options.augmentation, products=options.products)
    if options.alpha and "nmda" not in options.act:
        print("note: --alpha is of nmda, which is not asked for")
    nmda = [f"nmda:{alpha!r}" for alpha in options.alpha or ALPHAS]
    acts = [each for act in options.act for each in (nmda if act == "nmda" else [act])]
    asked = combinations(variant, settings, acts, range(options.first_seed, options.first_seed + options.seeds))
    Sizes(DATASETS[options.dataset].side, **given([*SIZES]))  # says what cannot be before the images are read
    device, out = device_of(options), options.out or Path("runs/vision") / options.dataset
    images = load(options.dataset, options.data)
    print(images.summary(), flush=True)
    sizes = Sizes(images.side, len(images.classes), **given([*SIZES]))
    for run in asked:  # all before the first, which may take hours
        check(out / run.label, images, sizes, run.variant, run.settings)
    made_folder(out)
    failed = []
    for number, run in enumerate(asked, start=1):
        print(f"{number} of {len(asked)}: {run.label}", flush=True)
        try:
            train(out / run.label, images, sizes, run.variant, run.settings, device, options.line)
        except UserError as error:
            failed.append(f"{run.label} ({error})")
    if len(failed) < len(asked):
        _show(read_runs([out]), out)
    if failed:
        raise UserError(f"{len(failed)} of {len(asked)} runs could not be trained: {'; '.join(failed)}")


def _tables(options: argparse.Namespace) -> None:
    from ..folder import made_folder
    from .runs import read_runs

    runs, out = read_runs(options.folders), options.out or options.folders[0]
    made_folder(out)
    _show(runs, out)


def _show(runs: Sequence[Any], folder: Path) -> None:
    """Print Table S1 with its tests, and keep it and the curves in the folder."""
    from ..plots import show
    from .figures import over_epochs
    from .runs import report

    show(report(runs), folder, "tables.txt", [("accuracy", over_epochs(runs))])


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m small.vision",
        description="The NMDA activation in a Vision Transformer (Kim et al. 2023, Appendix A.9 and Table S1).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_tables):
        add(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "Vision Transformers on CIFAR-100 or TinyImageNet: Table S1",
        "Trains a transformer for every activation and seed, one after the other, each in a folder of its own, and "
        "measures the test accuracy after every epoch. Prints Table S1 with the paper's row and the tests, and writes "
        "them to tables.txt and the curves to accuracy.png. The accuracy is that of the last epoch, not of the best. A "
        "killed training goes on from its last epoch when the same command is given again. CIFAR-100 may be its binary "
        "archive, its Python archive or parquet, TinyImageNet its folder or its zip archive.",
        "python -m small.vision train --dataset cifar100 --data cifar-100-python.tar.gz\n"
        "  python -m small.vision train --dataset tiny-imagenet --data ~/data --act gelu nmda --alpha 10\n"
        "  python -m small.vision train --dataset cifar100 --data ~/data --act gelu --streams values "
        "--out runs/vision/values",
    )
    command.add_argument("--dataset", choices=("cifar100", "tiny-imagenet"), required=True)
    command.add_argument(
        "--data", type=Path, default=Path("data"), metavar="PATH",
        help="the data set's folder or archive, or a folder that holds it under its published name (data)",
    )  # fmt: skip
    command.add_argument("--out", type=Path, metavar="DIR", help="folder of all runs (runs/vision/DATASET)")
    command.add_argument(
        "--act", nargs="+", default=("gelu", "nmda"), metavar="NAME", help="activations: gelu, nmda, relu, ... (both)"
    )
    command.add_argument("--alpha", nargs="+", type=float, metavar="A", help="of --act nmda (10 and 0)")
    command.add_argument("--seeds", type=count, default=3, metavar="N", help="how many (3)")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="(0)")
    command.add_argument("--streams", nargs="+", default=(), metavar="S", help="queries, keys, values (none)")
    command.add_argument(
        "--source", choices=("previous", "accumulated", "first"), default="previous", help="(previous)"
    )
    command.add_argument(
        "--augmentation", choices=("none", "basic", "strong"), default="strong",
        help="basic: crops and mirror images; strong: also colours, rotation, shear, erasing (strong)",
    )  # fmt: skip
    command.add_argument(
        "--products", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast to it (float32)"
    )
    fractional = ("dropout", "lr", "weight_decay", "smoothing")
    for name, text in (SIZES | SETTINGS).items():
        kind = float if name in fractional else int
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    add_device(command)
    command.set_defaults(command=_train)


def _add_tables(commands: Any) -> None:
    command = add_command(
        commands,
        "tables",
        "Table S1, tests and curves of trainings, anew",
        "Prints the table and the tests, and writes tables.txt and accuracy.png; also while runs go on.",
        "python -m small.vision tables runs/vision/cifar100 runs/vision/tiny-imagenet --out runs/vision",
    )
    add_folders(command)
    command.add_argument("--out", type=Path, metavar="DIR", help="folder of table and curves (the first DIR)")
    command.set_defaults(command=_tables)
