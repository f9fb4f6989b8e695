"""Residual streams and all other switches against a model written out; the pair's common start."""

import pytest
import torch

from llm.model import DecoderForCausalLM

from .reference import reference_logits
from .switches import EVERY, STYLES, SWITCHES, make_config, make_model, tokens


@pytest.mark.parametrize(("style", "switch"), EVERY)
def test_logits_and_gradients_equal_the_written_out_model(style: str, switch: str) -> None:
    model = make_model(style, switch)
    ids = tokens(1, 17)
    ours, theirs = model(ids).logits[0, :, : model.config.unpadded_vocab_size], reference_logits(model, ids[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    if model.config.nmda_learnable:
        return  # the reference reads alpha as a number
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for name, a, b in zip(
        names,
        torch.autograd.grad((ours * weights).sum(), parameters),
        torch.autograd.grad((theirs * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1.0, b.abs().max().item()), msg=name)


@pytest.mark.parametrize("style", STYLES)
def test_streams_change_the_model(style: str) -> None:
    ids = tokens(1, 12)
    logits = {switch: make_model(style, switch)(ids).logits for switch in ("plain", "queries", "keys", "values")}
    plain = logits.pop("plain")
    assert all((other - plain).abs().max() > 1e-3 for other in logits.values())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("switch", [switch for switch in SWITCHES if switch != "plain"])
def test_a_pair_starts_equal_in_all_it_shares(style: str, switch: str) -> None:
    alike = {key: value for key, value in SWITCHES[switch].items() if key.startswith(("param", "base_", "tie_"))}
    a, b = (
        dict(DecoderForCausalLM(make_config(style, name, initializer_seed=3, **alike)).named_parameters())
        for name in ("plain", switch)
    )
    shared = [name for name in a if name in b and a[name].shape == b[name].shape]
    assert all("_proj" in name for name in a.keys() - set(shared))  # other head counts reshape the projections
    assert len(shared) > len(a) // 2
    assert all(torch.equal(a[name], b[name]) for name in shared)
    other = dict(DecoderForCausalLM(make_config(style, switch, initializer_seed=4)).named_parameters())
    matrices = [name for name in shared if a[name].ndim == 2]
    assert not any(torch.equal(b[name], other[name]) for name in matrices)


@pytest.mark.parametrize("style", STYLES)
def test_a_switch_that_is_off_changes_nothing(style: str) -> None:
    """Loss and gradients bitwise those of the plain model, whatever the settings of a switch that is off."""
    off = {"stream": [], "stream_source": "accumulated", "stream_weight": "head", "stream_own": 0.0, "nmda_alpha": 7.0}
    off |= {"stream_arriving": 3.0, "swish_beta": 2.0, "xielu_positive": 1.0}
    off |= {"value_embedding_layers": [1], "value_embedding_gate": 0.0, "residual_expansion": 1}
    results = []
    for settings in ({}, off):
        model = make_model(style, **settings)
        loss = model(ids := tokens(2, 20), labels=ids).loss
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
