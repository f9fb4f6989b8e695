"""What makes the luck of initial weights smaller: python -m benchmarks.luck

Trains one toy model on the built-in stories with many initial weights and one data order, under several training
settings. The standard deviation of the final validation loss is the luck: a null arm's difference has sqrt(2) times it.
Every run is also judged by exponential moving averages of its weights. Writes docs/luck.csv, and the table into
docs/scaling.md.
"""

import argparse
import csv
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from scipy.stats import chi2
from torch import Tensor
from tqdm import tqdm

from benchmarks.ladder import PAGE, as_csv, markdown, page_with
from benchmarks.transfer import CONTEXT, Size, Texts, make_model, story_texts, training
from llm.common.errors import UserError, exit_status
from llm.common.files import write_files
from llm.train.optim import Schedule

RESULT = PAGE.parent / "luck.csv"
SIZE, STEPS, RATE = Size(64, 4), 1200, 4e-3
AVERAGES = (0.98, 0.995)  # decay of a moving average: weights of about the last 50 and 200 steps
LAST = "last weights"
VALIDATED = 1024  # rows
Row = dict[str, str]


class Setting(NamedTuple):
    """How a model is trained, and initialised: `deviation` times the standard deviation of the others."""

    schedule: Schedule
    rate: float = RATE
    steps: int = STEPS
    deviation: float = 1.0


_TO_ZERO = Schedule("cosine", warmup_steps=100)
SETTINGS = {
    "cosine to 10%": Setting(Schedule("cosine", warmup_steps=100, min_lr_ratio=0.1)),
    "cosine to 0": Setting(_TO_ZERO),
    "cosine to 0, warm-up of 400 steps": Setting(Schedule("cosine", warmup_steps=400)),
    "half the initial weights": Setting(_TO_ZERO, deviation=0.5),
    "half the learning rate": Setting(_TO_ZERO, rate=RATE / 2),
    "twice the learning rate": Setting(_TO_ZERO, rate=2 * RATE),
    "twice the steps": Setting(_TO_ZERO, steps=2 * STEPS),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.luck",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.luck --seeds 6 --jobs 2",
    )
    parser.add_argument("--seeds", type=int, default=6, metavar="N", help="initial weights per setting (default: 6)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes of one thread each (default: 2)")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="only these; others keep their rows"
    )
    options = parser.parse_args(arguments)

    def run() -> None:
        if min(options.seeds - 1, options.jobs) < 1:
            raise UserError("--seeds must be 2 or more, for a standard deviation, and --jobs 1 or more")
        rows = list(measured(options.settings, options.seeds, options.jobs))
        if RESULT.exists():
            with RESULT.open(newline="") as file:
                rows += [row for row in csv.DictReader(file) if row["setting"] not in options.settings]
        rows.sort(key=lambda row: list(SETTINGS).index(row["setting"]))
        write_files({RESULT: as_csv(rows), PAGE: page_with({"luck": table(rows)})})
        print(table(rows))

    return exit_status(run)


def measured(settings: Sequence[str], seeds: int, jobs: int) -> Iterator[Row]:
    """Train each setting with every seed; yield a row for each average of weights."""
    with tempfile.TemporaryDirectory() as folder:
        texts = story_texts(Path(folder), documents=12_000)
    runs = [(name, seed) for name in settings for seed in range(1, seeds + 1)]
    with ProcessPoolExecutor(jobs, get_context("spawn"), _keep, (texts,)) as pool:
        names, numbers = zip(*runs, strict=True)
        for rows in tqdm(pool.map(_of_kept, names, numbers), total=len(runs), unit="run"):
            yield from rows


_texts: list[Texts] = []


def _keep(texts: Texts) -> None:
    torch.set_num_threads(1)
    _texts.append(texts)


def _of_kept(name: str, seed: int) -> list[Row]:
    return rows_of(_texts[0], name, SETTINGS[name], seed)


def rows_of(texts: Texts, name: str, setting: Setting, seed: int) -> list[Row]:
    """Train once; return a row for the last weights and for each of `AVERAGES`."""
    start = time.process_time()  # of one thread
    model = make_model(SIZE, "standard", seed)
    if setting.deviation != 1:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(setting.deviation)
    weights = dict(model.named_parameters())
    averages = {decay: {key: value.detach().clone() for key, value in weights.items()} for decay in AVERAGES}
    # what is yielded before the update of step n is of the weights after step n - 1
    for step, _ in enumerate(training(model, texts, setting.rate, setting.steps, 1, setting.schedule, "adamw")):
        _update(averages, weights, step)
    _update(averages, weights, setting.steps)
    seconds = time.process_time() - start
    losses = {LAST: validation_loss(model, texts)}
    for decay, average in averages.items():
        model.load_state_dict(average, strict=False)
        losses[f"moving average, {decay:g}"] = validation_loss(model, texts)
    return [
        {"setting": name, "seed": str(seed), "weights": key, "loss": f"{loss:.5f}", "seconds": f"{seconds:.1f}"}
        for key, loss in losses.items()
    ]


@torch.no_grad()
def _update(averages: dict[float, dict[str, Tensor]], weights: dict[str, torch.nn.Parameter], step: int) -> None:
    for decay, average in averages.items():
        share = 1 - min(decay, (1 + step) / (10 + step))  # at first the average is short, so that none of it is old
        torch._foreach_lerp_(list(average.values()), list(weights.values()), share)


@torch.no_grad()
def validation_loss(model: Any, texts: Texts) -> float:
    """Return the mean loss over the first rows of the validation split, in nats per token."""
    count = min(VALIDATED, (len(texts.validation) - 1) // CONTEXT)
    ids, targets = (texts.validation[first : first + count * CONTEXT].view(count, CONTEXT) for first in (0, 1))
    parts = zip(ids.split(64), targets.split(64), strict=True)
    return sum(float(model(part, shift_labels=target).loss) * len(part) for part, target in parts) / count


def table(rows: Sequence[Row]) -> str:
    """Return a row for each setting: loss, standard deviation with a 95% interval, and what its precision costs.

    The cost is CPU time x variance, relative to the first setting: what it takes to measure a mean over initial weights
    as precisely.
    """
    lines, first = [], 0.0
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        losses = {each: [float(row["loss"]) for row in own if row["weights"] == each] for each in kinds(rows)}
        deviation, free = stdev(losses[LAST]), len(losses[LAST]) - 1
        low, high = (deviation * math.sqrt(free / chi2.ppf(p, free)) for p in (0.975, 0.025))
        seconds = fmean(float(row["seconds"]) for row in own)
        first = first or seconds * deviation**2
        averaged = [f"{fmean(losses[each]):.4f}, {stdev(losses[each]):.4f}" for each in kinds(rows)[1:]]
        spread = f"{deviation:.4f} ({low:.4f} to {high:.4f})"
        cost = f"{seconds * deviation**2 / first:.1f}"
        lines.append([setting, f"{fmean(losses[LAST]):.4f}", spread, *averaged, f"{seconds:.0f}", cost])
    header = ["setting", "mean loss", "standard deviation", *(f"{each}: both" for each in kinds(rows)[1:])]
    return markdown([*header, "CPU seconds", "cost"], lines)


def kinds(rows: Sequence[Row]) -> list[str]:
    """Return the weights that runs were judged by, the last ones first."""
    return list(dict.fromkeys([LAST, *(row["weights"] for row in rows)]))


if __name__ == "__main__":
    sys.exit(main())
