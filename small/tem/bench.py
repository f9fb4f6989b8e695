"""`python -m small.tem bench`: TEM's memory as sums and as the paper's matrix, and both models' steps.

    memory_D        recall, of conjunctions of D numbers: at time t sums are O(t D), the matrix O(D^2)
    walks_T         the same with 200 numbers, over walks of T cells
    steps           gradient steps of TEM-t, of TEM by sums, and of TEM by the matrix (Figure 4b)

The parts of a comparison alternate within a round; a ratio is the median of the rounds' ratios, with the least and
the greatest.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm.common.devices import device_name
from llm.common.environment import environment
from llm.common.processes import progress_bar

from ..experiment.bench import compared, in_turn, seconds_of
from .memory import FORMS, RULES, Rule, recall
from .runs import Model, TemSpec
from .settings import MachineSizes, TemSettings, TransformerSizes
from .train import Run

SENSORY = 10  # X
PLACES, WALK = (10, 20, 40, 80), 100  # G, so that D is 100 to 800; cells
WALKS, MIDDLE = (25, 100, 400), 20  # cells; G
# Calls of a measurement: short ones, and those that come after the matrix, whose memory goes back to the system.
REPEATS = {"sums": 20, "matrix": 2, "factored": 20, "TEM-t": 10, "TEM, sums": 10, "TEM, matrix": 1}
BATCH = 16  # of a retrieval; TEM's reference code has 16 walks in a step


def run(rounds: int, device: str, settings: TemSettings | None = None) -> dict[str, Any]:
    """All comparisons, as a JSON object."""
    settings = settings or TemSettings()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        f"memory_{SENSORY * places}": partial(_memory, rounds, device, places, WALK) for places in PLACES
    }
    parts |= {f"walks_{walk}": partial(_memory, rounds, device, MIDDLE, walk) for walk in WALKS}
    parts["steps"] = partial(_steps, rounds, device, settings)
    result: dict[str, Any] = {"rounds": rounds, **environment(), "device": device_name(device), "batch": settings.batch}
    for name, measure in progress_bar(len(parts), 0, "bench", "part", iterable=parts.items(), leave=False):
        result[name] = measure()
    return result


def _memory(rounds: int, device: str, places: int, walk: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def drawn(width: int) -> Tensor:
        return torch.randn(BATCH, walk, width, generator=generator).to(device) * width**-0.5

    parts = drawn(SENSORY), drawn(places), drawn(places)
    rules = {form: replace(RULES["linear"], form=form) for form in FORMS}  # one linear step: all three forms are equal
    with torch.no_grad():
        times = in_turn(
            rounds,
            {
                form: partial(seconds_of, partial(recall, *parts, rule), device, REPEATS[form])
                for form, rule in rules.items()
            },
        )
    return compared(times, {"matrix to sums": ("matrix", "sums"), "sums to factored": ("sums", "factored")})


def _steps(rounds: int, device: str, settings: TemSettings) -> dict[str, Any]:
    models = {
        "TEM-t": Model(TransformerSizes()),
        "TEM, sums": Model(MachineSizes(), Rule()),
        "TEM, matrix": Model(MachineSizes(), replace(Rule(), form="matrix")),
    }
    runs = {name: Run(TemSpec(model, settings), device) for name, model in models.items()}
    times = in_turn(
        rounds,
        {name: partial(seconds_of, partial(run.train, 1), device, REPEATS[name]) for name, run in runs.items()},
    )
    pairs = [("TEM, sums", "TEM-t"), ("TEM, matrix", "TEM-t"), ("TEM, matrix", "TEM, sums")]
    return compared(times, {f"{slow} to {fast}": (slow, fast) for slow, fast in pairs})
