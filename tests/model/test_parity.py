"""Equal to transformers' Llama and GPT-2 at the same weights: logits, loss, gradients, generation, and back."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm.model import DecoderConfig, DecoderForCausalLM

from .switches import tokens

LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.1,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.1,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama_biases_tied": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "llama_wide_heads_500k": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    ),
    "llama3_rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **LLAMA,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2_relu_untied": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2, activation_function="relu", tie_word_embeddings=False, n_inner=100)
    ),
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, DecoderForCausalLM]:
    torch.manual_seed(0)
    theirs = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # biases and norms are constant at first
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs, DecoderForCausalLM.from_hf(theirs)


def test_logits_loss_and_gradients(pair: tuple[Any, DecoderForCausalLM]) -> None:
    theirs, ours = pair
    ids = tokens(3, 40, high=97)
    labels = ids.clone()
    labels[:, :5] = -100
    a, b = theirs(ids, labels=labels), ours(ids, labels=labels)
    assert (a.logits - b.logits).abs().max() <= 1e-5
    assert abs(a.loss - b.loss) <= 1e-6
    a.loss.backward()
    b.loss.backward()
    with torch.no_grad():  # gradients go through the same table of names as weights
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    gradients = dict(DecoderForCausalLM.from_hf(theirs).named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5, name


def test_generation_and_hidden_states(pair: tuple[Any, DecoderForCausalLM]) -> None:
    theirs, ours = pair
    ids = tokens(2, 9, high=97)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(theirs.generate(ids, **settings), ours.generate(ids, **settings))
    for model in pair:
        model.set_attn_implementation("eager")
    a, b = (model(ids, output_hidden_states=True, output_attentions=True) for model in pair)
    for kind in ("hidden_states", "attentions"):
        assert len(a[kind]) == len(b[kind])
        for x, y in zip(a[kind], b[kind], strict=True):
            assert (x - y).abs().max() <= 1e-5


def test_there_and_back(pair: tuple[Any, DecoderForCausalLM]) -> None:
    theirs, ours = pair
    back = ours.to_hf()
    assert type(back) is type(theirs)
    original = theirs.state_dict()
    assert back.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.state_dict().items())
    ids = tokens(2, 30, high=97)
    assert torch.equal(back.eval()(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"stream": ["values"]},
        {"hidden_act": "nmda"},
        {"softmax_scale": 1.0},
        {"vocab_size": 64, "unpadded_vocab_size": 61},
        {"norm": "layernorm"},
    ],
)
def test_a_switch_that_hf_lacks_is_refused(settings: dict[str, Any]) -> None:
    model = DecoderForCausalLM(
        DecoderConfig.llama(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **settings)
    )
    with pytest.raises(ValueError, match=next(iter(settings.keys() - {"vocab_size", "norm"}), "parts")):
        model.to_hf()
    with pytest.raises(ValueError, match="DecoderConfig cannot be converted"):
        DecoderForCausalLM.from_hf(model)
    with pytest.raises(ValueError, match="takes a model, not 'gpt2'"):
        DecoderForCausalLM.from_hf("gpt2")  # type: ignore[arg-type]
