"""`python -m small.vision` as a user gives it: commands, Table S1, tests, sentences, exit statuses."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from small.vision.cli import main
from small.vision.runs import read_runs
from small.vision.train import Run

from ..pictures import is_a_picture
from .files import cifar_python, pictures, tarred, tiny_imagenet, zipped

TINY = [
    "--width", "16", "--heads", "2", "--neurons", "8", "--layers", "1", "--epochs", "2", "--warmup", "1", "--batch",
    "16", "--lr", "0.003", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tarred(cifar_python(folder / "made", train=pictures(64, 32, 0), test=pictures(200, 32, 1)))
    zipped(tiny_imagenet(folder / "made", train=pictures(32, 64, 0), test=pictures(20, 64, 1)))
    for path in (folder / "made").glob("*.*"):
        path.rename(folder / path.name)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "cifar100"
    words = ["train", "--dataset", "cifar100", "--data", str(data), *TINY, "--seeds", "3", "--out", str(out)]
    assert main(words) == 0
    return out


def test_train_makes_table_s1_with_three_seeds_of_each(trained: Path, capsys) -> None:
    assert main(["tables", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert (trained / "tables.txt").read_text().strip() in printed and is_a_picture(trained / "accuracy.png")
    runs = read_runs([trained])
    assert [run.variant.act for run in runs] == ["gelu"] * 3 + ["nmda:10"] * 3 + ["nmda:0"] * 3
    header, ours, paper = (
        next(line for line in printed.splitlines() if word in line) for word in ("GELU", "CIF", "r's")
    )
    assert re.split(r"\s{2,}", header.strip()) == ["GELU", "NMDA α = 10", "NMDA α = 0"]
    for column, act in enumerate(("gelu", "nmda:10", "nmda:0")):
        accuracy = [100 * run.rows[-1].accuracy for run in runs if run.variant.act == act]
        assert f"{np.mean(accuracy):.2f} ± {np.std(accuracy):.2f} (3 seeds)" == re.split(r"\s{2,}", ours)[1 + column]
    assert re.split(r"\s{2,}", paper.strip())[1:] == ["69.92 ± 0.34", "70.27 ± 0.47", "49.91 ± 0.58"]
    assert printed.count("GELU: ") == 2 and printed.count("3 seeds x 200 test images.") == 2


def test_the_same_command_again_trains_nothing(trained: Path, data: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*/*")}
    words = ["train", "--dataset", "cifar100", "--data", str(data), *TINY, "--seeds", "3", "--out", str(trained)]
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in trained.glob("*/*") if ".lock" not in path.name} == {
        path: time for path, time in before.items() if ".lock" not in path.name
    }


def test_what_cannot_be_trained_is_said_before_and_the_rest_is_trained(data, tmp_path, monkeypatch, capsys) -> None:
    words = ["train", "--dataset", "cifar100", "--data", str(data), *TINY, "--seeds", "1", "--out", str(tmp_path / "o")]
    assert main([*words, "--act", "gelu"]) == 0
    assert main([*words, "--act", "relu", "gelu", "--smoothing", "0.3"]) == 2
    assert "different settings (settings.smoothing" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "o").glob("act=*")] == ["act=gelu,seed=0"]
    step = Run._step
    nan_of_nmda = lambda run, *rest: step(run, *rest) * (math.nan if "NMDA" in str(run.model) else 1)  # noqa: E731
    monkeypatch.setattr(Run, "_step", nan_of_nmda)
    assert main([*words, "--act", "nmda", "relu", "--alpha", "3"]) == 2
    shown = capsys.readouterr()
    assert "1 of 2 runs could not be trained: act=nmda:3,seed=0 (the loss of epoch 1 is nan" in shown.err
    assert "relu is" in shown.out


def test_data_sets_with_streams_in_one_table(trained: Path, data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tiny"
    words = ["train", "--dataset", "tiny-imagenet", "--data", str(data / "tiny-imagenet-200.zip"), *TINY, "--seeds"]
    assert main([*words, "1", "--act", "gelu", "relu", "--streams", "values", "--out", str(out)]) == 0
    assert "TinyImageNet: 32 training and 20 test images of 5 classes, 64 x 64" in capsys.readouterr().out
    assert main(["tables", str(trained), str(out), "--out", str(tmp_path / "both")]) == 0
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "(1 seed)" in lines["TinyImageNet"] and "54.90" not in printed  # the paper has no streams
    assert any(line.startswith("TinyImageNet: relu is") and "with one seed" in line for line in lines)
    assert (tmp_path / "both" / "tables.txt").is_file() and is_a_picture(tmp_path / "both" / "accuracy.png")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--dataset", "cifar100", "--data", "nowhere"], "nowhere is not there: fetch CIFAR-100"),
        (["train", "--dataset", "cifar100", "--act", "swishy"], "activation 'swishy' is unknown"),
        (["train", "--dataset", "cifar100", "--alpha", "-1"], "activation 'nmda:-1.0' is unknown"),
        (["train", "--dataset", "cifar100", "--act", "gelu", "gelu"], "an activation is asked for twice"),
        (["train", "--dataset", "tiny-imagenet", "--patch", "7"], "patch 7 must divide the images' side of 64"),
        (["train", "--dataset", "cifar100", "--streams", "value"], "stream 'value' is unknown"),
        (["train", "--dataset", "cifar100", "--epochs", "5"], "warmup 10 must be below epochs 5"),
        (["train", "--dataset", "cifar100", "--act", "gelu", "--alpha", "3", "--data", "x"], "x is not there"),
        (["tables", "."], "holds no run of python -m small.vision with a result: train first"),
    ],
)
def test_bad_input_is_said_in_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_has_an_example_and_needs_no_torch() -> None:
    ask = (
        "import sys\nfrom small.vision.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    for command in ("train", "tables"):
        done = subprocess.run([sys.executable, "-c", ask, command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and f"python -m small.vision {command}" in done.stdout, done.stderr
