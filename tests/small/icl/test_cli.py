"""`python -m small.icl` as a user gives it: commands, files, pictures, sentences, exit statuses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from small.experiment.bench import format_ratios
from small.icl import bench, cli, figures
from small.icl import sweep as sweeping
from small.icl.bench import NumpyLoop
from small.icl.cli import main
from small.icl.runs import UNSHIFTED, IclSpec, Snapshot, joined, read_snapshots
from small.icl.settings import IclSettings, IclSizes, Task
from small.icl.sweep import Knob, points
from small.icl.task import KINDS
from small.icl.train import Machine

from ..pictures import is_a_picture

TINY = ["--batch", "8", "--evaluate-every", "10", "--evaluation", "20", "--no-compile", "--device", "cpu"]


def test_amicl_writes_its_figures_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "amicl"
    assert main(["amicl", "--out", str(out), "--trials", "200", "--device", "cpu"]) == 0
    found = json.loads((out / "amicl.json").read_text())
    for convention in ("paper", "code"):
        assert found[convention]["a"]["dot"][-1] > 0.98
        assert len(found[convention]["memories"]) == 24
    assert found["trials"] == 200
    assert all(
        is_a_picture(out / f"{name}.png") for name in ("attention_matrices", "accuracy_by_weight", "accuracy_by_size")
    )
    assert "As in the code (200 trials" in capsys.readouterr().out


def test_train_prints_tables_and_draws_figure_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    words = ["train", "--variants", "classic", "queries+values:learned", "--seeds", "2", "--steps", "20", *TINY]
    assert main([*words, "--out", str(out)]) == 0
    assert "Table 1" in capsys.readouterr().out
    assert "Table 6" in (out / "tables.txt").read_text()
    assert is_a_picture(out / "learning_curves.png")
    rows = read_snapshots(out)
    assert {(row.variant, row.seed) for row in rows} == {
        (v, s) for v in ("classic", "queries+values:learned") for s in (0, 1)
    }
    record = json.loads((out / "run.json").read_text())
    assert record["attempts"][0]["command"].startswith("python -m small.icl train --variants classic")
    (out / "learning_curves.png").unlink()
    assert main(["tables", str(out)]) == 0
    assert is_a_picture(out / "learning_curves.png")


@pytest.mark.slow
def test_a_training_killed_from_outside_goes_on(tmp_path: Path) -> None:
    through, killed = tmp_path / "through", tmp_path / "killed"
    words = [
        "train",
        "--variants",
        "classic",
        "values",
        "--seeds",
        "1",
        "--steps",
        "400",
        *TINY,
        "--stop-accuracy",
        "0",
    ]
    assert main([*words, "--out", str(through)]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "small.icl", *words, "--out", str(killed)], stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 300
    while not (killed / "checkpoint.safetensors").exists() or read_snapshots(killed)[-1].step < 50:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert read_snapshots(killed)[-1].step < 400
    assert main([*words, "--out", str(killed)]) == 0
    assert (killed / "snapshots.csv").read_bytes() == (through / "snapshots.csv").read_bytes()


def test_ctrl_c_ends_with_130_and_the_last_snapshot(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    words = [
        "train",
        "--variants",
        "classic",
        "--seeds",
        "1",
        "--steps",
        "100000",
        *TINY,
        "--stop-accuracy",
        "0",
        "--out",
        str(out),
    ]
    process = subprocess.Popen([sys.executable, "-m", "small.icl", *words], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (out / "checkpoint.safetensors").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert read_snapshots(out)


def test_sweep_draws_the_phase_plot_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    words = ["sweep", "--x", "noise=0,0.5", "--y", "alpha=0,10", "--variants", "classic", "values", "--seeds", "2"]
    words += ["--steps", "20", *TINY, "--threshold", "0.01", "--out", str(out)]
    assert main(words) == 0
    assert is_a_picture(out / "phase.png") and "phase.png" in (out / "index.html").read_text()
    with (out / "sweep.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 4 * 2 * 2
    assert {row[0] for row in rows[1:]} == {f"noise={x},alpha={y}" for x in ("0", "0.5") for y in (0, 10)}
    trained = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoint.safetensors")}
    capsys.readouterr()
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoint.safetensors")} == trained
    assert "noise=0.5,alpha=10" in capsys.readouterr().out


def test_knobs_turn_what_they_name() -> None:
    given = points(Knob.parse("content=40,85"), Knob.parse("layers=2,4"), IclSpec(Task(), IclSizes(), IclSettings()))
    assert [(p.task.content, p.sizes.width, p.sizes.layers) for p in given] == [
        (40, 105, 2), (85, 150, 2), (40, 105, 4), (85, 150, 4),
    ]  # fmt: skip
    (point, *_) = points(
        Knob.parse("lr=0.1"), Knob.parse("alpha=10"), IclSpec(Task(), IclSizes(), IclSettings(("keys",)))
    )
    assert point.settings.lr == 0.1 and point.settings.variants == ("keys:nmda10",)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "--variants", "vales"], "vales"),
        (["train", "--variants", "values:nmda"], "nmda"),
        (["train", "--variants", "classic:learned"], "no stream"),
        (["train", "--noise", "-1"], "noise -1.0"),
        (["train", "--steps", "77"], "multiple"),
        (["train", "--device", "toaster"], "--device cpu"),
        (["train", "--layers", "0"], "layers 0"),
        (["sweep", "--x", "nois=1", "--y", "lr=1"], "nois"),
        (["sweep", "--x", "noise=a", "--y", "lr=1"], "VALUE"),
        (["sweep", "--x", "noise=1", "--y", "noise=2"], "two different"),
        (["sweep", "--x", "noise=0.1", "--y", "copies=2,3"], "copies 3"),
        (["sweep", "--x", "noise=0.1,0.1", "--y", "lr=1"], "twice"),
        (["sweep", "--x", "noise=0.1", "--y", "lr=1", "--threshold", "0.99"], "--threshold 0.99"),
        (["train", "--first-seed", "-1"], "below 0"),
        (["sweep", "--x", "noise=0.1", "--y", "alpha=1,-1"], "nmda-1"),
        (["sweep", "--x", "noise=0.1", "--y", "pairs=4,4.5"], "pairs=4.5"),
        (["train", "--pairs", "40"], "81 tokens"),
        (["train", "--lr", "inf"], "lr inf"),
        (["amicl", "--device", "toaster"], "--device cpu"),
        (["amicl", "--trials", "0"], "trials 0"),
        (["amicl", "--seed", "-1"], "seed -1"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        main([*words, "--no-compile", "--out", str(out)] if words[0] != "amicl" else [*words, "--out", str(out)]) == 2
    )
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and named in said[-1]
    assert not any(out.glob("**/*")), "nothing is left behind"


def test_trainings_of_other_seeds_are_taken_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, more, joint = (tmp_path / name for name in ("one", "other", "more", "joint"))
    words = ["train", "--variants", "classic", "values", "--steps", "20", *TINY]
    assert main([*words, "--seeds", "2", "--out", str(one)]) == 0
    assert main([*words, "--seeds", "1", "--first-seed", "2", "--out", str(other)]) == 0
    assert main([*words, "--seeds", "1", "--first-seed", "3", "--lr", "0.02", "--out", str(more)]) == 0
    assert main(["tables", str(one), str(other), "--joint", str(joint)]) == 0
    assert is_a_picture(joint / "learning_curves.png")
    assert {row.seed for row in joined([one, other])} == {0, 1, 2}
    assert len(joined([one, other])) == len(read_snapshots(one)) + len(read_snapshots(other))
    capsys.readouterr()
    for folders, named in (((one, one), "both have seed 0"), ((one, more), "settings.lr (0.01, 0.02)")):
        assert main(["tables", *map(str, folders), "--joint", str(tmp_path / "none")]) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_tables_of_no_training_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", str(tmp_path)]) == 2
    assert "holds no training" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"attempts": []}')
    assert main(["tables", str(tmp_path)]) == 2
    (tmp_path / "run.json").write_text('{"attempts": [], "task": {}, "sizes": {}, "settings": {}}')
    assert main(["tables", str(tmp_path)]) == 2
    assert "has no snapshot yet" in capsys.readouterr().err
    (tmp_path / "snapshots.csv").write_text("snapshot,step\n")
    assert main(["tables", str(tmp_path)]) == 2
    assert "snapshots.csv cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "amicl"])
def test_an_out_that_cannot_be_made_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    words = TINY if command == "train" else []
    assert main([command, *words, "--out", str(tmp_path / "file" / "x")]) == 2
    assert "another --out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_lines_defaults_are_those_of_the_settings() -> None:
    given = cli._parser().parse_args(["train", "--out", "x", "--device", "cpu", "--no-compile"])
    assert cli._asked(given) == IclSpec(Task(), IclSizes(), IclSettings()) and cli._machine(given) == Machine()


def test_a_sweeps_grid_has_its_steps_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 3 points with a first snapshot of their own each; in one, a seed never passes."""
    firsts = {(x, y): 2 * x + 7 * y for x in (1, 2, 3) for y in (0, 1)}

    def trained(folder: Path, spec: IclSpec, *_: object) -> list[Snapshot]:
        first, rows = firsts[spec.task.copies, int(spec.task.novel)], []
        for seed in (0, 1):
            for n in range(20):
                passed = n >= first + seed and not (first == 11 and seed)
                rows.append(Snapshot(n, 500 * n, "keys", seed, dict.fromkeys(KINDS, float(passed)), {}))
        return rows

    drawn = {}
    monkeypatch.setattr(sweeping, "train", trained)
    monkeypatch.setattr(sweeping, "of_sweep", lambda x, y, grids, *_: drawn.update(x=x, y=y, **grids))
    x, y = Knob.parse("copies=1,2,3"), Knob.parse("novel=0,1")
    made = points(x, y, IclSpec(Task(pairs=6), IclSizes(), IclSettings(("keys",), (0, 1))))
    text, _ = sweeping.sweep(x, y, made, tmp_path, 0.9, Machine(), "")
    expected = [[500 * (firsts[a, b] + 0.5) for a in (1, 2, 3)] for b in (0, 1)]
    expected[1][1] = np.nan
    np.testing.assert_array_equal(drawn["keys"], expected)
    assert drawn["x"] == ("copies", [1, 2, 3]) and drawn["y"] == ("novel", [0, 1])
    assert "> 75,000" in text and "6,750" in text
    rows = list(csv.reader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert ["copies=2,novel=1", "keys", "0", "5500"] in rows and ["copies=2,novel=1", "keys", "1", ""] in rows


def test_figure_3_draws_runs_and_their_mean() -> None:
    rows = []
    for seed, top in ((0, 0.4), (1, 0.8)):
        for n in range(4):
            accuracy = {kind: top * n / 3 / (1 + index) for index, kind in enumerate(KINDS)}
            loss = {kind: 3.0 - n / (1 + index) for index, kind in enumerate(KINDS)} | {UNSHIFTED: 3.0 + n}
            rows.append(Snapshot(n, 500 * n, "values", seed, accuracy, loss))
    figure = figures.training(rows)
    for axes, kind in zip(figure.axes, ("test", "iw", "ic", "ic2"), strict=False):
        place = KINDS.index(kind)
        one, other, mean = (line.get_ydata() for line in axes.lines)
        np.testing.assert_allclose(one, [0.4 * n / 3 / (1 + place) for n in range(4)])
        np.testing.assert_allclose(mean, (np.array(one) + other) / 2)
        np.testing.assert_allclose(axes.lines[2].get_xdata(), [0, 0.5, 1, 1.5])
    np.testing.assert_allclose(figure.axes[4].lines[2].get_ydata(), [3 - n for n in range(4)])
    losses = figure.axes[5]
    assert len(losses.lines) == 15
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ["Test", "IW", "IC", "IC2, shifted label", "IC2, label that was learned"]
    np.testing.assert_allclose(losses.lines[14].get_ydata(), [3 + n for n in range(4)])
    variants = {line.get_color() for axes in figure.axes[:5] for line in axes.lines}
    assert not variants & {line.get_color() for line in losses.lines}
    assert "where the first of them ended" in figure.get_supxlabel()
    before = [row._replace(loss={kind: row.loss[kind] for kind in KINDS}) for row in rows]  # of an earlier version
    assert len(figures.training(before).axes[5].lines) == 12


@pytest.mark.parametrize("command", ["amicl", "train", "tables", "sweep", "bench"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"example:\n  python -m small.icl {command}" in capsys.readouterr().out


# ---- The benchmark's own loops ---------------------------------------------------------------------------------------


def test_the_benchmarks_loops_follow_the_same_rules() -> None:
    loop, task = NumpyLoop(Task()), Task()
    drawn = [loop.sequence() for _ in range(2000)]
    answered = [any((x[1::2, 65:] == loop.labels[answer].astype(np.float32)).all(1)) for x, answer in drawn]
    free = 0.25 * (31 / 32) ** 8  # of the free sequences, those without the query's label
    assert np.mean(answered) == pytest.approx(1 - free, abs=0.04)
    assert all(x.shape == (17, 150) and (x[:, :65].sum(1) == 1).all() for x, _ in drawn[:100])
    loop = NumpyLoop(bench.paper_task(length=20, width=100))
    assert np.mean([loop.amicl("dot", 2.0) for _ in range(300)]) > 0.97
    assert np.mean([loop.amicl("dot", 0.5) for _ in range(300)]) < 0.15
    assert task.tokens == 17


def test_the_benchmark_reports_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "AMICL_LOOP_TRIALS", 1)
    result = {"device": "CPU", "generator": bench._generator(2, "cpu", False), "amicl": bench._amicl(2, "cpu")}
    monkeypatch.setattr(bench, "LARGE", 64)
    result["step"] = bench._step(1, "cpu", "float32", compiled=False)
    text = format_ratios(result)
    assert "NumPy loop to generator" in text and "step to its products alone" in text
    median, least, greatest = result["generator"]["ratios"]["NumPy loop to generator"]
    assert least <= median <= greatest
    assert result["step"]["operations_a_run"] > 1e9
