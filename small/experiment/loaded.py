"""A trained model with episodes of its task and its activity in them, as named arrays; the same in all experiments.

loaded = small.load("runs/grid/small/act=nmda:10,maps=16,seed=0")
episode = loaded.episode(seed=1)              # {"cell": (walker, step), "action": ..., ...}
activity = loaded.activations(episode)        # {"ffn": (walker, step, layer, neuron), ...}
loaded.axes["ffn"]                            # ("walker", "step", "layer", "neuron")
"""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from llm.common.files import write_file

from .runs import make_folder

Table = dict[str, np.ndarray]


class Loaded(ABC):
    """One trained run.

    Args:
        folder: of the run.
        model: at the last checkpoint, in evaluation mode.
        settings: of its training.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]]  # name of an array of an episode or of activations -> its axes

    def __init__(self, folder: Path, model: nn.Module, settings: Any) -> None:
        self.folder, self.model, self.settings = folder, model.eval(), settings

    @abstractmethod
    def episode(self, seed: int = 0) -> Table:
        """Return what the model reads and should answer, drawn anew for each seed (at least 0); on the CPU."""

    @abstractmethod
    def activations(self, episode: Table) -> Table:
        """Return the model's activity in an episode, its logits among it, without gradients; on the CPU."""


def write_recording(loaded: Loaded, seed: int, path: Path) -> dict[str, tuple[int, ...]]:
    """Write an episode and the activity in it to an .npz file; returns the shape of each array.

    The file also has `axes`, a JSON object of the names of each array's axes.
    """
    episode = loaded.episode(seed)
    arrays = episode | loaded.activations(episode)
    file = io.BytesIO()
    axes = np.array(json.dumps({name: loaded.axes[name] for name in arrays}))
    np.savez_compressed(file, **arrays, axes=axes)  # type: ignore[arg-type]  # any name but "file" is an array's
    make_folder(path.parent)
    write_file(path, file.getvalue())
    return {name: array.shape for name, array in arrays.items()}
