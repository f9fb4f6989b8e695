"""`python -m llm prepare`: text of any source becomes a token store.

Stages, in order:
    1. sources    what is to be read: files, folders, globs, hub datasets, the built-in corpus (`sources.py`)
    2. plan       the settings, written to STORE/plan.json; the same command later must have the same
    3. tokenizer  loaded, or trained on up to 50 MB; saved in the store                           (`settle.py`)
    4. subset     which documents are taken, where not all are                                    (`subset.py`)
    5. shards     each source becomes one shard a split, by as many processes as there are cores (`encode.py`)
    6. duplicates dropped on request, when every shard is there                                   (`deduplicate.py`)
    7. index      store.json, when every shard is there                                        (`llm.data.store`)

Every file is written to a temporary file and renamed, and nothing depends on the number of workers or on time. So a
run that was killed is finished by the same command: it keeps each shard whose bytes are those of its manifest, makes
the others, and the store is byte for byte that of a run left alone. A source that cannot be read gives no shard; the
others are finished, and all that went wrong is told at the end.

`--task i/n` makes the shards of every n-th source, from the i-th on; the task that ends last goes on to the index. What
two processes could both write, one writes and the other waits for (`llm.data.preparation.encode.store_lock`).

A document is held out for validation by the hash of its text, so that equal documents are on the same side, whatever
file they come from, or with --group-by by the hash of its group, so that the chunks of a book are; the built-in corpus
and some hub datasets have a split of their own. Documents without text are left out and counted.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import UserError
from ...common.processes import available_cores
from ..lost_text import LostText, total
from ..shard import GROUPS, SPLITS, Manifest, boundary_tokens, sizes_match
from ..store import FEW_DOCUMENTS
from ..store_index import write_index
from ..stories import Split
from ..tokenizer import load_tokenizer
from ..workers import Progress, run_all
from .deduplicate import repeats, rewrite
from .documents import Source
from .encode import Recipe, is_in_use, shards_of, splits_of, store_lock
from .options import add_arguments as add_arguments
from .recipe import PrepareSettings, open_folder
from .settle import check_lost_text, identity_with, resolve_recipe

FAILURES_TOLD = 20  # in full


@dataclass(frozen=True)
class Summary:
    """What a finished store holds and what it took."""

    path: Path
    documents: int
    left_out: dict[str, int]  # why, and how many documents
    tokens: dict[Split, int]
    validation_documents: int
    validation_groups: int | None  # None where documents have no groups
    vocab_size: int
    bytes_per_token: float  # of text, without the ids that begin and end documents
    seconds: float
    lost: LostText  # of the text, what its ids do not hold

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items() if count)
        left_out = f" (left out: {reasons})" if reasons else ""
        grouped = self.validation_groups is not None
        counted = self.validation_documents if self.validation_groups is None else self.validation_groups
        few = (
            f"; warning: only {counted} validation {'groups' if grouped else 'documents'}: raise --validation-fraction "
            f"(with another --out) until there are {FEW_DOCUMENTS}, before you compare models on them"
        )
        return (
            (
                f"{self.path}: {self.documents:,} documents{left_out}, {self.tokens['train']:,} training and "
                f"{self.tokens['validation']:,} validation tokens, vocabulary {self.vocab_size:,}, "
                f"{self.bytes_per_token:.2f} bytes/token, {self.seconds:.1f} s"
            )
            + (f"; {self.lost}" if str(self.lost) else "")
            + f"; {counted:,} validation groups" * grouped
            + few * (counted < FEW_DOCUMENTS)
        )


@dataclass(frozen=True)
class Share:
    """What one task of several has done, where others have yet to end."""

    path: Path
    task: tuple[int, int]
    sources: int
    missing: int  # sources without their shards, over all tasks
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.path}: task {self.task[0]}/{self.task[1]} has done its {self.sources} sources in "
            f"{self.seconds:.1f} s; {self.missing} sources of other tasks are missing, and the last task to end "
            "finishes the store"
        )


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    task: tuple[int, int] = (1, 1),
    workers: int | None = None,
    **settings: Any,
) -> Summary | Share:
    """Make the token store `out` of `sources`, or finish it, or with `task` (i, n) make its i-th share of n.

    `settings` are those of `PrepareSettings`, by name. Raises UserError for input that cannot be used. A first run that
    could not make a single shard leaves no folder.
    """
    began = time.perf_counter()
    out, chosen = Path(out), PrepareSettings(**settings)
    workers = available_cores() if workers is None else workers
    if problems := [*chosen.problems(), *_problems(task, workers)]:
        raise UserError("; ".join(problems))
    existed = out.exists()
    try:
        found = chosen.open(sources)
        loaded = None if chosen.tokenizer is None else load_tokenizer(chosen.tokenizer)
        is_new = open_folder(out, chosen.plan(found, None if loaded is None else identity_with(loaded, chosen.bos)))
        try:
            recipe = resolve_recipe(out, chosen, found, loaded, workers)
            share = found[task[0] - 1 :: task[1]]
            _make_shards(share, recipe, workers)
            _make_shards([source for source in found if _state(source, out) == "damaged"], recipe, workers)
            if missing := sum(_state(source, out) != "there" for source in found):
                return Share(out, task, len(share), missing, time.perf_counter() - began)
            manifests = _finish(found, recipe, workers, chosen)
        except UserError:
            if is_new and task[1] == 1 and not any(any((out / split).glob("*.json")) for split in SPLITS):
                _clear(out, existed)
            raise
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; fix that (free some space, say) and run the same "
            "command again: what is done is kept"
        ) from error
    return _summary(recipe, manifests, _validation_groups(recipe, manifests), time.perf_counter() - began)


def _clear(out: Path, existed: bool) -> None:
    """Remove what a run has written that could not make a shard, and the folder itself where the run made it.

    Not where the same command runs in another process, too, which is making one.
    """
    if is_in_use(out):
        return
    for path in out.iterdir():
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not existed:
        with suppress(OSError):
            out.rmdir()


def _problems(task: tuple[int, int], workers: int) -> list[str]:
    problems = [f"--workers {workers} must be at least 1"] if workers < 1 else []
    if not 1 <= task[0] <= task[1]:
        problems.append(f"--task {task[0]}/{task[1]} must be one of 1/{task[1]} to {task[1]}/{task[1]}")
    return problems


# ---- Shards, duplicates, index ---------------------------------------------------------------------------------------


def _make_shards(sources: Sequence[Source], recipe: Recipe, workers: int) -> None:
    """Make the shards of these sources that are not there and whole. Raises UserError for all that failed."""
    with Progress(sum(source.size for source in sources), len(sources)) as progress:
        results = run_all(partial(shards_of, recipe), sources, workers, progress)
    failures = [result for result in results if isinstance(result, UserError)]
    if failures:
        raise _combined_error(failures, len(sources))


def _state(source: Source, out: Path) -> str:
    """Whether the shards of a source are "there", "missing", or "damaged": not of the size that their manifests say."""
    states = set()
    for split in splits_of(source):
        if not (out / split / f"{source.name}.json").is_file():
            return "missing"
        manifest = Manifest.read(out / split, source.name)
        states.add(manifest is not None and sizes_match(out / split, manifest))
    return "there" if states == {True} else "damaged"


def _finish(
    sources: Sequence[Source], recipe: Recipe, workers: int, chosen: PrepareSettings
) -> dict[Split, list[Manifest]]:
    """Drop duplicates where it was asked for, and write the index: every shard is there."""
    if recipe.deduplicate:
        for split in SPLITS:
            _deduplicate(recipe.out / split, _manifests(sources, recipe.out, split), workers)
    manifests = {split: _manifests(sources, recipe.out, split) for split in SPLITS}
    check_lost_text(_lost(manifests), chosen.allow_lossy_tokenizer)
    if not any(manifest.tokens for manifest in manifests["train"]):
        raise UserError(
            "no document is left to train on; give more or a smaller --validation-fraction, and another --out"
        )
    with store_lock(recipe.out, "store"):
        write_index(
            recipe.out,
            manifests,
            vocab_size=recipe.vocab_size,
            begin_of_document=recipe.begin_of_document,
            end_of_document=recipe.end_of_document,
            tokenizer_fingerprint=recipe.tokenizer_fingerprint,
            validation_fraction=recipe.validation_fraction,
            groups=None if chosen.grouping is None else str(chosen.grouping),
            validation_groups=_validation_groups(recipe, manifests),
        )
    return manifests


def _validation_groups(recipe: Recipe, manifests: dict[Split, list[Manifest]]) -> int | None:
    """How many groups are held out; None where documents have none."""
    if not recipe.grouped:
        return None
    folder = recipe.out / "validation"
    every = [np.fromfile(folder / f"{manifest.name}.groups", GROUPS) for manifest in manifests["validation"]]
    return len(np.unique(np.concatenate([np.empty(0, GROUPS), *every])))


def _manifests(sources: Sequence[Source], out: Path, split: Split) -> list[Manifest]:
    names = [source.name for source in sources if split in splits_of(source)]
    found = [manifest for name in names if (manifest := Manifest.read(out / split, name))]
    if len(found) < len(names):
        raise UserError(f"{out} was changed while it was finished; run the same command again")
    return found


def _lost(manifests: dict[Split, list[Manifest]]) -> LostText:
    return total(manifest.lost for split in SPLITS for manifest in manifests[split])


def _deduplicate(folder: Path, manifests: list[Manifest], workers: int) -> None:
    to_do = {manifest.name for manifest in manifests if "duplicate" not in manifest.left_out}
    if not to_do:
        return
    names = [manifest.name for manifest in manifests]
    items = [item for item in zip(names, repeats(folder, names), strict=True) if item[0] in to_do]
    size = sum(manifest.bytes_out for manifest in manifests if manifest.name in to_do)
    with Progress(size, len(items), f"drop duplicates, {folder.name}") as progress:
        for result in run_all(partial(rewrite, folder), items, workers, progress):
            if isinstance(result, UserError):
                raise result


def _combined_error(failures: Sequence[UserError], sources: int) -> UserError:
    if sources == 1:
        return failures[0]
    told = [str(failure) for failure in failures[:FAILURES_TOLD]]
    if len(failures) > FAILURES_TOLD:
        told.append(f"... and {len(failures) - FAILURES_TOLD} more")
    others = ", the others are done" if len(failures) < sources else ""
    return UserError(
        "\n  ".join(told)
        + f"\n{len(failures)} of {sources} sources could not be prepared{others}; fix them and run the "
        "same command again, or leave them out with another --out"
    )


def _summary(
    recipe: Recipe, manifests: dict[Split, list[Manifest]], validation_groups: int | None, seconds: float
) -> Summary:
    every = [manifest for split in SPLITS for manifest in manifests[split]]
    tokens = {split: sum(manifest.tokens for manifest in manifests[split]) for split in SPLITS}
    documents = sum(manifest.documents for manifest in every)
    around = boundary_tokens(recipe.begin_of_document)
    of_text = sum(tokens.values()) - around * documents
    left_out = {"bad": sum(len(manifest.bad) for manifest in every)}
    for manifest in every:
        for reason, count in manifest.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    return Summary(
        path=recipe.out,
        documents=documents,
        left_out=left_out,
        tokens=tokens,
        validation_documents=sum(manifest.documents for manifest in manifests["validation"]),
        validation_groups=validation_groups,
        vocab_size=recipe.vocab_size,
        bytes_per_token=sum(manifest.bytes_in for manifest in every) / max(1, of_text),
        seconds=seconds,
        lost=_lost(manifests),
    )


# ---- Command ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Run the command: its arguments are those of `prepare`, by name."""
    print(prepare(**vars(args)))
