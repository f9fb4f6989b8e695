"""A memory that keeps only some moments, against a loop that keeps a list."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from llm.common.errors import UserError
from small.tem.model import TemTransformer
from small.tem.settings import TransformerSizes
from small.tem.store import new, surprising, times_of


@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
@settings(max_examples=30)
def test_new_moments_are_unlike_every_kept_one(seed: int, below: float) -> None:
    keys = torch.randn(3, 12, 3, generator=torch.Generator().manual_seed(seed))
    found = new(keys, below)
    for row, kept in zip(keys, found.tolist(), strict=True):
        memory: list[torch.Tensor] = []
        for key, is_kept in zip(row, kept, strict=True):
            expected = all(F.cosine_similarity(key, other, dim=0) < below for other in memory)
            assert is_kept == expected
            if expected:
                memory.append(key)
    assert found[:, 0].all()


def test_times_are_those_of_what_is_kept_and_the_end_beyond() -> None:
    kept = torch.tensor([[True, False, False, True], [True, True, True, False]])
    assert times_of(kept).tolist() == [[0, 3, 4], [0, 1, 2]]


def test_a_moment_is_asked_for_with_what_was_kept_before() -> None:
    asked = []

    def ask(now: int, kept: torch.Tensor) -> torch.Tensor:
        asked.append((now, kept.tolist()))
        return torch.tensor([[0.0, 9.0 if now == 2 else 0.0]])  # sure of symbol 1 at moment 2

    assert surprising(torch.tensor([[1, 1, 1, 1]]), ask, 0.6).tolist() == [[True, True, False, True]]
    assert asked == [(1, [[True]]), (2, [[True, True]]), (3, [[True, True, False]])]


@pytest.mark.parametrize("separation", ["softmax", "linear"])
@pytest.mark.parametrize(("store", "below"), [("surprising", 0.3), ("new", 0.6), ("new", 0.99), ("all", 0.5)])
def test_logits_are_those_of_a_memory_that_is_a_list(store: str, below: float, separation: str) -> None:
    torch.manual_seed(0)
    model = TemTransformer(5, 4, TransformerSizes(8, 6, 5, 7, separation=separation, store=store, below=below))
    with torch.no_grad():
        model.read_out[1].weight.mul_(6)  # so that some predictions are sure
        model.code_to_key.weight.mul_(4)
    actions, symbols = torch.randint(5, (6, 20)), torch.randint(4, (6, 20))
    told = model(actions, symbols)
    counts = []
    for row in range(6):
        keys, memory, times = model.code_to_key(told.codes[row]), [], []
        for time in range(20):
            if time:
                scores = torch.stack([keys[time] @ key for key, _ in memory]) / 6**0.5
                weights = scores.softmax(0) if separation == "softmax" else scores
                logits = model.read_out(sum(w * value for w, (_, value) in zip(weights, memory, strict=True)))
                torch.testing.assert_close(told.logits[row, time - 1], logits, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(told.weights[row, time - 1, : len(memory)], weights, rtol=1e-4, atol=1e-5)
                assert not told.weights[row, time - 1, len(memory) :].any()
            keep = {
                "all": True,
                "new": all(F.cosine_similarity(keys[time], key, dim=0) < below for key, _ in memory),
                "surprising": not time or logits.softmax(-1)[symbols[row, time]] < below,
            }[store]
            if keep and time < 19:
                memory.append((keys[time], model.symbol_to_value.weight[symbols[row, time]]))
                times.append(time)
        assert told.times[row].tolist() == times + [19] * (told.times.shape[1] - len(times))
        counts.append(len(memory))
    assert (max(counts) == 19) == (store == "all") and min(counts) > 2


def test_stores_that_cannot_be() -> None:
    with pytest.raises(
        UserError, match="store 'some' is unknown: give all, surprising or new; below 1 must be between"
    ):
        TransformerSizes(store="some", below=1)
