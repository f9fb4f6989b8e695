"""bench-ranks runs the real fit in each layout, measures its ranks, and leaves nothing behind."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from llm.bench.probe import WINDOW, communication, covered
from llm.bench.ranks import Plan
from llm.cli import main, parser_of

Config = Callable[..., Path]
LAYOUTS = {"plain": 1, "zero3": 2}  # processes of each


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_each_layout_is_measured(tiny_config: Config, scratch: Path, tmp_path: Path, capsys) -> None:
    config, out = tiny_config(run__loggers=["csv"]), tmp_path / "new" / "ranks.json"
    words = ["--config", str(config), "--layouts", *LAYOUTS, "--rounds", "1", "--steps", "3", "--threads", "1"]
    words += ["--accelerator", "cpu"]
    assert main(["bench-ranks", *words, "--folder", str(scratch), "--json", str(out)]) == 0
    assert not list(scratch.iterdir())
    result = json.loads(out.read_text())
    again = parser_of("bench-ranks").parse_args(result["command"].split()[4:])
    assert (again.layouts, again.steps, again.processes, again.threads) == (list(LAYOUTS), 3, 2, 1)
    assert {"device", "versions", "git_commit", "cores", "precision", "parameters"} <= result.keys()
    assert (result["rows"], result["context"], result["checkpoint_every_of_config"]) == (8, 32, 5)
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "2"]) == 0
    files = {file.name: file.stat().st_size for file in (tmp_path / "run/checkpoints/step-00000002").iterdir()}
    printed = capsys.readouterr().out
    for name, processes in LAYOUTS.items():
        (ranks,) = result["raw"][name]
        assert [rank["rank"] for rank in ranks] == list(range(processes))
        for rank in ranks:
            assert rank["threads"] == 1
            assert len(rank["plain_step_seconds"]) == len(rank["with_checkpoint_step_seconds"]) == 3
            assert 0 < rank["held_up_seconds"] < rank["with_checkpoint_step_seconds"][0]
            assert 0 < rank["peak_memory_mib"]["plain"] <= rank["peak_memory_mib"]["with_checkpoint"] < 500
            profiled = rank["profiled"]
            assert 0 <= profiled["alone_seconds"] <= profiled["communication_seconds"] <= profiled["seconds"]
            assert (profiled["collectives"] > 0) == (profiled["communication_seconds"] > 0) == (name != "plain")
        written = ranks[0]["written"]
        assert written["bytes"].keys() == files.keys()
        assert all(written["bytes"][kind] == files[kind] for kind in ("model.safetensors", "optimizer.safetensors"))
        figures = {key: values["median"] for key, values in result["layouts"][name].items()}
        assert all(0 <= value <= 1 for key, value in figures.items() if "share" in key)
        assert figures["checkpoint_bytes"] == sum(written["bytes"].values())
        rate = 8 * 32 / statistics.fmean(ranks[0]["plain_step_seconds"])
        assert figures["tokens_per_second"] == pytest.approx(rate)
        one = result["layouts"]["plain"]["tokens_per_second"]["median"]
        assert figures["to_plain"] == pytest.approx(rate / one)
        assert f"\n{name}" in printed


def test_a_fit_that_fails_is_told_in_a_sentence(tiny_config: Config, scratch: Path, monkeypatch, capsys) -> None:
    failing = [sys.executable, "-c", "print('error: no memory'); print('and more'); raise SystemExit(2)"]
    monkeypatch.setattr(Plan, "words", lambda *_: failing)
    assert main(["bench-ranks", "--config", str(tiny_config()), "--accelerator", "cpu", "--folder", str(scratch)]) == 2
    assert capsys.readouterr().err == "error: the fit of plain failed with status 2: no memory\n"
    assert not list(scratch.iterdir())


def processes_of(scratch: Path) -> list[str]:
    """Those whose command line names the folder, but for the command itself."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if f"{scratch}/" in words:
            found.append(words)
    return found


@pytest.mark.slow
def test_terminated_it_leaves_nothing_behind(tiny_config: Config, scratch: Path) -> None:
    words = ["--config", str(tiny_config()), "--layouts", "ddp", "--folder", str(scratch), "--accelerator", "cpu"]
    command = [sys.executable, "-m", "llm", "bench-ranks", *words, "--steps", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(processes_of(scratch)) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(processes_of(scratch)) == 2
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1].endswith("interrupted\n")
    assert process.returncode == 130
    assert not processes_of(scratch)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds", "0"], "must be at least 1"),
        (["--processes", "1"], "--processes at least 2"),
        (["--rows", "7"], "data.batch_size 7 is not a multiple of 2 device(s): the nearest that is, is 8"),
        (["--precision", "half"], "--precision 'half' is unknown"),
        (["--precision", "bf16-true"], "trainer.precision bf16-true has no fp32 master weights under deepspeed"),
        (["--folder", "nowhere"], "there is no folder nowhere"),
        (["--accelerator", "gpu", "--processes", "99"], "--processes 99 are more than the"),
        (["--", "--data.batchsize", "4"], "unknown config key"),
    ],
)
def test_what_cannot_be_measured_is_told(words: list[str], told: str, tiny_config: Config, capsys) -> None:
    assert main(["bench-ranks", "--config", str(tiny_config(data__batch_size=8)), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert error.count("\n") == 0


def test_the_length_of_a_union_is_that_of_its_points() -> None:
    draw = random.Random(0)
    for _ in range(200):
        spans = [(start, start + draw.randrange(9)) for start in draw.choices(range(40), k=draw.randrange(8))]
        points = {point for start, end in spans for point in range(start, end)}
        assert covered(spans) == len(points)


def event(name: str, start: float, end: float, device: DeviceType, annotation: bool = False) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


@pytest.mark.parametrize(
    ("device", "names"),
    [
        (DeviceType.CPU, ("c10d::allreduce_", "gloo:all_reduce", "aten::mm")),
        (DeviceType.CUDA, ("ncclDevKernel_AllGather", "ncclDevKernel_AllReduce_Sum_f32", "sm90_gemm")),
    ],
)
def test_communication_is_what_collectives_cover(monkeypatch, device: DeviceType, names: tuple[str, ...]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == DeviceType.CUDA)
    one, two, computing = names
    other = DeviceType.CUDA if device == DeviceType.CPU else DeviceType.CPU
    found = communication(
        [
            event(WINDOW, 1e6, 11e6, DeviceType.CPU, annotation=True),
            event(one, 0, 2e6, device),  # a second of it within
            event(two, 4e6, 7e6, device),
            event(one, 5e6, 8e6, device),  # beside it
            event(computing, 6e6, 9e6, device),
            event(WINDOW if device == DeviceType.CUDA else "ProfilerStep", 1e6, 11e6, device, annotation=True),
            event(computing, 1e6, 11e6, other),
        ]
    )
    assert (found["seconds"], found["communication_seconds"], found["alone_seconds"]) == (10, 5, 3)
