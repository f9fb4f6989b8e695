"""Evaluations by size: pairs of exports of a study's runs, held against scipy and statsmodels."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from evals.__main__ import main
from llm.runs.study_record import StudyRun, read_record
from tests.evals.made_up import add_task, make_export
from tests.evals.verdict.test_study import STEPS, write_study

ITEMS = 400


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A finished study whose runs of the largest budget are exported and evaluated at two of four sizes."""
    path = write_study(tmp_path)
    for run in read_record(path).runs:
        if run.budget == "b1" and run.size in ("s0", "s2"):
            numbers = np.random.default_rng([run.seed, *run.arm.encode()])
            gain = 0.12 if (run.arm, run.size) == ("values", "s2") else 0.0
            export = make_export(folder(tmp_path, run), np.ones(3), step=STEPS[1], seed=run.seed)
            add_task(export, "piqa", 0, numbers.random(ITEMS) < 0.5 + gain)
    return path


def folder(root: Path, run: StudyRun) -> Path:
    return root / "runs" / run.name


def accuracies(root: Path, size: str, arm: str) -> np.ndarray:
    """(seeds, items) in the order of the seeds."""
    runs = sorted(root.glob(f"runs/{size}/{arm}-seed*-1"), key=lambda path: path.name)
    files = [run / f"exports/step-{STEPS[1]:08d}/evals/samples/piqa-0shot.jsonl" for run in runs]
    return np.array([[json.loads(line)["acc_norm"] for line in file.read_text().splitlines()] for file in files])


def test_each_size_and_arm_is_compared_with_its_baseline(study: Path, tmp_path: Path) -> None:
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    where = [(each["size"], each["budget"], each["arm"]) for each in found]
    assert sorted(where) == sorted((size, "b1", arm) for size in ("s0", "s2") for arm in ("values", "null"))
    for each in found:
        sides = [accuracies(tmp_path, each["size"], arm) for arm in ("classic", each["arm"])]
        by_seed = sides[1].mean(axis=1) - sides[0].mean(axis=1)
        assert each["measure"] == "piqa, 0-shot, acc_norm" and each["unit"] == "points"
        assert each["difference"] == pytest.approx(by_seed.mean(), abs=1e-12)
        assert each["means"] == pytest.approx([side.mean() for side in sides], abs=1e-12)
        half = stats.sem(by_seed) * stats.t.isf(0.025, len(by_seed) - 1)  # seeds alone: the widest that it may be
        assert each["low"] >= each["difference"] - max(half, 0.15) and each["low"] < each["difference"] < each["high"]
    for null in (False, True):
        own = [each for each in found if (each["arm"] == "null") == null]
        holm = multipletests([each["p_value"] for each in own], method="holm")[1]
        assert [each["adjusted_p_value"] for each in own] == pytest.approx(holm.tolist())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Evaluations by size" in page and "piqa, 0-shot, acc_norm" in page


def test_what_cannot_be_paired_is_named(study: Path, tmp_path: Path) -> None:
    """Another limit at one size, and no items at another: the verdict on the loss stands."""
    runs = [run for run in read_record(study).runs if run.budget == "b1" and run.arm == "values"]
    (spoilt,) = [run for run in runs if run.size == "s0"][:1]
    (lacking,) = [run for run in runs if run.size == "s2"][:1]
    file = folder(tmp_path, spoilt) / f"exports/step-{STEPS[1]:08d}/evals/lm_eval.json"
    file.write_text(file.read_text().replace('"limit": null', '"limit": 7'))
    (folder(tmp_path, lacking) / f"exports/step-{STEPS[1]:08d}/evals/lm_eval.json").unlink()
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {each["arm"] for each in found["evaluations"]} == {"null"}
    notes = " ".join(found["notes"])
    assert "Evaluations of s0 b1 values are left out: piqa, 0-shot was measured with different limit" in notes
    assert "piqa, 0-shot is left out: it was not measured for" in notes and lacking.name in notes
    assert "less compute than classic" in found["verdict"]["values"]


def test_a_study_without_exports_has_no_such_section(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"] == []
    assert "Evaluations by size" not in (tmp_path / "out" / "report.html").read_text()
