"""The benchmark compares everything, at small sizes."""

from pathlib import Path

import pytest

from small.experiment.bench import format_ratios
from small.tem import bench
from small.tem.cli import main
from small.tem.settings import TemSettings


def test_the_benchmark_compares_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PLACES", (2, 3)), ("WALK", 5), ("WALKS", (4,)), ("MIDDLE", 2), ("BATCH", 2)):
        monkeypatch.setattr(bench, name, value)
    result = bench.run(1, "cpu", TemSettings(spaces=("3x3",), batch=2, walk_from=6, walk_to=6))
    assert {"memory_20", "memory_30", "walks_4", "steps"} < set(result)
    for part in ("memory_20", "memory_30", "walks_4", "steps"):
        assert all(seconds > 0 for seconds in result[part]["seconds"].values())
    text = format_ratios(result)
    for ratio in ("matrix to sums", "TEM, matrix to TEM, sums", "TEM, sums to TEM-t"):
        assert ratio in text


def test_the_command_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run", lambda rounds, device: {"device": device, "rounds": rounds})
    assert main(["bench", "--rounds", "2", "--device", "cpu", "--json", str(tmp_path / "a" / "b.json")]) == 0
    assert '"rounds": 2' in (tmp_path / "a" / "b.json").read_text()
