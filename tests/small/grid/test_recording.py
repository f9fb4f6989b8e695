"""Recordings against a loop over one walker's own forward passes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llm.common.errors import UserError
from small.grid import recording
from small.grid.model import Variant
from small.grid.recording import record, record_once
from small.grid.runs import GridFolder, GridSpec
from small.grid.settings import GridSettings, GridSizes, RecordingSettings
from small.grid.train import Run, train
from small.rate_maps import gini, place_cell_scores
from small.spaces import space

SIZES = GridSizes(width=16, heads=2, head_dim=8, neurons=12, code=8, segment=4, memory=4)


@pytest.fixture(scope="module")
def run() -> Run:
    made = Run(
        GridSpec(
            space("3x3"),
            SIZES,
            Variant("nmda:10"),
            GridSettings(maps=2, letters=4, trials=1, steps=16, batch=4, lr=1e-2),
        )
    )
    made.train(1)
    return made


def test_activity_is_added_to_the_cell_that_is_asked_for(run: Run) -> None:
    found = record(run, 1, steps=200, walkers=5, shuffles=3)
    walks = run.world.trial("record", 1, 5, 4 * 11, only=1)
    first = run.first_code("record", 1, 5)
    sums = {"ffn": np.zeros((2, 9, 12)), "softmax": np.zeros((2, 9, 18)), "codes": np.zeros((9, 8))}
    visits, ginis = np.zeros(9), []
    moments: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # segment, walker -> cell, activity of layer 0
    run.model.eval()
    for walker in range(5):
        code, memory = first[walker : walker + 1], ()
        for segment in range(11):
            now = slice(4 * segment, 4 * segment + 5)
            actions, letters = walks.actions[walker : walker + 1, now], walks.letters[walker : walker + 1, now]
            acts: list[torch.Tensor] = []
            hooks = [
                layer.ffn.act.register_forward_hook(lambda _, __, out, acts=acts: acts.append(out))
                for layer in run.model.layers
            ]
            with torch.no_grad():
                answer = run.model(code, actions, letters[:, :4], memory, (4,))
            for hook in hooks:
                hook.remove()
            code, memory = answer.code, answer.memory
            if segment == 0:
                continue
            cell = walks.cells[walker, 4 * segment + 4].item()
            visits[cell] += 1
            for layer in range(2):
                sums["ffn"][layer, cell] += acts[layer][0, -1].numpy()
                sums["softmax"][layer, cell] += answer.weights[layer][0, :, 0].reshape(-1).numpy()
            moments[segment, walker] = cell, acts[0][0, -1].numpy()
            ginis.append([gini(act[0, -1].abs()).item() for act in acts])
    assert visits.sum() == 50
    for layer in range(2):
        np.testing.assert_allclose(found.ffn[layer].whole.rates("walk").numpy(), sums["ffn"][layer].T / 50, atol=1e-6)
        np.testing.assert_allclose(
            found.softmax[layer].whole.rates("walk").numpy(), sums["softmax"][layer].T / 50, atol=1e-6
        )
    for half, of in zip(found.ffn[0].halves, (range(2), range(2, 5)), strict=True):
        expected = np.zeros((9, 12))
        for (_, walker), (cell, activity) in moments.items():
            expected[cell] += activity * (walker in of)
        np.testing.assert_allclose(half.sums.numpy(), expected, atol=1e-6)
    assert len(set(found.ffn[0].shifts)) == 3 and 0 not in found.ffn[0].shifts
    for shift, maps in zip(found.ffn[0].shifts, found.ffn[0].shuffled, strict=True):
        expected = np.zeros((9, 12))
        for (segment, walker), (cell, _) in moments.items():
            expected[cell] += moments[segment, (walker - shift) % 5][1]
        np.testing.assert_allclose(maps.sums.numpy(), expected, atol=1e-6)
    alone = run.world.trial("record codes", 1, 1, 200, only=1)
    code = run.first_code("record codes", 1, 1)
    for step in range(1, 201):
        matrix = run.model.codes.transitions.detach().unflatten(0, (5, 8))[alone.actions[0, step]]
        code = torch.tanh(code @ matrix)
        sums["codes"][alone.cells[0, step]] += code[0].numpy()
    np.testing.assert_allclose(found.codes.rates("walk").numpy(), sums["codes"].T / 200, atol=1e-6)
    np.testing.assert_allclose(found.gini.numpy(), np.mean(ginis, axis=0), rtol=1e-4)


def test_hooks_are_taken_off_again(run: Run) -> None:
    record(run, steps=20, walkers=5, shuffles=2)
    assert not any(layer.ffn.act._forward_hooks for layer in run.model.layers)


def test_what_was_measured_is_kept_until_the_run_or_the_question_changes(tmp_path: Path, monkeypatch) -> None:
    graph, settings = space("3x3"), GridSettings(maps=2, letters=4, trials=2, steps=16, batch=4, lr=1e-2, walkers=4)
    train(tmp_path, GridSpec(graph, SIZES, Variant("nmda:10"), settings))
    first = record_once(tmp_path, RecordingSettings(steps=1000))
    shapes = {name: tuple(part.shape) for name, part in first._asdict().items()}
    assert shapes["ffn_rates"] == (2, 12, 9) and shapes["softmax_shuffled"] == (20, 2, 18)
    assert shapes["codes"] == (8, 9) and shapes["code_grid_shuffled"] == (20, 8) and shapes["gini"] == (2,)
    expected, loud = place_cell_scores(first.ffn_rates[1].double(), graph), first.ffn_peaks[1] >= 0.01
    np.testing.assert_allclose(first.ffn_scores[1][loud].numpy(), expected[loud].numpy(), atol=1e-4)
    assert loud.any() and first.ffn_scores[1][~loud].isnan().all()
    assert (first.ffn_rates >= 0).all()
    initial = record_once(tmp_path, RecordingSettings(steps=1000), trained=False)
    assert (
        not torch.equal(initial.ffn_rates, first.ffn_rates) and (tmp_path / "untrained_neurons.safetensors").is_file()
    )
    asked: list[int] = []
    monkeypatch.setattr(recording, "record", lambda *args, **more: asked.append(1) or record(*args, **more))
    again = record_once(tmp_path, RecordingSettings(steps=1000))
    assert not asked and all(
        torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in zip(first, again, strict=True)
    )
    record_once(tmp_path, RecordingSettings(steps=1000, normalisation="occupancy"))
    (tmp_path / "neurons.safetensors").write_bytes(b"torn")
    record_once(tmp_path, RecordingSettings(steps=1000))
    assert len(asked) == 2
    with GridFolder(
        tmp_path, GridSpec(graph, SIZES, Variant("nmda:10"), settings)
    ) as folder:  # a trial more, not evaluated
        run = Run(GridSpec(graph, SIZES, Variant("nmda:10"), settings))
        folder.restore(run.tensors())
        folder.begin(2, {})
        folder.keep(None, 3, run.tensors())
    record_once(tmp_path, RecordingSettings(steps=1000))
    assert len(asked) == 3


def maps_of(rates: list[list[float]], visits: list[int]) -> recording.LayerMaps:
    """Maps of a line of cells with such activity per visit in both halves; shuffles have none."""
    found = recording.LayerMaps(len(visits), len(rates), [1], torch.device("cpu"))
    for maps in (found.whole, *found.halves):
        maps.visits += torch.tensor(visits)
        maps.sums += torch.tensor(rates).T * maps.visits[:, None]
    return found


def test_noise_has_no_score_and_is_drawn_as_nothing() -> None:
    """Of a map of -0.001 with one cell at +0.0001, Equation S1 makes 1; and of a cell seen once, whatever was there."""
    noise, field, rare = [-0.001, -0.001, 0.0001, -0.001], [0.0, 0.3, 0.1, 0.0], [0.02, 0.01, 0.01, 5.0]
    maps, line = maps_of([noise, field, rare], [50, 50, 50, 1]), space("line:4")
    assert place_cell_scores(maps.whole.rates("occupancy"), line)[0] == 1  # what the paper's score alone says
    found = recording._measured(maps, line, RecordingSettings())
    assert found["scores"].isnan().tolist() == [True, False, False]
    assert found["information"].isnan().tolist() == found["stability"].isnan().tolist() == [True, False, False]
    expected = place_cell_scores(torch.tensor([[0.0, 0.3, 0.1, 0], [0.02, 0.01, 0.01, 0]]).double(), line)
    torch.testing.assert_close(found["scores"][1:], expected)
    assert found["rates"].min() == 0 and found["rates"][2, 3] == 0
    torch.testing.assert_close(found["peaks"], torch.tensor([0.0001, 0.3, 0.02]).double())
    torch.testing.assert_close(found["stability"][1:], torch.ones(2).double())
    every = recording._measured(maps, line, RecordingSettings(least_rate=0.0, least_visits=1))
    assert every["scores"][0] == 1 and every["peaks"][2] == 5


def test_a_neuron_passes_if_hardly_a_shuffle_reaches_its_score() -> None:
    scores = torch.tensor([[0.9, 0.5, torch.nan]])
    shuffled = torch.full((20, 1, 3), 0.4)
    shuffled[3, 0, 1] = 0.6  # one of twenty
    empty = dict.fromkeys(recording.Neurons._fields, torch.zeros(1))
    neurons = recording.Neurons(**empty | {"ffn_scores": scores, "ffn_shuffled": shuffled})
    assert neurons.passes("ffn").tolist() == [[True, False, False]]


def test_codes_of_a_walk_are_those_of_its_chunks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = record(run, steps=20, walkers=5, shuffles=2).codes
    monkeypatch.setattr(recording, "CHUNK", 7)
    chunks = record(run, steps=20, walkers=5, shuffles=2).codes
    assert torch.equal(whole.visits, chunks.visits) and whole.visits.sum() == 20
    torch.testing.assert_close(whole.sums, chunks.sums)


@pytest.mark.parametrize(("asked", "named"), [
        ({"steps": 10}, "too few"), ({"map_index": 4}, "0 to 3"),
        ({"shuffles": 50}, "shuffles 50 must be fewer than the 50 walkers"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(run: Run, asked: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        record(run, **asked)
