"""The loss curve of every fast path over 200 steps against that of the plain paths.

The bound is the spread that rounding makes: the plain path again, with weights moved before every step by at most one
unit in the last place of float32, for two seeds. A fast path may be as far from the plain curve as twice the farther of
them, in the root mean square over steps. Dropout draws other elements: its mean loss over the last 50 steps has to lie
among those of the plain path, as two samples of seeds.
"""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from llm.cli import main
from llm.model import DecoderConfig, DecoderForCausalLM
from llm.model.fast_paths import FAST_PATHS, fast, switch_off, without
from llm.train.module import LanguageModule
from llm.train.optim import Optimizer

STEPS, ROWS, TIME, VOCABULARY = 200, 4, 64, 256
CHANGES_NOTHING = {  # the matrix products, and the attention, of the other precision
    False: ("attention", "dropout"),
    True: ("matmul", "dropout"),
}


@cache
def batches() -> torch.Tensor:
    """A Markov chain with four successors of each token: (steps, rows, time + 1)."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=generator)
    ids = torch.randint(VOCABULARY, (STEPS, ROWS, 1), generator=generator)
    for _ in range(TIME):
        choice = torch.randint(4, (STEPS, ROWS, 1), generator=generator)
        ids = torch.cat([ids, successors[ids[..., -1]].gather(-1, choice)], dim=-1)
    return ids


def curve(
    half: bool,
    off: Iterable[str],
    noise: int | None = None,
    compiled: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """The losses of `STEPS` steps with these fast paths off."""
    config = DecoderConfig.llama(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TIME, initializer_range=0.1, attention_dropout=dropout, residual_dropout=dropout,
    )  # fmt: skip
    model, losses = DecoderForCausalLM(config).train(), []
    generator = torch.Generator().manual_seed(noise or 0)
    model.lm_head.compiled_loss = compiled
    if compiled:
        torch._dynamo.reset()  # of what other tests have compiled: after eight forms of a block it would give up
    for block in model.model.layers if compiled else ():
        block.compile()
    optimizer = Optimizer(lr=3e-3).build(model)
    torch.manual_seed(seed)
    with without("loss"):  # whatever, to come back from
        switch_off(off)
        for ids in batches():
            with torch.no_grad():
                for parameter in model.parameters() if noise is not None else ():
                    parameter.mul_(1 + 2**-23 * torch.randint(-1, 2, parameter.shape, generator=generator))
            with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                inputs = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}
                loss = model(**inputs, num_items_in_batch=ROWS * TIME).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return np.array(losses)


@cache
def plain_and_spread(half: bool) -> tuple[np.ndarray, float]:
    plain = curve(half, FAST_PATHS)
    assert plain[0] > 5.5 > 2.5 > plain[-1]  # it learns: ln 256 = 5.5, ln 4 = 1.4
    return plain, max(distance(curve(half, FAST_PATHS, noise=seed), plain) for seed in (1, 2))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one - other).mean()))


PATHS = [*((name,) for name in FAST_PATHS), FAST_PATHS]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("on", PATHS, ids=lambda on: on[0] if len(on) == 1 else "all")
def test_a_fast_path_stays_within_the_spread_of_rounding(on: tuple[str, ...], half: bool) -> None:
    plain, spread = plain_and_spread(half)
    far = distance(curve(half, [name for name in FAST_PATHS if name not in on]), plain)
    if set(on) <= set(CHANGES_NOTHING[half]):
        assert far == 0
    else:
        assert 0 < far <= 2 * spread


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_compiled_blocks_stay_within_the_spread_of_rounding(half: bool) -> None:
    """With the fast paths off, and on: both switches act there."""
    plain, spread = plain_and_spread(half)
    compiled, both = curve(half, FAST_PATHS, compiled=True), curve(half, (), compiled=True)
    assert 0 < distance(compiled, plain) <= 2 * spread
    assert 0 < distance(both, plain) <= 2 * spread
    assert distance(both, compiled) > 0


@pytest.mark.parametrize(("stream", "blocks"), [([], 1), (["values"], 2)], ids=["classic", "values"])
def test_blocks_of_a_shape_are_compiled_once(stream: list[str], blocks: int) -> None:
    """Of four layers with a stream the first is another shape: nothing arrives there."""
    decoder = DecoderConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=4, num_attention_heads=1, stream=stream, initializer_range=0.1
    )
    module, ids = LanguageModule(decoder, compile=True), torch.zeros(2, 5, dtype=torch.long)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        module.model(input_ids=ids, shift_labels=ids, num_items_in_batch=10).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == blocks + 1  # and the loss


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_dropout_by_bits_learns_as_dropout_does(half: bool) -> None:
    def ends(off: Iterable[str]) -> list[float]:
        return [curve(half, off, dropout=0.1, seed=seed)[-50:].mean() for seed in range(5)]

    fast_ends, plain_ends = ends(()), ends(FAST_PATHS)
    assert stats.ttest_ind(fast_ends, plain_ends).pvalue > 0.001
    without_dropout = curve(half, FAST_PATHS)[-50:].mean()
    assert min(*fast_ends, *plain_ends) > without_dropout  # there was dropout in both


def test_a_run_switches_them_off_and_the_next_on_again() -> None:
    decoder = DecoderConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    LanguageModule(decoder, plain=["matmul", "loss"]).setup("fit")
    assert [name for name in FAST_PATHS if not fast(name)] == ["matmul", "loss"]
    LanguageModule(decoder).setup("fit")
    assert all(map(fast, FAST_PATHS))


def test_an_unknown_one_is_refused(tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(tiny_config()), "--model.plain", "[matmul, speed]"]) == 2
    assert "model.plain ['speed'] is unknown: give any of matmul, " in capsys.readouterr().err
