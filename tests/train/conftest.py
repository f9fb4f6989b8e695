"""What the tests of this folder share: a second store for mixtures, and no rendezvous of another test's ranks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed

from llm.cli import main


@pytest.fixture(scope="session")
def second_store(story_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other stories, tokenized as those of `story_store`."""
    store = tmp_path_factory.mktemp("others") / "store"
    words = ["prepare", "stories:7", "--documents", "200", "--tokenizer", str(story_store / "tokenizer"), "--workers"]
    assert main([*words, "1", "--out", str(store)]) == 0
    return store


@pytest.fixture(autouse=True)
def no_rendezvous_is_left() -> Iterator[None]:
    """Lightning writes where the ranks of a process meet into its environment, which later tests' processes inherit.

    They would all meet at that one port, which is in use.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: a new one, or one that an earlier test has left and DeepSpeed holds."""
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    if ours:
        distributed.destroy_process_group()
