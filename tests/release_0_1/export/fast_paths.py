"""Faster ways to the same numbers, each with a plain way beside it and a switch, of the process as in `torch.backends`:

    matmul      float32 products on x86 CPUs by oneDNN (`linear.py`); plain: torch's own choice, MKL
    attention   bfloat16 causal attention on CPUs by blocks of queries (`cpu_attention.py`); plain: sdpa
    dropout     dropout on CPUs by bits, and attention with it (`dropout.py`); plain: torch's
    rotary      rotary positions and their gradient in two passes (`positions.py`); plain: autograd's form
    norm        RMSNorm on CPUs in few passes (`norms.py`); plain: torch's
    loss        head and cross-entropy by chunks (`loss.py`); plain: all logits at once

They differ by rounding alone, dropout in the elements that a seed draws. Each has one derivative, by autograd: for a
second one, or for `torch.func`, there is `without()`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

FAST_PATHS = ("matmul", "attention", "dropout", "rotary", "norm", "loss")
_off: set[str] = set()


def fast(name: str) -> bool:
    """Whether the fast path called `name` is on, as all are at first."""
    return name not in _off


def switch_off(names: Iterable[str]) -> None:
    """Switch these off and all others on.

    Raises:
        ValueError: no fast path has this name.
    """
    names = set(names)
    if unknown := names.difference(FAST_PATHS):
        raise ValueError(f"no fast path is called {', '.join(sorted(unknown))}: give any of {', '.join(FAST_PATHS)}")
    _off.clear()
    _off.update(names)


@contextmanager
def without(*names: str) -> Iterator[None]:
    """With these off, all of them where none is named; before and after as it was."""
    before = set(_off)
    switch_off(names or FAST_PATHS)
    try:
        yield
    finally:
        switch_off(before)
