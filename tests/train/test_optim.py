"""Groups, schedule and FLOPs against what they should be by hand or by torch's own counter."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llm.model import DecoderConfig, DecoderForCausalLM
from llm.train.flops import device_peak, flops_per_token
from llm.train.optim import Optimizer, Schedule


@pytest.mark.parametrize("style", [DecoderConfig.llama, DecoderConfig.gpt2])
def test_only_matrices_decay(style: Any) -> None:
    model = DecoderForCausalLM(
        style(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            stream=["queries", "values"],
            stream_weight="head",
            hidden_act="nmda",
            nmda_learnable=True,
        )
    )
    optimizer = Optimizer(lr=0.1, weight_decay=0.5).build(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with no gradient, decay alone moves a weight: by 1 - 0.1 x 0.5
    for name, parameter in model.named_parameters():
        matrix = any(part in name for part in ("_proj.weight", "embed_", "lm_head"))
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if matrix else 1.0), msg=name)


def test_muon_by_hand() -> None:
    """Three updates of every parameter, against Muon and AdamW written out in float64."""
    config = DecoderConfig.llama(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2
    )
    model = DecoderForCausalLM(config)
    settings = Optimizer(name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.5, muon_momentum=0.9)
    optimizer = settings.build(model)
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    state = {name: torch.zeros(2, *weight.shape, dtype=torch.float64) for name, weight in expected.items()}
    for count in range(1, 4):
        for index, (name, parameter) in enumerate(model.named_parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * index + count))
            weight, moments, gradient = expected[name], state[name], parameter.grad.double()
            if ".layers." in name and weight.ndim == 2:
                moments[0] = 0.9 * moments[0] + 0.1 * gradient
                rms = 0.2 * max(weight.shape) ** 0.5  # times that of a matrix with orthonormal rows or columns
                update = 0.02 * rms * newton_schulz(0.1 * gradient + 0.9 * moments[0])
                expected[name] = weight * (1 - 0.02 * 0.5) - update
            else:
                moments[0], moments[1] = (
                    0.9 * moments[0] + 0.1 * gradient,
                    0.95 * moments[1] + 0.05 * gradient.square(),
                )
                ratio = moments[0] / (1 - 0.9**count) / ((moments[1] / (1 - 0.95**count)).sqrt() + 1e-8)
                expected[name] = weight * (1 - 1e-3 * 0.5 * (weight.ndim == 2)) - 1e-3 * ratio
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = 0.02 * 0.2 if ".layers." in name and parameter.ndim == 2 else 1e-3  # an element's change in a step
        tolerance = 0.05 * moved if moved > 1e-3 else 1e-6  # torch's Muon multiplies in bf16
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=3 * tolerance, msg=name)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic iteration of Jordan et al. 2024, by singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left * values @ right


def test_the_papers_schedule_by_hand() -> None:
    """500 steps of warm-up, cosine to 0 at 40,000, a straight line to 0 over the last 5,000."""
    schedule = Schedule(shape="cosine", warmup_steps=500, cooldown_steps=5000)
    factor = [schedule.factor(step, 40_000) for step in range(40_000)]
    assert factor[0] == 1 / 500
    assert factor[249] == 0.5
    assert factor[499] == factor[500] == 1.0
    assert factor[20_250] == pytest.approx(0.5)  # the middle of the cosine
    knee = 0.5 * (1 + math.cos(math.pi * 34_500 / 39_500))
    assert factor[35_000] == pytest.approx(knee)
    assert factor[37_500] == pytest.approx(knee / 2)
    assert factor[39_999] == pytest.approx(knee / 5000)


def test_warm_up_stable_decay_by_hand() -> None:
    schedule = Schedule(shape="wsd", warmup_steps=10, cooldown_steps=100, min_lr_ratio=0.1)
    factor = [schedule.factor(step, 500) for step in range(500)]
    assert factor[:10] == [(step + 1) / 10 for step in range(10)]
    assert set(factor[9:401]) == {1.0}
    assert factor[425] == pytest.approx(0.1 + 0.9 * 0.5)  # a quarter of the decay
    assert factor[499] == pytest.approx(0.1 + 0.9 * (1 - 0.99**0.5))


@given(
    st.sampled_from(["cosine", "constant", "wsd"]),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 100),
    st.floats(0, 1),
)
def test_any_schedule_rises_then_falls_within_bounds(
    shape: str, warmup: int, cooldown: int, between: int, floor: float
) -> None:
    cooldown += shape == "wsd"
    steps = warmup + between + cooldown
    schedule = Schedule(shape, warmup, cooldown, floor)
    assert schedule.problems(steps) == []
    factor = [schedule.factor(step, steps) for step in range(steps)]
    assert all(0 <= value <= 1 for value in factor)
    assert factor[: warmup + 1] == sorted(factor[: warmup + 1])
    assert factor[warmup:] == sorted(factor[warmup:], reverse=True)
    assert max(factor) == 1


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        (Schedule(shape="linear"), 10, "cosine or constant"),
        (Schedule(warmup_steps=6, cooldown_steps=5), 10, "longer than the run"),
        (Schedule(), -1, "max_steps"),
        (Schedule(shape="wsd"), 10, "set model.schedule.cooldown_steps"),
        (Schedule(warmup_steps=-5), 10, "must be at least 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(schedule: Schedule, steps: int, message: str) -> None:
    (problem,) = schedule.problems(steps)
    assert message in problem


def test_settings_that_cannot_be_are_named() -> None:
    assert Optimizer(name="sgd").problems() == ["model.optimizer.name sgd must be one of adamw, muon"]
    (problem,) = Optimizer(name="muon", muon_lr=-1.0).problems()
    assert "muon_lr" in problem
    assert Optimizer(name="muon").sharding_problems(2, False) == Optimizer().sharding_problems(3, True) == []
    for stage, offload in ((3, False), (1, True)):
        (problem,) = Optimizer(name="muon").sharding_problems(stage, offload)
        assert "strategy.stage" in problem


@pytest.mark.parametrize(
    "config",
    [
        DecoderConfig.llama(vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4),
        DecoderConfig.llama(
            vocab_size=96,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            unpadded_vocab_size=80,
        ),
        DecoderConfig.gpt2(vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=3),
    ],
)
def test_flops_are_those_that_torch_counts(config: DecoderConfig) -> None:
    model = DecoderForCausalLM(config)
    model.set_attn_implementation("eager")  # every key counted, as the formula does
    ids = torch.randint(80, (2, 40))
    with FlopCounterMode(display=False) as counter:  # of the plain model: it knows neither oneDNN's products nor addmm_
        model(ids, labels=ids).loss.backward()
    padding = 6 * config.hidden_size * (config.vocab_size - config.unpadded_vocab_size)  # not computed in training
    assert flops_per_token(config, 40) == pytest.approx(counter.get_total_flops() / ids.numel() - padding, rel=1e-3)


def test_no_peak_is_invented() -> None:
    assert device_peak(torch.device("cpu"), half_precision=True) is None


@pytest.mark.parametrize("form", ["hyper", "hyper-manifold"])
def test_flops_of_hyper_connections_are_those_of_torchs_counter(form: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    counted = []
    for residual in ("plain", form):
        model = DecoderForCausalLM(DecoderConfig.llama(**sizes, residual=residual, residual_expansion=3))
        ids = torch.randint(96, (2, 40))
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids).loss.backward()
        counted.append((counter.get_total_flops() / ids.numel(), flops_per_token(model.config, 40)))
    (plain, said_plain), (hyper, said) = counted
    added = 2 * 2 * 6 * 3 * 64  # the counter leaves out what is not a matrix product: adding to the copies
    assert said - said_plain - added == pytest.approx(hyper - plain, rel=1e-3)
