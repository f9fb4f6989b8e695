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
from torch import nn

from llm.cli import main
from llm.model import DecoderConfig, DecoderForCausalLM, fast_dropout
from llm.model.fast_attention import FastAttention
from llm.model.fast_dropout import FastDropout
from llm.model.fast_linear import HAS_BFLOAT16, FastLinear, multiply_in_float32, use_onednn
from llm.model.fast_loss import FastOutputHead
from llm.model.fast_norm import FastRMSNorm
from llm.model.fast_paths import FAST_PATHS, enable_fast_paths
from llm.train.module import LanguageModule
from llm.train.optim import Optimizer

STEPS, ROWS, TIME, VOCABULARY = 200, 4, 32, 256
CHANGES_NOTHING = {  # the matrix products, and the attention, of the other precision
    False: ("attention", "dropout"),
    True: ("matmul", "dropout") if HAS_BFLOAT16 else ("dropout",),
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
    steps: int = STEPS,
) -> np.ndarray:
    """The losses of the first steps with these fast paths off."""
    config = DecoderConfig.llama(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TIME, initializer_range=0.1, attention_dropout=dropout, residual_dropout=dropout,
    )  # fmt: skip
    model, losses = DecoderForCausalLM(config).train(), []
    generator = torch.Generator().manual_seed(noise or 0)
    model.enable_fast_paths(name for name in FAST_PATHS if name not in set(off))
    model.lm_head.compiled_loss = compiled
    if compiled:
        torch._dynamo.reset()  # of what other tests have compiled: after eight forms of a block it would give up
    for block in model.model.layers if compiled else ():
        block.compile()
    optimizer = Optimizer(lr=3e-3).build(model)
    torch.manual_seed(seed)
    for ids in batches()[:steps]:
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
        assert far <= 2 * spread  # 0 on a processor whose plain path runs the same kernel


@pytest.mark.parametrize(
    "half", [pytest.param(False, id="fp32"), pytest.param(True, id="bf16", marks=pytest.mark.slow)]
)
def test_compiled_blocks_stay_within_the_spread_of_rounding(half: bool) -> None:
    """With the fast paths off, and on."""
    plain, spread = plain_and_spread(half)
    compiled, both = curve(half, FAST_PATHS, compiled=True), curve(half, (), compiled=True)
    assert distance(compiled, plain) <= 2 * spread
    assert distance(both, plain) <= 2 * spread


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
        return [curve(half, off, dropout=0.1, seed=seed, steps=80)[-40:].mean() for seed in range(5)]

    fast_ends, plain_ends = ends(()), ends(FAST_PATHS)
    assert stats.ttest_ind(fast_ends, plain_ends).pvalue > 0.001
    without_dropout = plain_and_spread(half)[0][40:80].mean()
    assert min(*fast_ends, *plain_ends) > without_dropout  # there was dropout in both


FAST = {"matmul": FastLinear, "dropout": FastDropout, "norm": FastRMSNorm, "loss": FastOutputHead}


def on(model: nn.Module) -> set[str]:
    """The fast paths that any module of a model has."""
    named = {name for name, kind in FAST.items() if any(type(module) is kind for module in model.modules())}
    return named.union(*(module.fast_paths for module in model.modules() if isinstance(module, FastAttention)))


def test_a_model_is_plain_torch_until_they_are_switched_on() -> None:
    config = DecoderConfig.llama(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=1)
    model = DecoderForCausalLM(config)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["lm_head"] is kinds["model.layers.0.feedforward.up_proj"] is nn.Linear
    assert kinds["model.norm"] is nn.RMSNorm and not on(model) and not model.fused_loss
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for names in ((), *((name,) for name in FAST_PATHS), FAST_PATHS, ("matmul", "loss")):
        model.enable_fast_paths(names)
        assert on(model) == set(names) and model.fused_loss == ("loss" in names)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == weights
    enable_fast_paths(model, ())
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    with pytest.raises(ValueError, match=r"no fast path is called speed: give any of matmul, "):
        model.enable_fast_paths(["matmul", "speed"])


NODES = {  # in the graph of the loss, of a fast path alone
    "matmul": {"_LinearBackward"},
    "attention": {"_CausalAttentionBackward"},
    "dropout": set(),
    "rotary": {"_RotationBackward"},
    "norm": {"_RMSNormBackward"},
    "loss": {"_SummedLossBackward"},
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("names", [(), *PATHS], ids=lambda names: "+".join(names) or "none")
def test_each_path_acts_where_it_is_on_and_nowhere_else(
    names: tuple[str, ...], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DecoderConfig.llama(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, residual_dropout=0.5
    )
    model, ids = DecoderForCausalLM(config).train(), torch.zeros(1, 4, dtype=torch.long)
    model.enable_fast_paths(names)
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(fast_dropout, "keep_factors", lambda x, p: drawn.append(x) or torch.ones_like(x))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        node = model(ids, shift_labels=ids).loss.grad_fn
    found, to_visit = set(), [node]
    while to_visit:
        if (node := to_visit.pop()) is not None and node not in found:
            found.add(node)
            to_visit += [following for following, _ in node.next_functions]
    nodes = {node.name() for node in found}
    expected = set().union(*(NODES[name] for name in names))
    if not (multiply_in_float32(ids.device, torch.bfloat16) if half else use_onednn(torch.zeros(1))):
        expected -= NODES["matmul"]
    if not half:
        expected -= NODES["attention"]
    assert {name for name in nodes if name in set().union(*NODES.values())} == expected
    assert len(drawn) == (2 if "dropout" in names else 0)  # after attention, and after the FFN


def test_compiled_blocks_multiply_by_the_fast_path() -> None:
    config = DecoderConfig.llama(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ids = torch.zeros(1, 4, dtype=torch.long)

    def functions(names: tuple[str, ...]) -> int:
        graphs: list[torch.fx.GraphModule] = []
        model = DecoderForCausalLM(config).train()
        model.enable_fast_paths(names)
        torch._dynamo.reset()
        model.model.layers[0].compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
        model(ids, shift_labels=ids)
        (graph,) = graphs
        return sum("autograd_function_apply" in str(node.target) for node in graph.graph.nodes)

    assert functions(("rotary", "norm")) == 0  # the compiler fuses torch's own
    assert functions(("matmul",)) == (7 if use_onednn(torch.zeros(1)) else 0)


def test_a_run_switches_off_those_that_are_named() -> None:
    decoder = DecoderConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert on(LanguageModule(decoder, disable_fast_paths=["matmul", "loss"]).model) == set(FAST_PATHS) - {
        "matmul",
        "loss",
    }
    assert on(LanguageModule(decoder).model) == set(FAST_PATHS)


def test_a_plain_model_has_second_derivatives_and_functional_transforms() -> None:
    """As an export that a stranger loads: fast paths have one derivative."""
    config = DecoderConfig.llama(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, stream=["values"]
    )
    torch.manual_seed(0)
    model, ids = DecoderForCausalLM(config).double(), torch.randint(8, (2, 5))
    model.set_attn_implementation("eager")
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (), {"input_ids": ids, "labels": ids}).loss

    one = torch.func.grad(loss)(weights, ids)
    expected = torch.autograd.grad(loss(weights, ids), list(weights.values()), create_graph=True)
    for found, wanted in zip(one.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    direction = [torch.randn_like(weight) for weight in weights.values()]
    second = torch.autograd.grad(expected, list(weights.values()), direction)
    step = 1e-4
    moved = [
        torch.func.grad(loss)({n: w + s * step * d for (n, w), d in zip(weights.items(), direction, strict=True)}, ids)
        for s in (1, -1)
    ]
    for found, ahead, behind in zip(second, moved[0].values(), moved[1].values(), strict=True):
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-2, atol=1e-3)  # the loss is float32


def test_an_unknown_one_is_refused(tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(tiny_config()), "--model.disable_fast_paths", "[matmul, speed]"]) == 2
    assert "model.disable_fast_paths ['speed'] is unknown: give any of matmul, " in capsys.readouterr().err
