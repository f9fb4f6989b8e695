"""Commands of `python -m small.vision`: train, tables.

torch is imported inside the command that needs it, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.common.arguments import accept_old_name, add_command
from llm.common.errors import UserError

from ..arguments import add_device, add_folders, count, device_of, run_command

SIZES = {
    "patch": "side of a patch in pixels (default: 1/8 of the image's)",
    "width": "token width (default: 192)",
    "heads": "number of attention heads (default: 12)",
    "neurons": "feed-forward neurons per layer (default: 384)",
    "layers": "number of transformer layers (default: 9)",
    "dropout": "dropout probability (default: 0)",
}
SETTINGS = {
    "epochs": "number of training epochs (default: 100)",
    "batch": "images per step (default: 128)",
    "lr": "peak learning rate of AdamW (default: 1e-3)",
    "weight_decay": "weight decay of matrices (default: 0.05)",
    "warmup": "warm-up epochs (default: 10)",
    "smoothing": "label smoothing (default: 0.1)",
}
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
        "--data", type=Path, default=Path("data"), metavar="PATH",
        help="folder or archive of the data set, or a folder with it under its published name (default: data)",
    )  # fmt: skip
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder, with a folder per run (default: runs/vision/DATASET)"
    )
    command.add_argument(
        "--act", nargs="+", default=("gelu", "nmda"), metavar="NAME",
        help="activations: gelu, nmda, relu, ... (default: gelu nmda)",
    )  # fmt: skip
    command.add_argument("--alpha", nargs="+", type=float, metavar="A", help="alphas of --act nmda (default: 10 0)")
    command.add_argument("--seeds", type=count, default=3, metavar="N", help="number of seeds (default: 3)")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="first seed (default: 0)")
    command.add_argument(
        "--streams", nargs="+", default=(), metavar="S",
        help="residual attention streams: any of queries, keys, values (default: none)",
    )  # fmt: skip
    command.add_argument(
        "--source", choices=("previous", "accumulated", "first"), default="previous",
        help="layers whose projection a stream carries: the previous one, the sum of all earlier ones, or the first "
        "(default: previous)",
    )  # fmt: skip
    command.add_argument(
        "--augmentation", choices=("none", "basic", "strong"), default="strong",
        help="augmentation of training images: none, crops and mirror images (basic), or also colours, rotation, "
        "shear and erasing (strong) (default: strong)",
    )  # fmt: skip
    command.add_argument(
        "--dtype", dest="products", choices=("float32", "bfloat16"), default="float32",
        help="dtype of matrix products; bfloat16 uses autocast (default: float32)",
    )  # fmt: skip
    accept_old_name(command, "--products", "--dtype")
    fractional = ("dropout", "lr", "weight_decay", "smoothing")
    for name, text in (SIZES | SETTINGS).items():
        kind = float if name in fractional else int
        metavar = "N" if kind is int else "X"
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
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
