"""Table S1 and its tests from runs that are made up: known accuracies, known images that are told right."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from statsmodels.stats.multitest import multipletests

from llm.common.errors import UserError
from small.variants import Variant
from small.vision.figures import over_epochs
from small.vision.runs import read_runs
from small.vision.settings import VisionSettings, VisionSizes
from small.vision.tables import table_s1

IMAGES = 2000


def made(
    out: Path,
    act: str,
    seed: int,
    right: np.ndarray,
    epochs: int = 2,
    done: int = 2,
    data: str = "cifar100",
    **more: str,
) -> Path:
    """The folder of a run whose last checkpoint is of epoch `done`; its table may be a row ahead."""
    folder = out / f"act={act},seed={seed}"
    folder.mkdir(parents=True)
    record = {
        "data": {"name": data, "classes": 5, "side": 32, "train": 9, "test": len(right), "crc32": "0"},
        "sizes": asdict(VisionSizes()),
        "variant": asdict(Variant(act, **more)),
        "settings": asdict(VisionSettings(seed=seed, epochs=epochs, warmup=0)),
        "attempts": [],
    }
    (folder / "run.json").write_text(json.dumps(record))
    rows = [f"{epoch},1.5,1.6,{0.1 * epoch if epoch < done else right.mean()}" for epoch in range(1, done + 1)]
    (folder / "accuracy.csv").write_text("\n".join(["epoch,loss,test_loss,accuracy", *rows, f"{done + 1},1,1,0.99"]))
    save_file({"test.right": torch.from_numpy(right)}, folder / "checkpoint.safetensors", {"step": str(done)})
    return folder


def right(accuracy: float, seed: int, like: np.ndarray | None = None) -> np.ndarray:
    """Which images are told right; half of them are those of `like`."""
    draw = np.random.default_rng(seed)
    own = draw.random(IMAGES) < accuracy
    return own if like is None else np.where(draw.random(IMAGES) < 0.5, like, own)


def test_means_deviations_and_the_papers_rows(tmp_path: Path) -> None:
    accuracies = {}
    for n, (data, act) in enumerate(
        (d, a) for d in ("cifar100", "tiny-imagenet") for a in ("gelu", "nmda:10", "nmda:0")
    ):
        sides = [right(0.3 + 0.05 * n + 0.01 * seed, 10 * n + seed) for seed in range(3)]
        for seed, side in enumerate(sides):
            made(tmp_path / data, act, seed, side, data=data)
        accuracies[data, act] = [100 * side.mean() for side in sides]
    text = table_s1(read_runs([tmp_path / "cifar100", tmp_path / "tiny-imagenet"]))
    found = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[2:8]]
    assert found[0] == ["GELU", "NMDA α = 10", "NMDA α = 0"]
    expected = {key: f"{np.mean(v):.2f} ± {np.std(v):.2f} (3 seeds)" for key, v in accuracies.items()}
    assert found[2:] == [
        ["CIFAR-100", *(expected["cifar100", act] for act in ("gelu", "nmda:10", "nmda:0"))],
        ["the paper's", "69.92 ± 0.34", "70.27 ± 0.47", "49.91 ± 0.58"],
        ["TinyImageNet", *(expected["tiny-imagenet", act] for act in ("gelu", "nmda:10", "nmda:0"))],
        ["the paper's", "54.90 ± 0.45", "55.72 ± 0.03", "40.36 ± 0.52"],
    ]


def numbers(sentence: str) -> list[float]:
    """Difference, low, high, p."""
    found = re.search(r"GELU: (\S+) points, 95% interval (\S+) to (\S+), p (\S+),", sentence)
    assert found is not None
    return [float(each) for each in found.groups()]


def test_verdicts_are_paired_within_seeds_and_images_and_corrected(tmp_path: Path) -> None:
    """With the same images right in every seed the interval is the t interval over images; p is Holm's."""
    base = right(0.5, 0)
    acts = {"nmda:10": right(0.62, 1, base), "nmda:5": right(0.53, 2, base), "relu": right(0.4, 3, base)}
    for seed in range(3):
        made(tmp_path, "gelu", seed, base)
        for act, side in acts.items():
            made(tmp_path, act, seed, side)
    lines = table_s1(read_runs([tmp_path])).splitlines()
    tests = {act: stats.ttest_rel(side.astype(float), base.astype(float)) for act, side in acts.items()}
    corrected = multipletests([test.pvalue for test in tests.values()], method="holm")[1]
    words = {"nmda:10": "above", "nmda:5": "not shown to differ from", "relu": "below"}
    titles = {"nmda:10": "NMDA α = 10", "nmda:5": "NMDA α = 5", "relu": "relu"}
    for (act, test), p_value in zip(tests.items(), corrected, strict=True):
        (line,) = (line for line in lines if line.startswith(f"CIFAR-100: {titles[act]} is "))
        assert f"is {words[act]} GELU" in line and line.endswith(f"3 seeds x {IMAGES:,} test images.")
        interval = test.confidence_interval(0.95)
        difference = 100 * (acts[act].mean() - base.mean())
        found = numbers(line)
        assert found[:3] == pytest.approx([difference, 100 * interval.low, 100 * interval.high], abs=0.006)
        assert found[3] == pytest.approx(p_value, rel=0.06)
    assert lines[-1] == "p values are corrected for 3 comparisons (Holm 1979); each interval is that of one alone."


def test_a_correction_may_turn_a_verdict(tmp_path: Path) -> None:
    """Of three comparisons one has p 0.02 by itself."""
    base = right(0.5, 0)
    gains = {"nmda:10": 200, "nmda:1": 37, "relu": 2}
    for act, gain in gains.items():
        other = base.copy()
        other[np.flatnonzero(~base)[: 130 + gain]] = True
        other[np.flatnonzero(base)[:130]] = False
        made(tmp_path, act, 0, other)
    made(tmp_path, "gelu", 0, base)
    made(tmp_path / "alone", "nmda:1", 5, base, epochs=1, done=1)
    lines = [line for line in table_s1(read_runs([tmp_path, tmp_path / "alone"])).splitlines() if " GELU" in line]
    words = {line.split(": ")[1].split(" is ")[0]: line for line in lines if "points" in line}
    assert "is above" in words["NMDA α = 10"] and "not shown" in words["NMDA α = 1"] and "not shown" in words["relu"]
    _, low, _, p_value = numbers(words["NMDA α = 1"])
    assert low > 0 and 0.03 < p_value < 0.09
    text = table_s1(read_runs([tmp_path, tmp_path / "alone"]))
    assert "corrected for 3 comparisons" in text and "compared with nothing" in text


def test_activations_whose_names_are_nearly_alike_are_two(tmp_path: Path) -> None:
    for act, accuracy in (("gelu", 0.5), ("nmda:1", 0.5), ("nmda:1.0000001", 0.8)):
        made(tmp_path, act, 0, right(accuracy, 3))
    text = table_s1(read_runs([tmp_path]))
    assert text.count(" points, ") == 2 and "NMDA α = 1.0000001 is above" in text


@pytest.mark.parametrize(("part", "name", "value"), [("data", "crc32", "1"), ("settings", "lr", 0.5)])
def test_other_images_or_rates_are_never_one_group(part: str, name: str, value: object, tmp_path: Path) -> None:
    made(tmp_path, "gelu", 0, right(0.5, 0))
    folder = made(tmp_path, "nmda:10", 0, right(0.9, 0))
    record = json.loads((folder / "run.json").read_text())
    record[part][name] = value
    (folder / "run.json").write_text(json.dumps(record))
    assert "there is no GELU run of the same settings here" in table_s1(read_runs([tmp_path]))


def test_a_table_that_is_not_of_its_checkpoint_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path, "gelu", 0, right(0.5, 0))
    rows = (folder / "accuracy.csv").read_text().splitlines()
    (folder / "accuracy.csv").write_text("\n".join(rows[:2]))
    with pytest.raises(UserError, match=r"accuracy\.csv is not of its checkpoint, of epoch 2"):
        read_runs([tmp_path])


def test_answers_of_another_number_of_images_are_refused(tmp_path: Path) -> None:
    made(tmp_path, "gelu", 0, right(0.5, 0))
    folder = made(tmp_path, "nmda:10", 0, right(0.5, 1))
    save_file({"test.right": torch.ones(1, dtype=torch.bool)}, folder / "checkpoint.safetensors", {"step": "2"})
    with pytest.raises(UserError, match=r"test\.right is torch\.bool of \(1,\), not of this training"):
        table_s1(read_runs([tmp_path]))


def test_seeds_are_paired_by_their_numbers(tmp_path: Path) -> None:
    """Every seed gains the same 2%, though seeds differ by 20%; and only seeds of both count."""
    for seed, accuracy in enumerate((0.3, 0.5, 0.7)):
        base = np.arange(IMAGES) < accuracy * IMAGES
        made(tmp_path, "gelu", seed, base)
        made(tmp_path, "nmda:10", seed, np.arange(IMAGES) < (accuracy + 0.02 + 0.001 * seed) * IMAGES)
    made(tmp_path, "gelu", 7, right(0.1, 9))
    (line,) = (line for line in table_s1(read_runs([tmp_path])).splitlines() if "points" in line)
    difference, low, high, p_value = numbers(line)
    assert "is above GELU" in line and difference == pytest.approx(2.1) and 1 < low < high < 3 and p_value < 0.01
    assert "3 seeds x 2,000" in line


def test_equal_accuracies_are_no_difference(tmp_path: Path) -> None:
    for seed in range(3):
        base = np.arange(IMAGES) % 2 == 0
        made(tmp_path, "gelu", seed, base)
        made(tmp_path, "nmda:10", seed, np.random.default_rng(seed).permutation(base))
    (line,) = (line for line in table_s1(read_runs([tmp_path])).splitlines() if "points" in line)
    difference, low, high, p_value = numbers(line)
    assert "not shown to differ" in line and difference == 0 and low < 0 < high and p_value == 1


def test_one_seed_speaks_of_two_trainings(tmp_path: Path) -> None:
    base = right(0.5, 0)
    made(tmp_path, "gelu", 0, base)
    made(tmp_path, "nmda:10", 0, right(0.8, 1, base))
    text = table_s1(read_runs([tmp_path]))
    assert "with one seed this speaks of two trainings" in text and "(1 seed)" in text and "corrected" not in text


def test_runs_count_as_of_their_checkpoint(tmp_path: Path) -> None:
    """A kill leaves a table one row ahead; a run without a checkpoint is not there yet."""
    made(tmp_path, "gelu", 0, right(0.5, 0))
    made(tmp_path, "gelu", 1, right(0.9, 1), done=1)
    made(tmp_path, "nmda:10", 0, right(0.5, 1), epochs=2, done=1)
    (made(tmp_path, "nmda:10", 1, right(0.5, 2)) / "checkpoint.safetensors").unlink()
    runs = read_runs([tmp_path])
    assert [(run.variant.act, run.settings.seed, run.rows[-1].epoch) for run in runs] == [
        ("gelu", 0, 2), ("gelu", 1, 1), ("nmda:10", 0, 1)
    ]  # fmt: skip
    text = table_s1(runs)
    assert f"{100 * right(0.5, 0).mean():.2f} (1 seed, 1 not done)" in text and "(epoch 1 of 2)" in text
    assert "NMDA α = 10 is compared with nothing: no seed is finished with it and with GELU." in text


def test_other_settings_are_other_rows_and_have_no_base(tmp_path: Path) -> None:
    made(tmp_path / "a", "gelu", 0, right(0.5, 0))
    made(tmp_path / "b", "nmda:10", 0, right(0.5, 1), epochs=1, done=1)
    made(tmp_path / "c", "nmda:10", 0, right(0.5, 1), streams=("values",))
    text = table_s1(read_runs([tmp_path / name for name in "abc"]))
    assert "CIFAR-100, streams values, epochs 2: NMDA α = 10 is compared with nothing: there is no GELU run" in text
    assert text.count("the paper's") == 2  # of those without streams
    made(tmp_path / "d", "relu", 0, right(0.5, 0))
    assert "the paper's" not in table_s1(read_runs([tmp_path / "d"]))  # the paper has no ReLU


def test_one_run_twice_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", "gelu", 0, right(0.5, 0))
    made(tmp_path / "b", "gelu", 0, right(0.5, 0))
    for folders in ([tmp_path / "a", folder], [tmp_path / "a", tmp_path / "b"]):
        with pytest.raises(UserError, match="are one run twice: give only one of them"):
            read_runs(folders)


def test_a_record_of_another_version_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path, "gelu", 0, right(0.5, 0))
    record = json.loads((folder / "run.json").read_text())
    del record["data"]["name"]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"run\.json is of another version \('name'\)"):
        read_runs([tmp_path])


def test_curves_are_those_of_the_tables(tmp_path: Path) -> None:
    sides = [right(0.5, 0), right(0.7, 1)]
    for seed, side in enumerate(sides):
        made(tmp_path, "gelu", seed, side)
    made(tmp_path / "tiny", "relu", 0, right(0.5, 0), data="tiny-imagenet")
    panels = over_epochs(read_runs([tmp_path, tmp_path / "tiny"])).axes
    assert len(panels) == 4
    loss, accuracy = panels[:2]
    assert [list(line.get_ydata()) for line in loss.lines] == [[1.5, 1.5]] * 3
    own = [[10.0, 100 * side.mean()] for side in sides]
    np.testing.assert_allclose([line.get_ydata() for line in accuracy.lines], [*own, np.mean(own, axis=0)])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["GELU"]
