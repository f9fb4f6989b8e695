"""store.json: which shards a token store has, in columns, and what every reader of them must know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import write_json
from .shard import SPLITS, Manifest, token_dtype
from .stories import Split

FORMAT = 2
AGAIN = "run the same prepare command again: it writes the index again"
COLUMNS = ("names", "sha256", "tokens", "documents")  # of the shards of a split


def write_index(
    path: Path,
    manifests: dict[Split, list[Manifest]],
    *,
    vocab_size: int,
    end_of_document: int,
    begin_of_document: int | None = None,
    tokenizer_fingerprint: str,
    validation_fraction: float | None = None,
    groups: str | None = None,
    validation_groups: int | None = None,
) -> None:
    """Write store.json from the manifests of all shards, in order: from then on the store is finished.

    groups: the key that names the group of each document, in words; validation_groups: how many are held out.
    """
    # Columns rather than a record a shard: a third of the size, and 60,000 shards are read in 50 ms.
    splits = {
        split: {
            "names": [manifest.name for manifest in shards],
            "tokens": [manifest.tokens for manifest in shards],
            "documents": [manifest.documents for manifest in shards],
            "sha256": [manifest.sha256["tokens"] for manifest in shards],
            "sampled": [manifest.sampled for manifest in shards],
        }
        for split, shards in manifests.items()
    }
    index = {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).str,
        "end_of_document": end_of_document,
        "begin_of_document": begin_of_document,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "validation_fraction": validation_fraction,
        "groups": groups,
        "validation_groups": validation_groups,
        "fingerprint": content_fingerprint(splits),
        "splits": splits,
    }
    write_json(path / "store.json", index, indent=None)


def read_index(path: Path) -> dict[str, Any]:
    """The content of store.json. Raises UserError where there is no finished store of this format."""
    if not path.exists():
        raise UserError(f"there is no token store {path}; make one with `python -m llm prepare SOURCE... --out {path}`")
    try:
        index = json.loads((path / "store.json").read_bytes())
        readable = index["format"] == FORMAT
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not a finished token store: it has no store.json{_progress(path)}; run the same prepare "
            "command again to finish it"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}/store.json cannot be read ({error}); {AGAIN}") from error
    if not readable:
        raise UserError(f"{path} is a token store of another format ({index['format']}); prepare it again")
    if problem := _index_problem(index):
        raise UserError(f"{path}/store.json is damaged ({problem}); {AGAIN}")
    return index


def _index_problem(index: dict[str, Any]) -> str:
    """Say what is wrong with the content of store.json; nothing where it can be used."""
    for key in ("vocab_size", "end_of_document"):
        if not isinstance(index.get(key), int) or index[key] < 0:
            return f"{key} is not a whole number"
    if index.get("begin_of_document") is not None and not isinstance(index["begin_of_document"], int):
        return "begin_of_document is not a whole number"
    if not isinstance(index.get("groups"), str | None) or not isinstance(index.get("validation_groups"), int | None):
        return "groups are not a key and a whole number"
    if index.get("dtype") not in ("<u2", "<u4"):
        return f"dtype {index.get('dtype')!r} is unknown"
    if not all(isinstance(index.get(key), str) for key in ("fingerprint", "tokenizer_fingerprint")):
        return "a fingerprint is missing"
    splits = index.get("splits")
    for split in SPLITS:
        shards = splits.get(split) if isinstance(splits, dict) else None
        listed = shards if isinstance(shards, dict) else {}
        columns = [listed[key] for key in COLUMNS if isinstance(listed.get(key), list)]
        if len(columns) < len(COLUMNS) or len({len(column) for column in columns}) > 1:
            return f"it lists no shards of {split}"
        names, sha256, tokens, documents = columns
        if not all(isinstance(count, int) and count >= 0 for count in [*tokens, *documents]):
            return f"a shard of {split} has no whole number of tokens or documents"
        if not all(isinstance(text, str) for text in [*names, *sha256]):
            return f"a shard of {split} has no name or no sha256"
        if outside := [name for name in names if "/" in name or "\0" in name or name.startswith(".")]:
            return f"the shard {outside[0]!r} of {split} is not the name of a file in the store"
    return ""


def _progress(path: Path) -> str:
    """How far an unfinished store is: its sources that have a manifest, of those in plan.json. Empty without a plan."""
    try:
        sources = len(json.loads((path / "plan.json").read_bytes())["sources"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    done = {manifest.name for split in SPLITS for manifest in (path / split).glob("*.json")}
    return f" ({len(done):,} of its {sources:,} sources are done)"


def content_fingerprint(splits: Mapping[Any, Any]) -> str:
    """sha256 over the sha256 of the tokens of every shard, in order: equal for equal data wherever it was made."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split} {' '.join(splits[split]['sha256'])}\n".encode())
    return digest.hexdigest()
