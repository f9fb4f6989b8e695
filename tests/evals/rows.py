"""Rows of tasks with the hub's columns, made up."""

import json
from pathlib import Path


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(folder: Path, split: str, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def piqa_rows(prefix: str, count: int) -> list[dict]:
    return [
        {
            "goal": f"{prefix} goal {i}",
            "sol1": f"{prefix} first {i}",
            "sol2": f"{prefix} second way {i}",
            "label": i % 2,
        }
        for i in range(count)
    ]


def arc_rows(prefix: str, count: int) -> list[dict]:
    return [
        {
            "id": f"{prefix}{i}",
            "question": f"{prefix} question {i}?",
            "choices": {"text": [f"{prefix} {word} {i}" for word in ("one", "two", "three")], "label": ["1", "2", "3"]},
            "answerKey": str(i % 3 + 1),
        }
        for i in range(count)
    ]
