"""Every program is killed at random moments, also while a second attempt waits: the results are the undisturbed run's.

The suite kills each once. `KILLS=100 pytest tests/test_random_kills.py -s` kills a hundred times in all, and twenty
times more with a second attempt that was started while the first still lived.
"""

import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .evals.rows import arc_rows, piqa_rows, write_rows
from .exported import write_export
from .train.preloaded import Python, two_ranks
from .train.runs import Config, measured, weights

KILLS = int(os.environ.get("KILLS", "0"))
# After its imports a process has so many seconds of CPU before the kernel ends it, wherever it is. Prints what it took.
CODE = """
import signal, sys, time
seconds, program = float(sys.argv[1]), sys.argv[2]
if program == "evals":
    import datasets, lm_eval.evaluator, evals.harness.run, evals.page.curves
    from evals.__main__ import main
elif program == "small.grid":
    import small.grid.train, small.grid.gallery, matplotlib.pyplot
    from small.grid.cli import main
else:
    import llm.train.cli, llm.data.preparation.prepare
    from llm.cli import main
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_PROF, seconds)
began = time.process_time()
status = main(sys.argv[3:])
print("seconds", time.process_time() - began, file=sys.stderr)
sys.exit(status)
"""
NEVER = "0"
Start = Callable[[str, Path], list[Python]]


def same_files(folder: Path, *patterns: str) -> dict[str, bytes]:
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    assert found
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


class Fit:
    """24 steps with dropout and a checkpoint every third, in one process or two."""

    def __init__(self, config: Config, ranks: int) -> None:
        settings: dict[str, Any] = {"trainer__max_steps": 24, "run__checkpoint_every": 3, "run__loggers": ["csv"]}
        self.config, self.ranks = config(**settings, decoder__residual_dropout=0.1, data__validate_every=12), ranks

    def words(self, out: Path) -> list[str]:
        parallel = ["--trainer.devices", "2", "--strategy.name", "ddp"] if self.ranks == 2 else []
        return ["llm", "fit", "--config", str(self.config), "--resume", "auto", "--run.folder", str(out), *parallel]

    def results(self, out: Path) -> Any:
        tensors = {name: tensor.numpy().tobytes() for name, tensor in weights(out, 24).items()}
        return measured(out), tensors, json.loads((out / "summary.json").read_text())["validation_loss"]


class Prepare:
    """Six files of documents, a tokenizer trained on them, duplicates left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "texts"
        self.folder.mkdir()
        draw = random.Random(3)
        for name in range(6):
            texts = (" ".join(draw.choices("the cat sat on a mat and saw one dog".split(), k=60)) for _ in range(400))
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (self.folder / f"{name}.jsonl").write_text(lines)

    def words(self, out: Path) -> list[str]:
        options = ["--train-tokenizer", "300", "--workers", "1", "--deduplicate", "--validation-fraction", "0.1"]
        return ["llm", "prepare", str(self.folder), "--out", str(out), *options]

    def results(self, out: Path) -> Any:
        return same_files(out, "*/*.tokens", "tokenizer/*", "store.json")


class Grid:
    """Two small trainings of grid navigation."""

    def words(self, out: Path) -> list[str]:
        sizes = "--width 16 --heads 2 --head-dim 8 --neurons 16 --code 8 --segment 4 --memory 4"
        settings = "--letters 4 --trials 6 --steps 16 --batch 4 --walkers 6 --evaluate-every 2 --space 4x4 --maps 2"
        options = f"--preset small --alpha 10 --seeds 2 --device cpu {sizes} {settings}"
        return ["small.grid", "train", *options.split(), "--out", str(out)]

    def results(self, out: Path) -> Any:
        return same_files(out, "*/errors.csv", "*/checkpoint.safetensors", "errors.txt")


class Evals:
    """Two tasks at two numbers of shots."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.export = folder / "rows", folder / "model"
        write_export(self.export, max_position_embeddings=512)
        for task, rows, evaluated in (("piqa", piqa_rows, "validation"), ("arc_easy", arc_rows, "test")):
            write_rows(self.folder / task, "train", rows("example", 12))
            write_rows(self.folder / task, evaluated, rows("item", 20))

    def words(self, out: Path) -> list[str]:
        if not out.exists():
            out.mkdir()
            for file in self.export.iterdir():
                (out / file.name).write_bytes(file.read_bytes())
        tasks = ["--tasks", "piqa", "arc_easy", "--shots", "0", "2", "--data", str(self.folder)]
        return ["evals", "run", str(out), *tasks, "--device", "cpu"]

    def results(self, out: Path) -> Any:
        kept = json.loads((out / "evals/lm_eval.json").read_text())
        numbers = [{key: each[key] for key in ("task", "shots", "n", "metrics") if key in each} for each in kept]
        return sorted(numbers, key=str), same_files(out, "evals/samples/*.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fit", "two ranks", "prepare", "small", "evals"])
def test_killed_at_random_and_begun_again(kind: str, tiny_config: Config, tmp_path: Path) -> None:
    made: dict[str, Callable[[], Any]] = {
        "fit": lambda: Fit(tiny_config, 1),
        "two ranks": lambda: Fit(tiny_config, 2),
        "prepare": lambda: Prepare(tmp_path),
        "small": Grid,
        "evals": lambda: Evals(tmp_path),
    }
    job, draw = made[kind](), random.Random(f"{kind} {KILLS}")

    def start(out: Path, seconds: str) -> list[Python]:
        words = [seconds, *job.words(out)]
        return two_ranks(CODE, words) if kind == "two ranks" else [Python(CODE, words)]

    whole = tmp_path / "whole"
    said = finished(start(whole, NEVER))
    cost = max(float(seconds) for seconds in re.findall(r"^seconds ([\d.]+)$", said, re.M))
    wanted = job.results(whole)
    singles, doubles = (KILLS // 5, 0 if kind == "two ranks" else KILLS // 20) if KILLS else (1, 0)
    rounds = draw.sample([1] * singles + [2] * doubles, singles + doubles)
    killed, compared, out = {1: 0, 2: 0}, 0, tmp_path / "run-0"
    while rounds:
        attempts = start(out, f"{draw.uniform(0.02, cost):.3f}")
        if rounds[0] == 2:
            attempts += start(out, draw.choice([NEVER, f"{draw.uniform(0.02, cost):.3f}"]))
        statuses = [ended(attempt) for attempt in attempts]
        if -signal.SIGPROF in statuses:
            killed[rounds.pop(0)] += 1
        if 0 in statuses[-1:] or not rounds:
            finished(start(out, NEVER))
            assert job.results(out) == wanted, (kind, out)
            compared, out = compared + 1, tmp_path / f"run-{compared + 1}"
    print(
        f"{kind}: {killed[1]} kills, {killed[2]} with a second attempt, {compared} results compared, {cost:.2f} s each"
    )
    assert killed == {1: singles, 2: doubles} and compared


def ended(attempt: Python) -> int:
    """Wait for an attempt; 2 is one that another keeps out, or that lost its other rank."""
    said = attempt.communicate(timeout=900)[1]
    assert attempt.returncode in (0, 2, -signal.SIGPROF), said[-3000:]
    assert "Traceback" not in said or attempt.returncode < 0, said[-3000:]
    return attempt.returncode


def finished(attempts: list[Python]) -> str:
    said = [attempt.communicate(timeout=900)[1] for attempt in attempts]
    assert [attempt.returncode for attempt in attempts] == [0] * len(attempts), said[0][-3000:]
    return "\n".join(said)
