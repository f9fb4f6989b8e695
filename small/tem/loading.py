"""A trained TEM-t or TEM with walks of its task and its activity in them: see `small.experiment.loaded`."""

from pathlib import Path
from typing import ClassVar

import torch

from ..experiment.loaded import Loaded, Table
from ..experiment.runs import copy_into
from .machine import Machine
from .memory import conjunction
from .runs import read_asked
from .train import Run

_WALK = ("environment", "step")


class LoadedTem(Loaded):
    """One model; its episodes are walks in fresh environments, as in a test of its training."""

    axes: ClassVar = {
        "space": ("environment",), "cell": _WALK, "action": _WALK, "symbol": _WALK, "visited": _WALK,
        "new_link": _WALK, "logits": (*_WALK, "symbol"), "code": (*_WALK, "unit"),
        "attention": (*_WALK, "memory"), "memory_step": ("environment", "memory"), "conjunction": (*_WALK, "unit"),
    }  # fmt: skip

    def __init__(self, folder: Path, run: Run) -> None:
        super().__init__(folder, run.model, run.settings)
        self.run = run

    def episode(self, seed: int = 0, environments: int = 1) -> Table:
        """Return walks of a test's length: step 0 is where a walk starts, its action is to stay.

        `space` is the number of the space in settings.spaces; `visited` says that the cell was seen before, `new_link`
        that the action was not taken before from the last cell.
        """
        found = self.run.environments.episode("load", seed, environments, self.settings.tested_steps)
        names = ("space", "cell", "action", "symbol", "visited", "new_link")
        return {name: part.cpu().numpy() for name, part in zip(names, found, strict=True)}

    @torch.no_grad()
    def activations(self, episode: Table) -> Table:
        """Return codes of every step; logits of the symbol from step 1 on (index 0).

        And of TEM-t the attention of the same steps to the memories, and the step at which each was made; of TEM the
        conjunctions of every step.
        """
        actions, symbols = (torch.from_numpy(episode[name]).to(self.run.device) for name in ("action", "symbol"))
        found = self.model(actions, symbols)
        parts = {"logits": found.logits, "code": found.codes}
        if isinstance(self.model, Machine):
            parts["conjunction"] = conjunction(*self.model.bound(symbols, found.codes)).flatten(2)
        else:
            parts |= {"attention": found.weights, "memory_step": found.times}
        return {name: part.cpu().numpy() for name, part in parts.items()}


def load(folder: Path, device: str = "cpu") -> LoadedTem:
    """Load a run; see `small.experiment.loading.load`."""
    run = Run(read_asked(folder), device)
    run.at(copy_into(run.tensors(), folder))
    return LoadedTem(folder, run)
