"""The pictures of icl: the name, the caption and the drawing of each. Numbers are those of Burns et al. 2025."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..plots import Picture
from . import figures
from .runs import Snapshot

CURVES = "Blue: noise and last key as in the paper, orange: as in the authors' code. Dashed: Pearson's correlation."


def of_training(snapshots: Sequence[Snapshot]) -> list[Picture]:
    """The pictures of a training."""
    return [
        Picture(
            "learning_curves",
            "Accuracy on Test, IC, IC2 and IW, Test loss of all variants, and all losses of one of them (Figure 3). "
            "Light lines are single seeds, dark ones their mean, up to where the first seed ended. Dashed: the loss on "
            "IC2 against the label that was learned; solid: against the shifted label, which is right.",
            lambda: figures.training(snapshots),
        )
    ]


def of_amicl(found: Mapping[str, Any], seed: int) -> list[Picture]:
    """The pictures of the associative memory, of what `amicl.experiment` found."""
    return [
        Picture(
            "attention_matrices",
            "Attention of AMICL in one trial of 20 tokens at a = 2, a row of panels for each similarity and a column "
            "for each separation (Figure 6). A row of a matrix is a query, a column a key; the last row is the query "
            "that is answered, and ticks mark the keys with the right answer.",
            lambda: figures.matrices(seed=seed),
        ),
        Picture(
            "accuracy_by_weight",
            f"Accuracy of AMICL with argmax against a, the weight of the previous token (Figure 7). {CURVES} The "
            "dotted line is at 0.99.",
            lambda: figures.weight_curves(found),
        ),
        Picture(
            "accuracy_by_size",
            f"Accuracy of AMICL with argmax at a = 2 against the length of a trial and the width of a token (Figure "
            f"8). {CURVES}",
            lambda: figures.size_curves(found),
        ),
    ]


def of_sweep(
    x: tuple[str, list[Any]], y: tuple[str, list[Any]], steps: Mapping[str, Any], at_most: int, threshold: float
) -> Picture:
    """The phase plot, see `figures.phase`."""
    caption = (
        f"Step at which the accuracy on IC exceeds {threshold:g}, mean over seeds, for each {x[0]} and {y[0]}; a panel "
        "for each variant. White: a seed never did."
    )
    return Picture("phase", caption, lambda: figures.phase(x, y, steps, at_most, threshold))
