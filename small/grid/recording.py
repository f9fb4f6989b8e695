"""What the neurons of a trained navigator do while it walks one map: rate maps, and how sparse they are.

Kim et al. 2023, Section 3.2, Appendices A.1.3 and A.10: 10^5 steps on one of the training maps, the activity of
the masked observation's token once per segment, and the cell that it asks for. A *neuron* is one of the feed-forward
network (after the activation) or one weight of a head's softmax, of a place in the context: 65 places of 8 heads in 2
layers.

Next to every score stand two controls: the same run with its initial weights, and shuffles, in which every walker has
the activity of another one at the same time.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from llm.common.errors import UserError

from ..draws import seeds_of
from ..experiment.runs import checkpoint_step, measured_once
from ..rate_maps import (
    RateMaps,
    firing,
    gini,
    grid_scores,
    map_sparsity,
    place_cell_scores,
    spatial_information,
    stability,
    trusted_rates,
)
from ..spaces import Graph
from .model import Layer, Memory
from .runs import read_asked
from .settings import RecordingSettings
from .train import Run, load

WALKERS = 50  # that share the steps, on one map; each has a code of its own
CHUNK = 1000  # steps of a walk whose codes are made at once
NEURONS = "neurons.safetensors"
KINDS = ("ffn", "softmax")


class LayerMaps:
    """Rate maps of the neurons of a layer: of all walkers, of both halves of them, and of shuffles.

    Args:
        cells, neurons: S, R.
        shifts: a shuffle for each: walker w has the activity of walker w - shift.
        device: of the sums.
    """

    def __init__(self, cells: int, neurons: int, shifts: Sequence[int], device: torch.device) -> None:
        self.whole, *self.halves = (RateMaps(cells, neurons, device) for _ in range(3))
        self.shifts, self.shuffled = shifts, [RateMaps(cells, neurons, device) for _ in shifts]

    def add(self, cells: Tensor, activity: Tensor) -> None:
        """cells (W,), activity (W, R), of one moment of all walkers."""
        self.whole.add(cells, activity)
        middle = len(cells) // 2
        for half, now in zip(self.halves, (slice(None, middle), slice(middle, None)), strict=True):
            half.add(cells[now], activity[now])
        for shift, maps in zip(self.shifts, self.shuffled, strict=True):
            maps.add(cells, activity.roll(shift, 0))


@dataclass(frozen=True)
class Recording:
    """Of one map; maps for each layer, from the first."""

    ffn: list[LayerMaps]  # F neurons
    softmax: list[LayerMaps]  # H (memory + segment + 1) neurons, head by head, the earliest place first
    codes: RateMaps  # C components of the recurrent code, of one walker at every step
    shuffled_codes: list[RateMaps]  # of the walk's cells moved in time
    gini: Tensor  # (layers,), mean Gini index of the size of the feed-forward activity of a moment


@torch.no_grad()
def record(run: Run, map_index: int = 0, steps: int = 100_000, walkers: int = WALKERS, shuffles: int = 20) -> Recording:
    """Walk one map and add up the activity of every neuron by the cell that is asked for.

    Args:
        run: trained; it is left in evaluation mode.
        map_index: from 0; N and more are novel.
        steps: of all walkers together; each walks whole segments, the first of which, without a whole memory, is left
            out.
        walkers: at once.
        shuffles: of the cells; fewer than walkers.

    Raises:
        UserError: too few steps for one whole segment of each walker; no such map.
    """
    length, cells = run.sizes.segment, len(run.world.graph.cells)
    segments = steps // (walkers * length)
    if segments < 1:
        raise UserError(f"steps {steps} are too few for {walkers} walkers with segments of {length}")
    if not 0 <= map_index < len(run.world.letters):
        raise UserError(f"map {map_index} is not there: give 0 to {len(run.world.letters) - 1}")
    if shuffles >= walkers:
        raise UserError(f"shuffles {shuffles} must be fewer than the {walkers} walkers")
    random = np.random.default_rng(seeds_of(run.settings.seed, "record shuffles", map_index))
    shifts = (random.permutation(walkers - 1)[:shuffles] + 1).tolist()
    skipped = -(-run.sizes.memory // length)  # until the memory is whole
    walks = run.world.trial("record", map_index, walkers, (segments + skipped) * length, only=map_index)
    layers, device = run.sizes.layers, run.device
    ffn = [LayerMaps(cells, run.sizes.neurons, shifts, device) for _ in range(layers)]
    softmax = [LayerMaps(cells, run.sizes.heads * (run.sizes.window + 1), shifts, device) for _ in range(layers)]
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
    codes = _codes(run, map_index, steps, (random.integers(1, steps, size=shuffles)).tolist())
    return Recording(ffn, softmax, *codes, ginis / segments)


def _codes(run: Run, map_index: int, steps: int, shifts: Sequence[int]) -> tuple[RateMaps, list[RateMaps]]:
    """Of one walker: another starts with another code and elsewhere, so that their codes of a cell are not one.

    The code depends on the actions alone, not on the letters. A shuffle moves the cells by so many steps of the walk.
    """
    walk = run.world.trial("record codes", map_index, 1, steps, only=map_index)
    found, *shuffled = (RateMaps(len(run.world.graph.cells), run.sizes.code, run.device) for _ in (0, *shifts))
    moved = [walk.cells[0, 1:].roll(shift) for shift in shifts]
    code = run.first_code("record codes", map_index, 1)
    for begin in range(0, steps, CHUNK):
        codes = run.model.codes(code, walk.actions[:, begin : begin + CHUNK + 1])[0]  # the first is known already
        found.add(walk.cells[0, begin + 1 : begin + CHUNK + 1], codes[1:])
        for maps, cells in zip(shuffled, moved, strict=True):
            maps.add(cells[begin : begin + CHUNK], codes[1:])
        code = codes[-1:]
    return found, shuffled


class Neurons(NamedTuple):
    """What was measured of a run's neurons; the tensors are on the CPU.

    Rates are as they are scored and drawn: negative ones are 0, and so are cells with too few visits. A silent neuron
    has NaN for a score. R neurons are F of the feed-forward network, or H (memory + segment + 1) of the softmax.
    """

    ffn_rates: Tensor  # (layers, R, S)
    ffn_peaks: Tensor  # (layers, R), activity per visit of the best cell
    ffn_scores: Tensor  # (layers, R), place-cell scores
    ffn_shuffled: Tensor  # (L, layers, R), of the shuffles
    ffn_information: Tensor  # (layers, R), bits
    ffn_sparsity: Tensor  # (layers, R)
    ffn_stability: Tensor  # (layers, R)
    softmax_rates: Tensor
    softmax_peaks: Tensor
    softmax_scores: Tensor
    softmax_shuffled: Tensor
    softmax_information: Tensor
    softmax_sparsity: Tensor
    softmax_stability: Tensor
    codes: Tensor  # (C, S), rates of the recurrent code
    code_grid: Tensor  # (C,), grid scores; NaN in a space that is not square
    code_grid_shuffled: Tensor  # (L, C)
    gini: Tensor  # (layers,), of the size of the feed-forward activity

    def passes(self, kind: str) -> Tensor:
        """(layers, R) bool: which neurons have a score that no more than 5 in 100 of it and its shuffles reach."""
        own, shuffled = getattr(self, f"{kind}_scores"), getattr(self, f"{kind}_shuffled")
        return own.isfinite() & (1 + (shuffled >= own).sum(0) <= 0.05 * (1 + len(shuffled)))


def record_once(folder: Path, how: RecordingSettings, device: str = "cpu", trained: bool = True) -> Neurons:
    """Return the neurons of a run at its last checkpoint, or with its initial weights; kept in its folder.

    They are recorded again if the run was trained further since, or was recorded otherwise.

    Raises:
        UserError: no trained run, or one that cannot be recorded so.
    """

    def measure() -> Neurons:
        run = load(folder, device) if trained else Run(read_asked(folder), device)
        found = record(run, how.map_index, how.steps, shuffles=how.shuffles)
        graph = run.world.graph
        parts = {}
        for kind in KINDS:
            layers = [_measured(layer, graph, how) for layer in getattr(found, kind)]
            for name in layers[0]:
                stacked = torch.stack([layer[name] for layer in layers])
                parts[f"{kind}_{name}"] = stacked.transpose(0, 1) if name == "shuffled" else stacked
        parts["codes"] = found.codes.rates(how.normalisation)
        parts["code_grid"], *shuffled = _grid([found.codes, *found.shuffled_codes], graph)
        parts["code_grid_shuffled"] = torch.stack(shuffled)
        return Neurons(**{name: each.float() for name, each in parts.items()}, gini=found.gini.float())

    facts = asdict(how) | {"trial": checkpoint_step(folder) if trained else 0}
    return measured_once(folder / (NEURONS if trained else f"untrained_{NEURONS}"), Neurons, facts, measure)


def _measured(maps: LayerMaps, graph: Graph, how: RecordingSettings) -> dict[str, Tensor]:
    """The measures of a layer by the ends of their names in `Neurons`."""
    visits = maps.whole.visits
    known = visits >= how.least_visits

    def trusted(normalisation: str) -> Tensor:
        """Rates of all neurons and then of each shuffle, one under the other, ((1 + L) R, S)."""
        rates = torch.cat([each.rates(normalisation) for each in (maps.whole, *maps.shuffled)])
        return trusted_rates(rates, visits, how.least_visits)

    every, count = trusted("occupancy"), maps.whole.sums.shape[1]
    firing_ones, rates = firing(every, how.least_rate), trusted(how.normalisation)
    scores = torch.where(firing_ones, place_cell_scores(rates, graph), torch.nan).view(-1, count)
    by_visit, loud = every[:count], firing_ones[:count]
    first, second = (half.rates("occupancy").clamp(min=0) for half in maps.halves)
    both = known & (maps.halves[0].visits > 0) & (maps.halves[1].visits > 0)
    measures = {
        "information": spatial_information(by_visit, visits * known),
        "sparsity": map_sparsity(by_visit, visits * known),
        "stability": stability(first, second, both),
    }
    return {
        "rates": rates[:count],
        "peaks": by_visit.amax(1),
        "scores": scores[0],
        "shuffled": scores[1:],
        **{name: torch.where(loud, each, torch.nan) for name, each in measures.items()},
    }


def _grid(maps: Sequence[RateMaps], graph: Graph) -> tuple[Tensor, ...]:
    """Grid scores (C,) of the rates per visit of each maps, NaN in a space that is not square."""
    rates = torch.stack([each.rates("occupancy") for each in maps])  # (maps, C, S)
    if graph.shape is None:
        return torch.full_like(rates[..., 0], torch.nan).unbind()
    return grid_scores(rates.flatten(0, 1).unflatten(1, graph.shape)).view(len(maps), -1).unbind()
