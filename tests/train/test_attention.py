"""The attention of a run by its name: all of them the same numbers, and where they are refused."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm.cli import main
from llm.model import DecoderForCausalLM
from llm.train.attention import FLASH, NAMES, attention_problems
from tests.model.switches import make_config, tokens


@pytest.mark.parametrize("stream", [[], ["values"]], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_eager_sdpa_and_flex_give_the_same_loss(packed: bool, stream: list[str]) -> None:
    model = DecoderForCausalLM(make_config("llama", "gqa", stream=stream))
    ids, losses = tokens(2, 40), {}
    places = (torch.arange(40) % 25).expand(2, -1) if packed else None
    for name in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(name)
        with torch.no_grad():  # torch has no backward pass of flex attention on CPUs
            losses[name] = model(ids, position_ids=places, labels=ids).loss.item()
    assert losses["sdpa"] == pytest.approx(losses["eager"], rel=1e-5)
    assert losses["flex_attention"] == pytest.approx(losses["eager"], rel=1e-5)


def test_a_run_is_trained_with_the_one_that_is_asked_for(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    losses = {}
    for name in ("sdpa", "eager"):
        run = tmp_path / name
        assert main(["fit", "--config", str(tiny_config(model__attention=name, run__folder=str(run)))]) == 0
        with (run / "metrics.csv").open() as file:
            losses[name] = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-4)
    assert losses["eager"] != losses["sdpa"]  # they round differently: the setting is not ignored


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_refused_on_a_cpu(name: str, tiny_config: Callable[..., Path], capsys) -> None:
    assert main(["fit", "--config", str(tiny_config()), "--model.attention", name]) == 2
    said = capsys.readouterr().err
    assert f"model.attention {name} needs a GPU and works in half precision alone" in said and "set sdpa" in said


def test_what_is_refused() -> None:
    def problems(name: str, **facts: bool | float) -> list[str]:
        good = {"on_gpu": True, "half": True, "masked": False}
        return attention_problems(name, **(good | facts))  # type: ignore[arg-type]

    assert problems("linear") == [f"model.attention 'linear' is unknown: give one of {', '.join(NAMES)}"]
    for name in ("sdpa", "eager"):
        assert not problems(name, on_gpu=False, half=False, masked=True, dropout=0.1)
    assert not problems("flex_attention", masked=True, half=False)
    assert problems("flex_attention", on_gpu=False) == [
        "model.attention flex_attention has no backward pass on CPUs: set sdpa"
    ]
    assert "knows no dropout" in problems("flex_attention", dropout=0.1)[0]
    assert not problems("flex_attention", on_gpu=False, dropout=0.1, training=False)
    assert "knows no dropout" in problems("flash_attention_3", dropout=0.1)[0]
    if not FLASH["flash_attention_2"][1]():
        assert "is not installed here (pip install flash-attn)" in problems("flash_attention_2")[0]
    assert "documents of a row" in problems("flash_attention_2", masked=True)[0]


def test_flash_attention_does_not_let_documents_leak() -> None:
    """The model itself refuses, wherever it is used; the kernel is not reached."""
    model = DecoderForCausalLM(make_config("llama"))
    model.config._attn_implementation_internal = "flash_attention_2"  # which transformers would not set here
    places = (torch.arange(12) % 7).expand(2, -1)
    with pytest.raises(ValueError, match="flash attention lets packed documents see each other: use sdpa"):
        model(tokens(2, 12), position_ids=places)
