"""Dropout by bits: its probability, its seed, and where it is torch's."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from llm.model.fast_dropout import FastDropout

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_elements_are_dropped_with_the_probability(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((1000, 400), 3.0, dtype=dtype)
    found = FastDropout(p)(x)
    kept = found != 0
    assert torch.equal(found[kept], (x * torch.tensor(1 / (1 - p), dtype=dtype))[kept])
    assert stats.binomtest(int((~kept).sum()), kept.numel(), p).pvalue > 1e-4
    # No element tells of its neighbours, in a row or in a column.
    for one, other in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
        together = (one & other).double().mean().item()
        assert together == pytest.approx((1 - p) ** 2, abs=5 * (p * (1 - p) / kept.numel()) ** 0.5)
    assert torch.equal(FastDropout(p).eval()(x), x) and torch.equal(FastDropout(0.0)(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_the_same_elements_again(dtype: torch.dtype) -> None:
    x, found = torch.ones(7, 11, dtype=dtype), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append([FastDropout(0.5)(x) for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1]) and not torch.equal(found[0][0], found[2][0])


def test_what_is_not_for_bits_is_torchs() -> None:
    x = torch.ones(50, 50, dtype=torch.float64)
    torch.manual_seed(0)
    found = FastDropout(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, 0.5))
    assert not FastDropout(1.0)(torch.ones(5)).any()
