"""Two processes over gloo send what is counted on paper, and the backward pass hides what it can."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.bench.ranks import layout_arguments
from llm.plan.parameters import parameters
from llm.train.cli import parse

from ..train.pairs import Command, together

Config = Callable[..., Path]
STEPS = 3 + 2 + 3  # of a probe that times one step at a time
# bytes a step of P parameters in two processes, each of which sends half of what is gathered and all of what is summed;
# the bytes of a gradient, of a weight, and how many micro-batches' gradients are sent
SENT = {
    "fsdp2-1": (4, 2, 1),  # gloo has no reduce-scatter: it sends an all-reduce, which is twice as much
    "fsdp2-1-bf16": (2, 2, 1),
    "fsdp2-2": (4, 2, 2),
    "ddp": (4, 0, 1),
    "ddp-bf16": (2, 0, 1),
    "zero1": (4, 2, 1),
    "zero1-bf16": (2, 2, 1),
    "zero2": (4, 2, 2),
    "zero2-bf16": (2, 2, 2),
}
IN_BACKWARD = {"ddp": True, "zero1": False, "zero2": True, "fsdp2-1": True, "fsdp2-2": True}


def test_what_each_strategy_sends(tiny_config: Config, tmp_path: Path) -> None:
    """Gradients of the last micro-batch or of both; only ZeRO 1 in bf16 leaves all of them until afterwards."""
    settings = {
        "decoder__hidden_size": 128,
        "decoder__intermediate_size": 512,
        "data__batch_size": 8,
        "data__micro_batch_size": 2,
        "trainer__precision": "bf16-mixed",
        "trainer__max_steps": STEPS,
        "trainer__limit_val_batches": 0,
        "run__loggers": ["csv"],
    }
    commands = []
    for name in SENT:
        (tmp_path / f"out-{name}").mkdir()
        probe = {"class_path": "llm.bench.probe.Probe", "init_args": {"out": str(tmp_path / f"out-{name}"), "steps": 1}}
        config = tiny_config(**settings, run__folder=str(tmp_path / name), run__checkpoint_every=4)
        words = [*layout_arguments(name), "--strategy.bucket_elements", "50000"]
        commands.append(Command(["fit", "--config", str(config), *words, f"--trainer.callbacks+={json.dumps(probe)}"]))
    assert set(together(tmp_path / "pair", commands)) == {(0, 0)}
    cli = parse(["--config", str(tiny_config(**settings))], run=False)
    count = parameters(cli.model.decoder_config)
    for name, (gradient, weight, times) in SENT.items():
        profiled = json.loads((tmp_path / f"out-{name}" / "rank-0.json").read_text())["profiled"]
        assert profiled["sent_bytes"] / 3 == pytest.approx(count * (gradient * times + weight / 2), rel=0.01), name
        hidden = profiled["sent_in_backward_bytes"] / profiled["sent_bytes"]
        assert (hidden > 0.2) if IN_BACKWARD[name.removesuffix("-bf16")] else (hidden == 0), (name, hidden)
