"""How the runs of the pair task are trained."""

import math
from dataclasses import dataclass

import torch

from llm.common.errors import UserError

from ..checks import below, refuse
from .model import Variant

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How runs are trained.

    Args:
        variants: names for `Variant.parse`.
        seeds: of the runs of each variant.
        steps: at most.
        batch: sequences a step.
        lr: of SGD.
        decay: each step multiplies the weights by 1 - decay.
        snapshot_every: steps.
        evaluation: sequences of each of Test, IC, IC2 and IW in a snapshot.
        until: stop when all runs have this accuracy, on IC and IC2, for good: above it in `patience` snapshots in a
            row. None trains all steps.
        patience: snapshots.
        products: "float32" or "bfloat16": dtype of activations and matrix products, see `Transformers`.
    """

    variants: tuple[str, ...] = ("classic", "queries", "keys", "values")
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    steps: int = 75_000
    batch: int = 128
    lr: float = 0.01
    decay: float = 1e-6
    snapshot_every: int = 500
    evaluation: int = 10_000
    until: float | None = 0.95
    patience: int = 5
    products: str = "float32"

    def __post_init__(self) -> None:
        names = ("steps", "batch", "snapshot_every", "evaluation", "patience")
        problems = below(self, dict.fromkeys(names, 1))
        if not 0 < self.lr < math.inf:
            problems.append(f"lr {self.lr} must be a finite number above 0")
        if not 0 <= self.decay < 1:
            problems.append(f"decay {self.decay} must be at least 0 and below 1")
        if self.until is not None and not 0 < self.until < 1:
            problems.append(f"stop-accuracy {self.until} must be between 0 and 1")
        if self.products not in PRODUCTS:
            problems.append(f"dtype {self.products!r} is unknown: give {' or '.join(PRODUCTS)}")
        elif self.snapshot_every > 0 and self.steps % self.snapshot_every:
            problems.append(f"steps {self.steps} must be a multiple of evaluate-every {self.snapshot_every}")
        if len(set(self.variants)) < len(self.variants) or not self.variants:
            problems.append("give at least one variant, and none twice")
        if not self.seeds or min(self.seeds) < 0:
            problems.append("give at least one seed, and none below 0")
        for name in self.variants:
            try:
                Variant.parse(name)
            except UserError as error:
                problems.append(str(error))
        refuse(problems)
