"""What a store is to be made of and how: checked, written to STORE/plan.json, and held against it at every later run.

Whatever could change a byte of the store is in the plan. The number of workers and of tasks is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import read_json, write_json
from ..stories import MARKER
from .documents import LARGEST, Grouping, Source
from .encode import store_lock
from .sources import open_sources

REMAKE = "delete its folder and prepare again"
HELD_OUT = 0.005  # of the documents
OURS = {"plan.json.part", "plan.json.partial", "prepare.lock", ".store.heartbeat"}  # of a run killed at its first step


@dataclass(frozen=True)
class PrepareSettings:
    """How documents become a store: the options of the command, by name."""

    tokenizer: str | Path | None = None
    train_tokenizer: int | None = None
    text_key: str = "text"
    id_key: str | None = None
    where: Sequence[str] = ()
    marker: str = MARKER
    documents: int | None = None
    subset_fraction: float | None = None
    subset_tokens: int | None = None
    bos: bool = False
    deduplicate: bool = False
    skip_bad: int = 0
    validation_fraction: float = HELD_OUT
    seed: int = 0
    max_document_bytes: int = LARGEST
    allow_lossy_tokenizer: bool = False
    group_by: str | None = None
    group_separator: str | None = None

    @property
    def grouping(self) -> Grouping | None:
        """Where documents name their group; None where they are not grouped."""
        return None if self.group_by is None else Grouping(self.group_by, self.group_separator)

    def problems(self) -> list[str]:
        """Settings that cannot be: each a sentence."""
        problems = []
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            problems.append("give either --tokenizer or --train-tokenizer")
        if not 0 <= self.validation_fraction < 1:
            problems.append(f"--validation-fraction {self.validation_fraction} must be at least 0 and below 1")
        if self.subset_fraction is not None and not 0 < self.subset_fraction <= 1:
            problems.append(f"--subset-fraction {self.subset_fraction} must be above 0 and at most 1")
        if self.subset_tokens is not None and self.subset_tokens < 1:
            problems.append(f"--subset-tokens {self.subset_tokens} must be at least 1")
        if self.subset_fraction is not None and self.subset_tokens is not None:
            problems.append("give either --subset-fraction or --subset-tokens")
        if self.skip_bad < 0:
            problems.append(f"--max-bad-documents {self.skip_bad} must be 0 or more")
        if self.group_separator is not None and not (self.group_by and self.group_separator):
            problems.append("--group-separator is a text inside the field that --group-by names: pass both")
        if self.max_document_bytes < 1:
            problems.append(f"--max-document-bytes {self.max_document_bytes} must be at least 1")
        return problems

    def open(self, patterns: Sequence[str]) -> list[Source]:
        """The sources that the patterns stand for. Raises UserError where there is none, or one twice."""
        return open_sources(
            patterns,
            text_key=self.text_key,
            id_key=self.id_key,
            where=self.where,
            marker=self.marker,
            documents=self.documents,
            seed=self.seed,
            largest=self.max_document_bytes,
            grouping=self.grouping,
        )

    def plan(self, sources: Sequence[Source], tokenizer: dict[str, Any] | None) -> dict[str, Any]:
        """Everything that decides the bytes of the store; `tokenizer` is None where it is to be trained."""
        subset = {"fraction": self.subset_fraction, "tokens": self.subset_tokens, "seed": self.seed}
        # A store that an older version began says nothing of these two.
        later: dict[str, Any] = {}
        if self.max_document_bytes != LARGEST:
            later["largest document"] = self.max_document_bytes
        if self.grouping is not None:
            later["groups"] = str(self.grouping)
        return later | {
            "sources": [source.location for source in sources],
            "text key": self.text_key,
            "id key": self.id_key,
            "marker": self.marker,
            "validation fraction": self.validation_fraction,
            "subset": subset if self.subset_fraction or self.subset_tokens else None,
            "deduplicate": self.deduplicate,
            "bad documents skipped in a source": self.skip_bad,
            "tokenizer": f"trained, {self.train_tokenizer} entries" if tokenizer is None else tokenizer,
            "begin-of-sequence ids": self.bos,
        }


def open_folder(out: Path, plan: dict[str, Any]) -> bool:
    """Create the folder with its plan, or hold the plan against the one it was begun with. True where it is new."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new or empty folder with --out")
    there = {path.name for path in out.iterdir()} if out.exists() else set()  # once: another task may be writing
    if "plan.json" not in there and there - OURS:
        raise UserError(f"{out} is not empty and no token store of this command; name a new or empty folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    with store_lock(out, "store"):
        if not (out / "plan.json").is_file():
            write_json(out / "plan.json", plan)
            return True
        begun = read_json(out / "plan.json", REMAKE)
        if not isinstance(begun, dict):
            raise UserError(f"{out}/plan.json is not what prepare wrote; {REMAKE}")
    for name in dict.fromkeys([*plan, "largest document", "groups"]):
        if begun.get(name) != plan.get(name):
            difference = _difference(name, begun.get(name), plan.get(name))
            raise UserError(f"{out} was begun with {difference}; name another --out")
    return False


def _difference(name: str, begun: Any, now: Any) -> str:
    if name == "sources":
        changed = sorted(set(begun or ()) ^ set(now))
        return f"other sources ({len(changed)} differ, as {changed[0]})" if changed else "sources in another order"
    if name == "tokenizer":
        return "another tokenizer"
    return f"{name}: {begun!r}, not {now!r}"
