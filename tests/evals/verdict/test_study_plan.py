"""What a study can show before it is trained: its numbers from `llm study plan`, its scatter from the null arm."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from evals.__main__ import main
from evals.verdict import power
from evals.verdict.study_plan import PlannedSize, baseline_slopes, pair_scatter
from llm.runs.study_record import StudyRecord, StudyRun
from tests.study import conftest as studies

tiny_study = studies.tiny_study
SIZES = [PlannedSize(f"s{n}", 3, 1e6 * 4**n, np.array([2e7 * 4**n]), np.array([2e15 * 16**n])) for n in range(4)]
NOTHING: dict[tuple[str, str, int], float] = {}


def test_without_runs_the_defaults_are_assumed_and_told() -> None:
    scatter = pair_scatter(SIZES, (NOTHING, ""), None)
    assert set(scatter.deviations) == {power.SEED_DEVIATION} and "the default, of 8M models" in scatter.source
    assert set(pair_scatter(SIZES, (NOTHING, ""), 0.25).deviations) == {0.25}
    slopes, source = baseline_slopes(SIZES, (NOTHING, ""))

    def loss(log_compute: float) -> float:  # Hoffmann et al. 2022, Equation 10, along N = 1e6 (C / 2e15)^(1/2)
        scale = math.exp((log_compute - math.log(2e15)) / 2)
        return 1.69 + 406.4 / (1e6 * scale) ** 0.34 + 410.7 / (2e7 * scale) ** 0.28

    at = SIZES[1].log_compute
    chord = (loss(at + math.log(16)) - loss(at - math.log(16))) / (2 * math.log(16))  # between its neighbours
    assert slopes[1] == pytest.approx(-chord, rel=1e-6) and "Hoffmann et al. 2022" in source


def test_the_scatter_is_that_of_the_finished_null_arm() -> None:
    """Its truth is zero, so that its root mean square counts every pair."""
    differences = {("s1", 5): 0.03, ("s1", 6): -0.01, ("s2", 7): 0.02}
    losses = {("classic", size, seed): 3.0 for size, seed in differences}
    losses |= {("null", size, seed): 3.0 + shift for (size, seed), shift in differences.items()}
    losses |= {("null", "s3", 8): 9.0}  # without its baseline
    scatter = pair_scatter(SIZES, (losses, "classic"), None)
    middle = (2 * SIZES[1].log_compute + SIZES[2].log_compute) / 3
    expected = [math.sqrt((9 + 1 + 4) / 3) / 100 * math.exp(-0.05 * (size.log_compute - middle)) for size in SIZES]
    assert scatter.deviations == pytest.approx(expected, rel=1e-9) and "as 3 finished pairs" in scatter.source


def test_slopes_are_measured_where_all_sizes_are_finished() -> None:
    finished = {("classic", f"s{n}", seed): 4.0 - 0.5 * n for n in range(4) for seed in (1, 2)}
    slopes, source = baseline_slopes(SIZES, (finished, "classic"))
    assert slopes == pytest.approx([0.5 / math.log(16)] * 4) and "as its finished runs do" in source
    del finished["classic", "s2", 1], finished["classic", "s2", 2]
    assert "Hoffmann" in baseline_slopes(SIZES, (finished, "classic"))[1]


def test_a_study_says_what_it_can_show(tiny_study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From the YAML to the sentence, with finished runs of the null arm in its folder."""
    sizes = {f"w{width}": {"decoder.hidden_size": width} for width in (24, 32, 40)}
    study = tiny_study(sizes=sizes, seeds=3)
    folder = Path(yaml.safe_load(study.read_text())["folder"])
    runs = []
    for size, shift in zip(sizes, (0.05, -0.03, 0.04), strict=True):
        for arm in ("classic", "null"):
            for budget, steps in (("2.56K", 10), ("5.12K", 20)):
                name = f"{size}/{arm}-seed1-{budget}"
                runs.append(StudyRun(name, "main", size, arm, budget, 7, steps, 256 * steps, 1, 1.0))
                (folder / name).mkdir(parents=True)
                summary = {"step": steps, "validation_loss": 5.0 - steps / 100 + shift * (arm == "null")}
                (folder / name / "summary.json").write_text(json.dumps(summary))
    StudyRecord(folder, {}, {}, [], [], "classic", ["classic", "values", "null"], list(sizes), runs).write()
    assert main(["study", str(study), "--plan", "--power", "0.9"]) == 0
    told = capsys.readouterr().out
    assert "3 seeds at 3 sizes show with a chance of 90% (95% intervals)" in told
    assert "as 3 finished pairs of the null arm do" in told and "Hoffmann" in told  # equal losses have no slope
    assert "With three sizes nothing is firm" in told
    shown = re.search(r"([\d.]+)% less compute \(m = ([\d.]+)\)", told)
    assert shown and float(shown[1]) == pytest.approx(100 * (1 - 1 / float(shown[2])), abs=0.6)
    assert main(["study", str(study), "--plan", "--seed-deviation", "0.5"]) == 0
    noisier = re.search(r"\(m = ([\d.]+)\)", capsys.readouterr().out)
    assert noisier and float(noisier[1]) > float(shown[2]) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "--power", "0.04"], "--power 0.04 must be above 1 - level, 0.05"),
        ([], "where the verdict goes is not said; give --out DIR"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert main(["study", str(tmp_path / "none.yaml"), *words]) == 2
    assert message in capsys.readouterr().err
