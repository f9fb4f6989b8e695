"""What must be known before the first shard: the tokenizer, and which documents are taken.

    tokenizer    loaded, or trained on up to 50 MB; saved in the store and taken from there ever after
    subset       of a fraction, or of a number of tokens, for which the sources are surveyed once

One process resolves this; others that begin at the same time wait, and find it in the store. A source that cannot be
read has no part in it: the error comes when its shard is to be made.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ...common.errors import UserError
from ...common.files import read_json, write_json
from ..lost_text import LIMIT, CountingEncoder, LostText
from ..tokenizer import (
    begin_of_document,
    end_of_document,
    load_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
    vocabulary_size,
)
from .documents import BadDocuments, Source
from .encode import Recipe, split_of, store_lock
from .recipe import PrepareSettings
from .subset import PLACES, Subset, subset_of_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_BYTES = 50_000_000  # of text to train a tokenizer on; more changes few merges
PROBES, PROBE_BYTES = 256, 1_000_000  # documents, and bytes of text, that are encoded both ways
SAMPLE_SOURCES = 64  # that the sample is taken from in turn, spread evenly over all


def resolve_recipe(
    out: Path, chosen: PrepareSettings, sources: Sequence[Source], loaded: PreTrainedTokenizerBase | None, workers: int
) -> Recipe:
    """Return the recipe of the shards. One process resolves what is open yet, the others find it in the store."""
    with store_lock(out, "store"):
        tokenizer = _resolve_tokenizer(out, loaded, chosen, sources)
        recipe = Recipe(
            out=out,
            validation_fraction=chosen.validation_fraction,
            subset=None,
            skip_bad=chosen.skip_bad,
            deduplicate=chosen.deduplicate,
            grouped=chosen.group_by is not None,
            **identity_with(tokenizer, chosen.bos),
        )
        return replace(recipe, subset=_resolve_subset(recipe, chosen, sources, workers))


def identity_with(tokenizer: PreTrainedTokenizerBase, bos: bool) -> dict[str, Any]:
    """What a store remembers of its tokenizer. Raises UserError for one that cannot make a store."""
    return {
        "vocab_size": vocabulary_size(tokenizer),
        "begin_of_document": begin_of_document(tokenizer) if bos else None,
        "end_of_document": end_of_document(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }


def _resolve_tokenizer(
    out: Path, loaded: PreTrainedTokenizerBase | None, chosen: PrepareSettings, sources: Sequence[Source]
) -> PreTrainedTokenizerBase:
    """The tokenizer of the store, as it comes back from the store; trained and saved where it is not there yet."""
    folder, partial = out / "tokenizer", out / "tokenizer.partial"
    if not folder.is_dir():
        if loaded is None:
            print(f"training a tokenizer of {chosen.train_tokenizer:,} entries ...", file=sys.stderr)
            loaded = train_bpe(_sample(sources, chosen), chosen.train_tokenizer or 0)
        shutil.rmtree(partial, ignore_errors=True)
        loaded.save_pretrained(partial)
        _check_on_documents(partial, list(islice(_sample(sources, chosen, PROBE_BYTES), PROBES)), chosen)
        partial.rename(folder)
    tokenizer = load_tokenizer(folder)
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))  # what the workers encode with
    came_back = identity_with(tokenizer, chosen.bos)
    expected = identity_with(loaded or tokenizer, chosen.bos)
    if came_back != expected or came_back["tokenizer_fingerprint"] != tokenizer_fingerprint(saved):
        raise UserError("the tokenizer does not come back from save_pretrained as it was; give its tokenizer.json")
    return tokenizer


def _check_on_documents(folder: Path, texts: list[str], chosen: PrepareSettings) -> None:
    """Encode some documents as the workers do and as transformers does, and see what the ids lose.

    Raises:
        UserError: the two differ, or too much is lost.
    """
    tokenizer, lost = load_tokenizer(folder), LostText()
    encoder = CountingEncoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    for text, ids in zip(texts, encoder.encode(texts, lost), strict=True):
        # As text: `<|endoftext|>` in a document is its characters.
        if tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False) != ids:
            raise UserError(
                f"transformers encodes the document {shorten(text, 60, placeholder=' ...')!r} otherwise than this "
                "tokenizer's tokenizer.json; give a tokenizer whose tokenizer_config.json names PreTrainedTokenizerFast"
            )
    check_lost_text(lost, chosen.allow_lossy_tokenizer)


def check_lost_text(lost: LostText, allowed: bool) -> None:
    """Raise UserError where the ids lose more of the text than `LIMIT`, unless that is allowed."""
    if lost.share > LIMIT and not allowed:
        raise UserError(
            f"the tokenizer loses text: {lost}; give a tokenizer with byte fallback, or pass --allow-lossy-tokenizer"
        )


def _sample(sources: Sequence[Source], chosen: PrepareSettings, size_limit: int | None = None) -> Iterator[str]:
    """Training documents of up to 64 sources, one of each in turn, until there are so many bytes of text (50 MB)."""
    size_limit = SAMPLE_BYTES if size_limit is None else size_limit
    usable = [source for source in sources if source.split != "validation"]
    count = min(SAMPLE_SOURCES, len(usable))
    spread = [usable[index * len(usable) // count] for index in range(count)]
    open_readers = [(source, source.documents(BadDocuments(chosen.skip_bad))) for source in spread]
    size = 0
    while open_readers:
        for source, reader in list(open_readers):
            try:
                document = next(reader, None)
            except UserError:
                document = None
            if document is None:
                open_readers.remove((source, reader))
                continue
            data = document.text.encode()
            if split_of(source, sha256(data).digest(), chosen.validation_fraction, document.group) == "train":
                size += len(data)
                if size > size_limit:
                    return
                yield document.text


def _resolve_subset(recipe: Recipe, chosen: PrepareSettings, sources: Sequence[Source], workers: int) -> Subset | None:
    """Which documents are taken; None: all. What a number of tokens comes to is found once and kept in subset.json."""
    if chosen.subset_fraction is not None:
        return Subset(chosen.seed, int(chosen.subset_fraction * PLACES))
    if chosen.subset_tokens is None:
        return None
    file = recipe.out / "subset.json"
    try:
        kept = read_json(file)
        return Subset(int(kept["seed"]), int(kept["threshold"]))
    except (UserError, KeyError, TypeError, ValueError):  # not there, or damaged: the same is found again
        found = subset_of_tokens(sources, chosen.subset_tokens, chosen.seed, recipe.lengths, workers, chosen.skip_bad)
        write_json(file, {"seed": found.seed, "threshold": found.threshold, "fraction": found.threshold / PLACES})
        return found
