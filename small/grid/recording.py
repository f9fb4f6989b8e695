"""What the neurons of a trained navigator do while it walks one map: rate maps, and how sparse they are.

Kim et al. 2023, Section 3.2, Appendices A.1.3 and A.10: 10^5 steps on one of the training maps, the activity of
the masked observation's token once per segment, and the cell that it asks for. A *neuron* is one of the feed-forward
network (after the activation) or one weight of a head's softmax, of a place in the context: 65 places of 8 heads in 2
layers.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from llm.common.errors import UserError

from ..experiment.runs import checkpoint_step, measured_once
from ..rate_maps import RateMaps, gini, place_cell_scores
from .model import Layer, Memory
from .settings import RecordingSettings
from .train import Run, load

WALKERS = 50  # that share the steps, on one map; each has a code of its own
CHUNK = 1000  # steps of a walk whose codes are made at once
NEURONS = "neurons.safetensors"


@dataclass(frozen=True)
class Recording:
    """Of one map; a RateMaps for each layer, from the first."""

    ffn: list[RateMaps]  # F neurons
    softmax: list[RateMaps]  # H (memory + segment + 1) neurons, head by head, the earliest place first
    codes: RateMaps  # C components of the recurrent code, of one walker at every step
    gini: Tensor  # (layers,), mean Gini index of the size of the feed-forward activity of a moment


@torch.no_grad()
def record(run: Run, map_index: int = 0, steps: int = 100_000, walkers: int = WALKERS) -> Recording:
    """Walk one map and add up the activity of every neuron by the cell that is asked for.

    Args:
        run: trained; it is left in evaluation mode.
        map_index: from 0; N and more are novel.
        steps: of all walkers together; each walks whole segments, the first of which, without a whole memory, is left
            out.
        walkers: at once.

    Raises:
        UserError: too few steps for one whole segment of each walker; no such map.
    """
    length, cells = run.sizes.segment, len(run.world.graph.cells)
    segments = steps // (walkers * length)
    if segments < 1:
        raise UserError(f"steps {steps} are too few for {walkers} walkers with segments of {length}")
    if not 0 <= map_index < len(run.world.letters):
        raise UserError(f"map {map_index} is not there: give 0 to {len(run.world.letters) - 1}")
    skipped = -(-run.sizes.memory // length)  # until the memory is whole
    walks = run.world.trial("record", map_index, walkers, (segments + skipped) * length, only=map_index)
    layers, device = run.sizes.layers, run.device
    ffn = [RateMaps(cells, run.sizes.neurons, device) for _ in range(layers)]
    softmax = [RateMaps(cells, run.sizes.heads * (run.sizes.window + 1), device) for _ in range(layers)]
    ginis = torch.zeros(layers, dtype=torch.float64, device=device)
    seen: dict[int, Tensor] = {}
    acts = [cast(Layer, layer).ffn.act for layer in run.model.layers]
    hooks = [
        act.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out[:, -1]}))
        for index, act in enumerate(acts)
    ]
    run.model.eval()
    code = run.first_code("record", map_index, walkers)
    memory: Memory = ()
    try:
        for segment in range(segments + skipped):
            now = slice(segment * length, (segment + 1) * length + 1)
            answer = run.model(code, walks.actions[:, now], walks.letters[:, now][:, :-1], memory, (length,))
            code, memory = answer.code, answer.memory
            if segment < skipped:
                continue
            asked = walks.cells[:, now][:, -1]
            for index in range(layers):
                ffn[index].add(asked, seen[index])
                softmax[index].add(asked, answer.weights[index][:, :, 0].flatten(1))
                ginis[index] += gini(seen[index].abs()).mean()  # signs cancel in Eq. S13's mean: nothing bounds it
    finally:
        for hook in hooks:
            hook.remove()
    return Recording(ffn, softmax, _codes(run, map_index, steps), ginis / segments)


def _codes(run: Run, map_index: int, steps: int) -> RateMaps:
    """Of one walker: another starts with another code and elsewhere, so that their codes of a cell are not one.

    The code depends on the actions alone, not on the letters.
    """
    walk = run.world.trial("record codes", map_index, 1, steps, only=map_index)
    found = RateMaps(len(run.world.graph.cells), run.sizes.code, run.device)
    code = run.first_code("record codes", map_index, 1)
    for begin in range(0, steps, CHUNK):
        codes = run.model.codes(code, walk.actions[:, begin : begin + CHUNK + 1])[0]  # the first is known already
        found.add(walk.cells[0, begin + 1 : begin + CHUNK + 1], codes[1:])
        code = codes[-1:]
    return found


class Neurons(NamedTuple):
    """What was measured of a run's neurons; the tensors are on the CPU."""

    ffn_rates: Tensor  # (layers, F, S)
    ffn_scores: Tensor  # (layers, F), place-cell scores
    softmax_rates: Tensor  # (layers, H (memory + segment + 1), S)
    softmax_scores: Tensor  # (layers, H (memory + segment + 1))
    codes: Tensor  # (C, S), rates of the recurrent code
    gini: Tensor  # (layers,), of the size of the feed-forward activity


def record_once(folder: Path, how: RecordingSettings, device: str = "cpu") -> Neurons:
    """Return the neurons of a run at its last checkpoint, kept in its folder in neurons.safetensors.

    They are recorded again if the run was trained further since, or was recorded otherwise.

    Raises:
        UserError: no trained run, or one that cannot be recorded so.
    """

    def measure() -> Neurons:
        run = load(folder, device)
        found = record(run, how.map_index, how.steps)
        rates = {
            name: torch.stack([layer.rates(how.normalisation) for layer in getattr(found, name)])
            for name in ("ffn", "softmax")
        }
        scores = {
            name: torch.stack([place_cell_scores(layer, run.world.graph) for layer in layers])
            for name, layers in rates.items()
        }
        codes = found.codes.rates(how.normalisation)
        every = (rates["ffn"], scores["ffn"], rates["softmax"], scores["softmax"], codes, found.gini)
        return Neurons(*(each.float() for each in every))

    return measured_once(folder / NEURONS, Neurons, asdict(how) | {"trial": checkpoint_step(folder)}, measure)
