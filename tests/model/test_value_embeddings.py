"""Value embeddings and their control, beyond what every switch has to hold."""

import pytest
import torch

from llm.model import DecoderForCausalLM

from .switches import STYLES, make_config, make_model, tokens

BOTH = ({"value_embedding": "values"}, {"value_embedding": "input"})
LAYERS = {"value_embedding_layers": [0, 2]}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 2}, {"head_dim": 20}], ids=["square", "narrow", "wide"])
def test_the_control_has_the_same_parameters_and_computes_a_plain_model(style: str, sizes: dict) -> None:
    """Its two tables are one: with that one, a plain model has the same logits."""
    sizes = sizes | {"tie_word_embeddings": False}
    arm, control = (make_model(style, **switch, **LAYERS, **sizes) for switch in BOTH)
    assert arm.num_parameters() == control.num_parameters()
    plain = DecoderForCausalLM(make_config(style, **sizes)).eval()
    weights = {name: tensor.clone() for name, tensor in control.state_dict().items()}
    gates, table = weights.pop("model.input_gates.gate"), weights.pop("model.embed_values.weight")
    assert len(gates) == 2
    for column in range(table.shape[1]):
        weights["model.embed_tokens.weight"][:, column % 48] += gates.mean() * table[:, column]
    plain.load_state_dict(weights)
    ids = tokens(2, 15)
    torch.testing.assert_close(plain(ids).logits, control(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("switch", BOTH, ids=["values", "input"])
def test_a_gate_of_zero_leaves_a_model_as_it_is_and_learns(style: str, switch: dict) -> None:
    ids, plain = tokens(2, 15), DecoderForCausalLM(make_config(style)).eval()
    silent = DecoderForCausalLM(make_config(style, **switch, **LAYERS, value_embedding_gate=0.0)).eval()
    assert torch.equal(silent(ids).logits, plain(ids).logits)
    silent(ids, labels=ids).loss.backward()
    gates = [p for name, p in silent.named_parameters() if name.endswith("gate")]
    assert sum(p.numel() for p in gates) == 2 and all((p.grad != 0).all() for p in gates)


def test_the_table_is_resized_with_the_vocabulary() -> None:
    model = make_model("llama", **BOTH[0])
    table = model.model.embed_values.weight.clone()
    for size in (70, 40):
        model.resize_token_embeddings(size)
        assert len(model.model.embed_values.weight) == size
        assert torch.equal(model.model.embed_values.weight[:40], table[:40])
        assert model(tokens(1, 9, high=size)).logits.shape[-1] == size


def test_what_cannot_be_is_named() -> None:
    for layers in ([], [3], [1, 1], [-1]):
        with pytest.raises(ValueError, match="value_embedding_layers"):
            make_config("llama", value_embedding="values", value_embedding_layers=layers)
    with pytest.raises(ValueError, match="value_embedding 'keys' is unknown: give one of none, values, input"):
        make_config("llama", value_embedding="keys")
    model = make_model("llama", **BOTH[0])
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(tokens(1, 4)))
    with pytest.raises(ValueError, match="value_embedding=values"):
        model.to_hf()
