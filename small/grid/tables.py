"""The table of a folder: the last errors of every group of runs."""

from collections.abc import Sequence

from llm.common.tables import text_table

from ..experiment.groups import mean_and_deviation
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
