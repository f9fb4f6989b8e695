"""Several arms against one baseline, and the null arm beside one seed's verdict."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from evals.__main__ import main
from llm.runs.study_record import StudyRecord, StudyRun

from ..made_up import add_task, document_lengths, make_export, make_run
from .test_compare import compare, results

DOCUMENTS = 200
SHIFTS = {"classic": 0.0, "values": -0.1, "keys": -0.004, "queries": 0.0}
NULL_SEED = {"initializer_seed": 99}


def make_arm(root: Path, arm: str, seed: int, shift: float, folder: str = "", **settings: Any) -> str:
    """A run whose documents are `shift` nats a token harder than the baseline's of the same seed."""
    stream = [arm] if arm in ("values", "keys", "queries") else []
    run = make_run(root / (folder or f"{arm}-seed{seed}"), stream, loss=2.0 + shift, seed=seed, **settings)
    numbers = np.random.default_rng([seed, *arm.encode()])
    base = np.random.default_rng(3).gamma(9, 0.25, DOCUMENTS)
    noise = 0.1 * numbers.standard_normal(DOCUMENTS) + 0.002 * numbers.standard_normal()
    export = make_export(run, document_lengths(DOCUMENTS) * (base + shift + noise), seed=seed)
    add_task(export, "piqa", 0, numbers.random(DOCUMENTS) < 0.5 - shift)
    return str(run)


def words_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_arms_share_one_error_rate_and_are_otherwise_as_alone(tmp_path, capsys):
    seeds = (1, 2, 3)
    runs = {arm: [make_arm(tmp_path, arm, seed, shift) for seed in seeds] for arm, shift in SHIFTS.items()}
    every = [runs["classic"][0], *runs["queries"], *runs["values"], *runs["classic"][1:], *runs["keys"]]
    assert compare(every, tmp_path / "all") == 0
    told = capsys.readouterr().out
    found = results(tmp_path / "all")
    arms = {each["names"][1]: each for each in found["arms"]}
    assert found["baseline"] == "classic" and list(arms) == ["queries", "values", "keys"]  # as given
    alone = {}
    for arm in arms:
        assert compare([*runs["classic"], *runs[arm]], tmp_path / arm) == 0
        alone[arm] = results(tmp_path / arm)
    for n, family in ((0, "primary"), (1, "tasks")):
        findings = {arm: arms[arm]["findings"][n] for arm in arms}
        for arm, finding in findings.items():
            single = alone[arm]["findings"][n]
            assert finding["family"] == family
            differing = {key for key in finding if finding[key] != single[key]}
            assert differing <= {"adjusted_p_value", "shown"}
        raw = [finding["p_value"] for finding in findings.values()]
        holm = multipletests(raw, method="holm")[1]
        assert [finding["adjusted_p_value"] for finding in findings.values()] == pytest.approx(holm.tolist())
    assert arms["values"]["findings"][0]["shown"] == "lower"
    assert "values is better than classic" in told and "The change of keys: decoder.stream [] → [keys]." in told
    page = words_of((tmp_path / "all" / "report.html").read_text())
    assert "queries, values, keys against classic" in page and "over all arms" in page
    assert all(f"{arm}: Loss" in page and f"{arm}: Where it comes from" in page for arm in arms)
    with (tmp_path / "all" / "table.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][:4] == ["arm", "measure", "classic", "of the arm"]
    assert {row[0] for row in rows[1:]} == set(arms)
    pictures = {path.name for path in (tmp_path / "all").glob("*.png")}
    assert pictures == {f"{arm}-loss.png" for arm in arms}


def test_one_arm_has_no_word_of_several(tmp_path, capsys):
    runs = [make_arm(tmp_path, arm, seed, SHIFTS[arm]) for arm in ("classic", "values") for seed in (1, 2)]
    assert compare(runs, tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("The change: decoder.stream [] → [values].\n")
    assert "arms" not in results(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "loss.png",
        "pictures",
        "report.html",
        "results.json",
        "table.csv",
        "table.tex",
        "tables",
    }
    page = words_of((tmp_path / "out" / "report.html").read_text())
    assert "values: Loss" not in page and "over all arms" not in page


# ---- The null arm ----------------------------------------------------------------------------------------------------


def difference(runs: list[str]) -> float:
    """Nats per token, by tokens, of the second export minus the first."""
    kept = [json.loads((Path(run) / "exports/step-00000040/evals/losses.json").read_text())[0] for run in runs]
    first, second = (np.sum(each["nats"]) / np.sum(each["tokens"]) for each in kept)
    return float(second - first)


@pytest.mark.parametrize(("shift", "larger"), [(0.02, False), (0.3, True)])
def test_one_seed_is_told_beside_a_null_arm_that_is_given(tmp_path, capsys, shift, larger):
    classic, values = (make_arm(tmp_path, arm, 1, SHIFTS[arm]) for arm in ("classic", "values"))
    null = make_arm(tmp_path, "null", 1, shift, config=NULL_SEED)
    assert compare([classic, values], tmp_path / "out", "--null", null) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    size = f"classic-seed1 with other initial weights (null arm) differs by {difference([classic, null]):+.4f} nats"
    assert size in said and ("no less than this" in said) == larger
    found = results(tmp_path / "out")
    assert found["null"]["difference"] == pytest.approx(difference([classic, null]), abs=1e-12)
    assert any(note.startswith("The null arm null-seed1, classic-seed1 with other") for note in found["notes"])


def test_several_seeds_note_the_null_arm_and_keep_their_sentence(tmp_path, capsys):
    seeds = (1, 2, 3)
    runs = [make_arm(tmp_path, arm, seed, SHIFTS[arm]) for arm in ("classic", "values") for seed in seeds]
    assert compare(runs, tmp_path / "plain") == 0
    plain = capsys.readouterr().out.splitlines()[-1]
    null = [make_arm(tmp_path, "null", seed, 0.02, config=NULL_SEED) for seed in seeds]
    assert compare(runs, tmp_path / "out", "--null", *null) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == plain and "null" not in plain
    assert any(line.startswith("The null arm null, classic with other initial weights, differs") for line in told)


def test_the_null_arm_of_the_study_is_found(tmp_path, capsys):
    study = tmp_path / "study"
    classic = make_arm(study, "classic", 1, 0.0, "small/classic-seed1-20x")
    values = make_arm(study, "values", 1, -0.1, "small/values-seed1-20x")
    null = make_arm(study, "null", 1, 0.03, "small/null-seed1-20x", config=NULL_SEED)
    listed = [
        StudyRun(f"small/{arm}-seed1-20x", "main", "small", arm, "20x", 1, 40, 40_000, 1000, 1e9)
        for arm in ("classic", "values", "null")
    ]
    arms = ["classic", "values", "null"]
    StudyRecord(study, {}, {}, [], [], "classic", arms, ["small"], listed).write()
    assert compare([classic, values], tmp_path / "out") == 0
    assert f"(null arm) differs by {difference([classic, null]):+.4f} nats" in capsys.readouterr().out.splitlines()[-1]
    (Path(null) / "summary.json").unlink()  # it is not finished
    assert compare([classic, values], tmp_path / "again") == 0
    assert "as there is no null arm" in capsys.readouterr().out.splitlines()[-1]


def test_other_runs_of_the_baseline_widen_the_interval_of_one_seed(tmp_path, capsys):
    """Other initial weights and other seeds alike: their deviation, twice its square, Student's quantile."""
    classic, values = (make_arm(tmp_path, arm, 1, SHIFTS[arm]) for arm in ("classic", "values"))
    others = [make_arm(tmp_path, "null", 1, 0.003, config=NULL_SEED), make_arm(tmp_path, "classic", 2, -0.004)]
    assert compare([classic, values], tmp_path / "alone") == 0
    assert compare([classic, values], tmp_path / "out", "--null", others[1], others[0]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    shifts = [0.0, *(difference([classic, other]) for other in others)]
    deviation = float(np.std(shifts, ddof=1))
    assert f"the interval covers the spread of 3 runs of classic-seed1 ({deviation:.4f} nats per token)" in said
    assert f"(null arm) differs by {shifts[1]:+.4f} nats" in said
    alone, found = (results(tmp_path / name)["findings"][0] for name in ("alone", "out"))
    assert found["spread"] == [pytest.approx(deviation), 3] and alone["spread"] is None
    of_seeds = 4.3027 * deviation * np.sqrt(2)  # Student's quantile of two degrees of freedom
    half, narrow = (found["high"] - found["low"]) / 2, (alone["high"] - alone["low"]) / 2
    assert max(narrow, 0.75 * of_seeds) < half < narrow + of_seeds
    tasks = [finding for finding in results(tmp_path / "out")["findings"] if finding["family"] == "tasks"]
    assert tasks and all(finding["spread"][1] == 3 for finding in tasks)


def test_other_seeds_of_the_study_count_too(tmp_path, capsys):
    study = tmp_path / "study"
    names = {
        (arm, seed): f"small/{arm}-seed{seed}-20x" for arm, seed in (("classic", 1), ("values", 1), ("classic", 2))
    }
    runs = [make_arm(study, arm, seed, 0.0, name) for (arm, seed), name in names.items()]
    listed = [
        StudyRun(name, "main", "small", arm, "20x", seed, 40, 40_000, 1000, 1e9) for (arm, seed), name in names.items()
    ]
    StudyRecord(study, {}, {}, [], [], "classic", ["classic", "values"], ["small"], listed).write()
    assert compare(runs[:2], tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "the interval covers the spread of 2 runs of classic" in said and "null arm" not in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "have the same initial weights"),
        ({"config": {**NULL_SEED, "model.optimizer.lr": 0.5}}, "differ in model.optimizer.lr (0.001 and 0.5)"),
        ({"config": NULL_SEED, "store": "f2"}, "store_fingerprint (f1 and f2)"),
    ],
)
def test_what_is_no_null_arm_is_refused(tmp_path, capsys, settings, message):
    runs = [make_arm(tmp_path, arm, 1, SHIFTS[arm]) for arm in ("classic", "values")]
    null = make_run(tmp_path / "null", **settings)
    assert main(["compare", *runs, "--out", str(tmp_path / "out"), "--documents", "0", "--null", str(null)]) == 2
    told = capsys.readouterr().err
    assert message in told and "--null takes the baseline with other initial weights" in told
    assert not (tmp_path / "out").exists()
