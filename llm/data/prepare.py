"""`python -m llm prepare`: text of any source becomes a token store.

Stages, in order:
    1. sources    what is to be read: files, folders, globs, the built-in corpus               (`llm.data.sources`)
    2. plan       the settings, written to STORE/plan.json; the same command later must have the same
    3. tokenizer  loaded or trained on the first 50 MB, saved in the store                     (`llm.data.tokenizer`)
    4. shards     each source becomes one shard a split, by as many processes as there are cores (`llm.data.encode`)
    5. index      store.json, when every shard is there                                        (`llm.data.store`)

Every file is written aside and renamed, and nothing depends on the number of workers or on time. So a run that was
killed is finished by the same command: it keeps each shard whose bytes are those of its manifest, makes the others,
and the store is byte for byte that of a run left alone. A source that cannot be read gives no shard; the others are
finished, and all that went wrong is told at the end.

A document is held out for validation by the hash of its text, so that equal documents are on the same side, whatever
file they come from; the built-in corpus has a split of its own. Documents without text are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..errors import UserError
from .encode import Recipe, shards_of, split_of
from .shard import SPLITS, Manifest, write_json
from .sources import DEFAULT_STORIES, Source, open_sources
from .store import write_index
from .stories import MARKER, Split
from .tokenizer import end_of_document, load_tokenizer, tokenizer_fingerprint, train_bpe, vocabulary_size
from .workers import Progress, available_cores, run_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 0.005  # of the documents; 4.4 of 9,040 million tokens are held out in nanoGPT's OpenWebText
SAMPLE_BYTES = 50_000_000  # of text to train a tokenizer on; more changes few merges
FAILURES_TOLD = 20  # in full
SAMPLE_SOURCES = 64  # that the sample is taken from in turn, spread evenly over all


@dataclass(frozen=True)
class Summary:
    """What a finished store holds and what it took."""

    path: Path
    documents: int
    empty_documents: int
    tokens: dict[Split, int]
    vocab_size: int
    bytes_per_token: float  # of text, without end-of-document ids
    seconds: float

    def __str__(self) -> str:
        left_out = f" ({self.empty_documents:,} empty ones left out)" if self.empty_documents else ""
        return (
            f"{self.path}: {self.documents:,} documents{left_out}, {self.tokens['train']:,} training and "
            f"{self.tokens['validation']:,} validation tokens, vocabulary {self.vocab_size:,}, "
            f"{self.bytes_per_token:.2f} bytes/token, {self.seconds:.1f} s"
        )


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: int | None = None,
    text_key: str = "text",
    marker: str = MARKER,
    documents: int | None = None,
    validation_fraction: float = HELD_OUT,
    seed: int = 0,
    workers: int | None = None,
) -> Summary:
    """Make the token store `out` of `sources`, or finish it. The arguments are those of the command, by name.

    Raises UserError for input that cannot be used. A first run that could not make a single shard leaves no folder.
    """
    began = time.perf_counter()
    out, workers = Path(out), available_cores() if workers is None else workers
    _check(tokenizer, train_tokenizer, validation_fraction, workers)
    found = open_sources(sources, text_key=text_key, marker=marker, documents=documents, seed=seed)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    plan = {
        "sources": [source.location for source in found],
        "text key": text_key,
        "marker": marker,
        "validation fraction": validation_fraction,
        "tokenizer": f"trained, {train_tokenizer} entries" if loaded is None else _identity(loaded),
    }
    is_new = _open_folder(out, plan)
    try:
        settled = _settle_tokenizer(out, loaded, train_tokenizer or 0, found, validation_fraction)
        made_with = _identity(settled)
        recipe = Recipe(out=out, validation_fraction=validation_fraction, **made_with)
        manifests = _make_shards(found, recipe, workers)
    except UserError:
        if is_new and not any(any((out / split).glob("*.json")) for split in SPLITS):
            shutil.rmtree(out)
        raise
    write_index(out, manifests, **made_with)
    return _summary(out, manifests, recipe.vocab_size, time.perf_counter() - began)


# ---- Plan ------------------------------------------------------------------------------------------------------------


def _check(tokenizer: object, train_tokenizer: int | None, fraction: float, workers: int) -> None:
    problems = []
    if (tokenizer is None) == (train_tokenizer is None):
        problems.append("give either --tokenizer or --train-tokenizer")
    if not 0 <= fraction < 1:
        problems.append(f"--validation-fraction {fraction} must be at least 0 and below 1")
    if workers < 1:
        problems.append(f"--workers {workers} must be at least 1")
    if problems:
        raise UserError("; ".join(problems))


def _open_folder(out: Path, plan: dict[str, Any]) -> bool:
    """Create the folder with its plan, or hold the plan against the one it was begun with. True where it is new."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new or empty folder with --out")
    if (out / "plan.json").is_file():
        begun = json.loads((out / "plan.json").read_bytes())
        for name, value in plan.items():
            if begun.get(name) != value:
                raise UserError(f"{out} was begun with {_difference(name, begun.get(name), value)}; name another --out")
        return False
    # A run that was killed at its very first step leaves nothing but a plan half-written.
    if out.exists() and any(path.name != "plan.json.partial" for path in out.iterdir()):
        raise UserError(f"{out} is not empty and no token store of this command; name a new or empty folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "plan.json", plan)
    return True


def _difference(name: str, begun: Any, now: Any) -> str:
    if name == "sources":
        changed = sorted(set(begun or ()) ^ set(now))
        return f"other sources ({len(changed)} differ, as {changed[0]})" if changed else "sources in another order"
    if name == "tokenizer":
        return "another tokenizer"
    return f"the {name} {begun!r}, not {now!r}"


def _identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a store remembers of its tokenizer. Raises UserError for one that cannot make a store."""
    return {
        "vocab_size": vocabulary_size(tokenizer),
        "end_of_document": end_of_document(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }


# ---- Tokenizer -------------------------------------------------------------------------------------------------------


def _settle_tokenizer(
    out: Path, loaded: PreTrainedTokenizerBase | None, vocab_size: int, sources: Sequence[Source], fraction: float
) -> PreTrainedTokenizerBase:
    """The tokenizer of the store, as it comes back from the store; trained and saved where it is not there yet."""
    folder, partial = out / "tokenizer", out / "tokenizer.partial"
    if not folder.is_dir():
        if loaded is None:
            print(f"training a tokenizer of {vocab_size:,} entries ...", file=sys.stderr)
            loaded = train_bpe(_sample(sources, fraction), vocab_size)
        shutil.rmtree(partial, ignore_errors=True)
        loaded.save_pretrained(partial)
        partial.rename(folder)
    settled = load_tokenizer(folder)
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))  # what the workers encode with
    came_back = _identity(settled)
    if came_back != _identity(loaded or settled) or came_back["tokenizer_fingerprint"] != tokenizer_fingerprint(saved):
        raise UserError("the tokenizer does not come back from save_pretrained as it was; give its tokenizer.json")
    return settled


def _sample(sources: Sequence[Source], fraction: float) -> Iterator[str]:
    """Training documents of up to 64 sources, one of each in turn, until there are 50 MB of text."""
    usable = [source for source in sources if source.split != "validation"]
    count = min(SAMPLE_SOURCES, len(usable))
    spread = [usable[index * len(usable) // count] for index in range(count)]
    open_readers = [(source, source.documents()) for source in spread]
    size = 0
    while open_readers:
        for source, reader in list(open_readers):
            document = next(reader, None)
            if document is None:
                open_readers.remove((source, reader))
            elif split_of(source, document.text, fraction) == "train":
                size += len(document.text.encode())
                if size > SAMPLE_BYTES:
                    return
                yield document.text


# ---- Shards and summary ----------------------------------------------------------------------------------------------


def _make_shards(sources: Sequence[Source], recipe: Recipe, workers: int) -> dict[Split, list[Manifest]]:
    """The manifests of the shards of each split, in the order of the sources. Raises UserError for all that failed."""
    with Progress(sum(source.size for source in sources), len(sources)) as progress:
        results = run_all(partial(shards_of, recipe), sources, workers, progress)
    failures = [result for result in results if isinstance(result, UserError)]
    if failures:
        raise _all_told(failures, len(sources))
    done = [manifest for result in results if not isinstance(result, UserError) for manifest in result]
    if not any(manifest.tokens for manifest in done if manifest.split == "train"):
        raise UserError("every document was held out for validation; give more, or a smaller --validation-fraction")
    return {split: [manifest for manifest in done if manifest.split == split] for split in SPLITS}


def _all_told(failures: Sequence[UserError], sources: int) -> UserError:
    if sources == 1:
        return failures[0]
    told = [str(failure) for failure in failures[:FAILURES_TOLD]]
    if len(failures) > FAILURES_TOLD:
        told.append(f"... and {len(failures) - FAILURES_TOLD} more")
    others = ", the others are done" if len(failures) < sources else ""
    return UserError(
        "\n  ".join(told)
        + f"\n{len(failures)} of {sources} sources could not be prepared{others}; mend them and run the "
        "same command again, or leave them out with another --out"
    )


def _summary(out: Path, manifests: dict[Split, list[Manifest]], vocab_size: int, seconds: float) -> Summary:
    every = [manifest for split in SPLITS for manifest in manifests[split]]
    tokens = {split: sum(manifest.tokens for manifest in manifests[split]) for split in SPLITS}
    documents = sum(manifest.documents for manifest in every)
    return Summary(
        path=out,
        documents=documents,
        empty_documents=sum(manifest.empty_documents for manifest in every),
        tokens=tokens,
        vocab_size=vocab_size,
        bytes_per_token=sum(manifest.bytes_in for manifest in every) / max(1, sum(tokens.values()) - documents),
        seconds=seconds,
    )


# ---- Command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a file, folder or glob of .txt, .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.zstd or .parquet, or the built-in "
        "corpus: stories or stories:SEED",
    )
    parser.add_argument("--out", required=True, metavar="STORE", help="the folder of the token store")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", metavar="T", help="a folder, tokenizer.json, SentencePiece .model or hub name"
    )
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE of this many entries on the sources"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument(
        "--marker", default=MARKER, help=f"what stands between the documents of a .txt (default: {MARKER})"
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help=f"how many training stories, of the corpus (default: {DEFAULT_STORIES:,})",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=HELD_OUT,
        metavar="F",
        help=f"of the documents of files, held out (default: {HELD_OUT}); of stories 5 %% as many are added",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the corpus, where its name gives none (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.epilog = "example: python -m llm prepare 'data/**/*.jsonl.zstd' --tokenizer gpt2 --out stores/nemotron"


def run(args: argparse.Namespace) -> None:
    """Run the command: its arguments are those of `prepare`, by name."""
    print(prepare(**vars(args)))
