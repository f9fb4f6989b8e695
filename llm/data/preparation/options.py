"""The options of `python -m llm prepare`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from ...common.arguments import accept_old_name
from ..lost_text import LIMIT
from ..stories import MARKER
from .documents import LARGEST
from .recipe import HELD_OUT
from .sources import DEFAULT_STORIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a file, folder or glob of .txt, .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.zstd or .parquet; a dataset of the "
        "hub, as roneneldan/TinyStories; or the built-in corpus: stories or stories:SEED",
    )
    add("--out", required=True, metavar="STORE", help="the folder of the token store")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", metavar="T", help="a folder, tokenizer.json, SentencePiece .model or hub name"
    )
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE of this many entries on the sources"
    )
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    add(
        "--task",
        type=_task,
        default=(1, 1),
        metavar="I/N",
        help="make the shards of every N-th source only, from the I-th on (1/N to N/N), as a Slurm job array does",
    )
    _add_choice(parser.add_argument_group("which documents").add_argument)
    _add_form(parser.add_argument_group("what becomes of them").add_argument)
    for old, new in OLD_NAMES.items():
        accept_old_name(parser, old, new)
    parser.epilog = EPILOG


def _add_choice(choose: Callable[..., Any]) -> None:
    """Which documents are taken."""
    choose("--path-filter", dest="where", action="append", default=[], metavar="PART", help=WHERE_HELP)
    choose("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    choose("--id-key", metavar="KEY", help="key or column of the document's id (default: the text stands for it)")
    choose("--group-by", metavar="KEY", help=GROUP_HELP)
    choose("--group-separator", metavar="SEP", help="the group is the part of this field before the last SEP")
    choose(
        "--separator", dest="marker", default=MARKER, help=f"separator of the documents in a .txt (default: {MARKER})"
    )
    choose("--documents", type=int, metavar="N", help=f"training stories of the corpus (default: {DEFAULT_STORIES:,})")
    choose("--subset-fraction", type=float, metavar="F", help="a random part of the documents, by seed and id")
    choose(
        "--subset-tokens",
        type=_count,
        metavar="N",
        help="a random part of about so many tokens (84e9, say), likewise",
    )
    choose("--max-bad-documents", dest="skip_bad", type=int, default=0, metavar="N", help=SKIP_HELP)
    choose(
        "--max-document-bytes",
        type=_count,
        default=LARGEST,
        metavar="N",
        help=f"a larger document is a broken one (default: {LARGEST:,})",
    )
    choose("--deduplicate", action="store_true", help="of documents with equal text keep the first")
    choose("--seed", type=int, default=0, help="of the subset, and of the corpus without one in its name (default: 0)")


def _add_form(form: Callable[..., Any]) -> None:
    """What becomes of the documents."""
    form(
        "--allow-lossy-tokenizer",
        action="store_true",
        help=f"accept a tokenizer whose ids lose more than {LIMIT:.0%}% of the characters",
    )
    form("--bos", action="store_true", help="begin each document with the tokenizer's begin-of-sequence id")
    form(
        "--validation-fraction",
        type=float,
        default=HELD_OUT,
        metavar="F",
        help=f"of the documents of files, held out (default: {HELD_OUT}); of stories 5 %% as many are added",
    )


OLD_NAMES = {"--where": "--path-filter", "--marker": "--separator", "--skip-bad": "--max-bad-documents"}
WHERE_HELP = (
    "only files with this part in their path, as quality=high; given again with another name both must hold, with the "
    "same name either"
)
GROUP_HELP = (
    "key or column of what a document is a part of, as its book: a group is never on both sides of the split, and "
    "models are compared by group (default: each document alone)"
)
SKIP_HELP = (
    "leave out up to N broken documents of a source, listed in its manifest, instead of the whole source (default: 0)"
)
EPILOG = """examples:
  python -m llm prepare 'nemotron/**/*.jsonl.zstd' --path-filter quality=high --id-key warc_record_id \\
      --subset-tokens 84e9 --tokenizer meta-llama/Llama-3.1-8B --out stores/nemotron --task 3/100
  python -m llm prepare roneneldan/TinyStories --tokenizer gpt2 --out stores/tinystories"""


def _task(word: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", word)
    if not match:
        raise argparse.ArgumentTypeError(f"{word!r} is no task: give I/N, as 3/100 for the third of a hundred")
    return int(match[1]), int(match[2])


def _count(word: str) -> int:
    try:
        return int(float(word))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of tokens: give 1000000 or 84e9") from error
