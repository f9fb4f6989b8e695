"""Rows of the matrix: low-rank adapters by peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .kinds import TOKENS, Load, row, tokens

peft = pytest.importorskip("peft")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits[..., :TOKENS]


def adapted(model: PreTrainedModel, **settings: Any) -> Any:
    """The model with adapters that change its logits, trained for one step."""
    torch.manual_seed(0)
    before = logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    torch.testing.assert_close(logits(wrapped), before, rtol=1e-4, atol=1e-4)  # adapters begin as nothing
    frozen = {name: p.clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):  # the first moves half of an adapter alone, since the other half begins at 0
        optimizer.zero_grad()
        out = wrapped(tokens(), labels=tokens())
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
        torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-4)
        out.loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert all(torch.equal(p, frozen[name]) for name, p in wrapped.named_parameters() if name in frozen)
    assert (logits(wrapped) - before).abs().max() > 1e-2
    return wrapped.eval()


def check_saved(wrapped: Any, base: PreTrainedModel, folder: Path) -> None:
    wrapped.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(logits(again), logits(wrapped), rtol=1e-4, atol=1e-4)


def check_merged(wrapped: Any) -> None:
    expected = logits(wrapped)
    merged = wrapped.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def linear_layers(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}


@row('peft: LoRA on `target_modules="all-linear"`; train, save, load, merge')
def test_lora(load: Load, kind: str, tmp_path: Path) -> None:
    wrapped = adapted(load(kind), target_modules="all-linear")
    found = {n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert found == linear_layers(load(kind))
    check_saved(wrapped, load(kind), tmp_path)
    check_merged(wrapped)


@row("peft: LoRA on the output head; train, save, load, merge")
def test_lora_on_the_head(load: Load, kind: str, tmp_path: Path) -> None:
    wrapped = adapted(load(kind), target_modules=["lm_head"])
    check_saved(wrapped, load(kind), tmp_path)
    if not load(kind).config.tie_word_embeddings:  # merging into a tied head changes the embedding, which peft says
        check_merged(wrapped)


@row("peft: DoRA; train, save, load, merge")
def test_dora(load: Load, kind: str, tmp_path: Path) -> None:
    wrapped = adapted(load(kind), target_modules="all-linear", use_dora=True)
    check_saved(wrapped, load(kind), tmp_path)
    check_merged(wrapped)


@row("peft: `modules_to_save` embedding and head; train, save, load, merge")
def test_modules_to_save(load: Load, kind: str, tmp_path: Path) -> None:
    wrapped = adapted(load(kind), target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    check_saved(wrapped, load(kind), tmp_path)
    check_merged(wrapped)
