"""A loaded TEM-t and TEM against their own predictions and definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch

import small
from small.tem.runs import TemSpec
from small.tem.train import train

from .test_train import SETTINGS, TEM, TEM_T


@pytest.mark.parametrize("model", [TEM_T, TEM], ids=["tem-t", "tem"])
def test_activity_is_that_of_the_trained_model(model, tmp_path: Path) -> None:
    train(tmp_path, TemSpec(model, SETTINGS), quiet=True)
    loaded = small.load(tmp_path)
    assert loaded.settings == SETTINGS
    episode = loaded.episode(5, environments=2)
    found = loaded.activations(episode)
    assert {name: len(loaded.axes[name]) for name in episode | found} == {
        name: array.ndim for name, array in (episode | found).items()
    }  # fmt: skip
    actions, symbols = torch.from_numpy(episode["action"]), torch.from_numpy(episode["symbol"])
    with torch.no_grad():
        expected = loaded.model(actions, symbols)
    np.testing.assert_array_equal(found["logits"], expected.logits)
    np.testing.assert_array_equal(found["code"], expected.codes)
    for row in range(2):  # a walk sees one symbol at each cell
        seen: dict[int, int] = {}
        columns = (episode[name][row].tolist() for name in ("cell", "symbol", "visited"))
        for cell, symbol, visited in zip(*columns, strict=True):
            assert visited == (cell in seen) and seen.setdefault(cell, symbol) == symbol
    if model == TEM_T:
        np.testing.assert_allclose(found["attention"].sum(-1), 1, rtol=1e-5)
        assert found["memory_step"].tolist() == [[*range(20)]] * 2
    else:
        assert loaded.model.updates == SETTINGS.steps  # the rule's rates are those of the end
        sensory, places = loaded.model.bound(symbols, expected.codes)
        outer = torch.einsum("btx,btg->btxg", sensory, places).flatten(2).detach()
        np.testing.assert_allclose(found["conjunction"], outer, rtol=1e-6)
