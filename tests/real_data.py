"""The real data that some tests read: CONTRIBUTING.md says what the folder holds."""

import os
from pathlib import Path

import pytest

VARIABLE = "HIPPOFORMER_TEST_DATA"


def find(*parts: str) -> Path | None:
    """A file or folder of the real data; None if the variable is not set."""
    folder = os.environ.get(VARIABLE)
    return Path(folder, *parts).absolute() if folder else None


def need(*parts: str) -> Path:
    """A file or folder of the real data; skips the test if the variable is not set."""
    if (path := find(*parts)) is None:
        pytest.skip(f"reads real data: set {VARIABLE} to its folder, which CONTRIBUTING.md describes")
    assert path.exists(), f"{VARIABLE} is set, but there is no {path}"
    return path
