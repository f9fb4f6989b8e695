"""Small experiments on the shared blocks, one folder each; `load` reads a trained run of any of them."""

from typing import Any


def load(folder: Any, device: str = "cpu", **others: Any) -> Any:
    """Load a trained run: see `small.experiment.loading.load`, which this imports when it is called."""
    from .experiment.loading import load

    return load(folder, device, **others)
