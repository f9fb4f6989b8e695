"""Rows of the matrix: another number of tokens, and losses on all logits."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from .kinds import TOKENS, Load, row, tokens


@row("Save and load: the same logits")
def test_saved_again(load: Load, kind: str, tmp_path: Path) -> None:
    model = load(kind)
    model.save_pretrained(tmp_path / "lr=1e-4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "lr=1e-4", trust_remote_code=True).eval()
    assert type(again).__module__ != "llm.model.decoder"
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@row("`resize_token_embeddings` up and down, with `shift_labels`; save, load")
def test_resized(load: Load, kind: str, tmp_path: Path) -> None:
    for size in (TOKENS - 7, TOKENS + 3, TOKENS + 50):
        model, kept = load(kind), min(size, TOKENS)
        with torch.no_grad():  # else its graph would hold the old weights
            ids = tokens() % (TOKENS - 7)
            before = model(ids).logits[..., :kept]
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size == model.get_input_embeddings().num_embeddings
        torch.testing.assert_close(model(ids).logits[..., :kept], before)
        ids, targets = tokens() % size, tokens(seed=1) % size
        ids[0, 0] = targets[0, 0] = size - 1
        logits = model(ids).logits
        assert logits.shape[-1] == size and logits.min() > -100  # all are tokens now
        loss = model(input_ids=ids, labels=targets, shift_labels=targets).loss
        torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        loss.backward()
        model.save_pretrained(tmp_path / str(size))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(size), trust_remote_code=True).eval()
        torch.testing.assert_close(again(ids).logits, logits)


@row("Any loss on the logits is finite, and padding of the vocabulary never wins")
def test_losses_on_logits(load: Load, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load(kind).to(dtype)
        with torch.no_grad():
            model.get_output_embeddings().weight[TOKENS:] = 100.0
        logits = model(tokens()).logits
        width = model.get_output_embeddings().out_features
        assert logits.shape[-1] == width and logits.argmax(-1).max() < TOKENS
        log_p = logits.log_softmax(-1)
        uniform = torch.full_like(log_p, 1 / width)
        losses = {
            "smoothed": F.cross_entropy(logits.flatten(0, 1), tokens().flatten(), label_smoothing=0.1),
            "distilled": F.kl_div(log_p, uniform, reduction="batchmean"),
            "squares": logits.square().mean(),
            "z": logits.logsumexp(-1).square().mean(),
            "entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        }
        for name, loss in losses.items():
            model.zero_grad()
            loss.backward(retain_graph=True)
            assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters()), name
