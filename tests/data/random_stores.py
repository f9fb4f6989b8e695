"""Stores of random documents, for what needs several stores or documents of every length."""

import json
import random
from pathlib import Path

from .by_hand import write_store


def random_store(
    path: Path, seed: int = 0, documents: int = 60, longest: int = 40, fingerprint: str | None = None, **settings
) -> Path:
    """Documents of 0 to `longest` ids and their end, two shards a split, a third as many of them held out.

    `settings` go to `write_store`; `fingerprint` is what the store says of its tokenizer.
    """
    draw = random.Random(seed)

    def shard(count: int) -> list[list[int]]:
        return [[draw.randrange(1, 300) for _ in range(draw.randrange(longest + 1))] for _ in range(count)]

    train, validation = ([shard(count // 2), shard(count - count // 2)] for count in (documents, documents // 3))
    write_store(path, train, validation=validation, **settings)
    if fingerprint is not None:
        index = json.loads((path / "store.json").read_text())
        (path / "store.json").write_text(json.dumps(index | {"tokenizer_fingerprint": fingerprint}))
    return path
