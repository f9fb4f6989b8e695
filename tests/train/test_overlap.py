"""A checkpoint is the state at its step, though training goes on while that is copied, sent and written."""

import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from llm.train import checkpoint as checkpoints
from llm.train.checkpointing import Checkpoints
from llm.train.gathering import HostCopies
from llm.train.module import LanguageModule

from .pairs import Command, together
from .runs import Config, fit

# Copies are made as late as they can be: when the gradients of the next step are there, and the optimizer waits. Each
# step's checkpoint is compared by the test with that of a run which trains on when it is written.
LATE = """
import threading, time
from llm.train.checkpointing import Checkpoints
from llm.train.gathering import HostCopies
copy, before, begin = HostCopies._copy, Checkpoints.on_before_optimizer_step, Checkpoints._begin
reached = threading.Event()
def late(self, shares):
    assert reached.wait(300)
    time.sleep(0.1)  # in which the update would be made, did it not wait
    copy(self, shares)
def arrived(self, trainer, *others):
    reached.set()
    before(self, trainer, *others)
    reached.clear()
def begun(self, trainer, module):
    state = begin(self, trainer, module)
    if trainer.global_step >= trainer.max_steps:
        reached.set()
    return state
HostCopies._copy, Checkpoints.on_before_optimizer_step, Checkpoints._begin = late, arrived, begun
def after():
    HostCopies._copy, Checkpoints.on_before_optimizer_step, Checkpoints._begin = copy, before, begin
"""
AT_ONCE = """
from llm.train.checkpointing import Checkpoints
begin = Checkpoints._begin
def waiting(self, trainer, module):
    state = begin(self, trainer, module)
    self.writer.done()
    return state
Checkpoints._begin = waiting
def after():
    Checkpoints._begin = begin
"""
KINDS = {
    "ddp": ["--strategy.name", "ddp"],
    "zero1": ["--strategy.name", "deepspeed"],
    "zero3": ["--strategy.name", "deepspeed", "--strategy.stage", "3"],
    "fsdp2": ["--strategy.name", "fsdp2"],
}


@pytest.mark.slow
def test_every_ranks_copies_may_be_late(tiny_config: Config, tmp_path: Path) -> None:
    common = {"trainer__precision": "bf16-mixed", "trainer__max_steps": 4, "data__micro_batch_size": 2}
    common |= {"run__checkpoint_every": 1, "run__keep_checkpoints": 9, "run__loggers": ["csv"]}
    commands = []
    for kind, words in KINDS.items():
        for when, before in (("late", LATE), ("at-once", AT_ONCE)):
            config = str(tiny_config(**common, run__folder=str(tmp_path / f"{kind}-{when}")))
            commands.append(Command(["fit", "--config", config, *words], before))
    assert set(together(tmp_path / "pair", commands)) == {(0, 0)}
    for kind in KINDS:
        digests = []
        for step in (1, 2, 3, 4):
            late, at_once = (checkpoints.find(tmp_path / f"{kind}-{when}", step) for when in ("late", "at-once"))
            for which in ("weights", "optimizer_state"):
                ours, theirs = getattr(late, which)(), getattr(at_once, which)()
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[name], theirs[name]) for name in ours), (kind, step)
            digests.append(late.weights_sha256())
        assert len(set(digests)) == 4


def test_training_goes_on_to_the_next_update_while_copies_are_made(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of a step begins after the next one's backward pass, and is of the weights before its update."""
    reached, expected, waited = threading.Event(), {}, []
    copy, begin, backward = HostCopies._copy, Checkpoints._begin, LanguageModule.on_after_backward

    def late(self: HostCopies, shares: Any) -> None:
        waited.append(reached.wait(300))
        time.sleep(0.1)  # in which the update would be made, did it not wait
        copy(self, shares)

    def begun(self: Checkpoints, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        expected[trainer.global_step] = _state(module.model, trainer.optimizers[0])
        reached.clear()
        told = begin(self, trainer, module)
        if trainer.global_step >= trainer.max_steps:  # no step is left
            reached.set()
        return told

    def passed(self: LanguageModule) -> None:
        reached.set()
        backward(self)

    monkeypatch.setattr(HostCopies, "_copy", late)
    monkeypatch.setattr(Checkpoints, "_begin", begun)
    monkeypatch.setattr(LanguageModule, "on_after_backward", passed)
    assert fit(tiny_config(run__checkpoint_every=2, run__keep_checkpoints=9, trainer__max_steps=7)) == 0
    assert waited == [True] * 4
    assert list(expected) == [2, 4, 6, 7]
    for step, tensors in expected.items():
        saved = checkpoints.find(tmp_path / "run", step)
        found = {**saved.weights(), **saved.optimizer_state()}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the weights and of AdamW's state, by the names that a checkpoint gives them."""
    held = dict(model.named_parameters())
    kept = {f"{kind}/{name}": each for name in held for kind, each in optimizer.state[held[name]].items()}
    return {name: tensor.detach().clone() for name, tensor in {**held, **kept}.items()}
