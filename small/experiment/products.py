"""`--dtype auto`: times a training's steps in float32 and in bfloat16, and keeps the faster.

Which is faster depends on the processor: bfloat16 needs instructions for it, and pays for conversions of small
matrices. All runs of a command get one answer, which run.json keeps as if it had been asked for.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .bench import in_turn, seconds_of
from .runs import RECORD, read_record

AUTO = "auto"
PRODUCTS = ("float32", "bfloat16")
ROUNDS, REPEATS = 3, 3  # steps of each that are timed, in turn, after as many that are not


def take_auto(options: argparse.Namespace) -> bool:
    """Return whether a command line asks for `--dtype auto`, which is taken off it."""
    auto = options.products == AUTO
    options.products = None if auto else options.products
    return auto


def faster(
    folders: Iterable[Path], program: str, step: Callable[[str], Callable[[], Any]], device: str
) -> str:  # fmt: skip
    """Return the dtype of the runs that are there already, else the one whose steps take less time; and print it.

    Args:
        folders: of the runs.
        program: as in "small.icl".
        step: dtype -> a function that makes a gradient step of a run that is thrown away.
        device: "cpu" or "cuda".
    """
    for folder in folders:
        if (folder / RECORD).is_file():
            found = read_record(folder, program, ["settings"])["settings"]["products"]
            print(f"dtype {found}, as before", flush=True)
            return found
    times = in_turn(ROUNDS, {name: partial(seconds_of, step(name), device, REPEATS) for name in PRODUCTS})
    medians = {name: statistics.median(each) for name, each in times.items()}
    best = min(medians, key=medians.__getitem__)
    words = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in medians.items())
    print(f"dtype {best}: a step takes {words}", flush=True)
    return best
