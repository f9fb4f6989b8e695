"""Freed memory stays with the process while it trains on a CPU, and only then."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from llm.train import allocator
from llm.train.module import LanguageModule

from .runs import fit

USES = """
import resource, torch
from llm.train.allocator import keep_freed_memory
from llm.common.processes import resident

def use():  # 256 MiB, and what using them costs in pages of 4 KiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return (resident() - start) // 2**20

torch.ones(2**10)
start = resident()
for keep in (False, True, False):
    keep_freed_memory(keep)
    use()
    print(use(), held())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept_and_given_back() -> None:
    """In one of a few processes: the heap begins anywhere, and a small piece may come to lie above a large one."""
    for _ in range(6):
        said = subprocess.run([sys.executable, "-c", USES], capture_output=True, text=True, check=True).stdout
        given, kept, again = (tuple(map(int, line.split())) for line in said.splitlines())
        if kept[0] < 50:
            break
    for faults, held in (given, again):
        assert faults > 50 and held < 50  # 65,536 small pages, or 128 huge ones
    assert kept[0] < 50 and kept[1] > 200


@pytest.mark.parametrize(("keep", "calls"), [(True, [True, False]), (False, [])])
@pytest.mark.parametrize("broken", [False, True])
def test_it_is_kept_during_fit(
    keep: bool, calls: list[bool], broken: bool, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its end, whatever that is."""
    found: list[bool] = []
    monkeypatch.setattr(allocator, "keep_freed_memory", found.append)
    if broken:
        monkeypatch.setattr(LanguageModule, "training_step", lambda *_: 1 / 0)
    config = tiny_config(model__retain_freed_memory=keep, trainer__max_steps=2)
    with pytest.raises(ZeroDivisionError) if broken else nullcontext():
        assert fit(config) == 0
    assert found == calls
