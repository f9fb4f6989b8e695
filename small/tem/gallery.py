"""The pictures of tem: the name, the caption and the drawing of each.

Numbers in captions are those of Whittington et al. 2022.
"""

from collections.abc import Callable, Iterator, Sequence

from ..experiment.groups import grouped
from ..plots import Picture
from ..spaces import Graph
from . import cell_figures, figures
from .capacity import REACHED, Curve
from .cell_figures import Measure
from .runs import TemRun

CODES = {"tem-t": "Figure 1", "tem": "Figure 2b, above"}
UNITS = {"tem-t": "memory neurons (attention weights)", "tem": "conjunctions"}
REMAPPING = {"tem-t": "Figure 5", "tem": "Figure 2b, below, and Figure 5"}


def of_training(runs: Sequence[TemRun]) -> list[Picture]:
    """The pictures of accuracies."""
    return [
        Picture(
            "learning_curves",
            "Zero-shot accuracy (above) and accuracy at visited cells (below) per gradient step and per second of "
            "training (Figure 4). Light lines are single seeds, dark ones their mean with its 95% interval.",
            lambda: figures.learning_curves(runs),
        )
    ]


def of_units(runs: Sequence[TemRun], room: Callable[[TemRun], Graph], measure: Measure) -> Iterator[Picture]:
    """The pictures of units: maps of the first run of each group, scores of all runs.

    `measure` is called when they are drawn. Scores are of square rooms.
    """
    for run, *_ in grouped(runs):
        name, model = run.folder.resolve().name, run.model.name
        yield Picture(
            f"codes,{name}",
            f"Rate maps of the position codes of {name} with the greatest grid scores and the greatest band scores, "
            f"the score above each, and their autocorrelograms below ({CODES[model]}).",
            lambda run=run: cell_figures.codes_in_a_room(measure(run), room(run)),  # type: ignore[misc]
        )
        yield Picture(
            f"remapping,{name}",
            f"Rate maps of {UNITS[model]} of {name}, a column for each and a row for each environment; right: "
            f"correlation of a unit's two maps of one environment, and of its maps of two ({REMAPPING[model]}). Kept "
            "pairs: correlation over environments of how alike two units are.",
            lambda run=run: cell_figures.in_environments(run, measure(run)),  # type: ignore[misc]
        )
    if any(room(run).shape is not None for run in runs):
        yield Picture(
            "grid_and_band_scores",
            "Grid scores and band scores of all codes; solid the units, dashed their shuffles, in which every walker "
            "has the codes of another one.",
            lambda: cell_figures.scores_and_shuffles(runs, measure),
        )


def of_capacity(curves: Sequence[Curve]) -> list[Picture]:
    """The picture of what memories recall."""
    return [
        Picture(
            "capacity",
            "Share of memories recalled against their number, a panel for each width of a code (Section 5). The "
            f"exponential is dashed because it lies on the softmax; the dotted line is at {REACHED:g}.",
            lambda: figures.capacities(curves),
        )
    ]
