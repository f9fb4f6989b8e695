"""Which figures of the paper can be drawn from the runs of a folder, each with the number that it has there."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from . import figures, place_figures
from .figures import number_of
from .place_figures import Measure
from .runs import GridRun, grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Made = tuple[str, Callable[[], "Figure"]]  # name of the file, what draws it


def without_runs() -> list[Made]:
    """The figures that need no training: the receptor and the activations."""
    return [("figure1", figures.receptor), ("figureS2", figures.activations)]


def of_errors(runs: Sequence[GridRun]) -> Iterator[Made]:
    """The figures of both errors."""
    recurrent, actions = _by_position(runs)
    nmda, leaky = (_of(recurrent, act) for act in ("nmda", "leaky_relu"))
    if recurrent:
        yield "figure3a", lambda: figures.over_trials(recurrent)
    if _vary(nmda, number_of):
        yield "figure3b", lambda: figures.against_alpha(nmda)
        yield "figureS6", lambda: figures.against_alpha(nmda, "first")
    if len(grouped(recurrent)) > 1:
        yield "figure3c", lambda: figures.across_activations(recurrent)
        if all(len(group) > 1 for group in grouped(recurrent)):
            yield "figureS7", lambda: figures.mann_whitney(recurrent)
    if _vary(recurrent, lambda run: run.settings.lr):
        yield "figureS8", lambda: figures.against_rate(recurrent)
    if _vary(leaky, number_of):
        yield "figureS10a", lambda: figures.against_slope(leaky)
    if actions:
        yield "figureS4a", lambda: figures.over_trials(actions)
    if _vary(_of(actions, "nmda"), number_of):
        yield "figureS4b", lambda: figures.against_alpha(_of(actions, "nmda"))


def of_neurons(runs: Sequence[GridRun], measure: Measure) -> Iterator[Made]:
    """The figures of rate maps, scores and sparsity."""
    recurrent, actions = _by_position(runs)
    nmda, leaky = (_of(recurrent, act) for act in ("nmda", "leaky_relu"))
    if recurrent:
        shown = max(nmda, key=number_of) if nmda else recurrent[0]
        yield "figure4ab", lambda: place_figures.rate_maps(shown, measure(shown))
        yield "figure4h", lambda: place_figures.best_maps(recurrent, measure)
        yield "figure5_workshop", lambda: place_figures.best_maps(recurrent, measure, side=8)
        yield "figureS13", lambda: place_figures.sparsity(recurrent, measure)
        if shown.space.shape is not None:
            yield "codes", lambda: place_figures.position_codes(shown, measure(shown))
    if nmda:
        name = "figureS9" if _vary(nmda, lambda run: run.settings.lr) else "figure4cdef"
        yield name, lambda: place_figures.scores_and_errors(nmda, measure)
    if len(nmda) < len(recurrent):
        yield "figure4g", lambda: place_figures.scores_and_errors(recurrent, measure)
    if _vary(leaky, number_of):
        yield "figureS10b", lambda: place_figures.scores_and_errors(leaky, measure)
    if actions:
        yield "figureS5", lambda: place_figures.scores_and_errors(actions, measure)


def _by_position(runs: Sequence[GridRun]) -> tuple[list[GridRun], list[GridRun]]:
    """Runs with recurrent codes, and those with the last action alone (Appendix A.5)."""
    actions = [run for run in runs if run.variant.position == "actions"]
    return [run for run in runs if run.variant.position != "actions"], actions


def _of(runs: Sequence[GridRun], act: str) -> list[GridRun]:
    return [run for run in runs if run.variant.act.partition(":")[0] == act]


def _vary(runs: Sequence[GridRun], what: Callable[[GridRun], float]) -> bool:
    return len({what(run) for run in runs}) > 1
