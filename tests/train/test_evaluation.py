"""Evaluation while training: no bit of the run is changed, nothing is left behind, and what is due gets done."""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.cli import main
from llm.common.lock import acquire_lock
from llm.runs import reading, status
from llm.train import checkpoint as checkpoints
from llm.train.evaluation import Evaluations, EvaluationSettings, _environment
from llm.train.loggers import MetricsFile
from llm.train.run_folder import RunFolder, RunSettings

from .preloaded import LLM, Python
from .runs import Config, assert_same_weights, events, fit, measured, metrics

ROOT = Path(__file__).parents[2]
# Stand in for `python -m llm export RUN --step N` and `python -m evals run EXPORT`, in a tenth of a second.
EXPORT = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
out.mkdir(exist_ok=True)
(out / "hippoformer.json").write_text("{}")
"""
EVALUATE = """
import json, pathlib, sys
results = pathlib.Path(sys.argv[1]) / "evals"
results.mkdir(exist_ok=True)
(results / "lm_eval.json").write_text(json.dumps([{"task": "stories", "shots": 0, "acc": 0.25}]))
"""
# Has a child of its own, and cleans up where it is asked to.
SLEEP = """
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / ".half.partial").touch()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
try:
    (folder / "pids.part").write_text(f"{os.getpid()} {child.pid}")
    (folder / "pids.part").rename(folder / "pids")
    time.sleep(600)
finally:
    (folder / ".half.partial").unlink()
"""


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has other programs run for the two commands; each is told the folder of the step's export."""

    def replace(export: str = EXPORT, evaluate: str = EVALUATE) -> None:
        def exporting(self: Evaluations, step: int) -> str | None:
            return self._supervised(step, ["-c", export, str(self.path(step))], on_cpu=True)

        monkeypatch.setattr(Evaluations, "_export", exporting)
        monkeypatch.setattr(EvaluationSettings, "command", lambda _, path: ["-c", evaluate, str(path)])
        monkeypatch.setattr(EvaluationSettings, "on_cpu", lambda _: True)
        monkeypatch.setattr(EvaluationSettings, "check", lambda *_: None)

    return replace


def evaluating(tiny_config: Config, **settings: object) -> Path:
    """A config of 30 steps that is evaluated every ten."""
    common = {"trainer__max_steps": 30, "run__loggers": ["csv"], "evaluation": {"every": 10, "nice": 0}}
    return tiny_config(**(common | settings))


def evaluated(run: Path) -> list[int]:
    return [event["step"] for event in events(run) if event["event"] == "evaluated"]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def until(reached: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_with_evaluations_is_the_same_to_the_last_bit(tiny_config: Config, tmp_path: Path) -> None:
    """`python -m llm fit` with and without, with dropout, the real export and the real tasks."""
    with_it, without = tmp_path / "with", tmp_path / "without"
    common = {
        "trainer__max_steps": 20,
        "decoder__residual_dropout": 0.1,
        "decoder__max_position_embeddings": 64,  # choices are longer than 32 tokens
        "data__context": 64,
        "run__keep_checkpoints": 1,
    }
    settings = {"every": 10, "arguments": "--tasks stories --limit 4 --batch-size 32", "nice": 0}
    configs = [
        tiny_config(**common, run__folder=str(without)),
        tiny_config(**common, run__folder=str(with_it), evaluation=settings),
    ]
    of_a_launcher = {"MASTER_PORT": "1", "WORLD_SIZE": "1"}
    for config in configs:
        process = Python(LLM, ["fit", "--config", str(config)], of_a_launcher)
        said = process.communicate()[1]
        assert process.returncode == 0, said
    log = (with_it / "exports" / "evaluation.log").read_text()
    assert evaluated(with_it) == [10, 20], log
    assert "waiting for the evaluation of step" in said
    assert measured(with_it) == measured(without)
    columns = ("train_loss", "validation_loss", "gradient_norm", "data_digest")
    assert len(metrics(without)) == 22 and all(any(row[name] for row in metrics(without)) for name in columns)
    assert_same_weights(with_it, without, 20)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (with_it, without)]
    assert summaries[0]["validation_loss"] == summaries[1]["validation_loss"]
    # A process with torch in it needs more than 100 MB; on a GPU it would be what torch has allocated there.
    assert all(10**8 < summary["peak_memory_bytes"] < 10**10 for summary in summaries)
    for step in (10, 20):
        export = with_it / "exports" / f"step-{step:08d}"
        facts = json.loads((export / "hippoformer.json").read_text())
        assert (facts["step"], facts["context"], facts["store_fingerprint"]) == (
            step,
            64,
            json.loads((with_it / "run.json").read_text())["store_fingerprint"],
        )
        (result,) = json.loads((export / "evals" / "lm_eval.json").read_text())
        assert (result["task"], result["n"], result["device"]) == ("stories", 4, "cpu")
    names = sorted(path.name for path in (with_it / "exports").iterdir())
    assert names == ["evaluation.log", "step-00000010", "step-00000020"]
    assert [path.name for path in (with_it / "checkpoints").iterdir()] == ["step-00000020"]
    seen = status.status_of(with_it)
    assert (seen.evaluated_step, seen.accuracies) == (20, {"stories, 0-shot": result["acc"]})
    assert f"  evaluated    step 20: stories, 0-shot {100 * result['acc']:.1f}%" in list(status.block(seen))


def test_a_checkpoint_stays_until_it_is_exported(
    tiny_config: Config, tmp_path: Path, stands_in: Callable, capsys: pytest.CaptureFixture
) -> None:
    """An export that is slower than the training: it waits until the run has only its last step to write."""
    run = tmp_path / "run"
    slow = f"""
import pathlib, time
folder = pathlib.Path({str(run / "checkpoints")!r})
while not (folder / "step-00000025").exists() and not (folder / "step-00000030").exists():
    time.sleep(0.01)
names = " ".join(sorted(path.name for path in folder.glob("step-*0")))
pathlib.Path({str(tmp_path)!r}, "seen").open("a").write(names + "\\n")
"""
    stands_in(export=slow + EXPORT)
    assert fit(evaluating(tiny_config, run__keep_checkpoints=1)) == 0
    first = (tmp_path / "seen").read_text().splitlines()[0].split()
    assert first[:2] == ["step-00000010", "step-00000020"]  # neither is the newest
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000030"]
    assert evaluated(run) == [10, 20, 30]
    log = (run / "exports" / "evaluation.log").read_text()
    assert re.findall(r" step (\d+): python", log) == ["10", "20", "30"] * 2  # all exports, then all evaluations
    assert "waiting for the evaluation of steps 10, 20, 30" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_the_evaluation_and_a_resumed_run_takes_it_up(
    tiny_config: Config,
    tmp_path: Path,
    stands_in: Callable,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    run, log = tmp_path / "run", MetricsFile.log_metrics
    pids = run / "exports" / "step-00000010" / "pids"
    stands_in(evaluate=SLEEP)

    def stopping(file: MetricsFile, row: dict, step: int) -> None:
        log(file, row, step)
        if step == 17:
            until(pids.exists)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsFile, "log_metrics", stopping)
    config = evaluating(tiny_config)
    assert fit(config) == (75 if number == signal.SIGTERM else 130)
    until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()), seconds=10)  # a signal takes its time
    assert not list((run / "exports").rglob("*.partial"))
    assert [event["event"] for event in events(run)] == ["stopped"]
    acquire_lock(run).close()  # nothing holds it
    monkeypatch.setattr(MetricsFile, "log_metrics", log)
    stands_in()
    assert fit(config, "--resume", "auto") == 0
    assert evaluated(run) == [10, 20, 30]


def test_ctrl_c_while_waiting_ends_a_finished_run_as_usual(
    tiny_config: Config, tmp_path: Path, stands_in: Callable, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    pids = run / "exports" / "step-00000010" / "pids"
    stands_in(evaluate=SLEEP)

    def interrupt() -> None:
        try:
            until(lambda: pids.exists() and (run / "summary.json").exists())
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    config = evaluating(tiny_config)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert fit(config) == 0
    thread.join()
    assert "evaluation interrupted; the run is finished" in capsys.readouterr().err
    until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()), seconds=10)  # a signal takes its time
    assert reading.summary(run)["step"] == 30 and not (run / "events.jsonl").exists()
    stands_in()
    assert fit(config, "--resume", "auto") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert evaluated(run) == [10, 20, 30]
    before = (run / "events.jsonl").read_bytes()
    assert fit(config, "--resume", "auto") == 0
    assert (run / "events.jsonl").read_bytes() == before


def test_a_signal_while_waiting_leaves_the_rest_to_the_next_attempt(
    tiny_config: Config, tmp_path: Path, stands_in: Callable
) -> None:
    run = tmp_path / "run"
    pids = run / "exports" / "step-00000010" / "pids"
    stands_in(evaluate=SLEEP)

    def preempt() -> None:
        try:
            until(lambda: pids.exists() and (run / "summary.json").exists())
        finally:
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=preempt)
    thread.start()
    assert fit(evaluating(tiny_config)) == 75
    thread.join()
    assert events(run)[-1]["event"] == "stopped" and reading.summary(run) is not None
    until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()), seconds=10)


KILLED = """
import sys
from llm.cli import main
from llm.train.evaluation import EvaluationSettings, Evaluations
export, evaluate, *words = sys.argv[1:]
Evaluations._export = lambda self, step: self._supervised(step, ["-c", export, str(self.path(step))], on_cpu=True)
EvaluationSettings.command = lambda _, path: ["-c", evaluate, str(path)]
EvaluationSettings.on_cpu = lambda _: True
EvaluationSettings.check = lambda *_: None
main(words)
"""


def test_kill_9_of_training_ends_the_evaluation(tiny_config: Config, tmp_path: Path) -> None:
    pids = tmp_path / "run" / "exports" / "step-00000050" / "pids"
    config = evaluating(tiny_config, trainer__max_steps=100_000, evaluation={"every": 50, "nice": 0})
    words = [sys.executable, "-c", KILLED, EXPORT, SLEEP, "fit", "--config", str(config)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        until(lambda: pids.exists() or process.poll() is not None)
        alive = [int(pid) for pid in pids.read_text().split()]
        assert not any(gone(pid) for pid in alive)
    finally:
        process.kill()
        process.wait()
    until(lambda: all(gone(pid) for pid in alive), seconds=60)
    assert not (pids.parent / ".half.partial").exists()


def test_an_evaluation_that_fails_is_an_event(
    tiny_config: Config, tmp_path: Path, stands_in: Callable, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    fails = "import sys; sys.exit('error: no such luck' if sys.argv[1].endswith('20') else 0)"
    stands_in(evaluate=EVALUATE + fails, export=EXPORT + fails.replace("20", "30"))
    assert fit(evaluating(tiny_config)) == 0
    told = {(event["step"], event["event"]): event for event in events(run)}
    assert told.keys() == {(10, "evaluated"), (20, "evaluation failed"), (30, "evaluation failed")}
    assert told[20, "evaluation failed"]["why"] == told[30, "evaluation failed"]["why"] == "error: no such luck"
    assert told[10, "evaluated"]["results"] == "stories, 0-shot 25.0%"
    said = capsys.readouterr().err
    assert "step 20: evaluation failed (error: no such luck); training continues" in said
    assert checkpoints.find(run).step == 30


def test_what_is_due_is_read_off_the_folder(tiny_config: Config, tmp_path: Path, stands_in: Callable) -> None:
    run = tmp_path / "run"
    stands_in()
    common = {"run__keep_checkpoints": 9, "run__checkpoint_every": 5}
    assert fit(evaluating(tiny_config, **common, trainer__max_steps=28)) == 0
    assert evaluated(run) == [10, 20, 28]  # the last step too
    evaluations = Evaluations(RunFolder(RunSettings(folder=str(run))), EvaluationSettings(every=10))
    assert evaluations.unfinished(28, 28) == ([], [])
    (run / "exports" / "step-00000010" / "evals" / "lm_eval.json").unlink()
    told = [line for line in (run / "events.jsonl").read_text().splitlines() if '"step": 20' not in line]
    (run / "events.jsonl").write_text("\n".join(told) + "\n")
    (run / "exports" / "step-00000028").rename(run / "exports" / "elsewhere")
    assert evaluations.unfinished(28, 28) == ([28], [10, 20])
    assert evaluations.unfinished(20, 28) == ([], [10, 20])
    (run / "checkpoints" / "step-00000028" / "state.json").unlink()
    assert evaluations.unfinished(28, 28) == ([], [10, 20])
    assert Evaluations(evaluations.run, EvaluationSettings(every=5)).unfinished(28, 40)[0] == [5, 15, 25]


def test_going_back_sets_the_exports_aside(tiny_config: Config, tmp_path: Path, stands_in: Callable) -> None:
    run = tmp_path / "run"
    stands_in()
    config = evaluating(tiny_config, run__keep_checkpoints=9)
    assert fit(config) == 0
    assert fit(config, "--resume", str(run / "checkpoints" / "step-00000015")) == 0
    names = sorted(path.name for path in (run / "exports").iterdir() if path.is_dir())
    assert names == [f"step-{step:08d}" for step in (10, 20, 30)] + [f"superseded-step-{step:08d}" for step in (20, 30)]
    assert evaluated(run) == [10, 20, 30, 20, 30]


def test_the_processes_are_no_rank_and_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "/there")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    given = _environment(threads=2, on_cpu=True)
    assert not [name for name in given if name.startswith(("SLURM", "MASTER", "TORCHELASTIC")) or "RANK" in name]
    assert "WORLD_SIZE" not in given
    assert (given["HF_HOME"], given["CUDA_VISIBLE_DEVICES"], given["OMP_NUM_THREADS"]) == ("/there", "", "2")
    assert _environment(threads=2, on_cpu=False)["CUDA_VISIBLE_DEVICES"] == "3"
    settings = EvaluationSettings(every=1, arguments="--tasks piqa --data 'my data' --device cuda:0")
    assert not settings.on_cpu() and EvaluationSettings(every=1).on_cpu()
    assert settings.command(Path("a"))[-6:] == ["--tasks", "piqa", "--data", "my data", "--device", "cuda:0"]


def test_the_peak_of_memory_is_that_of_all_lives(tiny_config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(trainer__max_steps=5, run__loggers=["csv"])
    assert fit(config) == 0
    assert reading.summary(run)["peak_memory_bytes"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def resumed(steps: int, **memory: int) -> int | None:
        """The summary's, of a run that goes on from a checkpoint which says so."""
        folder = checkpoints.find(run).path
        state = {name: value for name, value in checkpoints.find(run).state.items() if name != "peak_memory_bytes"}
        (folder / "state.json").write_text(json.dumps(state | memory))
        manifest = json.loads((folder / "manifest.json").read_text())
        content = (folder / "state.json").read_bytes()
        manifest["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert fit(config, "--resume", "auto", "--trainer.max_steps", str(steps)) == 0
        return reading.summary(run)["peak_memory_bytes"]

    assert resumed(6, peak_memory_bytes=10**15) == 10**15
    assert 10**8 < resumed(7, peak_memory_bytes=1) < 10**11
    assert resumed(8) is None  # of a run from before it was measured
    assert resumed(8) is None  # finished
    assert fit(config, "--resume", "auto", "--trainer.max_steps", "9") == 0
    assert reading.summary(run)["peak_memory_bytes"] is None


def test_settings_that_cannot_be_are_refused(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wrong = {
        ("every", "7"): "evaluation.every 7 must be a multiple of run.checkpoint_every 5",
        ("every", "0"): "evaluation.every 0 must be at least 1",
        ("threads", "0"): "evaluation.threads 0 must be at least 1",
        ("nice", "20"): "evaluation.nice 20 must be 0 to 19",
        ("nise", "3"): "unknown config key evaluation.nise: did you mean evaluation.nice?",
    }
    for (name, value), sentence in wrong.items():
        assert fit(tiny_config(), f"--evaluation.{name}", value) == 2
        assert sentence in capsys.readouterr().err
    refused = {
        "--taks stories": "unrecognized arguments: --taks stories (python -m evals run --help",
        "--tasks poetry": "there is no task poetry",
        "another/export": "unrecognized arguments: another/export",
        "--checkpoints": "is not a run folder",
        "--tasks 'stories": "are no words: no closing quotation",
    }
    for arguments, sentence in refused.items():
        assert fit(tiny_config(evaluation={"every": 5, "arguments": arguments})) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"error: evaluation.arguments {arguments!r}" in said and sentence in said
    assert not (tmp_path / "run").exists()
    words = ["--gpus", "1", "--device", "h100"]
    assert main(["plan", "--config", str(tiny_config(evaluation={"every": 5})), *words]) == 0
