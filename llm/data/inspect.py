"""`python -m llm inspect STORE`: what a token store holds, how long its documents are, some of it as text.

Stages: --verify, everything is read and hashed again  ->  document ends: lengths  ->  manifests: sources, what was left
out  ->  figures, histogram, windows of text.

Ends and manifests are streamed: 100 million documents take no more memory than a thousand.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError, printable
from ..common.files import write_file
from ..common.processes import available_cores
from .shard import SPLITS
from .store import ListedShard, TokenStore
from .store_figures import Figures, figures_of, histogram, windows
from .workers import Progress, Report, run_all

FIRST = 5  # sources and bad documents that are shown unasked
BYTES_A_WORKER = 1 << 28  # to verify: a fifth of a second, below which a process more is not worth its start


def verify(splits: Sequence[TokenStore]) -> list[str]:
    """Read everything again, on all cores: each sentence names one thing that is wrong; none means all is well."""
    shards = [shard for split in splits for shard in split.shards()]
    size = sum(shard.size for shard in shards)
    workers = min(available_cores(), 1 + size // BYTES_A_WORKER)
    with Progress(size, len(shards), "verify") as progress:
        results = run_all(_problems, shards, workers, progress)
    told = [[str(result)] if isinstance(result, UserError) else result for result in results]
    return [*splits[0].index_problems(), *(problem for problems in told for problem in problems)]


def _problems(shard: ListedShard, report: Report) -> list[str]:
    problems = list(shard.problems())
    report(shard.size, shard.documents, shard.tokens)
    return problems


# ---- What is shown ---------------------------------------------------------------------------------------------------


def summary(figures: Figures, context: int | None) -> Iterator[str]:
    """The figures of a split, a line each."""
    store = figures.store
    yield f"{store.split}: {store.documents:,} documents, {store.tokens:,} tokens"
    if store.documents:
        yield f"  {figures.bytes_per_token:.2f} bytes of text a token"
        yield (
            f"  tokens a document: mean {figures.mean:,.1f}, median {figures.percentile(50):,}, "
            f"95th percentile {figures.percentile(95):,}, longest {figures.lengths[-1]:,}"
        )
    if reasons := ", ".join(f"{count:,} {reason}" for reason, count in figures.left_out.items() if count):
        yield f"  left out of {figures.documents_in:,} documents: {reasons}"
    if store.groups is not None and store.split == "validation":
        yield f"  documents of {store.validation_groups:,} groups ({store.groups})"
    if lost := str(figures.lost):
        yield f"  the tokenizer loses text: {lost}"
    if context:
        windows = max(0, (store.tokens - 1) // context)
        unread = store.tokens - (windows * context + 1 if windows else 0)
        yield f"  context {context:,}: {windows:,} windows an epoch, {unread:,} tokens at the end in no window"


def source_table(every: Sequence[Figures], all_of_them: bool) -> Iterator[str]:
    """Each source with its tokens in each split."""
    names = list(dict.fromkeys(name for figures in every for name in figures.sources))
    shown = names if all_of_them else names[:FIRST]
    sources = f"{len(names):,} source{'s' * (len(names) != 1)}"
    yield f"{sources}{_first_of(shown, names)}, tokens in {' and '.join(f.store.split for f in every)}:"
    for name in shown:
        yield "".join(f"{figures.sources[name]:>16,}" for figures in every) + f"  {name}"


def bad_documents(every: Sequence[Figures], all_of_them: bool) -> Iterator[str]:
    """Each document that was left out for being broken."""
    bad = [sentence for figures in every for sentence in figures.bad]
    if bad:
        shown = bad if all_of_them else bad[:FIRST]
        yield f"bad documents left out: {len(bad):,}{_first_of(shown, bad)}"
        yield from (f"  {sentence}" for sentence in shown)


def _first_of(shown: Sequence[str], every: Sequence[str]) -> str:
    return "" if len(shown) == len(every) else f", the first {len(shown)} (--sources lists all)"


def write_plot(path: Path, every: Sequence[Figures]) -> None:
    """The lengths of the documents of each split that has any, as a PNG."""
    from .plots import draw_lengths

    write_file(path, draw_lengths([figures for figures in every if figures.store.documents]))


# ---- Command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm inspect`."""
    parser.add_argument("store", type=Path, help="folder that prepare wrote")
    parser.add_argument("--verify", action="store_true", help="hash every shard again and name what is wrong")
    parser.add_argument("--sources", action="store_true", help="list all sources and all bad documents")
    parser.add_argument("--context", type=int, metavar="T", help="say how many windows of T tokens an epoch has")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the lengths of the documents")
    parser.add_argument("--windows", type=int, default=3, metavar="N", help="random windows of text (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the random windows (default: 0)")
    parser.add_argument("--at", type=int, metavar="POSITION", help="show the text from this token on instead")
    parser.add_argument("--tokens", type=int, default=64, help="how many tokens of text to show (default: 64)")
    parser.epilog = "example: python -m llm inspect runs/stories/store --verify"


def run(args: argparse.Namespace) -> None:
    """Print the store's figures.

    Raises:
        UserError: no finished store, a position outside it, or with --verify what does not match its manifest.
    """
    _check(args)
    splits = [TokenStore.open(args.store, name) for name in SPLITS]
    train = splits[0]
    if args.verify:
        if problems := verify(splits):
            raise UserError("\n  ".join(problems) + "\nrun the same prepare command again: it makes these shards again")
        print("verified: every shard is what its manifest says")
    begin = "" if train.begin_of_document is None else f"begin with the id {train.begin_of_document} and "
    print(
        f"{train.path}: vocabulary {train.vocab_size:,}, {train.dtype.name}, documents {begin}end with the id "
        f"{train.end_of_document}, fingerprint {train.fingerprint[:16]}"
    )
    every = [figures_of(split) for split in splits]
    for figures in every:
        print(*summary(figures, args.context), sep="\n")
    print(*map(printable, [*source_table(every, args.sources), *bad_documents(every, args.sources)]), sep="\n")
    for figures in every:
        if figures.store.documents:
            print(*histogram(figures), sep="\n")
    if args.plot:
        write_plot(args.plot, every)
    draw = random.Random(args.seed)
    starts = [draw.randrange(max(1, train.tokens - args.tokens + 1)) for _ in range(args.windows)]
    starts = starts if args.at is None else [args.at]
    if starts:
        print(*windows(train, starts, args.tokens), sep="\n")


def _check(args: Any) -> None:
    problems = []
    for option, least in (("tokens", 1), ("windows", 0), ("context", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            problems.append(f"--{option} {value} must be at least {least}")
    if args.plot and args.plot.suffix != ".png":
        problems.append(f"--plot {args.plot} is drawn as a PNG; name it {args.plot.with_suffix('.png')}")
    if problems:
        raise UserError("; ".join(problems))
