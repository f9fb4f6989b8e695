"""What is measured of units, on a model whose codes are known waves; scores and correlations against slow counts."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from llm.errors import UserError
from small.grid.graph import space
from small.tem import recording
from small.tem.machine import MachineSizes
from small.tem.memory import Rule
from small.tem.model import Sizes, TemTransformer
from small.tem.recording import How, Units, measured, record, remapping
from small.tem.runs import read_runs
from small.tem.train import Model, Run, Settings, train

ROOM, PERIOD = space("15x15"), 6.0
SETTINGS = Settings(spaces=("5x5",), tested_steps=400)
HOW = How(walkers=64, steps=120, shuffles=40, environments=3, probes=40)


def waves(mixed: bool, store: str = "new") -> Run:
    """TEM-t with codes of three plane waves at 60 degrees, two components each; mixed so that every one is a grid."""
    run = Run(Model(Sizes(code=6, keys=6, store=store, below=0.98)), SETTINGS)
    model = run.model
    assert isinstance(model, TemTransformer)
    start = torch.tensor([1.0, 0, 1, 0, 1, 0])
    mixing = torch.eye(6)
    if mixed:
        # Cosines of three waves about one place in the first component; the others have it elsewhere.
        mixing = torch.linalg.qr(
            torch.stack([turned_start(*shift) for shift in ((0, 0), (1, 2), (3, 1), (2, 4), (4, 3), (5, 1))])
        )[0].mT
    with torch.no_grad():
        model.codes.start.copy_(start @ mixing)
        model.codes.generators.zero_()
        for action, (down, right) in enumerate(steps_of()):
            for wave in range(3):
                angle = phase(wave, down, right)
                model.codes.generators[action, 2 * wave, 2 * wave + 1] = angle
            model.codes.generators[action] = mixing.T @ model.codes.generators[action] @ mixing
        model.code_to_key.weight.copy_(6 * torch.eye(6))
    return run


def phase(wave: int, down: float, right: float) -> float:
    turn = 0.2 + wave * math.pi / 3
    return 4 * math.pi / (math.sqrt(3) * PERIOD) * (math.cos(turn) * right + math.sin(turn) * down)


def turned_start(down: float, right: float) -> torch.Tensor:
    found = [f(phase(wave, down, right)) for wave in range(3) for f in (math.cos, math.sin)]
    return torch.tensor(found)


def steps_of() -> list[tuple[int, int]]:
    """What each action does to row and column, read off the room."""
    width, middle, found = 15, 7 * 15 + 7, []
    for action in range(len(ROOM.actions)):
        row, column = divmod(int(ROOM.targets[middle, action]), width)
        found.append((row - 7, column - 7))
    return found


def test_waves_are_bands_and_their_sums_are_grids() -> None:
    bands = record(waves(mixed=False), ROOM, HOW)
    assert bands.by_place == pytest.approx(1, abs=1e-5)
    rows, columns = np.mgrid[-7:8, -7:8]
    expected = [[f(phase(w, *at)) for at in zip(rows.flat, columns.flat, strict=True)] for w in range(3) for f in
                (math.cos, math.sin)]  # fmt: skip
    for rates, wave in zip(bands.codes, expected, strict=True):
        assert abs(np.corrcoef(rates, wave)[0, 1]) > 0.9999
    assert bands.band.min() > 0.95 and bands.passing("band") == 1 and bands.passing("grid") < 1
    grids = record(waves(mixed=True), ROOM, HOW)
    assert grids.grid[0] > 1 and grids.band[0] < 0.6 < bands.band.min()
    assert grids.passing("grid") > 0


def test_a_share_passes_by_chance() -> None:
    random = torch.Generator().manual_seed(0)
    own, shuffled = torch.randn(4000, generator=random), torch.randn(200, 4000, generator=random)
    units = Units(*[torch.zeros(1)] * 2, own, shuffled, own + 9, shuffled, *[torch.zeros(1)] * 2)
    assert units.passing("grid") == pytest.approx(0.05, abs=0.015) and units.passing("band") == 1
    none = units._replace(grid=torch.full((3,), math.nan), grid_shuffled=torch.full((20, 3), math.nan))
    assert math.isnan(none.passing("grid"))


def test_memory_neurons_fire_where_they_were_made_and_remap() -> None:
    units = record(waves(mixed=False), ROOM, HOW)
    assert units.hippocampal.shape[:2] == (3, 2) and units.hippocampal.shape[3] == 25
    assert units.hippocampal.shape[2] == 25  # a memory for every cell of a room of which all has been seen
    for halves in units.hippocampal:  # each its own cell, the same in both halves
        peaks = halves.argmax(-1)
        assert torch.equal(peaks[0], peaks[1]) and sorted(peaks[0].tolist()) == list(range(25))
    found = remapping(units.hippocampal)
    assert found.within.min() > 0.9 and abs(found.across.mean()) < 0.1 and abs(found.pairs) < 0.1
    assert remapping(units.entorhinal).within.min() > 0.9


def test_conjunctions_are_what_is_seen_times_where() -> None:
    run = Run(Model(MachineSizes(code=6, places=4, sensory=10), Rule()), replace(SETTINGS, tested_steps=20))
    units = record(run, ROOM, HOW)
    assert units.hippocampal.shape == (3, 2, 40, 25) and units.entorhinal.shape == (3, 2, 6, 25)
    maps = units.hippocampal[0, 0].view(10, 4, 25)
    # In every cell two sensory components, those of its symbol, are on, each with the same place vector.
    for cell in range(25):
        on = (maps[:, :, cell].abs().sum(1) > 1e-6).nonzero().flatten().tolist()
        if on:
            assert len(on) == 2
            torch.testing.assert_close(maps[on[0], :, cell], maps[on[1], :, cell])


def test_remapping_is_pearsons_by_hand() -> None:
    rates = torch.rand(3, 2, 5, 12, generator=torch.Generator().manual_seed(1))
    rates[1] = 0.7 * rates[1] + rates[0]
    rates[:, :, 4] = 2.0  # flat
    found, maps = remapping(rates), rates.double().numpy()

    def r(one: np.ndarray, other: np.ndarray) -> float:
        return float(stats.pearsonr(one, other).statistic)

    for unit in range(4):
        within = np.mean([r(maps[e, 0, unit], maps[e, 1, unit]) for e in range(3)])
        across = np.mean([r(maps[e, 0, unit], maps[f, 1, unit]) for e, f in itertools.permutations(range(3), 2)])
        assert found.within[unit] == pytest.approx(within) and found.across[unit] == pytest.approx(across)
    assert np.isnan(found.within[4]) and np.isnan(found.across[4])
    alike = [[r(maps[e, 0, a], maps[e, 0, b]) for a, b in itertools.combinations(range(4), 2)] for e in range(3)]
    expected = np.mean([r(np.array(a), np.array(b)) for a, b in itertools.combinations(alike, 2)])
    assert found.pairs == pytest.approx(expected)


def test_what_was_measured_is_kept_until_the_run_or_the_question_changes(tmp_path: Path, monkeypatch) -> None:
    settings = Settings(spaces=("3x3",), symbols=6, steps=1, batch=2, walk_from=4, walk_to=4, tested=2, tested_steps=9)
    train(tmp_path / "a", Model(Sizes(code=4)), settings, quiet=True)
    (run,) = read_runs(tmp_path)
    how, times = replace(HOW, walkers=4, steps=20, shuffles=20, probes=2), []
    before = recording.record
    monkeypatch.setattr(recording, "record", lambda *words: times.append(0) or before(*words))
    first, again = measured(run, how), measured(run, how)
    assert len(times) == 1 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    measured(run, replace(how, probes=4))
    assert len(times) == 2
    (run.folder / recording.UNITS).write_bytes(b"torn")
    measured(run, replace(how, probes=4))
    assert len(times) == 3
    with pytest.raises(UserError, match=r"room line:9 has the actions .*: give a room of that structure"):
        measured(run, replace(how, room="line:9"))
    with pytest.raises(UserError, match="walkers 1 must be at least 2; environments 1 must be at least 2"):
        How(walkers=1, environments=1)
