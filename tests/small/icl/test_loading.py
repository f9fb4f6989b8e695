"""Loaded transformers of the pair task: weights of the run that is asked for, attention and neurons by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

import small
from llm.common.errors import UserError
from small.icl.runs import IclSpec
from small.icl.settings import IclSettings, IclSizes, Task
from small.icl.train import Machine, made, train

TASK = Task(classes=16, labels=8, pairs=4, novel_classes=16, content=12, positions=20)
SIZES = IclSizes(width=TASK.width, labels=8, key_width=6, neurons=7)
SETTINGS = IclSettings(
    variants=("classic", "values"), seeds=(0, 3), steps=20, batch=8, snapshot_every=20, evaluation=20, lr=0.05
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("icl") / "runs"
    train(path, IclSpec(TASK, SIZES, SETTINGS), Machine())
    return path


def test_activity_is_that_of_the_run_that_is_asked_for(folder: Path) -> None:
    loaded = small.load(folder, variant="values", seed=3)
    episode = loaded.episode(2, sequences=5)
    found = loaded.activations(episode)
    assert {name: len(loaded.axes[name]) for name in episode | found} == {
        name: array.ndim for name, array in (episode | found).items()
    }  # fmt: skip
    inputs, weights = torch.from_numpy(episode["inputs"]), dict(loaded.model.named_parameters())
    with torch.no_grad():
        first, second = (weights[f"projections.{n}"][0].T for n in range(2))
        q, k, v = (inputs @ first).split([6, 6, TASK.width], -1)
        causal = torch.full((9, 9), -torch.inf).triu(1)
        attended = (q @ k.mT + causal).softmax(-1)
        hidden = inputs + attended @ v
        q2, k2, v2 = (hidden @ second).split([6, 6, TASK.width], -1)
        last = (q2[:, -1:] @ k2.mT).softmax(-1)
        x = (hidden[:, -1:] + last @ (v2 + v))[:, 0]
        for layer in range(3):
            x = (x @ weights[f"hidden.{layer}"][0].T + weights[f"biases.{layer}"][0]).relu()
            np.testing.assert_allclose(found["neurons"][:, layer], x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["logits"], x @ weights["read_out"][0].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["attention"][:, 0], attended, atol=1e-5)
    np.testing.assert_allclose(found["attention"][:, 1, -1:], last, atol=1e-5)
    assert np.isnan(found["attention"][:, 1, :-1]).all()


def test_weights_are_trained_and_of_their_seed(folder: Path) -> None:
    every = [small.load(folder, variant=v, seed=s) for v in SETTINGS.variants for s in SETTINGS.seeds]
    first = [dict(loaded.model.named_parameters())["read_out"] for loaded in every]
    assert len({tuple(each.flatten().tolist()) for each in first}) == 4
    untrained = made(IclSpec(TASK, SIZES, SETTINGS), Machine())[0].models[0]
    assert not torch.equal(first[0], untrained.read_out)
    default = small.load(folder)
    assert torch.equal(dict(default.model.named_parameters())["read_out"], first[0])
    with pytest.raises(UserError, match=r"has no run of keys with seed 0: give one of classic, values and one of the"):
        small.load(folder, variant="keys")
