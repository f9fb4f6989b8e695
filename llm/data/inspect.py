"""`python -m llm inspect STORE`: what a token store holds, a window of it as text, and whether it is whole."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from .shard import SPLITS
from .store import TokenStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm inspect`."""
    parser.add_argument("store", type=Path, help="folder that prepare wrote")
    parser.add_argument("--verify", action="store_true", help="hash every shard again and name what is wrong")
    parser.add_argument("--at", type=int, default=0, metavar="POSITION", help="show the text from this token on")
    parser.add_argument("--tokens", type=int, default=64, help="how many tokens of text to show (default: 64)")
    parser.epilog = "example: python -m llm inspect runs/stories/store --verify"


def run(args: argparse.Namespace) -> None:
    """Print the store's figures.

    Raises:
        UserError: no store, a position outside it, or with --verify what does not match its manifest.
    """
    splits = {name: TokenStore.open(args.store, name) for name in SPLITS}
    train = splits["train"]
    print(f"{train.path}: vocabulary {train.vocab_size:,}, {train.dtype.name}, fingerprint {train.fingerprint[:16]}")
    for name, split in splits.items():
        mean = split.tokens / split.documents if split.documents else 0
        print(f"{name:11}{split.documents:>14,} documents {split.tokens:>18,} tokens {mean:>10.1f} tokens a document")
    print(repr(train.tokenizer().decode(train.read(args.at, min(args.tokens, train.tokens - args.at)))))
    if args.verify:
        problems = [problem for split in splits.values() for problem in split.verify()]
        if problems:
            raise UserError("; ".join(problems))
        print("verified: every shard is what its manifest says")
