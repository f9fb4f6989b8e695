"""The sbatch scripts, run as Slurm runs them: by bash, with the variables of a task."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm.data.store import TokenStore

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", sorted(ROOT.glob("slurm/*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def test_an_array_of_tasks_makes_a_store(tmp_path: Path, story_store: Path) -> None:
    for number, quality in enumerate(("high", "high", "low")):
        folder = tmp_path / "source" / f"quality={quality}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f'{{"warc_record_id": "{number}:{i}", "text": "Mary went to the garden {i} times."}}' for i in range(50)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    given = {
        "PYTHON": sys.executable,
        "SOURCE": str(tmp_path / "source"),
        "STORE": str(tmp_path / "store"),
        "TOKENIZER": str(story_store / "tokenizer"),
        "TOKENS": "400",
        "TASKS": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    for task in ("1", "2"):
        assert not (tmp_path / "store" / "store.json").exists()
        subprocess.run(
            [ROOT / "slurm" / "prepare_nemotron.sh", "--validation-fraction", "0"],
            env={**os.environ, **given, "SLURM_ARRAY_TASK_ID": task},
            cwd=tmp_path,
            check=True,
        )
    store = TokenStore.open(tmp_path / "store")
    assert store.verify() == []
    assert 400 <= store.tokens < 450
