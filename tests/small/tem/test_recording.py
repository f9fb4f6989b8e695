"""What is measured of units, on a model whose codes are known waves; scores and correlations against slow counts."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from llm.common.errors import UserError
from small.spaces import space
from small.tem import recording
from small.tem.cell_figures import unit_table
from small.tem.memory import Rule
from small.tem.model import Carry, TemTransformer
from small.tem.recording import Units, record, record_once, remapping
from small.tem.runs import Model, Row, TemRun, TemSpec, read_runs
from small.tem.settings import MachineSizes, RecordingSettings, TemSettings, TransformerSizes
from small.tem.train import Run, train

ROOM, PERIOD = space("15x15"), 6.0
SETTINGS = TemSettings(spaces=("5x5",), tested_steps=400)
HOW = RecordingSettings(walkers=128, steps=120, shuffles=40, environments=3, probes=40)


def waves(mixed: bool, store: str = "new") -> Run:
    """TEM-t with codes of three plane waves at 60 degrees, two components each; mixed so that every one is a grid."""
    run = Run(TemSpec(Model(TransformerSizes(code=6, keys=6, store=store, below=0.98)), SETTINGS))
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
    assert bands.band.min() > 0.95 and bands.share("bands") == 1 and bands.share("grids") == 0
    grids = record(waves(mixed=True), ROOM, HOW)
    assert grids.grid[0] > 1 and grids.band[0] < 0.6 < bands.band.min()
    assert grids.share("grid") > 0.5 and grids.share("bands") < 1


def test_a_hexagonal_code_passes_the_grid_score_and_a_lattice_of_two_waves_does_not() -> None:
    """The whole pipeline on codes that are known: walks, rate maps, scores and shuffles of a room of 15 x 15."""
    rows, columns = torch.meshgrid(torch.arange(15.0), torch.arange(15.0), indexing="ij")
    run, found = waves(mixed=False), {}
    for name, turns in (
        ("hexagonal", (0.2, 0.2 + math.pi / 3, 0.2 + 2 * math.pi / 3)),
        ("two waves", (0.0, math.pi / 2)),
    ):
        maps = []
        for unit in range(8):
            phases = [
                4
                * math.pi
                / (math.sqrt(3) * PERIOD)
                * (math.cos(t) * (columns - unit) + math.sin(t) * (rows - 2 * unit))
                for t in turns
            ]
            maps.append(sum(map(torch.cos, phases)).flatten())
        run.model.codes = OfPlace(torch.stack(maps, dim=1))
        units = Units(*(part.float() for part in recording._codes(run, ROOM, HOW)), torch.zeros(1), torch.zeros(1))
        found[name] = units.share("grids"), units.grid
    assert found["hexagonal"][0] == 1 and found["hexagonal"][1].min() > 0.8
    assert found["two waves"][0] == 0 and found["two waves"][1].max() < 0


class OfPlace(torch.nn.Module):
    """Codes that are a function of the cell, for walkers from the middle of the room."""

    def __init__(self, maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = maps  # (S, C)

    def forward(self, actions: torch.Tensor, carry: Carry | None = None) -> torch.Tensor:
        cells = torch.full((len(actions),), 7 * 15 + 7)
        codes = [self.maps[cells]]
        for step in actions[:, 1:].T:
            cells = torch.from_numpy(ROOM.targets)[cells, step]
            codes.append(self.maps[cells])
        return torch.stack(codes, dim=1)


class OfTime(torch.nn.Module):
    """Codes that tell nothing of places: noise that forgets slowly, of each walker its own or of all the same."""

    def __init__(self, width: int, shared: bool) -> None:
        super().__init__()
        self.width, self.shared = width, shared

    def forward(self, actions: torch.Tensor, carry: Carry | None = None) -> torch.Tensor:
        walkers, steps = actions.shape
        noise = torch.randn(
            1 if self.shared else walkers, steps, self.width, generator=torch.Generator().manual_seed(0)
        )
        kept = [noise[:, 0]]
        for step in range(1, steps):
            kept.append(0.95 * kept[-1] + noise[:, step])
        return torch.stack(kept, 1).expand(walkers, -1, -1)


@pytest.mark.parametrize("shared", [False, True])
def test_codes_of_time_pass_by_chance(shared: bool) -> None:
    """Activity that goes on from step to step makes no cells: neither score passes more often than one in twenty."""
    run = waves(mixed=False)
    run.model.codes = OfTime(200, shared)
    run.model.code_to_key = torch.nn.Linear(200, 6, bias=False)
    units = record(run, ROOM, HOW)
    for kind in ("grid", "band"):
        assert units.share(kind) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert units.by_place < 0.05


def test_a_share_passes_by_chance_whatever_the_number_of_shuffles() -> None:
    random = torch.Generator().manual_seed(0)
    for count in (20, 50, 100):
        own, shuffled = torch.randn(8000, generator=random), torch.randn(count, 8000, generator=random)
        band = torch.linspace(0, 1, 8000)
        units = Units(*[torch.zeros(1)] * 2, own, shuffled, band, shuffled - 9, *[torch.zeros(1)] * 2)
        assert units.share("grid") == pytest.approx(math.floor(0.05 * (count + 1)) / (count + 1), abs=0.008)
        assert units.share("band") == 1 and units.share("bands") == pytest.approx(0.5, abs=0.001)
        assert units.share("grids") == pytest.approx(units.share("grid") / 2, abs=0.008)
    none = units._replace(grid=torch.full((3,), math.nan), grid_shuffled=torch.full((20, 3), math.nan))
    assert math.isnan(none.share("grid")) and math.isnan(none.share("bands"))


def test_the_table_says_of_each_column_what_it_is(tmp_path: Path) -> None:
    """Made-up units, of which each column is known."""
    found = []
    for seed in (0, 1):
        maps = np.random.default_rng(seed).random((2, 2, 5, 12))
        maps[:, 1] = maps[:, 0] + 0.1 * maps[:, 1]
        codes = maps[:, :, :3].copy()
        codes[1] = codes[0] + 0.2 * codes[1]
        hippocampal, entorhinal = (torch.from_numpy(each).float() for each in (maps, codes))
        grid, low = torch.tensor([0.1, 0.7 + seed / 10, 0.2]), torch.zeros(40, 3) + 0.15
        band = torch.tensor([0.4, 0.45, 0.9])
        found.append(Units(torch.zeros(3, 4), torch.tensor(0.8), grid, low, band, low, hippocampal, entorhinal))
    model, rows = Model(TransformerSizes()), [Row(1, 1.0, 1, 1, 1, 1)]
    runs = [TemRun(model, TemSettings(seed=s), folder=Path(f"seed={s}"), rows=rows) for s in (0, 1)]
    empty = [each._replace(by_place=torch.tensor(0.25)) for each in found]
    text = unit_table(runs, lambda run: found[run.settings.seed], lambda run: empty[run.settings.seed])
    lines = [[cell for cell in line.split("  ") if cell] for line in text.splitlines()]
    rows = {line[0]: dict(zip([c.strip() for c in lines[0]][1:], [c.strip() for c in line[2:]], strict=True))
            for line in lines[2:4]}  # fmt: skip
    cells = [remapping(each.hippocampal) for each in found]
    codes = [remapping(each.entorhinal) for each in found]

    def both(values: list[float]) -> str:
        return f"{np.mean(values):.2f} ± {np.std(values):.2f}"

    assert rows["TEM-t"] == {
        "by place": "0.80 ± 0.00", "grid, best": "0.75 ± 0.05", "band, best": "0.90 ± 0.00",
        "grid, pass": "0.67 ± 0.00", "band, pass": "1.00 ± 0.00", "grids": "0.33 ± 0.00", "bands": "0.33 ± 0.00",
        "within": both([each.within.mean() for each in cells]), "across": both([each.across.mean() for each in cells]),
        "pairs": both([each.pairs for each in cells]), "pairs, codes": both([each.pairs for each in codes]),
    }  # fmt: skip
    assert rows["TEM-t, untrained"] == rows["TEM-t"] | {"by place": "0.25 ± 0.00"}
    assert len(set(rows["TEM-t"].values())) >= 8


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
    halves = units.entorhinal[0]
    assert not torch.equal(halves[0], halves[1])  # two recordings, not one


def test_conjunctions_are_what_is_seen_times_where() -> None:
    run = Run(TemSpec(Model(MachineSizes(code=6, places=4, sensory=10), Rule()), replace(SETTINGS, tested_steps=20)))
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
    rates[:, :, 4] = 0.7  # flat
    rates[2, 1, :, 11] = torch.nan  # one cell of one map was never walked
    found, maps = remapping(rates), rates[..., :11].double().numpy()

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
    settings = TemSettings(
        spaces=("3x3",), symbols=6, steps=1, batch=2, walk_from=4, walk_to=4, tested=2, tested_steps=9
    )
    train(tmp_path / "a", TemSpec(Model(TransformerSizes(code=4)), settings), quiet=True)
    (run,) = read_runs(tmp_path)
    how, times = replace(HOW, walkers=30, steps=20, shuffles=20, probes=2, room="3x3"), []
    before = recording.record
    monkeypatch.setattr(recording, "record", lambda *words: times.append(0) or before(*words))
    first, again = record_once(run, how), record_once(run, how)
    assert len(times) == 1
    torch.testing.assert_close(tuple(first), tuple(again), rtol=0, atol=0, equal_nan=True)
    record_once(run, replace(how, probes=4))
    assert len(times) == 2
    (run.folder / recording.UNITS).write_bytes(b"torn")
    record_once(run, replace(how, probes=4))
    assert len(times) == 3
    with pytest.raises(UserError, match=r"room line:9 has the actions .*: give a room of that structure"):
        record_once(run, replace(how, room="line:9"))
    assert not torch.equal(record_once(run, how, trained=False).codes, first.codes)
    with pytest.raises(
        UserError, match="environments 1 must be at least 2; shuffles 100 must be fewer than walkers 50"
    ):
        RecordingSettings(walkers=50, environments=1)


def test_a_model_of_a_maze_is_recorded_in_its_maze(tmp_path: Path) -> None:
    """It has the actions of a square, which it has never seen."""
    maze = tmp_path / "maze.txt"
    maze.write_text("#####\n#...#\n#.#.#\n#...#\n#####\n")

    def saved(*spaces: str) -> TemRun:
        return TemRun(Model(TransformerSizes()), TemSettings(spaces=spaces), folder=tmp_path, rows=[])

    assert space(str(maze)).actions == ROOM.actions
    assert len(recording.room_of(saved(str(maze)), RecordingSettings()).cells) == 8
    assert len(recording.room_of(saved("5x5", str(maze)), RecordingSettings()).cells) == 25
    assert recording.room_of(saved("5x5", "6x6"), RecordingSettings()).shape == (15, 15)
    assert recording.room_of(saved(str(maze)), RecordingSettings(room="7x7")).shape == (7, 7)
