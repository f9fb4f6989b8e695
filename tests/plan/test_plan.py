"""`python -m llm plan`: its figures by hand, its output, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm.cli import main
from llm.common.errors import UserError
from llm.plan.plan import DEVICES, device, read
from llm.plan.step_time import benchmark
from llm.train.flops import PEAKS

CONFIGS = Path(__file__).parents[2] / "configs"
VALUES = str(CONFIGS / "1b_values.yaml")
GIB = 2**30


def plan(*words: str, config: str = VALUES, folder: Path) -> dict[str, Any]:
    assert main(["plan", "--config", config, "--json", str(folder / "plan.json"), *words]) == 0
    return json.loads((folder / "plan.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: str, config: str = VALUES) -> str:
    assert main(["plan", "--config", config, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_the_papers_1b_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40,000 x 512 x 4,096 tokens; 6 P - what is not multiplied + 12 L H K T FLOPs a token; P by hand."""
    found = plan("--gpus", "8", "64", "--device", "h100", folder=tmp_path)
    width, layers, ffn = 2048, 16, 8192
    block = 2 * width**2 + 2 * width * 512 + 3 * width * ffn
    assert found["parameters"] == 131072 * width + layers * (block + 2 * width) + width
    assert found["tokens"] == 83_886_080_000
    assert found["flops_per_token"] == 6 * (layers * block + 128256 * width) + 12 * layers * width * 4096
    assert found["flops"] == found["flops_per_token"] * found["tokens"]
    assert found["time"] is None
    rows = {(row["devices"], row["layout"]): row for row in found["layouts"]}
    assert {layout for _, layout in rows} == {"DDP"} | {
        f"{kind} {n}{off}" for n in (1, 2, 3) for kind, off in (("ZeRO", ""), ("ZeRO", ", off-load"), ("FSDP2", ""))
    }
    for (devices, _), row in rows.items():
        assert row["rows_per_device"] == 512 // devices == row["micro_batch"] * row["micro_batches"]
        assert row["peak_bytes"] == sum(row["bytes"].values()) <= 0.9 * 80e9
        assert row["fits"]
    p = found["parameters"]
    ddp, three = rows[64, "DDP"], rows[64, "ZeRO 3"]
    assert ddp["bytes"]["optimizer"] == 8 * p and ddp["bytes"]["gradients"] == 8 * p  # DDP's buckets and the sum so far
    assert three["bytes"]["optimizer"] == 8 * -(-p // 64)
    assert ddp["sent_bytes"] == 63 / 64 * 8 * p
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for name in ("Rajbhandari et al. 2020", "Korthikanti et al. 2022", "PaLM", "Days: not known", "1,241,581,568"):
        assert name in text


def test_twice_the_micro_batch_doubles_activations_and_nothing_else(tmp_path: Path) -> None:
    one, two = (plan("--device", "h200", "--micro-batch", size, "--gpus", "8", folder=tmp_path) for size in "12")
    for a, b in zip(one["layouts"], two["layouts"], strict=True):
        angles = 2 * 4096 * 64 * (4 if a["layout"] == "DDP" else 2)
        assert b["bytes"]["activations"] - angles == 2 * (a["bytes"]["activations"] - angles)
        assert {k: a["bytes"][k] for k in ("weights", "optimizer")} == {
            k: b["bytes"][k] for k in ("weights", "optimizer")
        }


def test_recomputation_is_memory_for_flops(tmp_path: Path) -> None:
    words = ("--device", "h100", "--micro-batch", "4", "--gpus", "8")
    plain = plan(*words, folder=tmp_path)
    every, second = (
        plan(*words, "--", "--model.activation_checkpointing", how, folder=tmp_path) for how in ("true", "2")
    )
    for a, b, c in zip(plain["layouts"], second["layouts"], every["layouts"], strict=True):
        assert a["peak_bytes"] > b["peak_bytes"] > c["peak_bytes"]
    block = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)
    forward = 16 * (2 * block + 4 * 2048 * 4096)  # a third of the FLOPs in blocks
    assert every["recomputed_share"] == pytest.approx(forward / every["flops_per_token"])
    assert second["recomputed_share"] == every["recomputed_share"] / 2
    assert plain["recomputed_share"] == 0


def test_the_most_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that fits does so with as little as its peak, and with less a smaller micro-batch is taken."""
    config = str(CONFIGS / "gpt2_124m_gelu.yaml")
    row = plan("--device-memory", "16", "--gpus", "8", config=config, folder=tmp_path)["layouts"][0]
    enough, too_little = row["peak_bytes"] / 0.9 / GIB * 1.0001, row["peak_bytes"] / 0.9 / GIB * 0.9999
    words = ("--gpus", "8", "--device-memory")
    assert plan(*words, str(enough), config=config, folder=tmp_path)["layouts"][0] == row
    smaller = plan(*words, str(too_little), config=config, folder=tmp_path)["layouts"][0]
    assert smaller["micro_batch"] < row["micro_batch"] and 60 % smaller["micro_batch"] == 0
    capsys.readouterr()
    tiny = plan(*words, "0.5", config=config, folder=tmp_path)["layouts"][0]
    assert tiny["micro_batch"] == 1 and not tiny["fits"]
    assert "does not fit" in capsys.readouterr().out


def test_days_come_from_a_given_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan("--gpus", "8", "64", "--device", "h100", "--tokens-per-second", "20000", folder=tmp_path)["time"]
    assert found["days"]["8"] == pytest.approx(83_886_080_000 / (8 * 20_000) / 86_400)
    assert found["days"]["64"] == pytest.approx(found["days"]["8"] / 8)
    assert found["model_flop_utilisation"] == pytest.approx(20_000 * 9.025e9 / 989e12, rel=1e-3)
    assert "18.3% of the device's peak" in " ".join(capsys.readouterr().out.split())
    known = plan("--device-memory", "80", "--tokens-per-second", "20000", folder=tmp_path)["time"]
    assert known["model_flop_utilisation"] is None


def test_days_come_from_a_benchmark_of_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = {
        "parameters": 1_241_581_568,
        "context": 4096,
        "precision": "bf16-mixed",
        "device": "NVIDIA H100 80GB HBM3",
        "tokens_per_second": {"classic": [9.0], "values": [21_000.0, 20_000.0, 1_000.0]},
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(bench))
    words = ("--bench", str(file), "--gpus", "8", "--device", "h100")
    assert plan(*words, folder=tmp_path)["time"]["tokens_per_second_per_device"] == 20_000
    file.write_text(json.dumps(bench | {"tokens_per_second": {"classic": [1.0], "config": [5.0]}}))
    assert plan(*words, folder=tmp_path)["time"]["tokens_per_second_per_device"] == 5
    file.write_text(json.dumps(bench | {"tokens_per_second": {"classic": [1.0]}}))
    assert "is not a result of python -m llm bench" in refused(capsys, *words)
    file.write_text("{}")
    assert "is not a result of python -m llm bench" in refused(capsys, *words)
    wanted = read(VALUES, []).measured(device("h100", None))
    for name, other in {"parameters": 1, "context": 256, "precision": "32-true", "device": "CPU, 2 threads"}.items():
        file.write_text(json.dumps(bench | {name: other}))
        with pytest.raises(UserError, match=f"measured {name} {other}, this plan has .*: run python -m llm bench"):
            benchmark(file, wanted, ["values"])
    with pytest.raises(UserError, match=r"none\.json is not a result of"):
        benchmark(tmp_path / "none.json", wanted, ["values"])


def test_seconds_that_a_network_adds_to_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, for 1.24e9 parameters on 2 x 8 devices at 59,745 tokens/s: 8 micro-batches of 4 x 4,096 tokens. The
    gradients of the tied embedding are made last, and no pass is left to hide their sum."""
    words = ("--gpus", "8", "16", "--device", "h100", "--micro-batch", "4", "--tokens-per-second", "59745")
    p, e, micro_batch = 1_241_581_568, 131072 * 2048, 4 * 4096 / 59745
    for network, gigabits in (("100", 100), ("200", 200), ("8x400", 3200)):
        found = plan(*words, "--network", network, folder=tmp_path)
        assert found["network"] == {"gigabits": gigabits, "devices": 8}
        rows = {row["layout"]: row for row in found["layouts"] if row["devices"] == 16}
        assert all(row["time"] is None for row in found["layouts"] if row["devices"] == 8)  # one node
        ring = 15 / 16 / (gigabits * 1e9 / 8)  # seconds of each byte of a payload, in one direction
        reduced, gathered = 2 * ring * 4 * p, ring * 2 * p
        last, root = reduced * e / p, gathered * (e + 2048) / p
        forward, backward = micro_batch / 3, micro_batch * 2 / 3
        hidden = max(0, reduced - last - backward) + last
        scattered, half = reduced / 2 + gathered, max(0, (reduced - last) / 2 - backward) + last / 2
        expected = {
            "DDP": (reduced, hidden),
            "ZeRO 1": (reduced + gathered, reduced + gathered),
            "ZeRO 2": (8 * reduced + gathered, 8 * hidden + gathered),
            "FSDP2 1": (scattered, half + root + max(0, gathered - root - forward)),
            "FSDP2 2": (8 * reduced / 2 + gathered, 8 * half + root + max(0, gathered - root - forward)),
        }
        for layout, (sent, not_hidden) in expected.items():
            time = rows[layout]["time"]
            assert time["compute"] == pytest.approx(8 * micro_batch)
            assert time["sent"] == pytest.approx(sent)
            assert time["not_hidden"] == pytest.approx(not_hidden)
            assert time["days"] == pytest.approx(40_000 * (8 * micro_batch + not_hidden) / 86_400)
            assert time["gpu_hours"] == pytest.approx(time["days"] * 24 * 16)
        for layout in ("ZeRO 3", "FSDP2 3"):
            assert 0 <= rows[layout]["time"]["not_hidden"] < rows[layout]["time"]["sent"]
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "100 Gb/s leave each node of 8 devices" in text and "3200 Gb/s leave each node of 8 devices" in text
    assert found["time"]["gpu_hours"] == pytest.approx(83_886_080_000 / 59745 / 3600)


def test_gradients_in_bf16_are_half_of_those_in_fp32(tmp_path: Path) -> None:
    words = ("--gpus", "16", "--device", "h100", "--micro-batch", "4")
    exact, rounded = (
        {row["layout"]: row["sent_bytes"] for row in plan(*words, "--", *more, folder=tmp_path)["layouts"]}
        for more in ((), ("--strategy.communication_dtype", "bf16"))
    )
    p = 15 / 16 * 1_241_581_568
    summed = {"DDP": 2, "ZeRO 1": 2, "ZeRO 2": 2 * 8, "ZeRO 3": 8, "FSDP2 1": 1, "FSDP2 2": 8, "FSDP2 3": 8}
    for layout, times in summed.items():
        assert exact[layout] - rounded[layout] == pytest.approx(2 * p * times), layout


def test_without_a_throughput_only_what_is_sent_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpus", "16", "--device", "h100", "--network", "200", "--gpus-per-node")
    found = plan(*words, "4", folder=tmp_path)
    for row in found["layouts"]:
        assert row["time"]["sent"] == pytest.approx(row["sent_bytes"] * 8 / 200e9)
        assert {row["time"][name] for name in ("compute", "not_hidden", "days", "gpu_hours")} == {None}
    plan(*words, "16", folder=tmp_path)
    assert "No number of --gpus needs several nodes" in capsys.readouterr().out


def test_the_path_of_a_measured_throughput_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = CONFIGS.parent / "benchmarks" / "results" / "1b_gpu_bf16.json"
    found = plan("--device", "h200", "--gpus", "16", "--bench", str(record), folder=tmp_path)["time"]
    assert found["source"].startswith(f"{record}: one NVIDIA H200, bf16-mixed, python -m llm bench")
    text = " ".join(capsys.readouterr().out.split())
    assert "--strategy.name ddp" in text and "GPU-hours" in text


def test_every_config_can_be_planned(tmp_path: Path) -> None:
    for path in sorted(CONFIGS.glob("*.yaml")):
        assert plan("--device", "a100-40", config=str(path), folder=tmp_path)["layouts"]


def test_devices_have_peaks() -> None:
    assert {name for _, name in DEVICES.values()} == PEAKS.keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "h1000"), "--device 'h1000' is unknown: give one of b200, gh200, h200, h100,"),
        ((), "give --device, one of b200, gh200, h200, h100,"),
        (("--device", "cpu"), "--device cpu needs --device-memory"),
        (("--device-memory", "0"), "--device-memory 0 must be above 0 GiB"),
        (("--device", "h100", "--gpus", "0"), "--gpus 0 must be at least 1"),
        (("--device", "h100", "--micro-batch", "0"), "--micro-batch 0 must be at least 1"),
        (("--device", "h100", "--headroom", "1.5"), "--headroom 1.5 must be above 0 and at most 1"),
        (("--device", "h100", "--tokens-per-second", "0"), "--tokens-per-second 0 must be above 0"),
        (("--device", "h100", "--network", "0"), "--network 0 must be above 0 Gb/s"),
        (("--device", "h100", "--gpus-per-node", "0"), "--gpus-per-node 0 must be at least 1"),
        (("--device", "h100", "--tokens-per-second", "1", "--bench", "f"), "--tokens-per-second or --bench, not both"),
        (
            ("--device", "h100", "--gpus", "24"),
            "data.batch_size 512 is not a multiple of 24 devices: the nearest that is, is 504",
        ),
        (
            ("--device", "h100", "--gpus", "8", "--micro-batch", "3"),
            "8 devices x micro-batch 3: the nearest that is, is 504",
        ),
        (("--device", "h100", "--", "--model.nothing", "1"), "unknown config key"),
        (("--device", "h100", "--", "--data.context", "-1"), "data.context -1 must be at least 1"),
    ],
)
def test_refuses_in_one_sentence(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *words)


def test_refuses_a_config_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml is not there: give the YAML of a run" in refused(capsys, "--device", "h100", config="none.yaml")
