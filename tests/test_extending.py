"""The walk-throughs of docs/extending.md: their diffs are applied to a copy, and their commands run as written."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
# The commands in one process: each would spend most of its time on imports.
ALL_IN_ONE = """
import json, sys
import evals.__main__, llm.cli
mains = {"llm": llm.cli.main, "evals": evals.__main__.main}
for program, *words in json.loads(sys.argv[1]):
    if status := mains[program](words):
        sys.exit(f"{program} {words}: status {status}")
"""


def test_each_walk_through_as_it_is_written(tmp_path: Path) -> None:
    for name in ("llm", "evals", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    diffs = re.findall(r"^```diff\n(.*?)^```", PAGE, re.M | re.S)
    assert len(diffs) == 5
    for diff in diffs:
        words = ["git", "apply", "--unidiff-zero", "-"]
        applied = subprocess.run(words, cwd=tmp_path, input=diff, capture_output=True, text=True)
        assert applied.returncode == 0, applied.stderr
    commands = re.findall(r"^    python -m ((?:.*\\\n)*.*)", PAGE, re.M)
    expected = ["prepare", "fit", "fit", "export", "fit", "plan", "run"]
    assert [command.split()[1] for command in commands] == expected
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    told = json.dumps([shlex.split(command.replace("\\\n", " ")) for command in commands])
    words = [sys.executable, "-c", ALL_IN_ONE, told]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "softcap"
    with (run / "metrics.csv").open(newline="") as stream:
        last = next(row for row in csv.DictReader(stream) if row["step"] == "5" and row["train_loss"])
    saved = load_file(run / "checkpoints" / "step-00000005" / "model.safetensors")
    for layer in range(4):
        limit = saved[f"model.layers.{layer}.feedforward.act.limit"].item()
        assert float(last[f"softcap_limit/{layer}"]) == limit != 3
    kept = load_file(tmp_path / "runs" / "adamax" / "checkpoints" / "step-00000005" / "optimizer.safetensors")
    assert {key.split("/")[0] for key in kept} == {"step", "exp_avg", "exp_inf"}
    with (tmp_path / "runs" / "adamax" / "metrics.csv").open(newline="") as stream:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(stream) if row["learning_rate"]]
    assert rates[-1] == pytest.approx(1e-3 * (1 - 3 / 4))  # the fourth step after one of warm-up
    assert "class Softcap" in (run / "export" / "activations.py").read_text()
    results = json.loads((run / "export" / "evals" / "lm_eval.json").read_text())
    assert [(result["task"], result["shots"], result["n"]) for result in results] == [
        ("opposites", 0, 3),
        ("opposites", 1, 3),
    ]
