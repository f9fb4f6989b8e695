"""The tables of a folder: the last errors of every group of runs, and the measures of its neurons with controls."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llm.common.tables import text_table

from ..experiment.groups import mean_and_deviation
from .recording import KINDS, Neurons
from .runs import MAPS, GridRun, grouped, names

SHOWN = ("working", "reference", "first")


def error_table(runs: Sequence[GridRun]) -> str:
    """Return the last errors of every group: mean ± standard deviation over seeds, on familiar and on novel maps."""
    of, rows = grouped(runs), []
    for group, name in zip(of, names(of), strict=True):
        trials = sorted({run.last.trial for run in group})
        errors = ([getattr(run.last.errors[maps], error) for run in group] for error in SHOWN for maps in MAPS)
        rows.append([name, str(len(group)), "/".join(map(str, trials)), *map(mean_and_deviation, errors)])
    return text_table(["", "seeds", "trial", *(f"{error}, {maps}" for error in SHOWN for maps in MAPS)], rows)


WORDS = """\
score: mean place-cell score of the neurons that are not silent (the best cell's activity per visit is at least
--least-rate). shuffled: the same with the cells of other walkers. pass: share of the scored neurons whose score at most
5% of it and its own shuffles reach (0.05 by chance). bits, sparsity, stability: means of spatial information, share of
the space, and correlation of the maps of both halves of the walkers. grid: greatest grid score of the recurrent code,
and the median over shuffles of theirs. untrained: initial weights."""


def neuron_table(
    runs: Sequence[GridRun], measure: Callable[[GridRun], Neurons], untrained: Callable[[GridRun], Neurons]
) -> str:
    """Return the measures of every group, mean and deviation over seeds, trained and with initial weights."""
    of, rows = grouped(runs), []
    for group, name in zip(of, names(of), strict=True):
        for title, found in ((name, measure), (f"{name}, untrained", untrained)):
            for kind in KINDS:
                each = [_measures(found(run), kind) for run in group]
                means = (mean_and_deviation([row[column] for row in each], 2) for column in each[0])
                rows.append([f"{title}: {kind}", str(len(group)), *means])
    header = ["", "seeds", *_measures(measure(runs[0]), KINDS[0])]
    return f"{text_table(header, rows)}\n\n{WORDS}"


def _measures(neurons: Neurons, kind: str) -> dict[str, float]:
    """The columns of one run."""
    scores = getattr(neurons, f"{kind}_scores")
    scored = scores.isfinite()
    means = {
        name: getattr(neurons, f"{kind}_{name}").nanmean().item() for name in ("information", "sparsity", "stability")
    }
    return {
        "silent": 1 - scored.double().mean().item(),
        "score": scores.nanmean().item(),
        "shuffled": getattr(neurons, f"{kind}_shuffled").nanmean().item(),
        "pass": neurons.passes(kind)[scored].double().mean().item(),
        "bits": means["information"],
        "sparsity": means["sparsity"],
        "stability": means["stability"],
        "grid": _greatest(neurons.code_grid),
        "grid, shuffled": float(np.median([_greatest(each) for each in neurons.code_grid_shuffled])),
    }


def _greatest(scores: torch.Tensor) -> float:
    known = scores[scores.isfinite()]
    return known.max().item() if len(known) else float("nan")
