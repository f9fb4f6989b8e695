"""Checkpoints: whole or absent, verified, found, restored."""

import json
from pathlib import Path

import pytest
import torch

from llm.common.errors import UserError
from llm.model import DecoderConfig, DecoderForCausalLM
from llm.train import checkpoint as checkpoints
from llm.train.gathering import HostCopies, assembled
from llm.train.optim import OPTIMIZERS, Optimizer
from llm.train.state import ReplicatedState


def small(**settings: object) -> DecoderForCausalLM:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return DecoderForCausalLM(DecoderConfig.llama(**(sizes | {"tie_word_embeddings": True} | settings)))


def step(model: DecoderForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(40, (2, 10), generator=torch.Generator().manual_seed(seed))
    model(ids, shift_labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, model: DecoderForCausalLM, optimizer: torch.optim.Optimizer, step: int, **kept: int) -> Path:
    shares = ReplicatedState(model, optimizer).shares(keep=True)
    names = [name for name, _ in model.named_parameters()]
    weights, state = assembled(shares, HostCopies().make(shares, None), names, None, keep=True)
    return checkpoints.write(
        folder, checkpoints.Snapshot(weights, state, model.config, {"step": step, "identity": {}}), **kept
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = small()
    optimizer = Optimizer(name).build(model)
    for seed in range(3):
        step(model, optimizer, seed)
    save(tmp_path, model, optimizer, 3, keep=2)
    other = small(initializer_seed=9)
    restored = Optimizer(name).build(other)
    checkpoints.restore(checkpoints.newest(tmp_path)[0], other, ReplicatedState(other, restored))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, restored, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    (another,) = OPTIMIZERS.keys() - {name}
    with pytest.raises(UserError, match=r"state of another optimizer.*model\.optimizer\.name"):
        checkpoints.restore(
            checkpoints.newest(tmp_path)[0], other, ReplicatedState(other, Optimizer(another).build(other))
        )


@pytest.fixture
def three(tmp_path: Path) -> Path:
    model = small()
    optimizer = Optimizer().build(model)
    for number in (1, 2, 10, 11):
        step(model, optimizer, number)
        save(tmp_path, model, optimizer, number, keep=3)
    return tmp_path


def test_the_newest_are_kept(three: Path) -> None:
    assert sorted(path.name for path in three.iterdir()) == ["step-00000002", "step-00000010", "step-00000011"]
    checkpoint, skipped = checkpoints.newest(three)
    assert checkpoint.step == 11
    assert skipped == []


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_torn_checkpoint_is_named_and_passed_over(three: Path, file: str, damage: str) -> None:
    path = three / "step-00000011" / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1 if file != "manifest.json" else 0x80  # no longer UTF-8
        path.write_bytes(content if damage == "flip" else content[:-1])
    checkpoint, skipped = checkpoints.newest(three)
    assert checkpoint.step == 10
    assert len(skipped) == 1
    assert str(path.parent) in skipped[0]
    assert file in skipped[0]


def test_every_nth_is_kept_for_good(tmp_path: Path) -> None:
    model = small()
    optimizer = Optimizer().build(model)
    for number in range(5, 65, 5):
        save(tmp_path, model, optimizer, number, keep=2, keep_every=20)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [20, 40, 55, 60]


def test_a_large_one_is_in_shards_and_none_may_be_missing(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 4000)
    model = small(initializer_seed=5)
    optimizer = Optimizer().build(model)
    step(model, optimizer, 1)
    path = save(three, model, optimizer, 12, keep=3)
    shards = sorted(path.glob("*.safetensors"))
    assert len([shard for shard in shards if shard.name.startswith("model")]) > 2
    assert len([shard for shard in shards if shard.name.startswith("optimizer")]) > 4
    found = checkpoints.newest(three)[0]
    assert found.path == path
    reloaded = DecoderForCausalLM.from_pretrained(path)  # as any transformers folder
    other = small()
    restored = Optimizer().build(other)
    checkpoints.restore(found, other, ReplicatedState(other, restored))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(reloaded.named_parameters())[name])
        assert torch.equal(parameter, dict(other.named_parameters())[name])
        for kind, value in optimizer.state[parameter].items():
            assert torch.equal(value, restored.state[dict(other.named_parameters())[name]][kind])
    for shard in shards:
        kept = shard.rename(three / "elsewhere")
        checkpoint, skipped = checkpoints.newest(three)
        assert checkpoint.step == 11
        assert f"{shard.name} is missing" in skipped[0]
        kept.rename(shard)
    assert checkpoints.newest(three)[0].step == 12


def test_a_half_written_one_is_not_seen(three: Path) -> None:
    (three / "step-00000011").rename(three / "step-00000012.partial")
    assert checkpoints.newest(three)[0].step == 10
    (three / "step-00000010" / "manifest.json").unlink()
    checkpoint, skipped = checkpoints.newest(three)
    assert checkpoint.step == 2
    assert "manifest.json" in skipped[0]


def test_another_models_checkpoint_is_refused(three: Path) -> None:
    checkpoint = checkpoints.read(three / "step-00000011")
    assert json.loads((checkpoint.path / "config.json").read_text())["hidden_size"] == 16
    for settings in ({"num_hidden_layers": 3}, {"hidden_size": 32}, {"tie_word_embeddings": False}):
        with pytest.raises(UserError, match="another model"):
            checkpoints.restore(checkpoint, small(**settings))
