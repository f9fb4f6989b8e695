"""A study of many arms: one picture and one table of all, with parameters, FLOPs and the source of each."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from evals.__main__ import main
from evals.verdict.study import judge_study
from evals.verdict.study_arms import ArmCost, format_cost
from llm.runs.study_record import StudyRecord, StudyRun

# arm -> final loss of three seeds, parameters, FLOPs per token
ARMS = {
    "classic": ((2.00, 2.10, 2.05), 1000, 6.0),
    "better": ((1.80, 1.91, 1.85), 1000, 6.0),
    "larger": ((1.90, 1.95, 1.97), 1200, 9.0),
    "equal": ((2.01, 2.09, 2.05), 1000, 6.0),
    "worse": ((2.30, 2.42, 2.35), 990, 5.7),
    "null": ((2.02, 2.07, 2.06), 1000, 6.0),
}
SOURCES = {"better": "Somebody 2020, as in the paper", "larger": "Somebody else 2021; <wider>"}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The folder of a finished study with one size, four arms with a change, and a search."""
    runs = []
    for arm, (losses, parameters, per_token) in ARMS.items():
        for seed, loss in enumerate(losses):
            name = f"small/{arm}-seed{seed}-1K"
            runs.append(StudyRun(name, "main", "small", arm, "1K", seed, 10, 1000, 500, 1000 * per_token))
            folder = tmp_path / "runs" / name
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps({"parameters": parameters}))
            (folder / "summary.json").write_text(json.dumps({"step": 10, "validation_loss": loss}))
    arms = {arm: {"source": SOURCES[arm]} if arm in SOURCES else None for arm in ARMS if arm != "null"}
    content = {"folder": str(tmp_path / "runs"), "arms": arms, "tune": {"key": "model.optimizer.lr"}}
    text = yaml.safe_dump(content)
    registered = {"study": text, "base": "{}", "time": "2026-01-01T00:00:00+00:00"}
    choices = {arm: {"small": 1e-3 * (number + 1)} for number, arm in enumerate(arms)}
    record = StudyRecord(
        tmp_path / "runs", registered, content, [], [], "classic", list(ARMS), ["small"], runs, choices
    )  # fmt: skip
    record.write()
    return tmp_path / "runs"


def test_parameters_and_flops_are_relative_to_the_baseline(study: Path) -> None:
    found = judge_study(study)
    assert found.costs["larger", "small"] == pytest.approx((1.2, 1.5, 3e-3))
    assert found.costs["worse", "small"] == pytest.approx((0.99, 0.95, 5e-3))
    assert found.costs["null", "small"] == pytest.approx((1, 1, 1e-3))  # tuned as the baseline
    assert format_cost(found.costs["larger", "small"]) == ("+20.0%", "1.50 ×")
    assert format_cost(None) == format_cost(ArmCost(None, None)) == ("–", "–")


def test_the_page_has_all_arms_in_one_picture_and_one_table(study: Path, tmp_path: Path) -> None:
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    page, svg = ((tmp_path / "out" / name).read_text() for name in ("report.html", "forest.svg"))
    assert page.count("<svg ") == 1 + 2 * 4  # of all, and effect and loss of each arm with a change
    order = [svg.index(f">{arm}<") for arm in ("better", "larger", "equal", "worse", "null")]
    assert order == sorted(order)  # the best first
    assert ">+20.0%, 1.50 ×<" in svg and ">−1.0%, 0.95 ×<" in svg.replace("-1.0%", "−1.0%")
    assert "Somebody 2020, as in the paper" in page and "Somebody else 2021; &lt;wider&gt;" in page
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sources"] == SOURCES
    assert {each["arm"]: each["parameters"] for each in results["costs"]}["larger"] == pytest.approx(1.2)
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert float(rows["larger"]["arm_flops"]) == pytest.approx(1.5) and rows["larger"]["source"] == SOURCES["larger"]
    assert float(rows["better"]["tuned"]) == 2e-3 and rows["equal"]["source"] == ""


def test_runs_without_a_count_leave_their_parameters_open(study: Path) -> None:
    (study / "small" / "larger-seed0-1K" / "run.json").write_text("{}")
    cost = judge_study(study).costs["larger", "small"]
    assert cost.parameters is None and cost.flops == pytest.approx(1.5)


def test_three_arms_or_fewer_have_no_common_picture(study: Path, tmp_path: Path) -> None:
    content = json.loads((study / "study.json").read_text())
    content["arms"].remove("worse")
    content["runs"] = [run for run in content["runs"] if run["arm"] != "worse"]
    (study / "study.json").write_text(json.dumps(content))
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "forest.png").exists() and (tmp_path / "out" / "better-effect.png").is_file()


def test_two_sizes_are_named_in_the_picture(study: Path, tmp_path: Path) -> None:
    content = json.loads((study / "study.json").read_text())
    record = StudyRecord(**content | {"folder": study, "runs": [StudyRun(**run) for run in content["runs"]]})
    for run in list(record.runs):
        more = replace(run, name=run.name.replace("small", "large"), size="large", parameters=900, flops=2 * run.flops)
        record.runs.append(replace(more, seed=run.seed + 10))
        (folder := study / more.name).mkdir(parents=True)
        for name in ("run.json", "summary.json"):
            (folder / name).write_text((study / run.name / name).read_text())
    record.sizes.append("large")
    record.write()
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    svg = (tmp_path / "out" / "forest.svg").read_text()
    assert svg.index(">better, small<") < svg.index(">better, large<") < svg.index(">worse, small<")
