"""Weights known by their content, and what a model was trained to read at once."""

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm.common import exported
from llm.common.errors import UserError
from llm.common.exported import read_card, trained_context, weights_sha256


def slow(folder: Path) -> str:
    """By a second way: every byte, every time."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in (("model-2.safetensors", b"two"), ("model-1.safetensors", b"one"), ("notes.txt", b"no")):
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_any_byte_counts_though_size_and_time_are_the_same(folder, monkeypatch):
    monkeypatch.setattr(exported, "TICK", -1)  # keep what has just changed, too
    file = folder / "model-1.safetensors"
    first = weights_sha256(folder)
    assert first == slow(folder)
    time = file.stat().st_mtime_ns
    other = folder / "other"
    other.write_bytes(b"0ne")
    os.utime(other, ns=(time, time))
    other.replace(file)  # another inode
    assert weights_sha256(folder) == slow(folder) != first


def test_what_has_not_changed_is_not_read_again(folder, monkeypatch):
    monkeypatch.setattr(exported, "TICK", -1)
    cache, read = folder / exported.CACHE, []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: [read.append(file.name), digest(file, name)][1])
    found = [weights_sha256(folder) for _ in range(3)]
    assert len(read) == 2 and set(found) == {slow(folder)}
    (folder / "model-2.safetensors").write_bytes(b"three")
    assert weights_sha256(folder) == slow(folder) and len(read) == 3
    cache.write_text("[")
    assert weights_sha256(folder) == slow(folder) and len(read) == 5


def test_a_file_that_has_just_changed_is_read_again(folder):
    """Within a tick of the clock two contents of one size have one time."""
    for content in (b"one", b"0ne", b"one"):
        with (folder / "model-1.safetensors").open("r+b") as file:
            file.write(content)
        assert weights_sha256(folder) == slow(folder)


@pytest.mark.parametrize(
    ("positions", "card", "expected"),
    [
        (512, {"context": 128}, 128), (512, {}, 512), (512, {"context": None}, 512), (512, {"context": 1024}, 512),
        (None, {"context": 64}, 64), (None, {}, None), (512, {"context": "128"}, 512), (512, {"context": 0}, 512),
    ],
)  # fmt: skip
def test_the_trained_context(positions, card, expected):
    plain = SimpleNamespace(max_position_embeddings=positions)
    parts = SimpleNamespace(get_text_config=lambda: plain)  # of a model that reads images too
    assert trained_context(plain, card) == trained_context(parts, card) == expected


def test_a_card_that_is_damaged(tmp_path):
    assert read_card(tmp_path) == {}
    for content in ("", "{", "[]", '"a"'):
        (tmp_path / "hippoformer.json").write_text(content)
        with pytest.raises(UserError, match=r"hippoformer\.json"):
            read_card(tmp_path)
