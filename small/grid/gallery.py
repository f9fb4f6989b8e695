"""The pictures of grid: which ones the runs of a folder allow, the name, the caption and the drawing of each.

Numbers in captions are those of Kim et al. 2023, unless another paper is named.
"""

from collections.abc import Callable, Iterator, Sequence

from ..plots import Picture
from . import figures, place_figures
from .figures import number_of
from .place_figures import Measure
from .runs import GridRun, grouped

SEEDS = "Light lines are single seeds, dark ones their mean; the dotted line is chance."
BARS = "Mean over seeds; bars are their standard deviation."
SCORES = (
    "Left: distribution of the place-cell scores, feed-forward neurons above, attention weights (softmax neurons) "
    "below; solid the neurons, dashed their shuffles, in which every walker has another one's activity. Silent neurons "
    "are left out. Right: mean score against the reference-memory error; light points are runs, dark ones the means of "
    "their groups, and r and p are Spearman's over the groups."
)
MAPS = "Above each map are its score and, in brackets, its peak per visit; colours are shares of the map's peak."


def without_runs() -> list[Picture]:
    """The pictures that need no training: the receptor and the activations."""
    return [
        Picture(
            "receptor",
            "Open probability and current of the NMDA receptor against the voltage, for four concentrations of "
            "magnesium and the alphas that belong to them (Figure 1a).",
            figures.receptor,
        ),
        Picture("activations", "NMDA and other activations, and their derivatives (Figure S2).", figures.activations),
    ]


def of_errors(runs: Sequence[GridRun]) -> Iterator[Picture]:
    """The pictures of both errors."""
    recurrent, actions = _by_position(runs)
    nmda, leaky = (_of(recurrent, act) for act in ("nmda", "leaky_relu"))
    if recurrent:
        yield Picture(
            "errors_over_trials",
            f"Reference- and working-memory error on familiar and on novel maps over trials (Figure 3a). {SEEDS}",
            lambda: figures.over_trials(recurrent),
        )
    if _vary(nmda, number_of):
        yield Picture(
            "reference_error_by_alpha",
            f"Reference-memory error on familiar maps against NMDA's alpha (Figure 3b). {BARS}",
            lambda: figures.against_alpha(nmda),
        )
        yield Picture(
            "first_visit_error_by_alpha",
            f"Error at first visits on familiar maps against NMDA's alpha (Figure S6). {BARS}",
            lambda: figures.against_alpha(nmda, "first"),
        )
    if len(grouped(recurrent)) > 1:
        yield Picture(
            "reference_error_by_activation",
            f"Reference-memory error on familiar maps, sorted by activation (Figure 3c). {BARS}",
            lambda: figures.across_activations(recurrent),
        )
        if all(len(group) > 1 for group in grouped(recurrent)):
            yield Picture(
                "activation_p_values",
                "Two-sided p of the Mann-Whitney test by permutation, reference-memory errors of every group against "
                "every other (Figure S7). *: p < 0.1, **: p < 0.01, ***: p < 0.001; not corrected.",
                lambda: figures.mann_whitney(recurrent),
            )
    if _vary(recurrent, lambda run: run.settings.lr):
        yield Picture(
            "reference_error_by_learning_rate",
            f"Reference-memory error on familiar maps against the initial learning rate (Figure S8). {BARS}",
            lambda: figures.against_rate(recurrent),
        )
    if _vary(leaky, number_of):
        yield Picture(
            "reference_error_by_slope",
            f"Reference-memory error on familiar maps against LeakyReLU's slope (Figure S10, above). {BARS}",
            lambda: figures.against_slope(leaky),
        )
    if actions:
        yield Picture(
            "errors_over_trials_without_recurrence",
            f"Both errors over trials if the position code is the last action alone (Figure S4, left). {SEEDS}",
            lambda: figures.over_trials(actions),
        )
    if _vary(_of(actions, "nmda"), number_of):
        yield Picture(
            "reference_error_by_alpha_without_recurrence",
            "Reference-memory error on familiar maps against NMDA's alpha if the position code is the last action "
            f"alone (Figure S4, right). {BARS}",
            lambda: figures.against_alpha(_of(actions, "nmda")),
        )


def of_neurons(runs: Sequence[GridRun], measure: Measure) -> Iterator[Picture]:
    """The pictures of rate maps, scores and sparsity; `measure` is called when they are drawn."""
    recurrent, actions = _by_position(runs)
    nmda, leaky = (_of(recurrent, act) for act in ("nmda", "leaky_relu"))
    if recurrent:
        yield from _of_maps(recurrent, chosen_run(recurrent), measure)
    if nmda:
        rates = _vary(nmda, lambda run: run.settings.lr)
        yield _scores("by_learning_rate", "S9", nmda, measure) if rates else _scores("", "4c to 4f", nmda, measure)
    if len(nmda) < len(recurrent):
        yield _scores("by_activation", "4g", recurrent, measure)
    if _vary(leaky, number_of):
        yield _scores("by_slope", "S10, below", leaky, measure)
    if actions:
        yield _scores("without_recurrence", "S5", actions, measure)


def chosen_run(runs: Sequence[GridRun]) -> GridRun:
    """Return the run whose own maps and walk are shown: of NMDA with the greatest alpha, else the first."""
    nmda = _of(runs, "nmda")
    return max(nmda, key=number_of) if nmda else runs[0]


def _of_maps(runs: Sequence[GridRun], shown: GridRun, measure: Measure) -> Iterator[Picture]:
    """The pictures of maps and sparsity; those of one run are of `shown`."""
    yield Picture(
        "place_cells",
        "Rate maps of the feed-forward neurons with the greatest place-cell scores, first seed of each group (Figure "
        f"4h). {MAPS}",
        lambda: place_figures.best_maps(runs, measure),
    )
    yield Picture(
        "rate_maps",
        f"Rate maps of {shown.folder.name} from the greatest to the least place-cell score, feed-forward neurons left, "
        f"attention weights right (Figures 4a and 4b). {MAPS}",
        lambda: place_figures.rate_maps(shown, measure(shown)),
    )
    yield Picture(
        "place_cells_64",
        "Rate maps of the 64 feed-forward neurons with the greatest place-cell scores, first seed of each group "
        f"(Figure 5 of Kim et al. 2022). {MAPS}",
        lambda: place_figures.best_maps(runs, measure, side=8),
    )
    yield Picture(
        "sparsity",
        f"Gini index of the size of the feed-forward activity (Equation S13, Figure S13). {BARS}",
        lambda: place_figures.sparsity(runs, measure),
    )
    if shown.space.shape is not None:
        yield Picture(
            "position_codes",
            f"Rate maps of the recurrent position code of {shown.folder.name}, components with the greatest grid "
            "scores (above each), and their autocorrelograms below.",
            lambda: place_figures.position_codes(shown, measure(shown)),
        )


def _scores(by: str, number: str, runs: Sequence[GridRun], measure: Measure) -> Picture:
    name = f"place_scores_{by}" if by else "place_scores"
    return Picture(name, f"{SCORES} (Figure {number}.)", lambda: place_figures.scores_and_errors(runs, measure))


def _by_position(runs: Sequence[GridRun]) -> tuple[list[GridRun], list[GridRun]]:
    """Runs with recurrent codes, and those with the last action alone (Appendix A.5)."""
    actions = [run for run in runs if run.variant.position == "actions"]
    return [run for run in runs if run.variant.position != "actions"], actions


def _of(runs: Sequence[GridRun], act: str) -> list[GridRun]:
    return [run for run in runs if run.variant.act.partition(":")[0] == act]


def _vary(runs: Sequence[GridRun], what: Callable[[GridRun], float]) -> bool:
    return len({what(run) for run in runs}) > 1
