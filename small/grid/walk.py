"""A walk of a trained navigator with the activity of its place cells and position codes, for the page of its folder."""

from pathlib import Path

import numpy as np

from ..walk_page import write_walk
from .loading import load
from .recording import Neurons
from .runs import GridRun

PLACE_CELLS, CODES = 8, 4  # units that can be chosen


def record_walk(folder: Path, run: GridRun, neurons: Neurons, device: str = "cpu") -> None:
    """Write walk.json of one walk to `folder`: the feed-forward neurons with the greatest scores, and codes."""
    loaded = load(run.folder, device)
    episode = loaded.episode()
    found = loaded.activations(episode)
    scores = neurons.ffn_scores.numpy()  # (layers, neurons)
    order = np.argsort(-np.nan_to_num(scores, nan=-1), axis=None, kind="stable")
    activity = {}
    for layer, neuron in zip(*np.unravel_index(order[:PLACE_CELLS], scores.shape), strict=True):
        if np.isfinite(score := scores[layer, neuron]):
            name = f"layer {layer + 1}, neuron {neuron} (place-cell score {score:.2f})"
            activity[name] = found["ffn"][0, :, layer, neuron]
    for unit in np.argsort(-neurons.code_grid.nan_to_num(-1).numpy(), kind="stable")[:CODES]:
        activity[f"position code {unit}"] = found["code"][0, :, unit]
    write_walk(folder, run.folder.resolve().name, run.space, episode["cell"][0], activity)
