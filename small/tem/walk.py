"""A walk of a trained model with the activity of its codes and hippocampal units, for the page of its folder."""

from pathlib import Path

import numpy as np

from ..spaces import space
from ..walk_page import write_walk
from .loading import load
from .recording import Units
from .runs import TemRun

CODES, HIPPOCAMPAL = 8, 4  # units that can be chosen


def record_walk(folder: Path, run: TemRun, units: Units, device: str = "cpu") -> None:
    """Write walk.json of one walk to `folder`: the codes with the greatest band scores, and hippocampal units."""
    loaded = load(run.folder, device)
    episode = loaded.episode()
    found = loaded.activations(episode)
    activity = {}
    for unit in np.argsort(-units.band.nan_to_num(-1).numpy(), kind="stable")[:CODES]:
        score = float(units.band[unit])
        activity[f"code {unit}" + (f" (band score {score:.2f})" if np.isfinite(score) else "")] = found["code"][
            0, :, unit
        ]
    kind, title = ("attention", "memory neuron") if "attention" in found else ("conjunction", "conjunction")
    each = np.nan_to_num(found[kind][0])  # (steps, units)
    for unit in np.sort(np.argsort(-each.std(0), kind="stable")[:HIPPOCAMPAL]):
        activity[f"{title} {unit}"] = each[:, unit]
    walked = space(run.settings.spaces[int(episode["space"][0])])
    write_walk(folder, run.folder.resolve().name, walked, episode["cell"][0], activity)
