"""Which figures of the paper can be drawn from the runs of a folder, each with the number that it has there."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from . import figures, place_figures
from .figures import number_of
from .graph import Graph
from .place_figures import Measure
from .runs import Done, grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Made = tuple[str, Callable[[], "Figure"]]  # name of the file, what draws it


def without_runs() -> list[Made]:
    """The figures that need no training: the receptor and the activations."""
    return [("figure1", figures.receptor), ("figureS2", figures.activations)]


def of_errors(runs: Sequence[Done]) -> Iterator[Made]:
    """The figures of both errors."""
    recurrent, actions = _by_position(runs)
    if recurrent:
        yield "figure3a", lambda: figures.over_trials(recurrent)
        if _vary(_nmda(recurrent), number_of):
            yield "figure3b", lambda: figures.against_alpha(recurrent)
            yield "figureS6", lambda: figures.against_alpha(recurrent, "first")
        if len(grouped(recurrent)) > 1:
            yield "figure3c", lambda: figures.across_activations(recurrent)
            if all(len(group) > 1 for group in grouped(recurrent)):
                yield "figureS7", lambda: figures.mann_whitney(recurrent)
        if _vary(recurrent, lambda run: run.settings.lr):
            yield "figureS8", lambda: figures.against_rate(recurrent)
        if _vary(_leaky(recurrent), number_of):
            yield "figureS10a", lambda: figures.against_slope(recurrent)
    if actions:
        yield "figureS4a", lambda: figures.over_trials(actions)
        if _vary(_nmda(actions), number_of):
            yield "figureS4b", lambda: figures.against_alpha(actions)


def of_neurons(runs: Sequence[Done], measure: Measure, graph: Graph) -> Iterator[Made]:
    """The figures of rate maps, scores and sparsity."""
    recurrent, actions = _by_position(runs)
    if recurrent:
        shown = max(_nmda(recurrent) or recurrent, key=lambda run: number_of(run) if _nmda([run]) else 0.0)
        yield "figure4ab", lambda: place_figures.rate_maps(shown, measure(shown), graph)
        yield "figure4cdefg", lambda: place_figures.scores_and_errors(recurrent, measure)
        yield "figure4h", lambda: place_figures.best_maps(recurrent, measure, graph)
        yield "figureS13", lambda: place_figures.sparsity(recurrent, measure)
        if _vary(recurrent, lambda run: run.settings.lr):
            yield "figureS9", lambda: place_figures.scores_and_errors(recurrent, measure)
        if _vary(_leaky(recurrent), number_of):
            yield "figureS10b", lambda: place_figures.scores_and_errors(_leaky(recurrent), measure)
    if actions:
        yield "figureS5", lambda: place_figures.scores_and_errors(actions, measure)


def _by_position(runs: Sequence[Done]) -> tuple[list[Done], list[Done]]:
    """Runs with recurrent codes, and those with the last action alone (Appendix A.5)."""
    actions = [run for run in runs if run.variant.position == "actions"]
    return [run for run in runs if run.variant.position != "actions"], actions


def _nmda(runs: Sequence[Done]) -> list[Done]:
    return [run for run in runs if run.variant.act.startswith("nmda:")]


def _leaky(runs: Sequence[Done]) -> list[Done]:
    return [run for run in runs if run.variant.act.startswith("leaky_relu:")]


def _vary(runs: Sequence[Done], what: Callable[[Done], float]) -> bool:
    return len({what(run) for run in runs}) > 1
