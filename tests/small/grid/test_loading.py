"""A loaded navigator against the model's own forward passes, asked for one step at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import small
from llm.common.errors import UserError
from small.grid.cli import main
from small.grid.model import Variant
from small.grid.runs import GridSpec
from small.grid.settings import GridSettings, GridSizes
from small.grid.train import train
from small.spaces import space

SIZES = GridSizes(width=16, heads=2, head_dim=8, neurons=12, code=8, segment=4, memory=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    settings = GridSettings(maps=2, letters=4, trials=1, steps=16, batch=4, lr=1e-2, walkers=4, objective="parallel")
    train(path, GridSpec(space("3x3"), SIZES, Variant("nmda:10"), settings), quiet=True)
    return path


def test_activity_is_that_of_each_step_asked_for_alone(folder: Path) -> None:
    loaded = small.load(folder)
    assert loaded.settings.maps == 2 and not loaded.model.training
    episode = loaded.episode(3, walkers=2)
    found = loaded.activations(episode)
    assert {name: len(loaded.axes[name]) for name in episode | found} == {
        name: array.ndim for name, array in (episode | found).items()
    }  # fmt: skip
    assert found["ffn"].shape == (2, 16, 2, 12) and found["attention"].shape == (2, 16, 2, 2, 11)
    actions, letters = torch.from_numpy(episode["action"]), torch.from_numpy(episode["letter"])
    code, memory = loaded.run.first_code("load", 3, 2), ()
    for segment in range(4):
        now = slice(4 * segment, 4 * segment + 5)
        for time in range(1, 5):
            acts: list[torch.Tensor] = []
            hooks = [
                layer.ffn.act.register_forward_hook(lambda _, __, out, acts=acts: acts.append(out[:, -1]))
                for layer in loaded.model.layers
            ]
            part = slice(4 * segment, 4 * segment + time + 1)
            with torch.no_grad():
                answer = loaded.model(code, actions[:, part], letters[:, part][:, :-1], memory, (time,))
            for hook in hooks:
                hook.remove()
            step = 4 * segment + time - 1  # in the arrays
            np.testing.assert_allclose(found["logits"][:, step], answer.logits[:, 0], atol=1e-5)
            np.testing.assert_allclose(found["code"][:, step], answer.code, atol=1e-5)
            np.testing.assert_allclose(found["ffn"][:, step], torch.stack(acts, 1), atol=1e-5)
            for layer in range(2):
                weights = answer.weights[layer][:, :, 0].numpy()  # (B, H, S): memory, letters, itself
                own, back = weights[..., -1], weights[..., -2::-1][..., :10]
                seen = found["attention"][:, step, layer]
                np.testing.assert_allclose(seen[..., 0], own, atol=1e-5)
                np.testing.assert_allclose(seen[..., 1 : 1 + back.shape[-1]], back, atol=1e-5)
                assert np.isnan(seen[..., 1 + back.shape[-1] :]).all()
        with torch.no_grad():
            answer = loaded.model(code, actions[:, now], letters[:, now][:, :-1], memory, (4,))
        code, memory = answer.code, answer.memory


def test_episodes_are_of_their_seed(folder: Path) -> None:
    loaded = small.load(folder)
    one, again, other = (loaded.episode(seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["cell"], other["cell"])
    letters = loaded.run.world.letters[one["map"][:, None], one["cell"]]
    assert np.array_equal(letters, one["letter"])


def test_record_writes_named_arrays_with_their_axes(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "activity.npz"
    assert main(["record", str(folder), "--out", str(out), "--episode", "3", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    with np.load(out) as file:
        axes = json.loads(str(file["axes"]))
        loaded = small.load(folder)
        episode = loaded.episode(3)
        for name, array in (episode | loaded.activations(episode)).items():
            np.testing.assert_array_equal(file[name], array)
            assert axes[name] == [*loaded.axes[name]]
    assert "walker x step x layer x neuron" in printed and "1 x 16 x 2 x 12" in printed


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not the folder of one run of a small experiment: give one with run\.json"):
        small.load(tmp_path)
    (tmp_path / "run.json").write_text('{"attempts": []}')
    with pytest.raises(UserError, match="is not the folder of one run"):
        small.load(tmp_path)
