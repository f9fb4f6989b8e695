"""What transformers, its Trainer and engines on top of it expect of a model; see also `matrix/`."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from llm.model import DecoderConfig, DecoderForCausalLM
from llm.model.attention import eager_attention
from llm.model.decoder import Decoder

SIZES = {
    "vocab_size": 96, "unpadded_vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
KINDS = {
    "classic": DecoderConfig.llama(**SIZES, num_key_value_heads=2),
    "streams": DecoderConfig.llama(**SIZES, stream=["queries", "values"], hidden_act="nmda", nmda_learnable=True),
    "gpt2": DecoderConfig.gpt2(**SIZES, stream=["values"], stream_weight="head"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind: str) -> DecoderForCausalLM:
    return DecoderForCausalLM(DecoderConfig.from_dict(KINDS[kind].to_dict())).eval()


def tokens(rows: int = 2, length: int = 12, vocabulary: int = 90) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


@kinds
def test_auto_model_loads_the_bare_decoder(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path / "saved")
    bare, report = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and type(bare).__name__ == "Decoder"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    expected = model.model(tokens()).last_hidden_state
    for found in (bare, whole.model):
        assert torch.equal(found(tokens()).last_hidden_state, expected)
    assert torch.equal(bare(tokens(), return_dict=False)[0], expected)


@kinds
def test_a_bare_decoder_starts_with_the_weights_of_the_one_with_a_head(kind: str) -> None:
    bare, whole = Decoder(KINDS[kind]), made(kind).model
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), whole.parameters(), strict=True))


@kinds
def test_what_vllm_asks_of_a_model_for_its_transformers_backend(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documentation, "Writing custom models": a base model, attention by the interface, keywords passed down to it,
    `is_causal`, and a plan for tensor parallelism that names linear layers."""
    model = made(kind)
    assert isinstance(model.model, PreTrainedModel) and model.base_model is model.model
    assert model._supports_attention_backend and all(layer.attention.is_causal for layer in model.model.layers)
    given = []

    def attention(module: torch.nn.Module, *tensors: Tensor, **keywords: object) -> tuple[Tensor, Tensor]:
        given.append((module.layer_idx, keywords.pop("attention_instances")))
        return eager_attention(module, *tensors, **keywords)  # type: ignore[arg-type]

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", attention)
    expected = model.model(tokens()).last_hidden_state
    model.config._attn_implementation = "mine"
    mask = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)[None, None]
    found = model.model(tokens(), attention_mask=mask, attention_instances="theirs", use_cache=False, return_dict=False)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert given == [(layer, "theirs") for layer in range(3)]
    names = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    planned = {name.replace("*", str(layer)) for name in model.config.base_model_tp_plan for layer in range(3)}
    assert set(names) <= planned


@kinds
def test_a_static_cache_compiled_whole_gives_the_tokens_of_the_dynamic_one(kind: str) -> None:
    model, ids, mask = made(kind), tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)
    torch._dynamo.reset()
    compiled = CompileConfig(backend="eager", fullgraph=True)
    compiled._compile_all_devices = True  # else transformers compiles on GPUs alone
    found = model.generate(ids, cache_implementation="static", compile_config=compiled, **settings)
    assert torch.equal(found, expected)


def test_only_labels_are_named_so() -> None:
    """transformers' Trainer evaluates a loss only if a batch has all arguments with labels in their name."""
    assert [name for name in inspect.signature(made("classic").forward).parameters if "label" in name] == ["labels"]


@kinds
@pytest.mark.parametrize("size", [70, 120])
def test_a_resized_model_has_its_fast_paths_still(kind: str, size: int) -> None:
    model, ids, targets = made(kind), tokens(vocabulary=size), tokens(vocabulary=size).flip(0)
    model.enable_fast_paths()
    model.resize_token_embeddings(size)
    assert model.fused_loss and model.config.vocab_size == model.config.unpadded_vocab_size == size
    loss = model(input_ids=ids, shift_labels=targets).loss
    torch.testing.assert_close(loss, F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten()))
    loss.backward()


@pytest.mark.parametrize("size", [70, 120])
def test_a_bare_decoder_is_resized_too(size: int, tmp_path: Path) -> None:
    bare = Decoder(DecoderConfig.llama(**SIZES))
    bare.resize_token_embeddings(size)
    bare.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert again.config.vocab_size == again.config.unpadded_vocab_size == size
    ids = tokens(vocabulary=size)
    assert torch.equal(again(inputs_embeds=bare.embed_tokens(ids))[0], bare(ids)[0])


@kinds
def test_padding_of_the_vocabulary_never_wins(kind: str) -> None:
    model = made(kind)
    with torch.no_grad():
        model.lm_head.weight[90:] = 100.0
    logits = model(tokens()).logits
    assert logits.shape[-1] == 96 and (logits[..., :90].min() > logits[..., 90:].max())
    assert logits.isfinite().all()
