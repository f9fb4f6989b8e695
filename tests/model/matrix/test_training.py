"""Rows of the matrix: transformers' Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .kinds import Load, row, tokens

RATE = 0.5


def rows_of(labels: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": label} for ids, label in zip(tokens(4), labels, strict=True)]


def some_left_out() -> Tensor:
    labels = tokens(4)
    labels[:2, :6] = -100
    labels[3, :] = -100
    return labels


def loss_by_hand(model: PreTrainedModel, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = model(tokens(4)).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=smoothing)


def trainer(model: PreTrainedModel, folder: Path, rows: list[dict[str, Tensor]], **settings: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4} | settings
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1, optim="sgd",
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, seed=1, **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def check_one_step(load: Load, kind: str, folder: Path, **settings: Any) -> None:
    """A step of the Trainer moves each weight by the gradient of the loss by hand."""
    labels, model, expected = some_left_out(), load(kind), load(kind)
    loss_by_hand(expected, labels).backward()
    trainer(model, folder, rows_of(labels), **settings).train()
    for (name, found), before in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert before.grad is not None
        if "k_proj.bias" not in name:  # softmax does not see it
            assert before.grad.abs().max() > 1e-6, name
        torch.testing.assert_close((before - found) / RATE, before.grad, rtol=1e-3, atol=1e-5)


@row("`Trainer.evaluate`: `eval_loss` is the loss of the labels")
def test_evaluation(load: Load, kind: str, tmp_path: Path) -> None:
    model = load(kind)
    for labels in (tokens(4), some_left_out()):
        found = trainer(model, tmp_path, rows_of(labels)).evaluate()
        assert found["eval_loss"] == pytest.approx(loss_by_hand(model, labels).item(), abs=1e-4)
    without = [{"input_ids": ids} for ids in tokens(4)]
    assert "eval_loss" not in trainer(model, tmp_path, without).evaluate()


@row("`Trainer` with label smoothing: the smoothed loss of the next token, finite")
def test_label_smoothing(load: Load, kind: str, tmp_path: Path) -> None:
    model, labels = load(kind), some_left_out()
    found = trainer(model, tmp_path, rows_of(labels), label_smoothing_factor=0.1).evaluate()["eval_loss"]
    assert found == pytest.approx(loss_by_hand(model, labels, smoothing=0.1).item(), rel=1e-4) and found < 20
    trainer(model, tmp_path, rows_of(labels), label_smoothing_factor=0.1).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@row("`Trainer`: gradient accumulation is one large batch")
def test_accumulation(load: Load, kind: str, tmp_path: Path) -> None:
    check_one_step(load, kind, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)


@row("Gradient checkpointing, `use_reentrant=False`: the same gradients")
def test_checkpointing(load: Load, kind: str, tmp_path: Path) -> None:
    kwargs = {"use_reentrant": False}
    check_one_step(load, kind, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)


@row("Gradient checkpointing, `use_reentrant=True`: the same gradients")
def test_reentrant_checkpointing(load: Load, kind: str, tmp_path: Path) -> None:
    kwargs = {"use_reentrant": True}
    check_one_step(load, kind, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
