"""The verdict on a study folder with known losses: that of the same ladder, and all that is missing is named."""

import csv
import io
import json
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from evals.__main__ import main
from evals.verdict import ladder_words
from evals.verdict.ladder import Run, judge, make_ladder
from evals.verdict.ladder_simulation import Design
from evals.verdict.study import judge_study
from evals.verdict.study_tables import outlook
from llm.common.errors import UserError
from llm.runs.study_record import StudyRecord, StudyRun, read_record
from tests.browser import check_page
from tests.evals.verdict.test_ladder import CONSTANT, runs_of, sizes_of

DESIGN = Design(4, 3, 2)
STEPS = (100, 200)
RUNS = runs_of(CONSTANT, DESIGN, seed=1)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The YAML of a finished study."""
    return write_study(tmp_path)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished study, with what the command wrote to its `out`, and printed."""
    folder = tmp_path_factory.mktemp("judged")
    with redirect_stdout(io.StringIO()) as told:
        assert main(["study", str(write_study(folder)), "--out", str(folder / "out")]) == 0
    return folder, told.getvalue()


def write_study(tmp_path: Path) -> Path:
    """Write a study whose 72 runs are done: classic, values and null; four sizes, three seeds, two budgets."""
    folder, sizes, runs = tmp_path / "runs", sizes_of(DESIGN), []
    by_name = {size.name: size for size in sizes}
    for one in RUNS:
        size = by_name[one.size]
        number = size.tokens.index(one.tokens)
        name = f"{one.size}/{one.arm}-seed{one.seed}-{number}"
        trunk, start = (None, 0) if number else (f"{one.size}/{one.arm}-seed{one.seed}-1", 80)
        runs.append(
            StudyRun(
                name, "main", one.size, one.arm, f"b{number}", one.seed, STEPS[number], int(one.tokens),
                int(size.parameters), size.flops[number], trunk, start,
            )
        )  # fmt: skip
        finish(folder / name, STEPS[number], one.loss)
    text = yaml.safe_dump({"folder": str(folder), "seeds": 3, "arms": {"classic": {}, "values": {"a": "<b>"}}})
    path = tmp_path / "study.yaml"
    path.write_text(text)
    registered = {"study": text, "base": "a: 1", "time": "2026-01-01T00:00:00+00:00"}
    StudyRecord(
        folder, registered, yaml.safe_load(text), [], [], "classic", ["classic", "values", "null"], list(by_name), runs
    ).write()
    return path


def finish(run: Path, step: int, loss: float) -> None:
    """Leave what a finished run leaves."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text("{}")
    (run / "summary.json").write_text(json.dumps({"step": step, "validation_loss": loss}))


def unfinish(run: Path, **event: object) -> None:
    """Leave what a run leaves that has stopped with this event."""
    (run / "summary.json").unlink()
    (run / "events.jsonl").write_text(json.dumps({"time": "", "event": "stopped", **event}) + "\n")


def numbers(value: object) -> list[float]:
    """All numbers of a result, in order."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def test_the_numbers_are_those_of_the_same_ladder(judged: tuple[Path, str]) -> None:
    tmp_path, told = judged
    ladder = make_ladder(RUNS[::-1], sizes_of(DESIGN), "classic", "null")
    expected = judge(ladder)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for arm in ("values", "null"):
        assert numbers(found["arms"][arm]) == pytest.approx(numbers(ladder_words.record(expected.arms[arm])), rel=1e-9)
    assert expected.joint is not None
    assert found["joint_fit"]["floor"] == pytest.approx(expected.joint.floor._asdict(), rel=1e-5)
    sentence = ladder_words.sentence(expected, "values")
    assert "less compute than classic" in sentence and told.rstrip().endswith(sentence)
    assert found["verdict"] == {"values": sentence}
    assert ladder_words.extrapolation(expected, "values") in told and ladder_words.held_out(expected, "values") in told
    assert not found["missing"] and not found["changes"]
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["size"]) for row in rows] == [(a, f"s{n}") for a in ("values", "null") for n in range(4)]
    at = expected.arms["values"].sizes[2]
    assert float(rows[2]["difference"]) == pytest.approx(at.difference.value, rel=1e-9)
    assert at.log_multiplier is not None
    assert float(rows[2]["multiplier_high"]) == pytest.approx(math.exp(at.log_multiplier.high), rel=1e-9)


def test_the_page_has_all_pictures_and_needs_no_network(judged: tuple[Path, str]) -> None:
    folder, out, study = judged[0], judged[0] / "out", judged[0] / "study.yaml"
    page = (out / "report.html").read_text()
    names = [f"values-{name}" for name in ("effect", "loss", "multiplier", "residuals")]
    assert page.count("<svg ") == len(names)
    assert sorted(path.stem for path in out.glob("*.svg")) == names == sorted(path.stem for path in out.glob("*.png"))
    for name in names:
        assert np.array(Image.open(out / f"{name}.png").convert("L")).std() > 5
        svg = (out / f"{name}.svg").read_text()
        assert svg.startswith("<svg ") and "mathdefault" not in svg  # no TeX at the ticks
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\((https?:)?//|@import|<link[^>]*http""", page)
    for run in read_record(study).runs:
        assert str(folder / "runs" / run.name) in page
    assert escape(study.read_text()) in page and (out / "study.yaml").read_text() == study.read_text()
    pictures = {f"{name}.{ending}" for name in names for ending in ("svg", "png", "pdf")}
    others = {"report.html", "results.json", "table.csv", "table.tex", "study.yaml", "tables"}
    assert {path.name for path in out.iterdir()} == pictures | others
    with (out / "tables" / "01-at-each-size.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)][1:5] == [f"s{n}" for n in range(4)]
    latex = (out / "table.tex").read_text().splitlines()
    assert latex[0].startswith(r"\begin{tabular}{l") and latex[-1] == r"\end{tabular}" and len(latex) == 4 + 4 + 2
    assert [line.partition(" & ")[0] for line in latex[4:8]] == [f"s{n}" for n in range(4)]


def test_the_page_is_whole_in_a_browser(judged: tuple[Path, str]) -> None:
    check_page(judged[0] / "out" / "report.html", pictures=4)


def test_what_is_missing_is_named_and_left_out(study: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    unfinish(runs / "s0/values-seed1-1", diverged=True, step=30, why="no finite loss in 10 steps")
    (runs / "s0/values-seed1-0/summary.json").unlink()
    (runs / "s0/values-seed1-0/run.json").unlink()  # it branches off the other
    unfinish(runs / "s1/null-seed10-1", step=5, why="SIGTERM")
    (runs / "s2/values-seed21-0/summary.json").unlink()
    (log := runs / "logs/s2/values-seed21-0.log").parent.mkdir(parents=True)
    log.write_text("error: out of memory\n")
    for path in (runs / "s3").rglob("*.json"):
        path.unlink()
    found = judge_study(study)
    told = "\n".join(found.missing)
    assert "s0/values-seed1-1 diverged at step 30 of 200: no finite loss in 10 steps." in told
    assert "s0/values-seed1-0 diverged at step 30 of 100: with s0/values-seed1-1, from which it branches." in told
    assert "s2/values-seed21-0 failed at step 0 of 100: out of memory." in told
    assert "Size s1: 1 of 18 runs is interrupted (s1/null-seed10-1)." in told
    assert "Size s3 has no finished run" in told and "Size s3: 18 of 18 runs are not started (s3/" in told
    assert any(note.startswith("Size s0, seed 1: values diverged") for note in found.notes)
    left = [run for run in RUNS if run.size != "s3"]
    out = {("values", 1), ("null", 10), ("values", 21)}
    kept = [run for run in left if (run.arm, run.seed) not in out]
    kept += [Run("values", "s0", 1, tokens, math.nan) for tokens in sizes_of(DESIGN)[0].tokens]
    expected = judge(make_ladder(kept, sizes_of(DESIGN)[:3], "classic", "null"))
    assert [at.seeds for at in found.verdict.arms["values"].sizes] == [2, 3, 2]
    assert found.sentences["values"] == ladder_words.sentence(expected, "values")


def test_one_seed_is_refused_in_words(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path in (tmp_path / "runs" / "s1").glob("values-seed1[12]-*/*.json"):
        path.unlink()
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "There is no verdict on values against classic: size s1 has 1 finished pair" in told
    assert "Size s1: 4 of 18 runs are not started (s1/values-seed11-0, " in told
    assert (tmp_path / "out" / "values-loss.png").is_file()
    assert not (tmp_path / "out" / "values-effect.png").exists()


def test_a_study_without_finished_pairs_leaves_nothing(study: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "runs").rglob("values*/*.json"):
        path.unlink()
    with pytest.raises(UserError, match="no finished runs of classic and of an arm with a change: train them"):
        judge_study(study)
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_what_changed_since_the_first_run_is_told(study: Path, tmp_path: Path) -> None:
    record = read_record(study)
    record.changes = ["seeds was 2 when the first run started, and is 3 now", "base: a was 0 and is 1"]
    record.notes = ["these sizes share their luck"]
    record.write()
    study.write_text(study.read_text().replace("seeds: 3", "seeds: 5"))
    found = judge_study(study)
    changed = ["seeds was 3 when the first run started, and is 5 now", "base: a was 0 and is 1"]
    assert found.changes == changed and "these sizes share their luck" in found.notes
    assert judge_study(tmp_path / "runs").verdict.arms["values"] == found.verdict.arms["values"]


def test_an_arm_that_costs_more_at_equal_tokens_is_noted(study: Path) -> None:
    record = read_record(study)
    for number, run in enumerate(record.runs):
        if run.arm == "values":
            record.runs[number] = replace(run, flops=run.flops * 1.25)
    record.write()
    [note] = [note for note in judge_study(study).notes if "FLOPs" in note]
    assert note.startswith("At equal tokens, values takes 1.250 to 1.250 times the FLOPs of classic")


def test_one_size_with_a_search_is_told_in_nats(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = tmp_path / "runs"
    for size in ("s1", "s2", "s3"):
        for path in (runs / size).rglob("*.json"):
            path.unlink()
    record = read_record(study)
    record.content["tune"] = {"key": "model.optimizer.lr"}
    for value, loss in ((1e-3, 4.0), (2e-3, 3.9), (4e-3, 4.1)):
        name = f"s0/values-tune1-lr{value:g}"
        record.runs.append(
            replace(record.runs[0], name=name, stage="tune", arm="values", steps=50, trunk=None, start=0, value=value)
        )
        finish(runs / name, 50, loss)
    record.choices = {"values": {"s0": 2.1e-3}}
    record.write()
    assert main(["study", str(runs), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    expected = judge(make_ladder([run for run in RUNS if run.size == "s0"], sizes_of(DESIGN)[:1], "classic", "null"))
    assert told.rstrip().endswith(ladder_words.sentence(expected, "values"))
    assert "three sizes are needed, and the study has 1" in told
    for picture in ("effect", "loss", "search"):
        assert "mathdefault" not in (tmp_path / "out" / f"values-{picture}.svg").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "There is none: it needs three sizes" in page and "s0/values-tune1-lr0.002" in page


def test_each_arm_has_its_sentence_and_pictures(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = read_record(study)
    record.arms.append("keys")
    for run in [run for run in record.runs if run.arm == "values" and run.size != "s3"]:
        record.runs.append(replace(run, name=run.name.replace("values", "keys"), arm="keys", trunk=None))
        finish(tmp_path / "runs" / record.runs[-1].name, run.steps, 0.01 + (record.state(run).loss or 0))
    record.arms.append("queries")
    record.write()
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "No seed of queries is finished with all its budgets" in told
    assert "There is no verdict on keys against classic: size s3 has 0 finished pairs" in told
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["verdict"]) == ["values", "keys"] and "less compute" in results["verdict"]["values"]
    assert (tmp_path / "out" / "values-effect.svg").is_file() and (tmp_path / "out" / "keys-loss.svg").is_file()


def test_the_measured_cost_of_a_step_is_counted(study: Path, tmp_path: Path) -> None:
    bench = tmp_path / "bench.json"
    rates = {"classic": [100.0, 110.0, 105.0, 90.0], "values": [80.0, 86.0, 85.0, 71.0]}
    bench.write_text(json.dumps({"tokens_per_second": rates}))
    found = judge_study(study, bench=bench)
    logs = np.log(np.array(rates["classic"]) / rates["values"])
    low, high = stats.t.interval(0.95, 3, logs.mean(), stats.sem(logs))
    ratio = found.step_times["values"]
    assert ratio[:3] == pytest.approx(np.exp([logs.mean(), low, high]), rel=1e-9)
    told = [sentence for sentence in outlook(found) if sentence.startswith("At the measured cost")]
    assert told == [ladder_words.at_equal_cost(found.verdict, "values", ratio)]


@pytest.mark.parametrize("content", ["[]", "{}", '{"tokens_per_second": {"config": [1.0, 2.0]}}'])
def test_step_times_that_do_not_fit_are_refused(study: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(UserError, match=r"bench\.json (is not of|has no two rounds of classic)"):
        judge_study(study, bench=tmp_path / "bench.json")
