"""Commands of `python -m small.tem`: what they write, that options arrive, bad input, help."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from small.tem import recording
from small.tem.cli import main
from small.tem.memory import RULES, Rule
from small.tem.runs import Model, read_runs
from small.tem.settings import MODULES, MachineSizes, TemSettings, TransformerSizes

from ..pictures import is_a_picture

WORDS = [
    "--spaces", "3x3", "3x4", "--symbols", "6", "--steps", "6", "--batch", "4", "--walk-from", "8", "--walk-to", "12",
    "--evaluate-every", "2", "--tested", "4", "--tested-steps", "20", "--device", "cpu",
]  # fmt: skip


def test_train_makes_a_table_and_figure_4(tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "tem"
    assert main(["train", *WORDS, "--seeds", "2", "--code", "12", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    runs = read_runs(out)
    assert [(run.model.name, run.settings.seed) for run in runs] == [
        ("tem-t", 0), ("tem-t", 1), ("tem", 0), ("tem", 1)
    ]  # fmt: skip
    assert {run.model.sizes.code for run in runs} == {12}
    assert (out / "tables.txt").read_text().strip() in printed and is_a_picture(out / "learning_curves.png")
    mean = np.mean([run.last.zero_shot for run in runs[:2]])
    assert f"{mean:.3f} ± " in next(line for line in printed.splitlines() if line.startswith("TEM-t "))
    assert main(["tables", str(out)]) == 0 and capsys.readouterr().out.strip() in printed


def test_options_reach_the_models(tmp_path: Path) -> None:
    words = ["train", *WORDS, "--seeds", "1", "--rule", "code", "--modules", "--separation", "linear", "--matrix"]
    words += ["--store", "new", "--below", "0.7", "--sensory", "11"]
    assert main([*words, "--transition", "relu", "--out", str(tmp_path)]) == 0
    transformer, machine = (run.model for run in read_runs(tmp_path))
    sizes = TransformerSizes(transition="relu", separation="linear", store="new", below=0.7)
    assert transformer.sizes == sizes and transformer.rule is None
    sizes = MachineSizes(code=sum(MODULES), modules=MODULES, transition="relu", sensory=11)
    assert machine == Model(sizes, replace(RULES["code"], form="matrix"))


def test_the_papers_preset_is_the_reference_codes(tmp_path: Path, monkeypatch) -> None:
    """github.com/jbakermans/torch_tem: 20,000 updates of 20 steps; walks shrink from 6,000 steps to 500; batch 16."""
    asked = []
    monkeypatch.setattr("small.tem.train.train", lambda path, spec, *_: asked.append((spec.model, spec.settings)))
    monkeypatch.setattr("small.tem.cli._show", lambda *_: None)
    assert main(["train", "--preset", "paper", "--seeds", "1", "--batch", "8", "--out", str(tmp_path)]) == 0
    (transformer, settings), (machine, same) = asked
    assert settings == same == TemSettings(
        spaces=("8x8", "9x9", "10x10", "11x11"), steps=20_000, batch=8, walk_from=5450, walk_to=1050, walk_spread=550,
        backprop=20, test_every=250,
    )  # fmt: skip
    lengths = [(settings.walk(step) - 550, settings.walk(step) + 550) for step in (1, 20_000)]
    assert lengths == [(4900, 6000), (500, 1600)] and settings.longest == 6000
    assert transformer == Model(TransformerSizes(code=120))
    assert machine == Model(MachineSizes(code=120, modules=(30, 30, 24, 18, 18)), RULES["code"])


@pytest.mark.slow
def test_figures_are_of_every_model(tmp_path: Path, capsys, monkeypatch) -> None:
    words = ["--room", "5x5", "--walkers", "24", "--steps", "30", "--shuffles", "20", "--probes", "4"]
    assert main(["train", *WORDS, "--seeds", "2", "--code", "9", "--out", str(tmp_path / "runs")]) == 0
    capsys.readouterr()
    assert main(["figures", str(tmp_path / "runs"), *words, "--environments", "3", "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    names = {
        "codes,tem-t,seed=0",
        "codes,tem,seed=0",
        "remapping,tem-t,seed=0",
        "remapping,tem,seed=0",
        "grid_and_band_scores",
    }
    assert {path.stem for path in (tmp_path / "o").glob("*.png")} == names | {"learning_curves"}
    walk = json.loads((tmp_path / "o" / "walk.json").read_text())
    assert walk["run"] == "tem-t,seed=0" and "memory neuron" in walk["units"][-1]["name"]
    assert '<script type="application/json" id="walk">' in (tmp_path / "o" / "index.html").read_text()
    assert all(is_a_picture(path) for path in (tmp_path / "o").glob("*.png"))
    assert (tmp_path / "o" / "cells.txt").read_text().strip() in printed
    names = [line.split("  ")[0] for line in printed.splitlines() if line.startswith("TEM")]
    assert names == ["TEM-t", "TEM-t, untrained", "TEM", "TEM, untrained"]
    # What was measured is not measured again.
    monkeypatch.setattr(recording, "record", None)
    assert main(["figures", str(tmp_path / "runs"), *words, "--environments", "3", "--out", str(tmp_path / "p")]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == printed.splitlines()[:4]
    assert main(["figures", str(tmp_path / "runs"), "--room", "hex:3x3"]) == 2
    assert "room hex:3x3 has the actions" in capsys.readouterr().err
    assert main(["figures", str(tmp_path / "runs"), "--shuffles", "3"]) == 2
    assert "shuffles 3 must be at least 20" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["figures", str(tmp_path / "runs"), *words, "--room", "40x40"]) == 2
    assert "24 walkers never came to" in capsys.readouterr().err


def test_families_have_maps_and_no_grid_scores(tmp_path: Path, capsys) -> None:
    words = [*WORDS[3:], "--models", "tem-t", "--seeds", "1", "--spaces", "family:3", "--out", str(tmp_path)]
    assert main(["train", *words]) == 0
    assert main(["figures", str(tmp_path), "--walkers", "24", "--shuffles", "20", "--probes", "4"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("TEM-t  ") and "nan" in line)
    assert row.split()[3:9] == ["nan"] * 6
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "codes,tem-t,seed=0", "learning_curves", "remapping,tem-t,seed=0"
    }  # fmt: skip


def test_capacity_writes_a_table_and_curves(tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "capacity"
    words = ["--widths", "4", "8", "--memories", "64", "--repeats", "4", "--out", str(out)]
    assert main(["capacity", *words]) == 0
    assert (out / "capacity.txt").read_text().strip() in capsys.readouterr().out
    assert is_a_picture(out / "capacity.png")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--out", "o", "--spaces", "5x5", "hex:3x3"], "spaces must share one structure"),
        (["train", "--out", "o", "--symbols", "46"], "there are 46 symbols: give a greater --sensory"),
        (["train", "--out", "o", "--models", "tem", "tem"], "a model is asked for twice"),
        (["train", "--out", "o", "--walk-spread", "9"], "walk-spread needs backprop"),
        (["train", "--out", "o", "--backprop", "5", "--walk-spread", "100"], "walk-spread 100 must be below walk-from"),
        (["train", "--out", "o", "--backprop", "5", "--store", "new"], "drop --store new"),
        (["train", "--out", "o", "--lr", "0"], "lr 0.0 must be a finite number above 0"),
        (["train", "--out", "o", "--store", "new", "--below", "1"], "below 1.0 must be between 0 and 1"),
        (["capacity", "--memories", "1"], "memories 2 to 16,384"),
        (["capacity", "--noise", "nan"], "the noise finite and not below 0"),
        (["capacity", "--widths", "5000"], "widths must be 1 to 4,096"),
        (["train", "--out", "o", "--below", "0.1"], "--below needs --store surprising or --store new"),
        (["train", "--out", "o", "--models", "tem", "--store", "new"], "--store is read by tem-t alone"),
        (["train", "--out", "o", "--models", "tem-t", "--rule", "code"], "--rule is read by tem alone"),
        (["train", "--out", "o", "--modules", "--code", "12"], "--code 12 and modules cannot both be"),
        (["figures", "."], "holds no run of python -m small.tem with a result: train first"),
        (["tables", "."], "holds no run of python -m small.tem with a result: train first"),
    ],
)
def test_bad_input_is_said_in_one_sentence(words: list[str], sentence: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--steps", "1"] if words[0] == "train" else words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error


def test_help_has_an_example_and_needs_no_torch() -> None:
    ask = (
        "import sys\nfrom small.tem.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    for command in ("train", "tables", "figures", "capacity", "bench"):
        done = subprocess.run([sys.executable, "-c", ask, command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and f"python -m small.tem {command}" in done.stdout, done.stderr
    assert Rule().act == "relu"
