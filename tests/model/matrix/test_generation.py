"""Rows of the matrix: `generate` and `pipeline`. References call the model without a cache, one token at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, pipeline

from .kinds import TOKENS, Load, row, tokens

NEW = 8


def continued(model: PreTrainedModel, ids: Tensor, choose: Callable[[Tensor], Tensor], steps: int = NEW) -> Tensor:
    """ids (B, T), continued by what `choose` makes of the last logits (B, V)."""
    for _ in range(steps):
        with torch.no_grad():
            last = model(ids, use_cache=False).logits[:, -1].float()
        ids = torch.cat((ids, choose(last)), dim=1)
    return ids


def greedy(logits: Tensor) -> Tensor:
    return logits[:, :TOKENS].argmax(-1, keepdim=True)


def generated(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)} | settings
    return model.generate(ids, **settings)


def calls(module: torch.nn.Module) -> list[None]:
    """A list that gets longer with each call of the module."""
    made: list[None] = []
    module.register_forward_hook(lambda *_: made.append(None))
    return made


@row("`generate`: greedy, with a cache and without")
def test_greedy(load: Load, kind: str) -> None:
    model, ids = load(kind), tokens()
    expected = continued(model, ids, greedy)
    assert torch.equal(generated(model, ids), expected)
    assert torch.equal(generated(model, ids, use_cache=False), expected)


@row("`generate`: beams")
def test_beams(load: Load, kind: str) -> None:
    """With a beam for each token, two steps find the likeliest pair of all."""
    model, ids = load(kind), tokens(1, 6)
    with torch.no_grad():
        first = model(ids).logits[0, -1, :TOKENS].log_softmax(-1)
        each = torch.cat((ids.expand(TOKENS, -1), torch.arange(TOKENS)[:, None]), dim=1)
        both = first[:, None] + model(each).logits[:, -1, :TOKENS].log_softmax(-1)
    best = both.argmax().item()
    found = generated(model, ids, num_beams=TOKENS, max_new_tokens=2, length_penalty=0.0)
    assert found[0, -2:].tolist() == [best // TOKENS, best % TOKENS]


@row("`generate`: sampling, at any temperature")
def test_sampling(load: Load, kind: str) -> None:
    model, ids = load(kind), tokens()
    torch.manual_seed(1)
    expected = continued(model, ids, lambda logits: torch.multinomial(logits.softmax(-1), 1))
    torch.manual_seed(1)
    assert torch.equal(generated(model, ids, do_sample=True, top_k=0), expected)
    hot = generated(model, ids, do_sample=True, top_k=0, temperature=30.0, num_return_sequences=20)
    assert hot.max() < TOKENS  # what pads the vocabulary is never drawn


@row("`generate`: left padding changes no token")
def test_left_padding(load: Load, kind: str) -> None:
    model, ids, mask = load(kind), tokens(), torch.ones(2, 12, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 0, 0
    found = generated(model, ids, attention_mask=mask)
    for row_ids, row_mask, continued_ids in zip(ids, mask, found, strict=True):
        alone = row_ids[row_mask.bool()][None]
        assert torch.equal(continued(model, alone, greedy)[0, -NEW:], continued_ids[-NEW:])


@row("`generate`: static cache")
def test_static_cache(load: Load, kind: str) -> None:
    model, ids = load(kind), tokens()
    assert torch.equal(generated(model, ids, cache_implementation="static"), continued(model, ids, greedy))


@row("`generate`: assisted by a draft model")
def test_assisted(load: Load, kind: str) -> None:
    model, draft, ids = load(kind), load(kind), tokens(1)
    torch.manual_seed(0)
    with torch.no_grad():
        draft.model.norm.weight += 0.3 * torch.randn(32)
    drafted = calls(draft)
    assert torch.equal(generated(model, ids, assistant_model=draft), continued(model, ids, greedy))
    assert drafted


@row("`generate`: drafts by early exit (`assistant_early_exit`)")
def test_early_exit(load: Load, kind: str) -> None:
    model, ids = load(kind), tokens(1)
    layers, expected = model.config.num_hidden_layers, continued(model, ids, greedy)
    first, last = calls(model.model.layers[0]), calls(model.model.layers[-1])
    assert torch.equal(generated(model, ids, assistant_early_exit=1), expected)
    assert len(first) > len(last) > 0
    assert model.config.num_hidden_layers == layers and torch.equal(generated(model, ids), expected)


@row("`generate`: drafts from the prompt (`prompt_lookup_num_tokens`)")
def test_prompt_lookup(load: Load, kind: str) -> None:
    model, ids = load(kind), tokens(1, 4).repeat(1, 3)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), continued(model, ids, greedy))


@row('`pipeline("text-generation")`')
def test_pipeline(load: Load, kind: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    made = pipeline("text-generation", model=str(folders[kind]), trust_remote_code=True, device="cpu")
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    texts = ["Mary gave", "John"]
    found = [each[0]["generated_text"] for each in made(texts, batch_size=1, **settings)]
    tokenizer = AutoTokenizer.from_pretrained(folders[kind], trust_remote_code=True)
    for text, whole in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids

        def without_end(logits: Tensor) -> Tensor:
            return greedy(logits.index_fill(-1, torch.tensor([0]), -torch.inf))

        expected = continued(load(kind), ids, without_end)[0]
        assert whole == tokenizer.decode(expected, skip_special_tokens=True)
    assert "is not supported for" not in caplog.text
