"""Whether bfloat16 products are worth their rounding on this CPU: measured, since it depends on the processor.

`fit` in bf16 says so before its first step where they are not; `trainer.precision: auto` takes the faster of the two.
"""

from __future__ import annotations

import statistics
import time

import torch

from ..model import DecoderConfig
from ..model.fast_linear import linear

TOKENS = 512  # at most, in a product that is timed
ROUNDS = 7
MARGIN = 1.05  # below this ratio of times, one is as good as the other


def seconds_of_products(hidden: int, intermediate: int, tokens: int) -> dict[torch.dtype, float]:
    """Median seconds of products (tokens, hidden) x (hidden, intermediate) in float32 and bfloat16, timed in turn."""
    pairs = {}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, hidden, generator=generator) for n in (min(tokens, TOKENS), intermediate))
        pairs[dtype] = x.to(dtype), weight.to(dtype)
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in pairs}
    with torch.no_grad():
        for turn in range(ROUNDS + 2):
            for dtype, (x, weight) in pairs.items():
                began = time.perf_counter()
                linear(x, weight)
                if turn >= 2:  # the first ones prepare kernels and memory
                    times[dtype].append(time.perf_counter() - began)
    return {dtype: statistics.median(each) for dtype, each in times.items()}


def slower_in_bf16(decoder: DecoderConfig, tokens: int) -> str | None:
    """One sentence where bfloat16 products of the feed-forward layer's shape are slower here than float32 ones."""
    assert decoder.intermediate_size is not None  # it follows from hidden_size
    seconds = seconds_of_products(decoder.hidden_size, decoder.intermediate_size, tokens)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    if ratio < MARGIN:
        return None
    return (
        f"on this CPU, bfloat16 products take {ratio:.2g} times as long as float32 ones: trainer.precision 32-true "
        "is probably faster (both runs of a pair need the same)"
    )


def choose(decoder: DecoderConfig, tokens: int, on_gpu: bool) -> str:
    """What `trainer.precision: auto` means here: "bf16-mixed" or "32-true". On a GPU nothing is measured."""
    return "32-true" if not on_gpu and slower_in_bf16(decoder, tokens) else "bf16-mixed"
