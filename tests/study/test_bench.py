"""`llm study bench`: every arm has its turns, and the verdict reads what was measured."""

import json
from pathlib import Path

import pytest
import yaml

from evals.verdict.study import judge_study
from llm.cli import main
from llm.runs.study_record import read_record

from .conftest import Study


def test_every_arm_takes_turns(tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study = tiny_study("study", arms={"classic": {}, "values": {"decoder.stream": ["values"]}}, sizes={"small": {}})
    assert main(["study", "bench", str(study), "--rounds", "2", "--steps", "1"]) == 0
    printed = capsys.readouterr()
    turns = [line.split()[2] for line in printed.err.splitlines() if line.startswith("round ")]
    assert turns == ["classic", "values", "values", "classic"]
    folder = Path(yaml.safe_load(study.read_text())["folder"])
    found = json.loads((folder / "bench.json").read_text())
    assert {arm: len(rates) for arm, rates in found["tokens_per_second"].items()} == {"classic": 2, "values": 2}
    assert min(rate for rates in found["tokens_per_second"].values() for rate in rates) > 0
    assert found["size"] == "small" and "device" in found and "study bench" in found["command"]
    header, _, classic, values, *_ = printed.out.splitlines()
    assert header.split()[:2] == ["arm", "tokens/s"] and classic.split()[0] == "classic"
    median = 1 / found["values_to_classic"]["median"]
    assert f" {median:.3f} " in values

    assert main(["study", "run", str(study)]) == 0  # it neither disturbs the runs nor takes their place
    judged = judge_study(study)
    assert judged.step_times.keys() == {"values"}
    assert judged.costs["null", "small"].step_time == 1 and len(read_record(folder).runs) == 6


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--size", "huge"], "--size huge is unknown: give one of small"),
        (["--rounds", "0"], "--rounds and --steps must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], expected: str, tiny_study: Study, capsys) -> None:
    study = tiny_study("study", arms={"classic": {}, "values": {"decoder.stream": ["values"]}}, sizes={"small": {}})
    assert main(["study", "bench", str(study), *words]) == 2
    assert expected in capsys.readouterr().err


def test_an_arm_that_cannot_be_trained_here_is_named(tiny_study: Study, tmp_path: Path, capsys) -> None:
    arms = {"classic": {}, "halved": {"model.attention": "flash_attention_2"}}
    study = tiny_study("study", arms=arms, sizes={"small": {}}, allow_difference=["model.attention"])
    assert main(["study", "bench", str(study), "--rounds", "1", "--steps", "1"]) == 2
    assert "halved at small: model.attention" in capsys.readouterr().err
