"""The choice between float32 and bfloat16 on a CPU, and what `fit` says of it."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from llm.model import DecoderConfig
from llm.train import precision

from .runs import Config, fit

SIZES = (64, 128, 256)  # hidden, intermediate, tokens
DECODER = DecoderConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Products of bfloat16 take so many times as long as those of float32."""

    def set_ratio(ratio: float) -> None:
        turns = itertools.cycle([1.0, ratio])
        time = 0.0

        def now() -> float:
            nonlocal time
            if next(ends):
                time += next(turns)
            return time

        ends = itertools.cycle([False, True])
        monkeypatch.setattr(precision.time, "perf_counter", now)

    return set_ratio


@pytest.mark.parametrize(("ratio", "choice"), [(0.4, "bf16-mixed"), (1.0, "bf16-mixed"), (1.6, "32-true")])
def test_the_faster_one_is_chosen(clock: Callable[[float], None], ratio: float, choice: str) -> None:
    clock(ratio)
    assert precision.choose(DECODER, 256, on_gpu=False) == choice
    said = precision.slower_in_bf16(DECODER, 256)
    assert said is None if choice == "bf16-mixed" else "bfloat16 products take 1.6 times as long" in said
    assert precision.choose(DECODER, 256, on_gpu=True) == "bf16-mixed"


def test_both_types_are_timed() -> None:
    times = precision.seconds_of_products(*SIZES)
    assert set(times) == {torch.float32, torch.bfloat16} and min(times.values()) > 0


def test_a_run_keeps_what_was_chosen_when_it_began(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(trainer__precision="auto", trainer__max_steps=4, run__checkpoint_every=2)
    monkeypatch.setattr(precision, "seconds_of_products", lambda *_: {torch.float32: 1.0, torch.bfloat16: 0.5})
    assert fit(config, "--trainer.max_steps", "2") == 0
    monkeypatch.setattr(precision, "seconds_of_products", lambda *_: {torch.float32: 1.0, torch.bfloat16: 2.0})
    assert fit(config, "--resume", "auto") == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"
    said = capsys.readouterr().err
    assert said.count("trainer.precision auto: bf16-mixed") == 2
    assert said.count("bfloat16 products take 2 times as long as float32 ones: trainer.precision 32-true") == 1
    assert fit(config, "--trainer.precision", "32-true", "--run.folder", str(tmp_path / "other")) == 0  # overrides it
    assert yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["trainer"]["precision"] == "32-true"
    assert fit(config, "--trainer.devices", "2") == 2
    assert "auto is for one device: give bf16-mixed or 32-true" in capsys.readouterr().err
