"""`llm bench`, its --find-micro-batch and `llm bench-growth`: what they measure, and how they end."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy import stats

from llm.bench.contenders import Plan, Window, contender, random_store
from llm.bench.growth import SIZES, growth, variants
from llm.bench.micro_batch import largest_fitting_divisor
from llm.bench.step import advice, figures, ratio
from llm.cli import main
from llm.model import DecoderConfig
from llm.train.cli import parse


@pytest.mark.slow
@pytest.mark.usefixtures("trials_start_fast")
def test_bench_prints_both_ratios_and_memory(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    words = ["--config", str(tiny_config(decoder__softmax_scale=1.0)), "--rounds", "2", "--steps", "2"]
    words += ["--baseline", "hf-eager"]
    assert main(["bench", *words, "--json", str(out), "--", "--data.context", "16"]) == 0
    printed = capsys.readouterr().out
    assert "classic to transformers: " in printed
    assert "values to classic: " in printed
    result = json.loads(out.read_text())
    assert result["context"] == 16
    assert all(len(rates) == 2 and min(rates) > 0 for rates in result["tokens_per_second"].values())
    assert all(memory > 0 for memory in result["peak_memory_mib"].values())
    for name in ("classic_to_transformers", "values_to_classic"):
        assert result[name]["least"] <= result[name]["median"] <= result[name]["greatest"]
        assert result[name]["interval"][0] <= result[name]["median"] <= result[name]["interval"][1]
    tokens = result["rows"] * result["context"]
    for name, rates in result["tokens_per_second"].items():
        for turn, rate in enumerate(rates):  # the parts are the whole step
            parts = {part: found[turn] for part, found in result["seconds_of_parts"][name].items()}
            assert sum(parts.values()) == pytest.approx(tokens / rate, rel=1e-6)
            assert all(parts[part] > 0 for part in ("data", "forward", "loss", "backward", "optimizer"))
            used = result["model_flop_utilisation"][name][turn] * result["matrix_flops_per_second"][turn]
            assert used == pytest.approx(rate * result["model_flops_per_token"])


def test_a_ratio_has_the_interval_of_its_logarithm() -> None:
    one, other = ([Window(rate, {}, 0.0) for rate in rates] for rates in ((4.0, 9.0, 6.0), (2.0, 3.0, 2.0)))
    found = ratio({"a": one, "b": other}, "a", "b")
    interval = stats.t.interval(0.95, 2, np.mean(np.log([2, 3, 3])), stats.sem(np.log([2, 3, 3])))
    assert (found["median"], found["least"], found["greatest"]) == (3, 2, 3)
    assert found["interval"] == pytest.approx(np.exp(interval))
    assert ratio({"a": one[:1], "b": other[:1]}, "a", "b")["interval"] is None


@pytest.mark.parametrize("part", ["forward", "loss", "backward", "optimizer"])
@pytest.mark.parametrize("name", ["classic", "plain", "transformers"])
def test_time_is_told_of_the_part_that_takes_it(part: str, name: str, tiny_config, tmp_path: Path, monkeypatch) -> None:
    """A wait of a second a step lengthens its own part."""
    cli = parse(["--config", str(tiny_config(decoder__softmax_scale=1.0))], run=False)
    random_store(tmp_path, cli.model.decoder_config.unpadded_vocab_size, 4 * 2 * 16 + 1)
    made = contender(name, Plan(cli.model, "32-true", 16, 2, "cpu", False, tmp_path))
    model = made.module.model if name != "transformers" else made.model
    inside = {"forward": model.get_input_embeddings(), "loss": model.get_output_embeddings()}
    if part in inside:
        inside[part].register_forward_pre_hook(lambda *_: time.sleep(1))
    elif part == "backward":
        parameter = next(p for p in model.parameters() if p.ndim == 2)
        parameter.register_hook(lambda _: time.sleep(1))
    else:
        monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_, **__: time.sleep(1) or torch.tensor(1.0))
    parts = made.window(2, parts=True).parts
    assert parts[part] > 1 and parts[part] == max(parts.values())


@pytest.mark.slow
@pytest.mark.usefixtures("trials_start_fast")
def test_bench_compares_the_contenders_that_are_asked_for(
    tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(tiny_config()), "--rounds", "1", "--steps", "1", "--baseline", "none"]
    words += ["--contenders", "silu", "nmda", "queries_keys"]
    assert main(["bench", *words]) == 0
    printed = capsys.readouterr().out
    assert "nmda to silu: " in printed and "queries keys to silu: " in printed
    assert "transformers" not in printed


@pytest.mark.slow
@pytest.mark.usefixtures("trials_start_fast")
def test_bench_says_what_each_fast_path_is_worth(
    tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_config(decoder__residual_dropout=0.1, model__disable_fast_paths=["rotary"]))
    assert main(["bench", "--config", config, "--rounds", "2", "--steps", "1", "--fast-paths"]) == 0
    printed = capsys.readouterr().out
    for name in ("matmul", "attention", "dropout", "norm", "loss", "all"):
        assert f"without {name} to config: " in printed
    assert "without rotary" not in printed  # it is off already
    assert "model.disable_fast_paths" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ({"norm": [1.01, 1.1], "loss": [0.7, 0.8], "all": [1.1, 1.2]}, "set model.disable_fast_paths to [norm]"),
        ({"norm": [0.99, 1.1], "loss": None}, "leave model.disable_fast_paths empty"),
    ],
)
def test_only_fast_paths_that_are_shown_to_be_slower_are_advised_against(intervals: dict, expected: str) -> None:
    result = {f"without_{name}_to_config": {"interval": interval} for name, interval in intervals.items()}
    assert expected in advice(result)


def test_bench_refuses_what_cannot_be(tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--config", str(tiny_config())]
    assert main([*words, "--contenders", "values", "values"]) == 2
    assert "--contenders has one twice" in capsys.readouterr().err
    assert main([*words, "--fast-paths", "--baseline", "none"]) == 2
    assert "leave out --contenders, --baseline" in capsys.readouterr().err
    for option in ("--rounds", "--rows"):
        assert main([*words, option, "0"]) == 2
        assert "--rounds, --steps, --rows and --micro-batches must be at least 1" in capsys.readouterr().err
    assert main([*words, "--baseline", "hf-liger"]) == 2
    assert "--baseline hf-liger needs a GPU and pip install liger-kernel: give hf" in capsys.readouterr().err
    for bad in (["--memory-budget", "3"], ["--find-micro-batch", "--memory-budget", "0"]):
        assert main([*words, *bad]) == 2
        assert "--memory-budget goes with --find-micro-batch and is above 0 GiB" in capsys.readouterr().err
    assert main([*words, "--find-micro-batch", "--rows", "2"]) == 2
    assert "--find-micro-batch measures the config alone: leave out --rows" in capsys.readouterr().err
    for option, value, told in (
        ("attention", "flash_attention_2", "model.attention flash_attention_2 needs a GPU"),
        ("disable_fast_paths", "[speed]", "model.disable_fast_paths ['speed'] is unknown"),
    ):
        assert main([*words, "--", f"--model.{option}", value]) == 2
        assert told in capsys.readouterr().err


def test_a_contender_has_the_weights_of_the_config(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Those that both have, tied where they are tied; others begin as they do in a run."""
    config = str(tiny_config(decoder__stream_weight="head", decoder__tie_word_embeddings=True))
    module = parse(["--config", config], run=False).model
    plan = Plan(module, "32-true", 16, 2, "cpu", False, tmp_path)
    given = module.model.state_dict()
    for name in ("classic", "queries_keys"):
        model = contender(name, plan).module.model
        found = model.state_dict()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert all(torch.equal(found[key], value) for key, value in given.items() if key in found)
        assert all((found[key] == 1).all() for key in found.keys() - given.keys())
        assert bool(found.keys() - given.keys()) == (name == "queries_keys")


@pytest.mark.parametrize("how", [pytest.param("transformers_compiled", marks=pytest.mark.slow), "transformers_blocks"])
def test_transformers_compiled_is_the_same_model(how: str, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    module = parse(["--config", str(tiny_config(decoder__softmax_scale=1.0))], run=False).model
    plan = Plan(module, "32-true", 16, 2, "cpu", False, tmp_path)
    eager, compiled = contender("transformers", plan), contender(how, plan)
    compiled.model.load_state_dict(eager.model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ids = torch.randint(50, (2, 16))
    losses = [each.forward(input_ids=ids, labels=ids).loss for each in (eager, compiled)]
    torch.testing.assert_close(*losses)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= (2 if how == "transformers_blocks" else 1)  # a block, and the loss


def test_ratios_are_to_transformers_as_it_is_and_compiled(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    module = parse(["--config", str(tiny_config())], run=False).model
    plan = Plan(module, "32-true", 16, 2, "cpu", False, tmp_path)
    parts = dict.fromkeys(("data", "forward", "loss", "backward", "optimizer", "logging"), 0.1)
    rates = {"transformers": (2, 3, 4), "transformers_compiled": (1, 5, 6), "classic": (10, 10, 10)}
    windows = {name: [Window(float(rate), parts, 1.0) for rate in each] for name, each in rates.items()}
    found = figures(plan, list(windows), windows, [1.0, 1.0, 1.0])
    assert found["classic_to_transformers_compiled"]["median"] == 2
    assert found["classic_to_transformers"]["median"] == pytest.approx(10 / 3)


@given(st.integers(1, 96), st.data())
def test_the_search_for_a_micro_batch_finds_the_largest(rows: int, data: st.DataObject) -> None:
    limit, asked = data.draw(st.integers(0, 100)), list[int]()
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found = largest_fitting_divisor(rows, data.draw(st.integers(1, 100)), fits)
    assert found == max((size for size in divisors if size <= limit), default=None)
    assert len(set(asked)) == len(asked) and set(asked) <= set(divisors)


@pytest.mark.slow
@pytest.mark.usefixtures("trials_start_fast")
def test_fit_says_what_to_set_and_the_run_takes_it(tiny_config: Callable[..., Path], tmp_path: Path, capsys) -> None:
    """A budget between the needs of many rows and of few: a context of 256 on a tiny model."""
    out, config = tmp_path / "fit.json", str(tiny_config())
    words = [
        "--config",
        config,
        "--find-micro-batch",
        "--memory-budget",
        "0.28",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--json",
        str(out),
    ]
    sizes = ["--data.context", "256", "--data.batch_size", "64", "--decoder.max_position_embeddings", "256"]
    sizes += ["--decoder.hidden_size", "64", "--decoder.num_hidden_layers", "8"]  # far more memory than noise
    assert main(["bench", *words, "--", *sizes]) == 0
    told = capsys.readouterr().out
    found = json.loads(out.read_text())
    fitting = [each for each in found["tried"] if each["measured_mib"] and each["measured_mib"] <= 0.28 * 1024]
    assert 0 < len(fitting) < len(found["tried"])
    largest = {every: max(each["rows"] for each in fitting if each["checkpointing"] == every) for every in (0, 1)}
    assert largest[0] < largest[1]  # more rows where every block is recomputed
    rates = {(each["checkpointing"], each["rows"]): each["tokens_per_second"] for each in found["finalists"]}
    assert {(0, largest[0]), (1, largest[1])} <= rates.keys()
    assert max(rates, key=lambda each: rates[each]) == (found["chosen"]["checkpointing"], found["chosen"]["rows"])
    assert all(64 % each["rows"] == 0 for each in found["tried"])
    setting = told.splitlines()[-1].removeprefix("fastest: ").split()
    assert parse(["--config", config, *setting], run=False).datamodule.given_micro_batch_size == found["chosen"]["rows"]


@pytest.mark.usefixtures("trials_start_fast")
def test_fit_refuses_a_budget_below_one_row(tiny_config: Callable[..., Path], capsys) -> None:
    words = ["bench", "--config", str(tiny_config()), "--find-micro-batch", "--memory-budget", "0.0001", "--steps", "1"]
    assert main([*words, "--", "--data.batch_size", "1"]) == 2
    assert "not one row fits into 0 MiB, with every block recomputed: shorten data.context" in capsys.readouterr().err


def test_growth_measures_each_size_and_draws_it(tiny_config: Callable[..., Path], tmp_path: Path, capsys) -> None:
    words = ["--config", str(tiny_config()), "--rounds", "1", "--steps", "1", "--out", str(tmp_path / "growth")]
    assert main(["bench-growth", *words]) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "growth" / "growth.json").read_text())
    assert set(found["sweeps"]) == set(SIZES)
    for name, sweep in found["sweeps"].items():
        assert f"{name:12}{sweep['size'][0]:>10,}" in told
        assert all(seconds > 0 for (seconds,) in sweep["seconds_per_token"])
        assert sorted(sweep["flops_per_token"]) == sweep["flops_per_token"]
    assert plt.imread(tmp_path / "growth" / "growth.png").std() > 0.05


def test_sizes_of_a_sweep_and_how_time_grows() -> None:
    config = DecoderConfig.llama(
        vocab_size=100, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    sweep = variants(config, 32, "width")
    assert [size for size, _, _ in sweep] == [24, 48, 96, 192]
    assert sweep[0][1] == {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    assert [size for size, _, _ in variants(config, 32, "depth")] == [3, 6, 12]  # one and a half layers are none
    longest = variants(config, 32, "context")[-1]
    assert longest == (128, {"max_position_embeddings": 128}, 128)
    assert growth([1.0, 4.0, 6.0], [1.0, 2.0, 4.0]) == [2.0, 0.75]


@pytest.mark.parametrize("name", ["classic", "transformers"])
def test_micro_batches_make_a_step(name: str, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """The optimizer steps once for all of them, and sees the mean of their gradients."""
    module = parse(["--config", str(tiny_config(decoder__softmax_scale=1.0))], run=False).model
    steps = []
    for count in (1, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        plan = Plan(module, "32-true", 16, 2, "cpu", False, folder, micro_batches=count)
        plan.fill(2)
        assert plan.tokens_per_step == 32 * count
        torch.manual_seed(0)
        made, clipped = contender(name, plan), list[float]()
        before = torch.nn.utils.clip_grad_norm_

        def clip(*words: Any, before: Any = before, clipped: list[float] = clipped, **others: Any) -> torch.Tensor:
            clipped.append(before(*words, **others).item())
            return torch.tensor(clipped[-1])

        torch.nn.utils.clip_grad_norm_ = clip
        try:
            made.window(2, parts=False)
        finally:
            torch.nn.utils.clip_grad_norm_ = before
        assert len(clipped) == 4  # two are not counted
        steps.append(clipped[0])
    assert 0.5 < steps[1] / steps[0] < 1.3  # a mean, not a sum of three


@pytest.mark.slow
def test_the_loss_alone_by_chunks_and_whole(tiny_config: Callable[..., Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "loss.json"
    words = ["--config", str(tiny_config()), "--rounds", "2", "--json", str(out)]
    assert main(["bench-loss", *words, "--", "--decoder.vocab_size", "20000", "--data.context", "256"]) == 0
    assert "chunks to plain: speed " in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["vocabulary"] == 20000
    whole = found["tokens"] * 20000 * 4 / 2**20
    assert found["peak_memory_mib"]["plain"] > 2 * whole > 0  # logits and their gradient
    assert found["peak_memory_mib"]["chunks"] < found["peak_memory_mib"]["plain"]
