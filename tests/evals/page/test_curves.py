"""Accuracy over training: the steps of runs evaluated by the command, and what its figures and CSV then show."""

import csv
import itertools
import json
import math
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.__main__ import main
from evals.exported_steps import read_run
from evals.harness import run as harness
from evals.page import curves
from evals.page.curves import Point
from llm.common import plots
from llm.common.errors import UserError

from ..made_up import make_run
from ..rows import arc_rows, piqa_rows, write_rows

PNG = b"\x89PNG"


def add_step(run: Path, step: int, accuracies: dict[tuple[str, int], float], **changes: object) -> Path:
    """An exported step of a run with results by (task, shots); `changes` to each of them."""
    folder = run / f"exports/step-{step:08d}"
    (folder / "evals").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "hippoformer.json").write_text(json.dumps({"run": run.name, "step": step}))
    shared = {
        "n": 400,
        "limit": None,
        "batch_size": 16,
        "dtype": "float32",
        "device": "cpu",
        "rows": "r",
        "chance": 0.25,
    }
    kept = [
        shared
        | {"task": task, "shots": shots, "acc": accuracy, "acc_norm": accuracy / 2}
        | {"acc_stderr": 0.02, "acc_norm_stderr": 0.01, "task_version": 1.0, "versions": {"torch": "2"}}
        | changes
        for (task, shots), accuracy in accuracies.items()
    ]
    (folder / "evals/lm_eval.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two runs with two evaluated steps each: two tasks, at 0 and 5 shots."""
    runs = [make_run(tmp_path / "classic"), make_run(tmp_path / "values", ["values"])]
    for (index, run), step in itertools.product(enumerate(runs), (10, 20)):
        base = 0.3 + 0.01 * step + 0.1 * index
        add_step(run, step, {("piqa", 0): base, ("arc_easy", 0): base + 0.1, ("piqa", 5): base, ("arc_easy", 5): base})
    return runs


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_points_are_the_results(pair):
    points = curves.accuracy_over_steps([read_run(run) for run in pair])
    assert len(points) == 16
    assert points[0] == Point("classic", "classic", 10, "piqa", 0, 0.4, 0.02, 0.25)
    assert {(p.run, p.step) for p in points} == {(run.name, step) for run in pair for step in (10, 20)}
    norm = curves.accuracy_over_steps([read_run(pair[1])], "acc_norm", tasks=["arc_easy"], shots=[5])
    assert norm == [
        Point("values", "values", step, "arc_easy", 5, pytest.approx((0.4 + 0.01 * step) / 2), 0.01, 0.25)
        for step in (10, 20)
    ]
    assert curves.accuracy_over_steps([read_run(make_run(pair[0].parent / "bare"))]) == []


def test_a_group_is_one_point_and_a_perplexity_none(pair):
    """The tasks have 400 and 100 items, of which the group counts each alike."""
    for path in (path for run in pair for path in run.glob("exports/*/evals/lm_eval.json")):
        kept = json.loads(path.read_text())
        rows = [result | ({"n": 100} if result["task"] == "piqa" else {}) for result in kept]
        bits = {"bits_per_byte": {"kind": "bits_per_byte", "better": -1, "share": False}}
        path.write_text(json.dumps([*rows, rows[0] | {"task": "wikitext", "bits_per_byte": 1.2, "metrics": bits}]))
        groups = {
            "both": {"tasks": ["piqa", "arc_easy"], "by_size": True},
            "more": {"tasks": ["piqa", "x"], "by_size": 1},
        }
        (path.parent / "groups.json").write_text(json.dumps(groups))
    runs = [read_run(run) for run in pair]
    points = curves.accuracy_over_steps(runs)
    assert {point.task for point in points} == {"both"} and len(points) == 8
    first = next(point for point in points if (point.run, point.step, point.shots) == ("classic", 10, 0))
    assert first.accuracy == pytest.approx(0.2 * 0.4 + 0.8 * 0.5) and first.chance == pytest.approx(0.25)
    assert first.error == pytest.approx(math.hypot(0.2 * 0.02, 0.8 * 0.02))
    line = next(line for line in csv.DictReader(curves.accuracy_csv(runs).splitlines()) if line["task"] == "wikitext")
    assert line["bits_per_byte"] == "1.2"


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, st.floats(0, 0.1), shares), min_size=1, max_size=6), st.integers(0, 5))
def test_the_mean_over_tasks(values, shots):
    points = [Point("a", "a", 3, f"task{n}", shots, *value) for n, value in enumerate(values)]
    (mean,) = curves.average(points)
    assert (mean.run, mean.step, mean.shots, mean.task) == ("a", 3, shots, "")
    assert mean.accuracy == pytest.approx(fmean(accuracy for accuracy, _, _ in values))
    variance = sum(error**2 for _, error, _ in values) / len(values) ** 2  # of a mean of independent parts
    assert mean.error == pytest.approx(math.sqrt(variance))
    assert mean.chance == pytest.approx(fmean(chance for _, _, chance in values))


def test_only_what_is_complete_is_averaged():
    def point(run: str, step: int, task: str, accuracy: float, error: float | None = 0.01) -> Point:
        return Point(run, run, step, task, 0, accuracy, error, None)

    points = [
        *(point("a", 1, task, 0.2) for task in ("piqa", "arc_easy", "openbookqa")),
        *(point("b", 1, task, 0.4) for task in ("piqa", "arc_easy")),
        point("b", 2, "piqa", 0.9),  # the other task is still to come at this step
        point("a", 2, "piqa", 0.5),
        point("a", 2, "arc_easy", 0.7, None),
    ]
    means = {(mean.run, mean.step): mean for mean in curves.average(points)}
    assert {key: mean.accuracy for key, mean in means.items()} == {
        ("a", 1): pytest.approx(0.2), ("b", 1): pytest.approx(0.4), ("a", 2): pytest.approx(0.6)
    }  # fmt: skip
    assert means["a", 2].error is None and means["a", 1].error == pytest.approx(0.01 / math.sqrt(2))
    assert curves.average([]) == curves.average([point("a", 1, "piqa", 0.5), point("b", 1, "arc_easy", 0.5)]) == []


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(0, 60))
def test_the_running_mean(values, width):
    expected = [fmean(values[max(0, at - width // 2) : at + width // 2 + 1]) for at in range(len(values))]
    assert curves.running_mean(np.array(values), width).tolist() == pytest.approx(expected, abs=1e-9)


def test_steps_that_were_not_measured_alike(pair):
    add_step(pair[1], 30, {("piqa", 0): 0.5}, batch_size=8, rows="others")
    runs = [read_run(run) for run in pair]
    with pytest.raises(
        UserError, match=r"step-00000030 were evaluated on piqa, 0-shot, with different batch_size \(16"
    ):
        curves.accuracy_over_steps(runs)
    assert len(curves.accuracy_over_steps(runs, shots=[5])) == 8


def test_names_and_sides(tmp_path):
    seeds = [make_run(tmp_path / f"classic-seed{n}", seed=n) for n in (1, 2)]
    runs = [read_run(folder) for folder in seeds]
    assert curves.labels(runs) == ["classic-seed1", "classic-seed2"]
    assert [run.side for run in runs] == ["classic", "classic"]
    of_study = [read_run(make_run(tmp_path / name, record={"name": name}, seed=990071)) for name in ("keys-seed2-20x",)]
    assert [run.side for run in of_study] == ["keys"]
    twins = [read_run(make_run(tmp_path / name, record={"name": "same"})) for name in ("one", "two")]
    assert curves.labels(twins) == ["one", "two"]
    deeper = [read_run(make_run(tmp_path / f"{name}/run", record={"name": "same"})) for name in ("x", "y")]
    assert curves.labels(deeper) == [str(run.folder) for run in deeper]
    bare = read_run(make_run(tmp_path / "1", record={"name": "1"}))
    assert bare.side == "1"


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_figure_5_has_a_panel_for_each_number_of_shots(pair):
    points = curves.accuracy_over_steps([read_run(run) for run in pair])
    figure = curves.draw_average(points)
    assert [axes.get_title() for axes in figure.axes] == ["0-shot, mean of 2 tasks", "5-shot, mean of 2 tasks"]
    for axes, more in zip(figure.axes, (5, 0), strict=True):
        for index, line in enumerate(line for line in axes.lines if line.get_color() != plots.INK):
            assert line.get_color() == plots.COLOURS[index]
            assert list(line.get_xdata()) == [10, 20]
            assert list(line.get_ydata()) == pytest.approx([40 + 10 * index + more, 50 + 10 * index + more])
            band = axes.collections[index].get_paths()[0].get_extents()
            error = 100 * math.hypot(0.02, 0.02) / 2
            assert (band.y0, band.y1) == pytest.approx((line.get_ydata()[0] - error, line.get_ydata()[1] + error))
        (chance,) = (line for line in axes.lines if line.get_color() == plots.INK)
        assert set(chance.get_ydata()) == {25.0}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["classic", "values", "chance"]


def test_figure_9_has_a_panel_for_each_task(pair):
    points = curves.accuracy_over_steps([read_run(run) for run in pair])
    figure = curves.draw_tasks(points, columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["ARC-Easy", "PIQA"]
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_color() != plots.INK]
        assert len(lines) == len(axes.collections) == 4
        assert len({(line.get_color(), str(line.get_linestyle())) for line in lines}) == 4
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["classic", "values", "0-shot", "5-shot", "chance"]
    without_chance = [point._replace(chance=None) for point in points]
    assert not [line for line in curves.draw_tasks(without_chance).axes[0].lines if line.get_color() == plots.INK]


def test_figure_4_shows_the_training_loss_over_steps(pair):
    figure = curves.draw_loss([read_run(run) for run in pair])
    (axes,) = figure.axes
    raw = axes.lines[0]
    assert list(raw.get_xdata()) == list(range(1, 41))
    assert list(raw.get_ydata()) == pytest.approx([2 + 4 * math.exp(-step / 8) for step in range(1, 41)])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["classic", "values"]
    assert axes.get_ylabel() == "training loss (nats per token)"
    metrics = pair[0] / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("\n3,3000,", "\n3,3000,nan,"))
    assert 3 not in curves.draw_loss([read_run(pair[0])]).axes[0].lines[0].get_xdata()
    metrics.unlink()
    assert not curves.draw_loss([read_run(pair[0])]).axes[0].lines


def test_seeds_share_a_colour_and_differ_in_their_mark(tmp_path):
    sides = {"classic": [], "values": ["values"]}
    runs = [make_run(tmp_path / f"{side}-seed{n}", stream, seed=n) for n in (1, 2) for side, stream in sides.items()]
    for index, run in enumerate(runs):
        add_step(run, 10, {("piqa", 0): 0.3 + 0.1 * index})
    (axes,) = curves.draw_average(curves.accuracy_over_steps([read_run(run) for run in runs])).axes
    lines = [line for line in axes.lines if line.get_color() != plots.INK]
    assert [line.get_color() for line in lines] == [*plots.COLOURS, *plots.COLOURS]
    assert len({line.get_marker() for line in lines}) == 4


def test_figures_are_pictures_for_paper_and_page(pair):
    runs = [read_run(run) for run in pair]
    points = curves.accuracy_over_steps(runs)
    for figure in (curves.draw_average(points), curves.draw_tasks(points, 3), curves.draw_loss(runs)):
        assert plots.as_png(figure).startswith(PNG)
        svg = plots.as_svg(figure, "a figure")
        assert ElementTree.fromstring(svg).get("aria-label") == "a figure" and "currentColor" in svg


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path, make_export) -> list[Path]:
    """Two runs with two exported steps each, tiny models."""
    runs = [make_run(tmp_path / "classic"), make_run(tmp_path / "values", ["values"])]
    for (index, run), step in itertools.product(enumerate(runs), (10, 20)):
        folder = run.relative_to(tmp_path) / f"exports/step-{step:08d}"
        make_export(str(folder), seed=step + index, context=256, info={"run": run.name, "step": step})
    for task, rows, evaluated in (("piqa", piqa_rows, "validation"), ("arc_easy", arc_rows, "test")):
        write_rows(tmp_path / "data" / task, "train", rows("example", 8))
        write_rows(tmp_path / "data" / task, evaluated, rows("item", 5))
    return runs


def test_every_exported_step_is_evaluated_once_and_drawn(trained, tmp_path, capsys, monkeypatch):
    words = ["run", "--checkpoints", *map(str, trained), "--data", str(tmp_path / "data"), "--device", "cpu"]
    words += ["--tasks", "piqa", "arc_easy", "--shots", "0", "1"]
    assert main(words) == 0
    out = trained[0] / "exports"
    header, _, *rows, _, last = capsys.readouterr().out.splitlines()
    assert (
        header.split("  ")[0] == "run" and "0-shot, mean acc_norm %" in header and "1-shot, mean acc_norm %" in header
    )
    assert [row.split()[:2] for row in rows] == [
        [name, step] for name in ("classic", "values") for step in ("10", "20")
    ]
    assert last == f"written to {out}: accuracy.png, accuracy-by-task.png, loss.png, accuracy.csv"
    assert all(
        (out / name).read_bytes().startswith(PNG) for name in ("accuracy.png", "accuracy-by-task.png", "loss.png")
    )
    table = list(csv.DictReader((out / "accuracy.csv").open()))
    assert len(table) == 2 * 2 * 4
    for line in table:
        folder = tmp_path / line["run"] / f"exports/step-{int(line['step']):08d}"
        kept = {(r["task"], str(r["shots"])): r for r in json.loads((folder / "evals/lm_eval.json").read_text())}
        result = kept[line["task"], line["shots"]]
        assert [float(line[name]) for name in ("acc", "acc_norm_stderr", "chance")] == [
            result[name] for name in ("acc", "acc_norm_stderr", "chance")
        ]
    assert rows[0].split()[2] == f"{100 * fmean(float(r['acc_norm']) for r in table[:4] if r['shots'] == '0'):.2f}"

    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("a model was loaded with nothing to do"))
    again = [*words, "--metric", "acc", "--out", str(tmp_path / "figures")]
    assert main(again) == 0
    captured = capsys.readouterr()
    assert "mean acc %" in captured.out and "classic, step 20: 4 of 4 results are kept" in captured.err
    assert len(list((tmp_path / "figures").iterdir())) == 4


def test_what_cannot_be_drawn(trained, tmp_path, capsys, make_export):
    bare = make_run(tmp_path / "bare")
    (tmp_path / "file").touch()
    export = make_export("export")

    def refused(*words: object) -> str:
        capsys.readouterr()
        assert (
            main(["run", "--checkpoints", *map(str, words), "--data", str(tmp_path / "data"), "--tasks", "piqa"]) == 2
        )
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert f"{bare} has no exported steps; make them with `python -m llm export {bare} --all`" in refused(bare)
    assert f"{export} is an exported folder, no run" in refused(export)
    assert "is not a run folder (it has no run.json)" in refused(tmp_path / "nothing")
    assert "a run folder is given twice" in refused(trained[0], trained[0])
    assert "file is a file; give a folder with --out" in refused(trained[0], "--out", tmp_path / "file")
    assert not list(tmp_path.rglob("lm_eval.json"))
