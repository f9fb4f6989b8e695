"""What the tests of `llm.bench` share."""

import subprocess
from typing import Any

import pytest

from ..data.conftest import bpe, bpe_folder
from ..train.preloaded import LLM, Python

__all__ = ["bpe", "bpe_folder"]


@pytest.fixture
def trials_start_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes in which `bench` tries a setting begin with everything imported: still one each."""

    start = subprocess.run

    def run(words: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        if words[1:3] != ["-m", "llm"]:  # git
            return start(words, **settings)
        process = Python(LLM, words[3:])
        said = process.communicate()[1]
        return subprocess.CompletedProcess(words, process.returncode, said, said)

    monkeypatch.setattr(subprocess, "run", run)
