"""What units of a trained model do in a room: rate maps, grid and band scores beside shuffles, remapping.

tem-transformer.txt, Sections 3 and 6, Figures 1, 2b, 5. Two recordings:

    codes      walkers from the middle of a room, which share the first code -> rate maps -> grid and band scores, and
               those of shuffles
    remapping  a walk in each of several environments fills its memory -> other walkers go on from there, the memory
               stays -> rate maps of codes and of hippocampal units in both halves of these walkers

Hippocampal units are, of TEM-t, its memory neurons: the attention weights, one neuron for each memory in the order in
which they were made; of TEM, its conjunctions of what is seen and where.

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

from llm.errors import UserError

from ..draws import seeds_of
from ..folder import copy_into
from ..grid.cells import RateMaps, band_scores, grid_scores
from ..grid.graph import Graph, space
from ..grid.world import Dice
from ..state import measured_once
from .machine import Machine
from .memory import attention, conjunction
from .model import TemTransformer
from .runs import Done
from .train import Run

UNITS = "units.safetensors"
SETTLE = 10  # steps of a walk that are left out: a ReLU's first code is unlike those that are moved on
SQUARE = "15x15"  # larger than any room of training, so that several periods are seen


@dataclass(frozen=True)
class How:
    """How units are measured.

    Args:
        room: of the codes; None is SQUARE, or the largest of training where those are of another structure.
        walkers, steps: of the codes' walks.
        shuffles: for each unit.
        environments: E; their room is the largest of training.
        probes: walkers that go on in each; half of them make one map, half the other.
    """

    room: str | None = None
    walkers: int = 512
    steps: int = 150
    shuffles: int = 100
    environments: int = 4
    probes: int = 64

    def __post_init__(self) -> None:
        least = {"walkers": 2, "steps": SETTLE + 10, "shuffles": 20, "environments": 2, "probes": 2}
        if problems := [
            f"{name} {getattr(self, name)} must be at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]:
            raise UserError("; ".join(problems))


class Units(NamedTuple):
    """What was measured of a run; scores are NaN in a room that is no square."""

    codes: Tensor  # (C, S), rates of the codes
    by_place: Tensor  # (): the share of the codes' variance that the cell explains
    grid: Tensor  # (C,)
    grid_shuffled: Tensor  # (L, C)
    band: Tensor  # (C,)
    band_shuffled: Tensor  # (L, C)
    hippocampal: Tensor  # (E, 2, M, S'), rates in both halves, in the largest room of training
    entorhinal: Tensor  # (E, 2, C, S'), of the codes there

    def passing(self, kind: str) -> float:
        """The share of units whose score, "grid" or "band", is above the 95th percentile of their own shuffles; by
        chance it is 0.05. NaN in a room that is no square."""
        own, shuffled = getattr(self, kind), getattr(self, f"{kind}_shuffled")
        if own.isnan().all():
            return float("nan")
        return (own > shuffled.nanquantile(0.95, dim=0)).double().mean().item()


def measured(done: Done, how: How, device: str = "cpu") -> Units:
    """The units of a run at its last checkpoint, kept in its folder.

    Raises:
        UserError: a damaged checkpoint; a room of other actions.
    """
    room = room_of(done, how)
    facts = asdict(how) | {"room": room.name, "step": done.last.step}

    def measure() -> Units:
        run = Run(done.model, done.settings, device)
        copy_into(run.tensors(), done.folder)
        return record(run, room, how)

    return measured_once(done.folder / UNITS, Units, facts, measure)


def room_of(done: Done, how: How) -> Graph:
    """Where codes are recorded; UserError for a room of other actions than those of training."""
    largest = max(map(space, done.settings.spaces), key=lambda room: len(room.cells))
    if how.room is None:
        square = space(SQUARE)
        return square if square.actions == largest.actions else largest
    room = space(how.room)
    if room.actions != largest.actions:
        raise UserError(
            f"room {how.room} has the actions {', '.join(room.actions)}, and {done.folder.name} was trained on "
            f"{', '.join(largest.actions)}: give a room of that structure"
        )
    return room


@torch.no_grad()
def record(run: Run, room: Graph, how: How) -> Units:
    """Both recordings; the model is left in evaluation mode."""
    run.model.eval()
    return Units(*(part.float() for part in (*_codes(run, room, how), *_remapping(run, how))))


# ---- Codes in a room -------------------------------------------------------------------------------------------------


def _codes(run: Run, room: Graph, how: How) -> tuple[Tensor, ...]:
    random = np.random.default_rng(seeds_of(run.settings.seed, "record codes"))
    start = np.full(how.walkers, _middle(room))
    cells, actions = (torch.from_numpy(each).to(run.device) for each in Dice(room).walks(start, how.steps, random))
    codes, cells = run.model.codes(actions)[:, SETTLE:], cells[:, SETTLE:]  # type: ignore[operator]  # both have some
    rates = _rates(codes, cells, room)
    spread = codes - rates.T.to(codes)[cells]
    by_place = 1 - spread.square().sum() / (codes - codes.mean((0, 1))).square().sum()
    shuffled = [_rates(_shifted(codes, random), cells, room) for _ in range(how.shuffles)]
    return (
        rates, by_place,
        *itertools.chain(*((score(rates), torch.stack([score(each) for each in shuffled]))
        for score in (_on_squares(grid_scores, room), _on_squares(band_scores, room)))),
    )  # fmt: skip


def _middle(room: Graph) -> int:
    """The cell nearest to the mean place; the first where nothing says where cells are."""
    if room.places is None:
        return 0
    return int(np.square(room.places - room.places.mean(0)).sum(1).argmin())


def _shifted(codes: Tensor, random: np.random.Generator) -> Tensor:
    """A shuffle: all walks after each other, moved in a circle by whole walks and a part of one.

    What one unit does from step to step stays (Langston et al. 2010, one long session); where it did so is lost, and
    the part of a walk sees to it that the walkers' common start is too.
    """
    walkers, steps = codes.shape[:2]
    part = random.integers(steps // 10, steps - steps // 10)
    shift = int(random.integers(1, walkers) * steps + part)
    return codes.flatten(0, 1).roll(shift, 0).view_as(codes)


def _on_squares(score: Callable[[Tensor], Tensor], room: Graph) -> Callable[[Tensor], Tensor]:
    def scored(rates: Tensor) -> Tensor:
        if room.shape is None:
            return torch.full_like(rates[:, 0], torch.nan)
        return score(rates.unflatten(1, room.shape))

    return scored


def _rates(activity: Tensor, cells: Tensor, room: Graph) -> Tensor:
    """activity (W, T, R) at cells (W, T) -> (R, S), by the time in each cell."""
    maps = RateMaps(len(room.cells), activity.shape[-1], activity.device)
    maps.add(cells.flatten(), activity.flatten(0, 1))
    return maps.rates("occupancy")


# ---- Remapping -------------------------------------------------------------------------------------------------------


def _remapping(run: Run, how: How) -> tuple[Tensor, Tensor]:
    """Rates of hippocampal units (E, 2, M, S) and of codes (E, 2, C, S)."""
    room = max(run.environments.spaces, key=lambda one: len(one.cells))
    found = [_in_environment(run, room, how, number) for number in range(how.environments)]
    fewest = min(hippocampal.shape[1] for hippocampal, _ in found)  # a neuron that one memory never used has no map
    return torch.stack([hippocampal[:, :fewest] for hippocampal, _ in found]), torch.stack([c for _, c in found])


def _in_environment(run: Run, room: Graph, how: How, number: int) -> tuple[Tensor, Tensor]:
    """(2, M, S) and (2, C, S) of one environment."""
    random = np.random.default_rng(seeds_of(run.settings.seed, "record environment", number))
    symbols = random.integers(run.settings.symbols, size=len(room.cells))  # (S,)
    dice, steps = Dice(room), run.settings.tested_steps
    filling = dice.walks(random.integers(len(room.cells), size=1), steps, random)
    # Probes have walked the filling walk too: so their codes have come from the same start.
    after = dice.walks(np.repeat(filling[0][:, -1], how.probes), steps, random)
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
    """rates (E, 2, M, S) -> correlations; a unit that is flat in a map is left out of what needs it (NaN)."""
    standard = rates.double() - rates.double().mean(-1, keepdim=True)
    length = standard.norm(dim=-1, keepdim=True)
    standard = torch.where(length > 1e-9, standard / length, torch.nan)
    between = torch.einsum("ems,fms->efm", standard[:, 0], standard[:, 1]).numpy()  # (E, E, M)
    same = np.eye(len(rates), dtype=bool)
    upper = np.triu_indices(rates.shape[2], 1)
    alike = torch.einsum("ems,ens->emn", standard[:, 0], standard[:, 0]).numpy()[:, upper[0], upper[1]]  # (E, pairs)
    found = []
    for one, other in itertools.combinations(alike, 2):
        both = np.isfinite(one) & np.isfinite(other)
        found.append(np.corrcoef(one[both], other[both])[0, 1] if both.sum() > 2 else np.nan)
    return Remapping(np.nanmean(between[same], 0), np.nanmean(between[~same], 0), float(np.nanmean(found)))
