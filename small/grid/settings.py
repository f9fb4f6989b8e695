"""What a grid navigator is asked to be: sizes, training, recording; and presets. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from llm.common.errors import UserError
from llm.common.limits import BELOW_ONE, NOT_NEGATIVE, POSITIVE, at_least

from ..experiment.options import option, problems, raise_problems

OBJECTIVES = ("steps", "parallel")
PRODUCTS = ("float32", "bfloat16")
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"space": "11x11", "maps": (32,), "alpha": (10.0,), "seeds": 3},
    "small": {
        "space": "5x5", "maps": (16,), "alpha": (0.0, 1.0, 10.0), "seeds": 2, "segment": 8, "memory": 8, "width": 64,
        "heads": 4, "head_dim": 16, "neurons": 256, "code": 32, "dropout": 0.0, "trials": 150, "steps": 256,
        "batch": 128, "lr": 2e-3, "clip": 1.0, "walkers": 256, "evaluate_every": 5, "objective": "parallel",
    },
}  # fmt: skip


@dataclass(frozen=True)
class GridSizes:
    """Sizes of the transformer; the defaults are the paper's.

    One half of the width is the position's, the other the letter's. Dropout is that of the input and of what each layer
    adds; the language models' feed-forward network has none inside.
    """

    width: int = option(512, "token width", at_least(1))
    heads: int = option(8, "number of attention heads", at_least(1))
    head_dim: int = option(64, "width of an attention head", at_least(1))
    neurons: int = option(2048, "feed-forward neurons per layer", at_least(1))
    layers: int = option(2, "number of transformer layers", at_least(1))
    code: int = option(128, "width of the recurrent position code", at_least(1))
    segment: int = option(32, "steps per segment", at_least(1))
    memory: int = option(32, "steps of memory before the segment", at_least(0))
    dropout: float = option(0.1, "dropout probability", BELOW_ONE)

    def __post_init__(self) -> None:
        found = problems(self)
        if self.width % 2:
            found.append(f"width {self.width} must be even: one half is the position's, the other the letter's")
        raise_problems(found)

    @property
    def window(self) -> int:
        """Steps back that the last target of a segment can see."""
        return self.segment + self.memory


@dataclass(frozen=True)
class GridSettings:
    """Training of one navigator; the defaults are the paper's.

    The seed is that of maps, walks, initial weights and dropout. There are `maps` of training and as many others. A run
    whose `trials` are raised is trained further. The last trial is always evaluated. The objective "steps" makes a
    gradient step for every walking step, "parallel" one for every segment, whose loss is the mean over all of its
    targets. With bfloat16, weights, their updates, recurrent codes and softmax stay float32.
    """

    seed: int = option(0, limit=at_least(0))
    maps: int = option(32, limit=at_least(1))
    letters: int = option(10, "number of different letters", at_least(2))
    trials: int = option(200, "number of training trials", at_least(1))
    steps: int = option(2048, "walking steps per trial, a multiple of --segment", at_least(1))
    batch: int = option(512, "walkers per training trial", at_least(1))
    lr: float = option(1e-4, "initial learning rate of Adam", POSITIVE)
    clip: float = option(0.25, "maximum gradient norm", POSITIVE)
    objective: str = option(
        "steps", "gradient steps: one per walking step, or one per segment", choices=OBJECTIVES
    )  # fmt: skip
    walkers: int = option(512, "walkers per evaluation and kind of maps", at_least(1))
    evaluate_every: int = option(1, "trials between evaluations", at_least(1))
    familiar: str = option(
        "evaluation",
        "errors on familiar maps: of a separate evaluation without dropout, or of the training pass itself, as in the "
        "authors' code",
        choices=("evaluation", "training"),
        name="familiar-errors",
    )
    products: str = option(
        "float32", "dtype of matrix products; bfloat16 uses autocast", choices=PRODUCTS, name="dtype"
    )  # fmt: skip

    def __post_init__(self) -> None:
        raise_problems(problems(self))


@dataclass(frozen=True)
class RecordingSettings:
    """How neurons are recorded; the steps are those of all walkers together."""

    steps: int = option(100_000, "walking steps to record, over all walkers", name="record-steps")
    map_index: int = option(0, "map to walk: 0 to N-1 familiar, N to 2N-1 novel", name="map")
    normalisation: str = option(
        "walk",
        "divisor of a rate map: all recorded moments (walk, as in the paper) or the visits to the cell (occupancy, as "
        "in the authors' code)",
        choices=("walk", "occupancy"),
    )
    least_rate: float = option(
        0.01,
        "least activity per visit of a neuron's best cell; other neurons are silent and have no score",
        NOT_NEGATIVE,
    )
    least_visits: int = option(5, "visits below which a cell counts as never visited", at_least(1))
    shuffles: int = option(20, "shuffles of the cells, next to which every score stands", at_least(20))

    def __post_init__(self) -> None:
        raise_problems(problems(self))


def check_segments(sizes: GridSizes, settings: GridSettings) -> None:
    """Raise UserError if the steps of a trial are not whole segments."""
    if settings.steps % sizes.segment:
        raise UserError(f"steps {settings.steps} must be a multiple of the segment {sizes.segment}")
