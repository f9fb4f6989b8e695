"""A loaded Vision Transformer against its own logits, and images that it was not trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch

import small
from llm.common.errors import UserError
from small.vision import datasets
from small.vision.train import train

from .test_train import ACT, SETTINGS, SIZES, asked, images


def test_activity_on_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = images(), tmp_path / "run"
    train(folder, data, asked(SIZES, ACT, SETTINGS), quiet=True)
    monkeypatch.setattr(datasets, "load", lambda name, path, quiet: data)
    with pytest.raises(UserError, match="needs its images: give data"):
        small.load(folder)
    loaded = small.load(folder, data=tmp_path)
    episode = loaded.episode(1, images=7)
    found = loaded.activations(episode)
    assert len(set(episode["number"].tolist())) == 7
    np.testing.assert_array_equal(episode["label"], data.test.labels[episode["number"]])
    assert found["ffn"].shape == (7, SIZES.tokens, 2, 24)
    with torch.no_grad():
        pixels = (torch.from_numpy(episode["pixels"]) / 255 - loaded.run.mean) / loaded.run.deviation
        np.testing.assert_allclose(found["logits"], loaded.model(pixels), atol=1e-5)
        last = loaded.model.blocks[1].feedforward
        added = last.down_proj(torch.from_numpy(found["ffn"][:, :, 1]))
    seen: list[torch.Tensor] = []
    last.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    loaded.activations(episode)
    np.testing.assert_allclose(seen[0], added, atol=1e-5)
    right = loaded.run.right[episode["number"]].numpy()
    np.testing.assert_array_equal(found["logits"].argmax(1) == episode["label"], right)
    other = images(test=13)
    monkeypatch.setattr(datasets, "load", lambda name, path, quiet: other)
    with pytest.raises(UserError, match="has other images than"):
        small.load(folder, data=tmp_path)
