"""Fixtures of the tests of `llm.data`: a small tokenizer trained on a real text, and a corpus."""

from pathlib import Path

import pytest

from llm.data.tokenizer import train_bpe

from .stores import write_lines

TEXT = "The hippocampus turns “where” into when: 3,141 café notes,\n\ta naïve map — and 𝒙 ≤ 42.\n"


@pytest.fixture(scope="session")
def bpe():
    return train_bpe([TEXT] * 4, 400)


@pytest.fixture(scope="session")
def bpe_folder(bpe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    bpe.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    """Six files of thirty documents each, among them one that is empty; large enough that some are held out."""
    for number in range(6):
        write_lines(tmp_path / "in" / f"{number}.jsonl", [f"{TEXT} {number} {i}" for i in range(29)] + [""])
    return tmp_path / "in"
