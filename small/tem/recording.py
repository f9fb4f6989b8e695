"""Recording of units of a trained model: rate maps, grid and band scores compared with shuffles, remapping.

Whittington et al. 2022, Sections 3 and 6, Figures 1, 2b, 5. Two recordings:

    codes      walkers from the middle of a room, which share the first code, once they are anywhere -> rate maps ->
               grid and band scores, and those of shuffles
    remapping  a walk in each of several environments fills its memory -> other walkers go on from there, the memory
               stays -> rate maps of codes and of hippocampal units in both halves of these walkers

Hippocampal units are, of TEM-t, its memory neurons: the attention weights, one neuron for each memory in the order in
which they were made; of TEM, its conjunctions of what is seen and where. An untrained model, of the same initial
weights, tells how much of all this is learned.

Dimension letters: E environments, W walkers, T steps, S cells of the room, C components of a code, M hippocampal units,
L shuffles.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.common.errors import UserError

from ..draws import seeds_of
from ..experiment.runs import copy_into, measured_once
from ..rate_maps import RateMaps, band_scores, grid_scores
from ..spaces import Graph, space
from ..walks import ActionSampler
from .machine import Machine
from .memory import attention, conjunction
from .model import TemTransformer
from .runs import TemRun, digest, largest_space
from .settings import SQUARE, RecordingSettings
from .train import Run

UNITS = "units.safetensors"
SETTLE = 100  # steps of a walk that are left out: until then where a walker is tells how long it has walked
FLAT = 1e-6  # a map varies less than this of its size by rounding


class Units(NamedTuple):
    """What was measured of a run; scores are NaN in a room that is not square."""

    codes: Tensor  # (C, S), rates of the codes
    by_place: Tensor  # (): the share of the codes' variance that the cell explains, of one half of walkers by the other
    grid: Tensor  # (C,)
    grid_shuffled: Tensor  # (L, C)
    band: Tensor  # (C,)
    band_shuffled: Tensor  # (L, C)
    hippocampal: Tensor  # (E, 2, M, S'), rates in both halves, in the largest room of training; NaN where never walked
    entorhinal: Tensor  # (E, 2, C, S'), of the codes there

    def passes(self, kind: str) -> Tensor:
        """(C,) bool: which units have a score, "grid" or "band", that at most 5 in 100 of it and its own shuffles reach
        (one-sided test by permutation); by chance it is one in twenty."""
        own, shuffled = getattr(self, kind), getattr(self, f"{kind}_shuffled")
        reached = 1 + (shuffled >= own).sum(0)
        return own.isfinite() & (reached <= 0.05 * (1 + len(shuffled)))

    def share(self, kind: str) -> float:
        """The share of units that pass "grid" or "band"; that are "grids" and not bands, or "bands": that pass, the
        one with a band score of at most 1/2, which two equal waves have, the other above. NaN in a room that is no
        square."""
        if self.grid.isnan().all():
            return float("nan")
        found = self.passes(kind.removesuffix("s"))
        if kind == "grids":
            found &= self.band <= 0.5
        if kind == "bands":
            found &= self.band > 0.5
        return found.double().mean().item()


def record_once(saved: TemRun, how: RecordingSettings, device: str = "cpu", trained: bool = True) -> Units:
    """Return the units of a run at its last checkpoint, or with its initial weights; kept in its folder.

    Raises:
        UserError: a damaged checkpoint; a room of other actions; a cell that no walker came to.
    """
    room = room_of(saved, how)
    facts = asdict(how) | {"room": digest(room), "step": saved.last.step if trained else 0}

    def measure() -> Units:
        run = Run(saved, device)
        if trained:
            copy_into(run.tensors(), saved.folder)
        return record(run, room, how)

    name = UNITS if trained else f"untrained_{UNITS}"
    return measured_once(saved.folder / name, Units, facts, measure)


def room_of(saved: TemRun, how: RecordingSettings) -> Graph:
    """Where codes are recorded; UserError for a room of other actions than those of training.

    By default the square, after a training in squares; a model trained in mazes or anywhere else has never seen one and
    is recorded in the largest space of its training.
    """
    largest = largest_space(saved.settings)
    if how.room is None:
        square = space(SQUARE)
        trained_in_squares = all(space(text).shape is not None for text in saved.settings.spaces)
        return square if trained_in_squares and square.actions == largest.actions else largest
    room = space(how.room)
    if room.actions != largest.actions:
        raise UserError(
            f"room {how.room} has the actions {', '.join(room.actions)}, and {saved.folder.name} was trained on "
            f"{', '.join(largest.actions)}: give a room of that structure"
        )
    return room


@torch.no_grad()
def record(run: Run, room: Graph, how: RecordingSettings) -> Units:
    """Both recordings; the model is left in evaluation mode."""
    run.model.eval()
    return Units(*(part.float() for part in (*_codes(run, room, how), *_remapping(run, how))))


# ---- Codes in a room -------------------------------------------------------------------------------------------------


def _codes(run: Run, room: Graph, how: RecordingSettings) -> tuple[Tensor, ...]:
    random = np.random.default_rng(seeds_of(run.settings.seed, "record codes"))
    start, steps = np.full(how.walkers, _middle(room)), SETTLE + how.steps
    cells, actions = (torch.from_numpy(each).to(run.device) for each in ActionSampler(room).walks(start, steps, random))
    codes, cells = run.model.codes(actions)[:, SETTLE + 1 :], cells[:, SETTLE + 1 :]  # type: ignore[operator]
    rates = _rates(codes, cells, room)
    if missed := int(rates.isnan().any(0).sum()):
        raise UserError(
            f"{how.walkers} walkers never came to {missed} of the {rates.shape[1]} cells of the room: give more "
            "--walkers or --steps, or a smaller --room"
        )
    shuffled = [
        _rates(_others(codes, by), cells, room) for by in random.permutation(how.walkers - 1)[: how.shuffles] + 1
    ]
    scores: list[Tensor] = []
    for score in (grid_scores, band_scores):
        scores += [_scored(score, rates, room), torch.stack([_scored(score, each, room) for each in shuffled])]
    return rates, _explained(codes, cells, room), *scores


def _others(codes: Tensor, by: int) -> Tensor:
    """A shuffle: each walker has the codes of another one at the same time.

    What a unit does from step to step stays, and from the start on; where it does so is lost.
    """
    return codes.roll(int(by), 0)


def _explained(codes: Tensor, cells: Tensor, room: Graph) -> Tensor:
    """The share of the variance of one half's codes that the other half's rates in the same cells explain."""
    half = len(codes) // 2
    expected = _rates(codes[:half], cells[:half], room).T.to(codes)[cells[half:]]
    known = expected.isfinite().all(-1)
    rest = codes[half:][known] - expected[known]
    return 1 - rest.square().sum() / (codes[half:][known] - codes[half:][known].mean(0)).square().sum()


def _middle(room: Graph) -> int:
    """The cell nearest to the mean place; the first where nothing says where cells are."""
    if room.places is None:
        return 0
    return int(np.square(room.places - room.places.mean(0)).sum(1).argmin())


def _scored(score: Callable[[Tensor], Tensor], rates: Tensor, room: Graph) -> Tensor:
    """(C, S) -> (C,), NaN in a room that is not square."""
    if room.shape is None:
        return torch.full_like(rates[:, 0], torch.nan)
    return score(rates.unflatten(1, room.shape))


def _rates(activity: Tensor, cells: Tensor, room: Graph) -> Tensor:
    """activity (W, T, R) at cells (W, T) -> (R, S), by the time in each cell; NaN where nobody came."""
    maps = RateMaps(len(room.cells), activity.shape[-1], activity.device)
    maps.add(cells.flatten(), activity.flatten(0, 1))
    return maps.rates("occupancy").masked_fill(maps.visits == 0, torch.nan)


# ---- Remapping -------------------------------------------------------------------------------------------------------


def _remapping(run: Run, how: RecordingSettings) -> tuple[Tensor, Tensor]:
    """Rates of hippocampal units (E, 2, M, S) and of codes (E, 2, C, S)."""
    room = largest_space(run.settings)
    found = [_in_environment(run, room, how, number) for number in range(how.environments)]
    fewest = min(hippocampal.shape[1] for hippocampal, _ in found)  # a neuron that one memory never used has no map
    return torch.stack([hippocampal[:, :fewest] for hippocampal, _ in found]), torch.stack([c for _, c in found])


def _in_environment(run: Run, room: Graph, how: RecordingSettings, number: int) -> tuple[Tensor, Tensor]:
    """(2, M, S) and (2, C, S) of one environment."""
    random = np.random.default_rng(seeds_of(run.settings.seed, "record environment", number))
    symbols = random.integers(run.settings.symbols, size=len(room.cells))  # (S,)
    sampler, steps = ActionSampler(room), run.settings.tested_steps
    filling = sampler.walks(random.integers(len(room.cells), size=1), steps, random)
    # Probes have walked the filling walk too: so their codes have come from the same start.
    after = sampler.walks(np.repeat(filling[0][:, -1], how.probes), steps, random)
    cells, actions = (
        torch.from_numpy(np.concatenate([np.repeat(first, how.probes, axis=0), then[:, 1:]], axis=1)).to(run.device)
        for first, then in zip(filling, after, strict=True)
    )  # (W, 2 T + 1)
    seen = torch.from_numpy(symbols).to(run.device)[cells]
    codes = run.model.codes(actions)  # type: ignore[operator]  # both have some
    units = _hippocampal(run.model, codes, actions, seen, steps)  # (W, T, M)
    halves = [slice(0, how.probes // 2), slice(how.probes // 2, None)]
    return tuple(  # type: ignore[return-value]
        torch.stack([_rates(activity[half], cells[half, steps + 1 :], room) for half in halves])
        for activity in (units, codes[:, steps + 1 :])
    )


def _hippocampal(model: torch.nn.Module, codes: Tensor, actions: Tensor, symbols: Tensor, steps: int) -> Tensor:
    """Activity of hippocampal units after the filling walk of T steps, (W, T, M)."""
    if isinstance(model, TemTransformer):
        filled = model(actions[:1, : steps + 1], symbols[:1, : steps + 1])
        keys = model.code_to_key(codes)
        memories = keys[:, filled.times[0]]  # (W, M, K)
        there = torch.zeros(memories.shape[:2], dtype=torch.long, device=memories.device)
        _, weights = attention(model, keys[:, steps + 1 :], memories, memories, model.sizes.separation, there)
        return weights
    assert isinstance(model, Machine)
    sensory, places = model.bound(symbols[:, steps + 1 :], codes[:, steps + 1 :])
    return conjunction(sensory, places).flatten(2)


@dataclass(frozen=True)
class Remapping:
    """How units of some kind change between environments; the correlations are Pearson's.

    That memory neurons of one number are nowhere alike is so by their making, as every walk is another; that their
    fields are narrow and stay is learned. Neighbours in number were made one after the other, and are neighbours in
    space in every environment: `pairs` is what this leaves, and the same of codes is the comparison.

    Args:
        within: of each unit's maps in both halves, the mean over environments, (M,).
        across: of its maps in two environments, one half each, the mean over pairs, (M,).
        pairs: how much alike two units' maps are, in one environment against another: the correlation over all pairs of
            units, the mean over pairs of environments. 1 where neighbours stay neighbours, 0 where nothing is kept.
    """

    within: np.ndarray
    across: np.ndarray
    pairs: float


def remapping(rates: Tensor) -> Remapping:
    """rates (E, 2, M, S) -> correlations, over the cells that all maps have.

    A unit that is flat in a map is left out of what needs it (NaN).
    """
    known = rates.double()[..., rates.isfinite().flatten(0, -2).all(0)]
    standard = known - known.mean(-1, keepdim=True)
    length = standard.norm(dim=-1, keepdim=True)
    standard = torch.where(length > FLAT * known.norm(dim=-1, keepdim=True), standard / length, torch.nan)
    between = torch.einsum("ems,fms->efm", standard[:, 0], standard[:, 1]).numpy()  # (E, E, M)
    same = np.eye(len(rates), dtype=bool)
    upper = np.triu_indices(rates.shape[2], 1)
    alike = torch.einsum("ems,ens->emn", standard[:, 0], standard[:, 0]).numpy()[:, upper[0], upper[1]]  # (E, pairs)
    found = []
    for one, other in itertools.combinations(alike, 2):
        both = np.isfinite(one) & np.isfinite(other)
        if both.sum() > 2:
            found.append(np.corrcoef(one[both], other[both])[0, 1])
    return Remapping(mean_known(between[same]), mean_known(between[~same]), float(np.mean(found)) if found else np.nan)


def mean_known(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is not NaN; NaN of nothing."""
    known = np.isfinite(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(0) / np.maximum(count, 1), np.nan)
