"""Before a study is trained: the smallest compute gain that its seeds and sizes can show.

python -m llm study plan (sizes, tokens, FLOPs, seeds) -> the baseline's slope and a pair's scatter, of finished runs or
assumed -> `power.smallest_multiplier` -> sentences
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.verdict import power
from llm.common.arguments import positive, share
from llm.common.errors import UserError
from llm.runs.study_record import MAIN, NULL_ARM, StudyRecord, read_record


class PlannedSize(NamedTuple):
    """A size of the baseline: pairs, non-embedding parameters, and tokens and training FLOPs of each budget."""

    name: str
    pairs: int
    parameters: float
    tokens: np.ndarray
    flops: np.ndarray

    @property
    def log_compute(self) -> float:
        """Mean ln FLOPs over the budgets."""
        return float(np.log(self.flops).mean())


class Scatter(NamedTuple):
    """The standard deviation of a pair's loss difference at each size, nats per token, and where it comes from."""

    deviations: np.ndarray
    source: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evals study`."""
    parser.add_argument("study", type=Path, metavar="STUDY", help="the YAML of a study, or its folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder for the page and the rest")
    parser.add_argument("--level", type=share, default=0.95, metavar="P", help="of the intervals (0.95)")
    parser.add_argument("--bench", type=Path, metavar="FILE", help="step times, from `llm bench --json FILE`")
    parser.add_argument("--plan", action="store_true", help="print the smallest gain that can be shown, and no more")
    parser.add_argument("--power", type=share, default=0.8, metavar="P", help="--plan: chance of showing it (0.8)")
    parser.add_argument(
        "--seed-deviation",
        type=positive,
        metavar="NATS",
        help=f"--plan: of a pair's loss difference from seed to seed (of the finished null arm, else "
        f"{power.SEED_DEVIATION})",
    )


def study_power(options: argparse.Namespace) -> str:
    """Say what a study can show.

    Raises:
        UserError: the study cannot be run, or a value is out of range.
    """
    level, chance = options.level, options.power
    if not 1 - level < chance:
        raise UserError(f"--power {chance} must be above 1 - level, {1 - level:.3g}")
    sizes = planned_sizes(options.study)
    losses = _finished(sizes, _record(options.study))
    scatter = pair_scatter(sizes, losses, options.seed_deviation)
    slopes, of_slopes = baseline_slopes(sizes, losses)
    assumed = f"Assumed: {scatter.source}; {of_slopes}."
    try:
        found = power.smallest_multiplier(
            [size.log_compute for size in sizes], slopes.tolist(), scatter.deviations.tolist(),
            [size.pairs for size in sizes], level, chance,
        )  # fmt: skip
    except UserError as error:
        return f"No compute gain can be shown: {error}."
    firm = (
        "With three sizes nothing is firm: add a size."
        if math.isinf(found.firm)
        else f"By seeds and by sizes (firm): {_gain(found.firm)}."
    )
    shown = (
        f"The smallest compute gain that {_seeds(sizes)} at {len(sizes)} sizes show with a chance of {chance:.0%} "
        f"({100 * level:g}% intervals), if it is the same at all sizes: {_gain(found.shown)}."
    )
    return f"{shown}\n{firm}\n{assumed}"


def _gain(multiplier: float) -> str:
    from evals.verdict.ladder_words import in_compute

    return f"{in_compute(math.log(multiplier))} compute (m = {multiplier:.3g})"


def _seeds(sizes: Sequence[PlannedSize]) -> str:
    count = sizes[0].pairs
    return f"{count} seed{'s' * (count != 1)}"


# ---- What is planned, and what is finished ---------------------------------------------------------------------------


def planned_sizes(study: Path) -> list[PlannedSize]:
    """Return the sizes of a study, as `llm study plan` works them out in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "llm", "study", "plan", str(study), "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(why.removeprefix("error: "))
        planned: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return [
        PlannedSize(
            each["size"],
            each["seeds"],
            each["non_embedding"],
            np.array(each["tokens"], dtype=np.float64),
            np.array(each["tokens"], dtype=np.float64) * each["flops_per_token"],
        )
        for each in planned
        if each["stage"] == MAIN
    ]


def _record(study: Path) -> StudyRecord | None:
    """Return the record of the study if its runs have begun."""
    try:
        return read_record(study)
    except UserError:
        return None


Losses = Mapping[tuple[str, str, int], float]  # (arm, size, seed) -> final loss, mean over the budgets


def _finished(sizes: Sequence[PlannedSize], record: StudyRecord | None) -> tuple[Losses, str]:
    """Return the losses of what is finished with all its budgets at these sizes, and the baseline's name."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for run in record.runs if record else ():
        state = record.state(run) if record else None
        if run.stage == MAIN and state and state.loss is not None and math.isfinite(state.loss):
            found.setdefault((run.arm, run.size, run.seed), []).append(state.loss)
    budgets = {size.name: len(size.tokens) for size in sizes}
    whole = {key: float(np.mean(of)) for key, of in found.items() if len(of) == budgets.get(key[1])}
    return whole, record.baseline if record else ""


def pair_scatter(sizes: Sequence[PlannedSize], finished: tuple[Losses, str], given: float | None) -> Scatter:
    """Return a pair's scatter: as given, or of the null arm, whose true difference is zero, or the default.

    The null arm's is the root mean square of its differences, at the mean ln C of its pairs; at other sizes it falls as
    C^-FALL, as `ladder_estimator` expects it.
    """
    from evals.verdict.ladder_estimator import FALL

    losses, baseline = finished
    x = np.array([size.log_compute for size in sizes])
    varies = "a pair's loss difference varies from seed to seed by"
    if given is not None:
        return Scatter(np.full(len(x), given), f"{varies} {given:.3g} nats per token (--seed-deviation)")
    at = {size.name: size.log_compute for size in sizes}
    pairs = [
        (at[size], loss - losses[baseline, size, seed])
        for (arm, size, seed), loss in losses.items()
        if arm == NULL_ARM and size in at and (baseline, size, seed) in losses
    ]
    if not pairs or not any(difference for _, difference in pairs):
        source = f"{varies} {power.SEED_DEVIATION:.3g} nats per token (the default, of 8M models; --seed-deviation)"
        return Scatter(np.full(len(x), power.SEED_DEVIATION), source)
    places, differences = np.array(pairs).T
    deviations = math.sqrt(float((differences**2).mean())) * np.exp(-FALL * (x - places.mean()))
    source = (
        f"{varies} {deviations[0]:.3g} to {deviations[-1]:.3g} nats per token, as {len(pairs)} finished pairs of the "
        "null arm do; an arm that shares initial weights with the baseline may vary less"
    )
    return Scatter(deviations, source)


def baseline_slopes(sizes: Sequence[PlannedSize], finished: tuple[Losses, str]) -> tuple[np.ndarray, str]:
    """Return by how much the baseline's loss falls per unit of ln FLOPs at each size, nats, and where that comes from.

    Differences of the means of neighbouring sizes where all are finished; else of the fit of Hoffmann et al. 2022.
    """
    losses, baseline = finished
    x = np.array([size.log_compute for size in sizes])
    if len(sizes) < 2:
        return np.ones(len(sizes)), "one size has no slope"
    means = [
        np.mean([loss for (arm, name, _), loss in losses.items() if (arm, name) == (baseline, size.name)] or [np.nan])
        for size in sizes
    ]
    slopes, source = -np.gradient(np.array(means), x), "as its finished runs do"
    if not (slopes > 0).all():  # nan where a size is not finished
        from evals.verdict.ladder_simulation import Law

        law = Law()
        slopes = -np.gradient(np.array([law(np.array(size.parameters), size.tokens).mean() for size in sizes]), x)
        source = "as the fit of Hoffmann et al. 2022 has it"
    fall = f"{slopes[0]:.2g} to {slopes[-1]:.2g} nats per token for e times the compute"
    return slopes, f"the baseline's loss falls by {fall}, {source}"
