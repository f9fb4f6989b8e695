"""`python -m small.grid` as a user gives it: commands, files, pictures, sentences, exit statuses."""

import json
import re
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import numpy as np
import pytest

from small.grid import cli
from small.grid.biophysics import Receptor
from small.grid.cli import main
from small.grid.model import Variant
from small.grid.runs import combinations, grouped, read_runs
from small.grid.settings import GridSettings, GridSizes
from small.grid.tables import error_table
from small.spaces import space

from ..pictures import is_a_picture

TINY = [
    "--preset", "small", "--space", "3x3", "--trials", "2", "--steps", "16", "--batch", "4", "--walkers", "4",
    "--width", "16", "--neurons", "8", "--device", "cpu",
]  # fmt: skip


def test_trainings_have_a_folder_of_their_own() -> None:
    options = cli._parser().parse_args(["train", "--alpha", "10", "--maps", "32", "--seeds", "3"])
    assert options.out == Path("runs/grid") and len(cli._asked(options)) == 3


def test_train_makes_a_run_for_every_combination_a_table_and_figures(tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "grid"
    words = [
        "train",
        *TINY,
        "--alpha",
        "0",
        "10",
        "--act",
        "relu",
        "--maps",
        "2",
        "3",
        "--seeds",
        "2",
        "--out",
        str(out),
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    runs = read_runs(out)
    assert len(runs) == 12 and (out / "act=nmda:10,maps=3,seed=1" / "checkpoint.safetensors").is_file()
    assert [(group[0].variant.act, group[0].settings.maps, len(group)) for group in grouped(runs)] == [
        ("nmda:0", 2, 2), ("nmda:0", 3, 2), ("nmda:10", 2, 2), ("nmda:10", 3, 2), ("relu", 2, 2), ("relu", 3, 2)
    ]  # fmt: skip
    assert (out / "errors.txt").read_text().strip() in printed
    assert all(
        is_a_picture(out / name)
        for name in ("errors_over_trials.png", "reference_error_by_alpha.png", "first_visit_error_by_alpha.png")
    )
    mean = np.mean(
        [run.last.errors["novel"].reference for run in runs if run.variant.act == "relu" and run.settings.maps == 2]
    )
    assert f"{mean:.3f} ± " in next(line for line in error_table(runs).splitlines() if line.startswith("relu, N = 2"))

    attempts = json.loads((out / "act=relu,maps=2,seed=0" / "run.json").read_text())["attempts"]
    assert attempts[0]["command"].startswith("python -m small.grid train --preset small")
    kept = (out / "act=relu,maps=2,seed=0" / "errors.csv").read_bytes()
    assert main(words) == 0  # nothing is trained again
    assert (out / "act=relu,maps=2,seed=0" / "errors.csv").read_bytes() == kept
    assert main(["tables", str(out), str(out / "act=relu,maps=2,seed=0")]) == 0


def test_magnesium_is_alpha(tmp_path: Path) -> None:
    words = ["train", *TINY, "--magnesium", "3.57", "--seeds", "1", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert read_runs(tmp_path / "out")[0].variant.act == "nmda:1" and Receptor(3.57).alpha == 1


def test_every_option_reaches_the_run(tmp_path: Path) -> None:
    words = [
        "train", *TINY, "--act", "leaky_relu:0.2", "--seeds", "1", "--first-seed", "3", "--position", "residual",
        "--transition", "identity", "--streams", "values", "keys", "--source", "first", "--objective", "steps",
        "--segment", "4", "--lr", "0.01", "--dtype", "bfloat16",
    ]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    (run,) = read_runs(tmp_path / "out")
    assert run.variant == Variant("leaky_relu:0.2", ("values", "keys"), "first", "residual", "identity")
    assert run.sizes.segment == 4 and run.sizes.width == 16 and run.sizes.head_dim == 16
    assert (run.settings.objective, run.settings.lr, run.settings.seed) == ("steps", 0.01, 3)
    assert run.settings.products == "bfloat16"


def test_the_paper_preset_is_the_paper() -> None:
    options = cli._parser().parse_args(["train", "--out", "x"])
    asked = cli._asked(options)
    assert [run.settings for run in asked] == [GridSettings(seed=seed) for seed in range(3)]
    assert all(
        run.sizes == GridSizes() and run.variant == Variant("nmda:10") and len(run.space.cells) == 121 for run in asked
    )


def test_combinations_name_what_varies() -> None:
    asked = combinations(
        space("3x3"),
        GridSizes(),
        Variant(),
        GridSettings(),
        {"lr": [1e-3, 1e-4], "streams": [(), ("values",)], "seed": [0]},
    )
    assert [run.label for run in asked][1] == "act=nmda:1,maps=32,lr=0.001,streams=values,seed=0"
    assert asked[2].settings.lr == 1e-4 and asked[3].variant.streams == ("values",)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", *TINY, "--alpha", "-1"], "activation 'nmda:-1'"),
        (["train", *TINY, "--alpha", "1", "1"], "act needs a value, and none twice"),
        (["train", *TINY, "--magnesium", "-2"], "magnesium -2.0 mM"),
        (["train", *TINY, "--steps", "17"], "steps 17 must be a multiple of the segment 8"),
        (["train", *TINY, "--space", "nowhere.txt"], "space 'nowhere.txt' is unknown"),
        (["train", *TINY, "--device", "cuda:7"], "cuda:7"),
        (["train", *TINY, "--first-seed", "-1"], "seed -1 must be at least 0"),
        (["train", *TINY, "--letters", "1"], "letters 1 must be at least 2"),
        (["train", *TINY, "--vary", "act=relu"], "--vary act is asked for twice"),
        (["train", *TINY, "--vary", "lr=1,2", "--vary", "lr=3"], "--vary lr is asked for twice"),
        (
            ["train", *TINY, "--dtype", "auto", "--vary", "products=float32,bfloat16"],
            "--dtype auto is one answer for all",
        ),
        (["sweep", *TINY, "--dtype", "auto", "--task", "1/2"], "--dtype auto is one answer for all runs"),
        (["figures", "one", "two", "--out", "three"], "--out is one folder"),
        (["figures"], "give the folders of trainings, or --out DIR for the figures that need no training"),
        (["record", "nowhere", "--out", "a.npz"], "nowhere is not the folder of one run of a small experiment"),
        (["record", "nowhere", "--out", "a.csv"], "--out a.csv must end in .npz"),
        (["tables", "nowhere"], "nowhere holds no run"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], named: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main([*words, *(["--out", str(out)] if words[0] == "train" else [])]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and named in said[0]
    assert not list(out.glob("*"))


def test_a_run_of_another_version_is_refused_by_name(tmp_path: Path, capsys) -> None:
    assert main(["train", *TINY, "--alpha", "1", "--seeds", "1", "--out", str(tmp_path)]) == 0
    path = tmp_path / "act=nmda:1,maps=16,seed=0" / "run.json"
    record = json.loads(path.read_text())
    record["settings"]["momentum"] = 1
    path.write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["tables", str(tmp_path)]) == 2
    assert "is of another version" in capsys.readouterr().err


def test_the_receptor_and_the_activations_need_no_run(tmp_path: Path) -> None:
    assert main(["figures", "--out", str(tmp_path / "new"), "--device", "cpu"]) == 0
    forms = {f"{name}.{form}" for name in ("receptor", "activations") for form in ("png", "svg", "pdf")}
    assert {path.name for path in (tmp_path / "new").iterdir()} == forms | {"index.html", "pictures.json"}
    assert all(is_a_picture(path) for path in (tmp_path / "new").glob("*.png"))


def test_auto_keeps_the_faster_dtype_for_all_runs_and_what_a_folder_has(tmp_path: Path, monkeypatch, capsys) -> None:
    slow = "bfloat16"

    def step(spec, device: str, compiled: bool | None):
        return lambda: time.sleep(0.02 * (spec.settings.products == slow))

    monkeypatch.setattr("small.grid.train.one_step", step)
    words = ["train", *TINY, "--alpha", "0", "1", "--seeds", "1", "--dtype", "auto", "--out", str(tmp_path / "a")]
    assert main(words) == 0
    assert [run.settings.products for run in read_runs(tmp_path / "a")] == ["float32"] * 2
    assert "dtype float32: a step takes float32" in capsys.readouterr().out
    slow = "float32"
    assert main([*words[:-1], str(tmp_path / "b")]) == 0
    assert [run.settings.products for run in read_runs(tmp_path / "b")] == ["bfloat16"] * 2
    capsys.readouterr()
    assert main([*words, "--trials", "3"]) == 0  # goes on in the dtype that it began with
    assert "dtype float32, as before" in capsys.readouterr().out
    assert [run.last.trial for run in read_runs(tmp_path / "a")] == [3, 3]


def test_steps_are_timed_in_both_dtypes(tmp_path: Path, capsys) -> None:
    assert main(["train", *TINY, "--alpha", "1", "--seeds", "1", "--dtype", "auto", "--out", str(tmp_path)]) == 0
    assert re.search(r"^dtype \w+: a step takes float32 [\d.]+ ms, bfloat16 [\d.]+ ms$", capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_figures_are_those_that_the_runs_allow(tmp_path: Path, capsys) -> None:
    runs, out = tmp_path / "runs", tmp_path / "figures"
    words = ["train", *TINY, "--neurons", "2", "--seeds", "2", "--out", str(runs)]  # few maps to draw
    assert main([*words, "--alpha", "0", "10", "--act", "leaky_relu:0.1", "leaky_relu:0.5"]) == 0
    assert main([*words, "--alpha", "0", "10", "--position", "actions", "--out", str(tmp_path / "actions")]) == 0
    asked = ["--record-steps", "2000", "--normalisation", "occupancy", "--device", "cpu"]
    assert main(["figures", str(runs), "--out", str(out), *asked]) == 0
    names = {path.stem for path in out.glob("*.png")}
    assert names == {
        "receptor", "activations", "errors_over_trials", "reference_error_by_alpha", "reference_error_by_activation",
        "rate_maps", "place_scores", "place_scores_by_activation", "place_cells", "first_visit_error_by_alpha",
        "activation_p_values", "reference_error_by_slope", "place_scores_by_slope", "sparsity", "position_codes",
        "place_cells_64",
    }  # fmt: skip
    page, captions = (out / "index.html").read_text(), json.loads((out / "pictures.json").read_text())
    assert set(captions) == names and all(escape(caption) in page for caption in captions.values())
    walk = json.loads((out / "walk.json").read_text())
    assert walk["run"] == "act=nmda:10,maps=16,seed=0" and len(walk["places"]) == 9 and len(walk["cells"]) == 17
    assert all(len(unit["activity"]) == 17 and unit["activity"][0] is None for unit in walk["units"])
    assert all(is_a_picture(path) for path in out.glob("*.png"))
    assert main(["figures", str(tmp_path / "actions"), *asked]) == 0
    assert {path.stem for path in (tmp_path / "actions").glob("*.png")} == {
        "receptor", "activations", "errors_over_trials_without_recurrence",
        "reference_error_by_alpha_without_recurrence", "place_scores_without_recurrence",
    }  # fmt: skip
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0] for line in printed.splitlines() if line.startswith("NMDA α = 10") and ": " in line}
    assert lines == {
        f"NMDA α = 10, N = 16{suffix}: {kind}" for suffix in ("", ", untrained") for kind in ("ffn", "softmax")
    }  # fmt: skip
    assert (out / "cells.txt").read_text().strip() in printed
    for wrong, named in ((["--map", "32"], "map 32 is not there"), (["--record-steps", "9"], "steps 9 are too few")):
        assert main(["figures", str(runs), *asked, *wrong]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["tables", "--help"], ["bench", "--help"]])
def test_help_answers_without_torch(words: list[str]) -> None:
    code = "import sys; from small.grid.cli import main\n"
    code += "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    outcome = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert len(words) == 1 or "example:" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 120
