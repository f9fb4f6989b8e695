"""Settings of a run's data that contradict each other, a sentence each. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

SLOTS = 1000  # into which the rows of a mixture are divided, see `mixture.py`


def of_rows(packing: str, mask_documents: bool) -> list[str]:
    """Whether rows that hold one document each are to be masked."""
    if mask_documents and packing in ("per_document", "documents"):
        return ["data.mask_documents has nothing to mask with data.packing per_document: leave one out"]
    return []


def of_weights(store: str | Mapping[str, float]) -> list[str]:
    """Which weights of a mixture cannot be."""
    weights = {store: 1.0} if isinstance(store, str) else store
    problems = [
        f"data.store: the weight {weight} of {path} must be a finite number above 0"
        for path, weight in weights.items()
        if not 0 < weight < math.inf
    ]
    if not 1 <= len(weights) <= SLOTS:
        problems.append(f"data.store names {len(weights)} stores: give a path, or a mapping of 1 to {SLOTS:,} paths")
    return problems
