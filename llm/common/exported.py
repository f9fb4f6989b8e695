"""An exported folder as files: what hippoformer.json says of it, and its weights known by their content."""

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json, write_json

CARD, CACHE = "hippoformer.json", ".weights.json"
TICK = 1_000_000_000  # nanoseconds: clocks of file systems are no coarser
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def read_card(folder: Path) -> dict[str, Any]:
    """Return what hippoformer.json says of the folder; empty for a model from elsewhere. UserError: it is damaged."""
    path = folder / CARD
    known = read_json(path) if path.is_file() else {}
    if not isinstance(known, dict):
        raise UserError(f"{path} is damaged; make the folder again with `python -m llm export RUN --out OUT`")
    return known


def text_config(config: Any) -> Any:
    """Return the part of a model's configuration that is about text: the whole of it where text is all it reads."""
    return getattr(config, "get_text_config", lambda: config)()


def trained_context(config: Any, card: Mapping[str, Any]) -> int | None:
    """Return how many tokens the model was trained to read at once: its card's, at most its positions.

    Without a card they are its positions (max_position_embeddings); None where it has no such limit.
    """
    positions, trained = getattr(text_config(config), "max_position_embeddings", None), card.get("context")
    known = [number for number in (positions, trained) if isinstance(number, int) and number > 0]
    return min(known, default=None)


def weight_files(folder: Path) -> list[Path]:
    """The files of `folder` that hold weights, by name."""
    return sorted({path for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file()})


def weights_sha256(folder: Path) -> str:
    """Return one sha256 of the folder's weight files: of their names and of every byte in them.

    A file next to them (`CACHE`) keeps each one's sha256 with its size, time of change and inode: what agrees in all
    three is not read again. The time is that of the inode (ctime), which no program can set back. A file that has just
    changed is not kept: it may change again within the clock's tick. Where nothing can be kept, every byte is read.
    """
    known, found = _read(folder / CACHE), {}
    for path in weight_files(folder):
        key = _key(path.stat())
        kept = known.get(path.name)
        if isinstance(kept, list) and kept[:3] == key and isinstance(kept[-1], str):
            found[path.name] = kept
            continue
        with path.open("rb") as file:
            found[path.name] = [*key, hashlib.file_digest(file, "sha256").hexdigest()]
            if _key(os.fstat(file.fileno())) != key:  # it changed meanwhile
                raise UserError(f"{path} is being written: wait until that is done, and rerun the command")
    settled = {name: entry for name, entry in found.items() if time.time_ns() - entry[1] > TICK}
    if settled and settled != known:
        with suppress(UserError):  # a folder that cannot be written
            write_json(folder / CACHE, settled)
    whole = "".join(f"{name} {entry[-1]}\n" for name, entry in found.items())
    return hashlib.sha256(whole.encode()).hexdigest()


def _key(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_ctime_ns, stat.st_ino]


def _read(cache: Path) -> dict[str, Any]:
    """The content of the cache; empty where it cannot be read."""
    try:
        return dict(read_json(cache))
    except (UserError, TypeError, ValueError):
        return {}
