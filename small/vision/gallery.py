"""The pictures of vision: the name, the caption and the drawing of each."""

from collections.abc import Sequence

from ..plots import Picture
from . import figures
from .runs import VisionRun


def of_training(runs: Sequence[VisionRun]) -> list[Picture]:
    """The pictures of a training."""
    return [
        Picture(
            "accuracy",
            "Training loss and top-1 test accuracy over epochs, a row for each data set; the last epoch's accuracy is "
            "in Table S1 of Kim et al. 2023. Light lines are single seeds, dark ones their mean.",
            lambda: figures.over_epochs(runs),
        )
    ]
