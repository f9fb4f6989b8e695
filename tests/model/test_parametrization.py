"""`completep` against Table 1 of Dey et al. 2025, written out by parameter name, and against `standard`."""

from typing import Any

import pytest
import torch

from llm.model import DecoderConfig, DecoderForCausalLM
from llm.train.optim import Optimizer

from .switches import STYLES, make_config, tokens

M, L = 48 / 12, 3 / 2  # width and depth relative to the base
SCALED = {
    "parametrization": "completep", "base_hidden_size": 12, "base_num_hidden_layers": 2, "base_head_dim": 6,
    "scale_residual_init": True, "stream": ["values"], "stream_weight": "head", "hidden_act": "nmda",
    "nmda_learnable": True,
}  # fmt: skip
AT_BASE = {"base_hidden_size": 48, "base_num_hidden_layers": 3, "base_head_dim": 12}


def steps(config: DecoderConfig, optimizer: str) -> list[torch.Tensor]:
    """The weights after three updates, and the logits."""
    model, ids = DecoderForCausalLM(config), tokens(2, 16)
    updates = Optimizer(name=optimizer, lr=1e-2).build(model)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        updates.step()
        updates.zero_grad()
    return [*model.parameters(), model(ids).logits]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("style", STYLES)
def test_at_the_base_size_it_is_standard_bit_for_bit(style: str, optimizer: str) -> None:
    switches: dict[str, Any] = {"stream": ["values", "keys"], "stream_source": "accumulated", "stream_weight": "layer"}
    plain = steps(make_config(style, **switches), optimizer)
    based = steps(make_config(style, **switches, parametrization="completep", **AT_BASE), optimizer)
    assert all(torch.equal(one, other) for one, other in zip(plain, based, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_initial_weights_are_those_of_the_base_table(style: str, tied: bool) -> None:
    standard = make_config(style, tie_word_embeddings=tied, **SCALED | {"parametrization": "standard"})
    models = [DecoderForCausalLM(c) for c in (standard, make_config(style, tie_word_embeddings=tied, **SCALED))]
    for (name, plain), scaled in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        factor = 1.0
        if name.endswith("_proj.weight"):
            factor = M**-0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            factor *= L**0.5  # sqrt(2 x 2 layers) of the base, not sqrt(2 x 3)
        torch.testing.assert_close(scaled, plain * factor, msg=name)


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 1.0), ("muon", 0.5)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_rates_decays_and_eps_are_those_of_the_table(style: str, tied: bool, optimizer: str, power: float) -> None:
    model = DecoderForCausalLM(make_config(style, tie_word_embeddings=tied, **SCALED))
    built = Optimizer(name=optimizer, lr=0.3, weight_decay=0.2, eps=1e-6).build(model)
    group_of = {id(parameter): group for group in built.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        group, block, matrix = group_of[id(parameter)], ".layers." in name, name.endswith("_proj.weight")
        assert group["lr"] == group["initial_lr"] == pytest.approx(0.3 * (M**-power if matrix else 1)), name
        decay = 0.2 * M**power if matrix else 0.2 if parameter.ndim == 2 else 0.0
        assert group["weight_decay"] == pytest.approx(decay), name
        if optimizer == "adamw" or not matrix:
            assert group["eps"] == pytest.approx(1e-6 / M / (L if block else 1)), name
    assert len(group_of) == len(list(model.parameters()))


def test_parameters_keep_their_order_and_groups_under_standard() -> None:
    model = DecoderForCausalLM(make_config("llama"))
    matrices, vectors = (
        [p for p in model.parameters() if p.ndim == 2],
        [p for p in model.parameters() if p.ndim != 2],
    )
    groups = Optimizer(eps=1e-6).build(model).param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in g] for g in (matrices, vectors)]
    assert {(group["lr"], group["eps"]) for group in groups} == {(3e-4, 1e-6)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parametrization": "mup"}, "'mup' is unknown: give one of standard, completep"),
        ({"parametrization": "completep", "base_head_dim": 4}, "needs base_hidden_size, base_num_hidden_layers: set"),
        ({"parametrization": "completep", **AT_BASE, "base_head_dim": 0}, "needs base_head_dim: set"),
    ],
)
def test_what_cannot_be_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config("llama", **settings)


def test_transformers_has_no_such_model() -> None:
    with pytest.raises(ValueError, match="parametrization=completep"):
        DecoderForCausalLM(make_config("llama", "completep")).to_hf()
    plain = DecoderForCausalLM(make_config("llama", parametrization="completep", **AT_BASE))
    ids = tokens(1, 9)
    assert torch.equal(plain.to_hf().eval()(ids).logits, plain.eval()(ids).logits)
