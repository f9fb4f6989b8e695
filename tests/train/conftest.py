"""What the tests of this folder share: a second store for mixtures."""

from pathlib import Path

import pytest

from llm.cli import main


@pytest.fixture(scope="session")
def second_store(story_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other stories, tokenized as those of `story_store`."""
    store = tmp_path_factory.mktemp("others") / "store"
    words = ["prepare", "stories:7", "--documents", "200", "--tokenizer", str(story_store / "tokenizer"), "--workers"]
    assert main([*words, "1", "--out", str(store)]) == 0
    return store
