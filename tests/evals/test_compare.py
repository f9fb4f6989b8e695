"""The comparison of two made-up runs: what is refused, what is written, and what the sentence says."""

import csv
import json
import math
import struct
from pathlib import Path

import pytest

from evals.__main__ import main
from evals.compare import Row, sentence

HEADER = "step,tokens,train_loss,perplexity,learning_rate,gradient_norm,tokens_per_second,mfu,validation_loss,seconds"


def make_run(folder: Path, name: str, loss: float = 2.0, seed: int = 1, store: str = "f1", steps: int = 40) -> Path:
    """A run folder as `fit` leaves it; validation every tenth step, ending at `loss`."""
    folder.mkdir(parents=True)
    lines = [HEADER]
    for step in range(1, steps + 1):
        train = loss + 4 * math.exp(-step / 8)
        validation = f"{loss + 4 * math.exp(-step / 8) * (step < steps)}" if step % 10 == 0 else ""
        lines.append(f"{step},{step * 1000},{train},{math.exp(train)},0.001,1.0,5000,,{validation},{step / 2}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    record = {"name": name, "parameters": 12345, "seed": seed, "store_fingerprint": store, "git_commit": "c"}
    (folder / "run.json").write_text(json.dumps(record))
    summary = {"step": steps, "tokens_seen": steps * 1000, "validation_loss": loss, "seconds": steps / 2}
    (folder / "summary.json").write_text(json.dumps(summary | {"parameters": 12345}))
    return folder


def make_exported(folder: Path, name: str, ioi: tuple[float, float], acc: float, step: int = 40, **changes) -> Path:
    """An exported folder with results; its weights are never read here."""
    (folder / "evals").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "hippoformer.json").write_text(json.dumps({"run": name, "step": step}))
    measured = {"dtype": "float32", "device": "cpu"}
    result = {"mean": {"correct": ioi[0], "incorrect": ioi[1]}, **measured}
    (folder / "evals/ioi.json").write_text(json.dumps(result))
    line = {"task": "piqa", "shots": 1, "acc": acc, "acc_stderr": 0.02, "acc_norm": acc, "acc_norm_stderr": 0.03}
    line |= {"n": 400, "limit": None, "batch_size": 16, "task_version": 1.0, "versions": {}, **measured, **changes}
    (folder / "evals/lm_eval.json").write_text(json.dumps([line]))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """The arguments of a comparison that is in order."""
    runs = [make_run(tmp_path / "a", "classic", 2.0), make_run(tmp_path / "b", "values", 1.9)]
    exports = [
        make_exported(tmp_path / "ea", "classic", (0.07, 0.05), 0.6),
        make_exported(tmp_path / "eb", "values", (0.41, 0.03), 0.62),
    ]
    return ["compare", *map(str, runs), "--exports", *map(str, exports), "--out", str(tmp_path / "out")]


def test_table_files_and_sentence(pair, tmp_path, capsys):
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert main(pair) == 0
    *table, blank, last = capsys.readouterr().out.splitlines()
    cells = {line.split("  ")[0]: line.split()[-2:] for line in table[2:]}
    assert table[0].split() == ["classic", "values"] and blank == ""
    assert cells["parameters"] == ["12,345", "12,345"] and cells["steps"] == ["40", "40"]
    assert cells["tokens seen"] == ["40,000", "40,000"]
    assert cells["validation loss, nats per token"] == ["2.0000", "1.9000"]
    assert cells["IOI correct name, %"] == ["7.00", "41.00"]
    assert cells["IOI incorrect name, %"] == ["5.00", "3.00"]
    assert cells["training time, s"] == ["20", "20"]
    assert next(line for line in table if line.startswith("piqa, 1-shot, acc, 400 items, %")).endswith(
        "60.00 ± 2.00  62.00 ± 2.00"
    )
    assert last == (
        "values minus classic: validation loss -0.1000 nats per token, IOI correct name +34.00 points, "
        "IOI incorrect name -2.00 points; one seed each gives no interval, so this is no verdict."
    )
    assert all(file.read_bytes() == content for file, content in before.items())  # pure reading
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"loss.png", "table.csv", "metrics.csv"}


def test_csv_files_hold_the_numbers_and_the_png_is_one(pair, tmp_path):
    main(pair)
    with (tmp_path / "out/metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    for name, folder in (("classic", "a"), ("values", "b")):
        with (tmp_path / folder / "metrics.csv").open(newline="") as file:
            assert [row for row in metrics if row["run"] == name] == [{"run": name, **r} for r in csv.DictReader(file)]
    with (tmp_path / "out/table.csv").open(newline="") as file:
        table = {row["measure"]: row for row in csv.DictReader(file)}
    assert float(table["validation loss, nats per token"]["values"]) == 1.9
    assert float(table["piqa, 1-shot, acc, 400 items, %"]["values, standard error"]) == 2.0
    png = (tmp_path / "out/loss.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG\r\n") and width >= 1000 and height >= 500


def test_without_exports_ioi_is_said_to_be_missing(tmp_path, capsys):
    runs = [make_run(tmp_path / folder, "same") for folder in ("a", "b")]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["same", "(A)", "same", "(B)"] and "IOI correct" not in out
    assert out.endswith(
        "same (B) minus same (A): validation loss +0.0000 nats per token, IOI not measured; "
        "one seed each gives no interval, so this is no verdict.\n"
    )


def test_a_task_that_one_model_lacks_is_shown_as_not_measured(pair, tmp_path, capsys):
    (tmp_path / "eb/evals/lm_eval.json").unlink()
    assert main(pair) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("piqa, 1-shot, acc,"))
    assert line.endswith("–") and "60.00 ± 2.00" in line


def test_the_sentence_never_calls_a_difference_better():
    for first, second in ((2.0, 1.0), (1.0, 2.0)):
        rows = [Row("validation loss, nats per token", (first, second), ".4f")]
        said = sentence(["a", "b"], rows)
        assert f"{second - first:+.4f}" in said and "no verdict" in said
        assert not any(word in said for word in ("better", "worse", "helped", "significant"))


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"store": "f2"}, ["store_fingerprint (f1 and f2)"]),
        ({"seed": 2}, ["seed (1 and 2)"]),
        ({"steps": 30}, ["step (40 and 30)", "tokens_seen (40000 and 30000)"]),
        ({"seed": 2, "store": "f2"}, ["store_fingerprint (f1 and f2)", "seed (1 and 2)"]),
    ],
)
def test_runs_that_are_no_pair_are_refused(tmp_path, capsys, changes, messages):
    runs = [make_run(tmp_path / "a", "classic"), make_run(tmp_path / "b", "values", **changes)]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(message in error for message in messages)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "b/summary.json").unlink(), "b is not finished (no summary.json)"),
        (lambda folder: (folder / "b/run.json").unlink(), "b is not a run folder (no run.json)"),
        (lambda folder: (folder / "b/metrics.csv").unlink(), "metrics.csv"),
        (lambda folder: (folder / "b/run.json").write_text("{"), "run.json cannot be read as JSON"),
        (lambda folder: (folder / "b/summary.json").write_text('{"step": 40}'), "lacks tokens_seen in summary.json"),
        (lambda folder: (folder / "b/metrics.csv").write_text("step\n1\n"), "lacks tokens in metrics.csv"),
        (lambda folder: (folder / "out").write_text(""), "out is a file"),
        (lambda folder: (folder / "eb/config.json").unlink(), "eb has no config.json"),
    ],
)
def test_folders_that_cannot_be_read(pair, tmp_path, capsys, spoil, message):
    spoil(tmp_path)
    assert main(pair) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").is_dir()


def test_exports_of_other_runs_or_steps_are_refused(pair, capsys):
    a, b = pair[4], pair[5]
    assert main([*pair[:4], b, a, *pair[6:]]) == 2
    assert "has run values and" in capsys.readouterr().err
    Path(b, "hippoformer.json").write_text(json.dumps({"run": "values", "step": 20}))
    assert main(pair) == 2
    assert "has step 20 and" in capsys.readouterr().err


def test_results_measured_differently_are_refused(pair, tmp_path, capsys):
    other = make_exported(tmp_path / "ec", "values", (0.4, 0.1), 0.6, n=100, limit=100)
    assert main([*pair[:5], str(other), *pair[6:]]) == 2
    error = capsys.readouterr().err
    assert "piqa, 1-shot, was measured with different n (400 and 100), limit (None and 100)" in error
