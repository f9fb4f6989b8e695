"""The attempts of a run: killed, interrupted, resumed, gone back, finished, and the folder that it keeps to itself."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llm.cli import main
from llm.runs import reading
from llm.train import checkpoint as checkpoints
from llm.train.loggers import MetricsFile

from .preloaded import LLM, Python
from .runs import Config, assert_same_weights, events, fit, losses, measured

# Runs the command and kills it, as kill -9 does, when a function of the product returns for the n-th time.
KILLED = """
import importlib, os, signal, sys
from llm.cli import main
module, *owner, name = sys.argv[1].split(":")
place = importlib.import_module(module)
for part in owner:
    place = getattr(place, part)
function, left = getattr(place, name), int(sys.argv[2])
def counted(*args, **kwargs):
    global left
    result, left = function(*args, **kwargs), left - 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(place, name, counted)
main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("what", "function", "times"),
    [
        # rows of steps 4, 8, 10 (validation), 12, 16, 20
        ("windows", "llm.train.loggers:MetricsFile:log_metrics", 6),
        ("documents", "llm.train.checkpoint:_sync", 3 * 7 + 3),  # within the fourth checkpoint, seven times each
        pytest.param(  # between two micro-batches
            "mixture", "llm.train.module:LanguageModule:training_step", 2 * 23 + 1, marks=pytest.mark.slow
        ),
        pytest.param(  # the fourth checkpoint is copied, and not written
            "windows", "llm.train.gathering:HostCopies:_copy", 4, marks=pytest.mark.slow
        ),
    ],
)
def test_killed_and_resumed_equals_undisturbed(
    tiny_config: Config, tmp_path: Path, story_store: Path, second_store: Path, what: str, function: str, times: int
) -> None:
    """30 steps = some, kill -9, resume, the rest: every row and weight equal to the last bit, with dropout."""
    mixture = {"data__store": {str(story_store): 0.6, str(second_store): 0.4}, "data__mask_documents": True}
    common = {
        **(mixture if what == "mixture" else {"data__rows": what}),
        "trainer__max_steps": 30,
        "trainer__log_every_n_steps": 4,  # no divisor of checkpoint_every: a row's mean spans the kill
        "data__micro_batch_size": 4,
        "decoder__residual_dropout": 0.1,
        "decoder__attention_dropout": 0.1,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit(tiny_config(**common, run__folder=str(whole))) == 0
    words = ["fit", "--config", str(tiny_config(**common, run__folder=str(broken))), "--resume", "auto"]
    assert Python(KILLED, [function, str(times), *words]).wait() == -signal.SIGKILL
    before = measured(broken)
    assert 16 <= int(before[-1]["step"]) < 30
    assert Python(LLM, words).wait() == 0
    assert measured(broken) == measured(whole)
    assert all(len(row["data_digest"]) == 16 for row in measured(whole) if row["train_loss"])
    assert before == measured(whole)[: len(before)]
    assert list(losses(broken)) == [4, 8, 12, 16, 20, 24, 28, 30]
    assert_same_weights(whole, broken, 30)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, broken)]
    assert summaries[0]["tokens_seen"] == summaries[1]["tokens_seen"]
    assert summaries[0]["validation_loss"] == summaries[1]["validation_loss"]


def test_interrupted_says_how_to_go_on(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(trainer__max_steps=100_000)
    command = [sys.executable, "-m", "llm", "fit", "--config", str(config), "--resume", "auto"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() or 12 not in losses(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "no checkpoint in" in message  # at the start
    assert "Ctrl-C again stops at once" in message
    assert "stopped at step" in message
    assert "--resume auto" in message
    assert "Traceback" not in message


def test_an_interrupt_waits_for_the_end_of_a_micro_batch(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised inside TensorBoard's queue it would lose a wake-up, and closing the logger would wait for ever."""
    logged = []

    def log(_: MetricsFile, __: dict, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        logged.append(step)

    monkeypatch.setattr(MetricsFile, "log_metrics", log)
    assert main(["fit", "--config", str(tiny_config())]) == 130
    assert logged == [1, 2, 3]  # the third to its end
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_going_back_to_an_older_checkpoint_leaves_the_newer_aside(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert fit(tiny_config(run__keep_checkpoints=4)) == 0
    first = losses(run)
    back = str(run / "checkpoints" / "step-00000005")
    assert fit(tiny_config(run__keep_checkpoints=2), "--resume", back, "--model.optimizer.lr", "1e-5") == 0
    said = capsys.readouterr().err
    assert "changed: model.optimizer.lr was 0.003, is 1e-05" in said
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names[:2] == ["step-00000015", "step-00000020"]
    assert names[2:] == [f"superseded-step-{step:08d}" for step in (10, 15, 20)]
    second = losses(run)
    assert list(second) == list(first)
    assert all((first[step] == second[step]) == (step <= 6) for step in first)  # the sixth loss is before the update
    record = json.loads((run / "run.json").read_text())
    assert [attempt["from_step"] for attempt in record["attempts"]] == [0, 5]
    other = tmp_path / "other"
    assert fit(tiny_config(run__folder=str(other))) == 0
    assert fit(tiny_config(run__folder=str(other)), "--resume", str(run)) == 2
    assert "is not of the run in" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fit(tiny_config(trainer__max_steps=6)) == 0
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert fit(tiny_config(trainer__max_steps=6, model__optimizer__lr=1.0), "--resume", "auto") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "summary.json").unlink()  # as after a kill between the last checkpoint and the summary
    assert fit(tiny_config(trainer__max_steps=6), "--resume", "auto") == 0
    assert (run / "summary.json").read_bytes() == before[run / "summary.json"]


def test_two_processes_never_share_a_run_folder(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A kill lets go of the folder at once, though the loading processes of the run live on for some seconds."""
    config, run = tiny_config(trainer__max_steps=100_000, data__workers=2), tmp_path / "run"
    other = Python(LLM, ["fit", "--config", str(config)])
    try:
        while not (run / "metrics.csv").exists() or 6 not in losses(run):
            assert other.poll() is None
            time.sleep(0.01)
        assert fit(config, "--resume", "auto") == 2
        assert "another process is training" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
    assert max(losses(run)) < 100_000
    last = checkpoints.find(run).step
    assert fit(tiny_config(), "--resume", "auto", "--trainer.max_steps", str(last + 2)) == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("mine")
    assert fit(tiny_config(run__folder=str(tmp_path / "thesis")), "--resume", "auto") == 2
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.txt"]


def test_a_run_without_a_checkpoint_that_can_be_used_is_not_begun_anew(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert fit(tiny_config(trainer__max_steps=10)) == 0
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").iterdir():
        (path / "optimizer.safetensors").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert fit(tiny_config(), "--resume", "auto") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: no checkpoint of {run} can be used" in message
    assert message.count("optimizer.safetensors is missing") == 2
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_any_error_of_the_thread_that_writes_ends_the_run(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a full disk would be trained through: this is no full disk."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(checkpoints, "save_torch_state_dict", broken)
    with pytest.raises(RuntimeError, match="no such luck"):
        fit(tiny_config(run__on_full_disk="continue"))
    assert max(losses(tmp_path / "run")) == 6  # the first is of step 5; all ranks know after the next
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    "moment", ["llm.train.module:LanguageModule:configure_optimizers", "llm.train.run_folder:RunFolder:open"]
)
def test_a_signal_while_the_run_starts_ends_it_after_the_first_step(
    tiny_config: Config, tmp_path: Path, moment: str
) -> None:
    words = ["fit", "--config", str(tiny_config(data__micro_batch_size=2)), "--resume", "auto"]
    source = KILLED.replace("SIGKILL", "SIGTERM").replace("main(sys", "status = main(sys") + "sys.exit(status)"
    ended = Python(source, [moment, "1", *words])
    said = ended.communicate()[1]
    assert ended.returncode == 75, said
    run = tmp_path / "run"
    assert f"SIGTERM: {run} stopped at step 1; its newest checkpoint is of step 1: resume with" in said
    assert checkpoints.find(run).step == 1
    whole = tmp_path / "whole"
    assert fit(tiny_config(run__folder=str(whole), data__micro_batch_size=2)) == 0
    assert main(words) == 0
    assert losses(run) == losses(whole)


def test_a_run_goes_on_at_another_precision(tiny_config: Config, tmp_path: Path) -> None:
    curves = {}
    for first, second in itertools.permutations(("32-true", "bf16-mixed", "bf16-true"), 2):
        run = tmp_path / f"{first}-{second}"
        settings = {"run__folder": str(run), "run__checkpoint_every": 1000, "model__schedule": {"shape": "constant"}}
        assert fit(tiny_config(**settings, trainer__precision=first, trainer__max_steps=4)) == 0
        words = ["--resume", "auto", "--trainer.precision", second]
        assert fit(tiny_config(**settings, trainer__precision=first, trainer__max_steps=8), *words) == 0
        curves[first, second] = [float(loss) for loss in losses(run).values()]
    for curve in curves.values():
        assert curve == pytest.approx(curves["32-true", "bf16-mixed"], abs=0.05)


def test_a_run_folder_is_never_overwritten_or_mixed(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert fit(tiny_config(trainer__max_steps=10)) == 0
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    assert fit(tiny_config()) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert fit(tiny_config(seed_everything=4), "--resume", "auto") == 2
    assert "seed" in capsys.readouterr().err
    assert fit(tiny_config(decoder__stream=[]), "--resume", "auto") == 2
    assert "decoder" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
    torn = tmp_path / "run" / "checkpoints" / "step-00000010" / "model.safetensors"
    torn.write_bytes(b"")
    assert fit(tiny_config(), "--resume", "auto") == 0
    message = capsys.readouterr().err
    assert f"passed over: {torn.parent} is not a complete checkpoint ({torn.name} has 0 of " in message
    assert events(tmp_path / "run")[-1]["event"] == "checkpoint passed over"
    assert "continuing from" in message
    assert list(losses(tmp_path / "run")) == list(range(1, 21))


def test_old_names_of_options_and_keys_still_work(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old_keys = {"run__skip_limit": 7, "model__schedule": {"warmup_steps": 1, "floor": 0.5}, "data__rows": "documents"}
    config = tiny_config(**old_keys, trainer__max_steps=2)
    assert fit(config, "--model.plain", "[matmul]", "--model.keep_memory=false") == 0
    said = capsys.readouterr().err
    for old, new in reading.RENAMED.items():
        if old == "run.spike_deviations":
            continue
        assert f"note: {old} is now called {'.'.join([*old.split('.')[:-1], new])}; the old name works" in said
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["run"]["max_consecutive_skips"] == 7 and "skip_limit" not in kept["run"]
    assert kept["model"]["schedule"]["min_lr_ratio"] == 0.5 and kept["data"]["packing"] == "per_document"
    assert kept["model"]["disable_fast_paths"] == ["matmul"] and kept["model"]["retain_freed_memory"] is False
    (tmp_path / "run" / "config.yaml").write_text("model: {plain: [loss]}\nrun: {skip_limit: 3}\n")
    assert reading.config(tmp_path / "run") == {
        "model": {"disable_fast_paths": ["loss"]}, "run": {"max_consecutive_skips": 3},
    }  # fmt: skip
