"""What must be known before the first shard: the tokenizer, and which documents are taken.

    tokenizer    loaded, or trained on up to 50 MB; saved in the store and taken from there ever after
    subset       of a fraction, or of a number of tokens, for which the sources are surveyed once

One process settles this; others that begin beside it wait and find it in the store. A source that cannot be read has no
part in it: that it cannot is told when its shard is to be made.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ...common.errors import UserError
from ..shard import read_json, write_json
from ..tokenizer import (
    begin_of_document,
    end_of_document,
    load_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
    vocabulary_size,
)
from .documents import BadDocuments, Source
from .encode import Recipe, held, split_of
from .recipe import Settings
from .subset import PLACES, Subset, subset_of_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_BYTES = 50_000_000  # of text to train a tokenizer on; more changes few merges
SAMPLE_SOURCES = 64  # that the sample is taken from in turn, spread evenly over all


def settle(
    out: Path, chosen: Settings, sources: Sequence[Source], loaded: PreTrainedTokenizerBase | None, workers: int
) -> Recipe:
    """The recipe of the shards. One process settles what is not settled yet, the others find it in the store."""
    with held(out, "store"):
        settled = _settle_tokenizer(out, loaded, chosen, sources)
        recipe = Recipe(
            out=out,
            validation_fraction=chosen.validation_fraction,
            subset=None,
            skip_bad=chosen.skip_bad,
            deduplicate=chosen.deduplicate,
            **identity_with(settled, chosen.bos),
        )
        return replace(recipe, subset=_settle_subset(recipe, chosen, sources, workers))


def identity_with(tokenizer: PreTrainedTokenizerBase, bos: bool) -> dict[str, Any]:
    """What a store remembers of its tokenizer. Raises UserError for one that cannot make a store."""
    return {
        "vocab_size": vocabulary_size(tokenizer),
        "begin_of_document": begin_of_document(tokenizer) if bos else None,
        "end_of_document": end_of_document(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }


def _settle_tokenizer(
    out: Path, loaded: PreTrainedTokenizerBase | None, chosen: Settings, sources: Sequence[Source]
) -> PreTrainedTokenizerBase:
    """The tokenizer of the store, as it comes back from the store; trained and saved where it is not there yet."""
    folder, partial = out / "tokenizer", out / "tokenizer.partial"
    if not folder.is_dir():
        if loaded is None:
            print(f"training a tokenizer of {chosen.train_tokenizer:,} entries ...", file=sys.stderr)
            loaded = train_bpe(_sample(sources, chosen), chosen.train_tokenizer or 0)
        shutil.rmtree(partial, ignore_errors=True)
        loaded.save_pretrained(partial)
        partial.rename(folder)
    settled = load_tokenizer(folder)
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))  # what the workers encode with
    came_back = identity_with(settled, chosen.bos)
    expected = identity_with(loaded or settled, chosen.bos)
    if came_back != expected or came_back["tokenizer_fingerprint"] != tokenizer_fingerprint(saved):
        raise UserError("the tokenizer does not come back from save_pretrained as it was; give its tokenizer.json")
    return settled


def _sample(sources: Sequence[Source], chosen: Settings) -> Iterator[str]:
    """Training documents of up to 64 sources, one of each in turn, until there are 50 MB of text."""
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
            if split_of(source, sha256(data).digest(), chosen.validation_fraction) == "train":
                size += len(data)
                if size > SAMPLE_BYTES:
                    return
                yield document.text


def _settle_subset(recipe: Recipe, chosen: Settings, sources: Sequence[Source], workers: int) -> Subset | None:
    """Which documents are taken; None: all. What a number of tokens comes to is found once and kept in subset.json."""
    if chosen.subset_fraction is not None:
        return Subset(chosen.seed, int(chosen.subset_fraction * PLACES))
    if chosen.subset_tokens is None:
        return None
    file = recipe.out / "subset.json"
    if not file.is_file():
        found = subset_of_tokens(sources, chosen.subset_tokens, chosen.seed, recipe.lengths, workers, chosen.skip_bad)
        write_json(file, {"seed": found.seed, "threshold": found.threshold, "fraction": found.threshold / PLACES})
    kept = read_json(file)
    return Subset(kept["seed"], kept["threshold"])
