"""Residual forms, beyond what every switch has to hold."""

import pytest
import torch

from llm.model import DecoderForCausalLM
from llm.model.residual import doubly_stochastic

from .switches import STYLES, make_config, make_model, tokens

FORMS = {
    "dense": {"residual": "dense"},
    "hyper": {"residual": "hyper"},
    "hyper-manifold": {"residual": "hyper-manifold"},
    "two copies": {"residual": "hyper-manifold", "residual_expansion": 2},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("style", STYLES)
def test_every_form_starts_as_the_plain_one_and_its_parameters_learn(style: str, form: dict) -> None:
    ids, plain = tokens(2, 15), DecoderForCausalLM(make_config(style)).eval()
    model = DecoderForCausalLM(make_config(style, **form))
    torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits, rtol=1e-4, atol=2e-4)
    ours = [p for name, p in model.named_parameters() if "connection" in name or "depth_averages" in name]
    updates = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # a projection that starts at 0 hides the gradient of its factor in the first step
        updates.zero_grad()
        model(ids, labels=ids).loss.backward()
        updates.step()
    assert ours and all(p.grad.abs().max() > 0 for p in ours)


@pytest.mark.parametrize("expansion", [2, 4])
def test_copies_become_different_ones(expansion: int) -> None:
    """Copies that are read and written alike would stay equal for ever."""
    model = DecoderForCausalLM(make_config("llama", residual="hyper-manifold", residual_expansion=expansion))
    updates, ids = torch.optim.SGD(model.parameters(), lr=1.0), tokens(2, 15)
    model(ids, labels=ids).loss.backward()
    updates.step()
    seen = []
    model.model.layers[-1].register_forward_hook(lambda module, given, result: seen.append(result[0]))
    model(ids)
    (copies,) = seen
    assert copies.shape[2] == expansion
    assert all((copies[:, :, 0] - copies[:, :, k]).abs().max() > 1e-4 for k in range(1, expansion))


def test_doubly_stochastic_matrices_and_their_gradients() -> None:
    logs = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = doubly_stochastic(logs)
    for dimension in (-1, -2):
        torch.testing.assert_close(found.sum(dimension), torch.ones(3, 5, 4, dtype=torch.float64), rtol=0, atol=1e-4)
    assert (found > 0).all()
    leaf = logs[0, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(doubly_stochastic, leaf)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        doubly_stochastic(leaf)
    assert saved == [leaf.shape]


@every_form
def test_autocast_leaves_the_residual_stream_in_float32(form: dict) -> None:
    model, seen = make_model("llama", **form).train(), []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, given, result: seen.append(result[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids := tokens(2, 15), labels=ids).loss
    loss.backward()
    assert set(seen) == {torch.float32}


@every_form
def test_hidden_states_have_the_width_of_the_model(form: dict) -> None:
    out = make_model("gpt2", **form)(tokens(2, 7), output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in out.hidden_states] == [(2, 7, 48)] * 4


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="residual_expansion 1 must be at least 2"):
        make_config("llama", residual="hyper", residual_expansion=1)
    with pytest.raises(ValueError, match="residual 'highway' is unknown: give one of plain, dense, hyper"):
        make_config("llama", residual="highway")
    with pytest.raises(ValueError, match="residual=hyper"):
        make_model("llama", residual="hyper").to_hf()
