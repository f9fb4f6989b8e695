"""A study of many arms: one picture and one table of all, with parameters, FLOPs and the source of each."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from evals.__main__ import main
from evals.verdict.study import judge_study
from evals.verdict.study_arms import ArmCost, adjusted_differences, format_cost
from llm.runs.study_record import StudyRecord, StudyRun, read_record

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
    assert found.costs["larger", "small"][:4] == pytest.approx((1.2, 1.5, 3e-3, 1200))
    assert found.costs["worse", "small"][:4] == pytest.approx((0.99, 0.95, 5e-3, 990))
    assert found.costs["null", "small"][:4] == pytest.approx((1, 1, 1e-3, 1000))  # tuned as the baseline
    assert adjusted_differences(found.verdict, found.costs) == {}  # one size says nothing of another
    assert format_cost(found.costs["larger", "small"]) == ("+20.0%", "1.50 ×", "–")
    assert format_cost(None) == format_cost(ArmCost(None, None)) == ("–", "–", "–")


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


def test_the_page_of_many_arms_begins_with_an_overview(study: Path, tmp_path: Path, capsys) -> None:
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    expected = (
        "A lower loss than that of classic is shown for 1 of 4 arms: better. A higher loss than that of classic is "
        "shown for 1 of 4 arms: worse. For the others, no difference is shown. The null arm shows nothing."
    )
    assert capsys.readouterr().out.splitlines()[-1] == expected
    page = (tmp_path / "out" / "report.html").read_text()
    assert expected in page and "4 arms against classic<" in page


def test_step_times_that_were_measured_stand_in_picture_and_table(study: Path, tmp_path: Path) -> None:
    """bench.json is the study's own; an arm that was not timed has none, and the null arm takes the baseline's."""
    rates = {"classic": [100.0, 110.0], "better": [80.0, 88.0], "worse": [100.0, 110.0]}
    (study / "bench.json").write_text(json.dumps({"tokens_per_second": rates}))
    found = judge_study(study)
    times = {arm: cost.step_time for (arm, _), cost in found.costs.items()}
    expected = {"classic": 1.0, "better": 1.25, "larger": None, "equal": None, "worse": 1.0, "null": 1.0}
    assert times == {arm: time and pytest.approx(time) for arm, time in expected.items()}
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    page, svg = ((tmp_path / "out" / name).read_text() for name in ("report.html", "forest.svg"))
    assert ">+0.0%, 1.00 ×, 1.25 ×<" in svg and ">+20.0%, 1.50 ×, –<" in svg
    assert "step time" in page
    with (tmp_path / "out" / "table.csv").open() as file:
        times = {row["arm"]: row["arm_step_time"] for row in csv.DictReader(file)}
    assert float(times["better"]) == pytest.approx(1.25) and times["larger"] == ""


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


def test_two_sizes_give_differences_at_equal_parameters_and_flops(study: Path, tmp_path: Path) -> None:
    """All losses of the larger size are 0.1 lower, with twice the parameters and four times the FLOPs."""
    record = read_record(study)
    for run in list(record.runs):
        name = run.name.replace("small", "large")
        record.runs.append(
            replace(run, name=name, size="large", seed=run.seed + 10, parameters=900, flops=4 * run.flops)
        )
        (study / name).mkdir(parents=True)
        parameters = 2 * json.loads((study / run.name / "run.json").read_text())["parameters"]
        (study / name / "run.json").write_text(json.dumps({"parameters": parameters}))
        loss = json.loads((study / run.name / "summary.json").read_text())["validation_loss"] - 0.1
        (study / name / "summary.json").write_text(json.dumps({"step": 10, "validation_loss": loss}))
    record.sizes.append("large")
    record.write()
    found = judge_study(study)
    left = adjusted_differences(found.verdict, found.costs)
    for size in ("small", "large"):  # the mean difference is -0.11
        assert left["larger", size] == pytest.approx(
            (-0.11 + 0.1 / math.log(2) * math.log(1.2), -0.11 + 0.1 / math.log(4) * math.log(1.5))
        )
        assert left["better", size] == pytest.approx((-0.59 / 3, -0.59 / 3))
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    svg, page = ((tmp_path / "out" / name).read_text() for name in ("forest.svg", "report.html"))
    assert svg.index(">better, small<") < svg.index(">better, large<") < svg.index(">worse, small<")
    assert "nats at equal FLOPs" in page and "\N{MINUS SIGN}0.0837" in page
