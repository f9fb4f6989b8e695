"""Benchmarks of the small experiments: contenders alternate within a round; a ratio is a median over rounds."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from llm.common.files import write_json
from llm.common.tables import text_table

from .runs import make_folder


def format_ratios(result: dict[str, Any]) -> str:
    """Return the ratios and the times as text."""
    rows = []
    for name, part in result.items():
        if isinstance(part, dict) and "ratios" in part:
            for ratio, (median, least, greatest) in part["ratios"].items():
                rows.append([name, ratio, f"{median:.3g}", f"{least:.3g} to {greatest:.3g}"])
    times = [
        [name, what, f"{1e3 * seconds:.3g}"]
        for name, part in result.items()
        if isinstance(part, dict) and "seconds" in part
        for what, seconds in part["seconds"].items()
    ]
    ratios = text_table(["", "ratio", "median", "over the rounds"], rows)
    return f"{result['device']}\n\n{ratios}\n\n{text_table(['', 'time of', 'ms, median'], times)}"


def in_turn(rounds: int, contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measure seconds of each contender in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, measure in contenders.items():
            seconds = measure()
            if number:
                times[name].append(seconds)
    return times


def seconds_of(work: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Measure seconds of one call, the mean of `repeats`; waits for a GPU."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def compared(times: dict[str, list[float]], ratios: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Return medians of the times, and each named ratio (slower / faster) with its range over the rounds."""
    found = {}
    for name, (over, under) in ratios.items():
        each = [a / b for a, b in zip(times[over], times[under], strict=True)]
        found[name] = (statistics.median(each), min(each), max(each))
    return {"seconds": {name: statistics.median(each) for name, each in times.items()}, "ratios": found}


def benchmark(measure: Callable[[], dict[str, Any]], options: argparse.Namespace) -> None:
    """Run a command `bench`: print the ratios, and write the whole result where --json says."""
    if options.json is not None:
        make_folder(options.json.parent)
    result = measure() | {"command": options.line}
    print(format_ratios(result))
    if options.json is not None:
        write_json(options.json, result)
