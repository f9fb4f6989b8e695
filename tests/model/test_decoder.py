"""What must hold for every switch: causality, cache, padding, packing, recomputation, compilation."""

import pytest
import torch

from llm.model import DecoderConfig, DecoderForCausalLM

from .switches import EVERY, STYLES, make_config, make_model, tokens

every_switch = pytest.mark.parametrize(("style", "switch"), EVERY)


@every_switch
def test_no_position_sees_a_later_one(style: str, switch: str) -> None:
    model = make_model(style, switch)
    ids = tokens(1, 16)
    base = model(ids).logits
    for position in (1, 8, 15):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 50
        logits = model(changed).logits
        assert torch.equal(logits[:, :position], base[:, :position])
        assert not torch.allclose(logits[:, position:], base[:, position:])


@every_switch
def test_cached_steps_equal_one_pass(style: str, switch: str) -> None:
    model = make_model(style, switch)
    ids = tokens(2, 20)
    whole, cache, parts = model(ids).logits, None, []
    for number, chunk in enumerate(ids.split([7, 1, 1, 5, 6], dim=1)):  # under both names of the cache
        out = model(chunk, **{("past_key_values", "cache")[number % 2]: cache}, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=2e-5)


@every_switch
def test_generation_with_and_without_cache_and_left_padding(style: str, switch: str) -> None:
    model = make_model(style, switch)
    prompts = [tokens(1, length, seed=length)[0] for length in (5, 11)]
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(p[None], attention_mask=torch.ones_like(p[None]), **settings)[0, len(p) :] for p in prompts]
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    for use_cache in (True, False):
        together = model.generate(ids, attention_mask=mask, use_cache=use_cache, **settings)[:, 11:]
        assert torch.equal(together, torch.stack(alone))
    padded = model(ids, attention_mask=mask).logits[0, -5:]
    torch.testing.assert_close(padded, model(prompts[0][None]).logits[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_switch
def test_packed_documents_do_not_see_each_other(style: str, switch: str, attention: str) -> None:
    model = make_model(style, switch)
    model.set_attn_implementation(attention)
    lengths = [6, 1, 9, 8]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = ids.split(lengths, dim=1)
    alone = torch.cat([model(document).logits for document in documents], dim=1)
    for use_cache in (False, True):
        packed = model(ids, position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=2e-5)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 50
    assert torch.equal(model(changed, position_ids=positions).logits[:, 6:], packed[:, 6:])
    model.train()
    torch.testing.assert_close(model(ids, position_ids=positions).logits, alone, rtol=1e-5, atol=2e-5)


def test_packing_with_a_mask_is_refused_instead_of_leaking() -> None:
    model, ids = make_model("llama"), tokens(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="attention_mask=None"):
        model(ids, position_ids=positions, attention_mask=torch.ones_like(ids))


@every_switch
def test_recomputed_blocks_give_the_same_gradients(style: str, switch: str) -> None:
    ids, results = tokens(2, 16), []
    for recompute in (False, True):
        model = make_model(style, switch).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(ids, labels=ids).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "switch", ["plain", "all_per_head", "nmda_learnable", "value_embedding_stream", "hyper", "hyper_manifold"]
)
@pytest.mark.parametrize("style", STYLES)
def test_compiled_blocks_are_one_graph_and_equal(style: str, switch: str) -> None:
    ids, results = tokens(2, 16), []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make_model(style, switch).train()
        if compiled:
            for block in model.model.layers:
                block.compile(fullgraph=True, backend="aot_eager")
        loss = model(ids, labels=ids).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_keeps_rope_and_norms_close(style: str) -> None:
    model, ids = make_model(style, "all_accumulated"), tokens(2, 48)
    exact, rough = model(ids).logits.softmax(-1), model.to(torch.bfloat16)(ids).logits.float().softmax(-1)
    assert torch.isfinite(rough).all()
    assert (exact - rough).abs().mean() < 0.01


def test_padding_of_the_vocabulary_never_wins_and_never_learns() -> None:
    model = make_model("llama", "padded_vocabulary")
    with torch.no_grad():
        model.lm_head.weight[50:] = 100.0  # would win by far
    ids = tokens(2, 20)
    out = model(ids, labels=ids)
    assert out.logits.shape[-1] == 61
    assert out.logits.argmax(-1).max() < 50
    assert out.logits.softmax(-1)[..., 50:].max() == 0
    out.loss.backward()
    assert (model.lm_head.weight.grad[50:] == 0).all()
    generated = model.generate(ids, max_new_tokens=8, do_sample=True, pad_token_id=0)
    assert generated.max() < 50


def test_training_loss_is_that_of_labels_and_weighted_by_tokens() -> None:
    model, ids = make_model("gpt2", "values"), tokens(2, 21)
    labels = ids.clone()
    labels[1, 10:] = -100
    with_labels = model(ids, labels=labels).loss
    shifted = model(ids[:, :-1], shift_labels=labels[:, 1:]).loss
    torch.testing.assert_close(with_labels, shifted)
    counts = (labels[:, 1:] != -100).sum(-1)
    rows = [
        model(ids[i : i + 1, :-1], shift_labels=labels[i : i + 1, 1:], num_items_in_batch=counts.sum()) for i in (0, 1)
    ]
    torch.testing.assert_close(rows[0].loss + rows[1].loss, shifted)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_capped_model_has_one_loss_in_every_form(z_loss: float) -> None:
    """From labels, from shifted labels, and fused with the head; the z-loss is in the gradient alone."""
    ids, results = tokens(2, 17), []
    for fast in ((), ("loss",)):
        for shifted in (False, True):
            model = make_model("llama", "soft_cap")
            model.enable_fast_paths(fast)
            given = (
                {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]} if shifted else {"input_ids": ids, "labels": ids}
            )
            loss = model(**given, z_loss=z_loss).loss
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    logits = model(ids).logits[:, :-1, :50]
    assert logits.abs().max() < 3
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    penalty = z_loss * logits.logsumexp(-1).square().mean()
    results.append([expected, *torch.autograd.grad(expected + penalty, list(model.parameters()))])
    for result in results[:-1]:
        for one, other in zip(result, results[-1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_dropout_is_on_in_training_only(style: str) -> None:
    model = make_model(style, attention_dropout=0.3, residual_dropout=0.3, embedding_dropout=0.3)
    ids = tokens(1, 12)
    assert torch.equal(model(ids).logits, make_model(style)(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_parameters_have_the_papers_number_on_the_meta_device() -> None:
    """GPT-2 124M: 50,257 x 768 + 1,024 x 768 + 12 x (12 x 768^2 + 13 x 768) + 2 x 768 = 124,439,808."""
    config = DecoderConfig.gpt2(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        model = DecoderForCausalLM(config)
    assert model.num_parameters() == 124_439_808


def test_all_problems_of_a_config_come_together() -> None:
    with pytest.raises(ValueError) as error:
        make_config(
            "llama",
            hidden_size=50,
            num_key_value_heads=3,
            hidden_act="swishy",
            stream=["value"],
            attention_dropout=1.5,
            nmda_alpha=-1.0,
            unpadded_vocab_size=99,
            norm="rms",
        )
    for part in (
        "hidden_size",
        "num_key_value_heads",
        "swishy",
        "value",
        "attention_dropout",
        "nmda_alpha",
        "99",
        "rms",
    ):
        assert part in str(error.value)


def test_too_long_for_learned_positions_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="64 learned positions"):
        make_model("gpt2")(tokens(1, 65))
