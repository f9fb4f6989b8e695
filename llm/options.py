"""Arguments of `export`, `push` and `generate`, without torch or the hub's client."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common.arguments import add_trust, count
from .train.declarations import names

COLDEST, HOTTEST = 1e-3, 1e3  # colder than that, logits leave the range of float32


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm export`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="run folder")
    parser.add_argument("--out", type=Path, help="new folder, for one run (default: RUN/exports/step-N)")
    parser.add_argument("--step", type=count(0), help="which checkpoint (default: the newest that verifies)")
    parser.add_argument("--all", action="store_true", help="every checkpoint, to RUN/exports/step-N")
    parser.add_argument(
        "--format",
        choices=("hippoformer", "transformers"),
        default="hippoformer",
        help="transformers: as LlamaForCausalLM or GPT2LMHeadModel, if no switch is on (needs --out)",
    )
    parser.add_argument(
        "--dtype", choices=names("export.py", "DTYPES"), default="float32", help="of the weights (default: float32)"
    )
    parser.epilog = (
        "examples: python -m llm export runs/classic runs/values; python -m llm export runs/values --out out/values\n"
        "(RUN OUT, as in version 0.1, means RUN --out OUT if OUT is no run)"
    )


def add_push(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm push`."""
    parser.add_argument("export", type=Path, metavar="EXPORT", help="exported folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="model on the hub, made if it is not there")
    parser.add_argument("--license", metavar="ID", help="of the weights, as apache-2.0 (default: none stated)")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.epilog = "example: python -m llm push runs/stories/export/values me/stories-values --license apache-2.0"


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm generate`."""
    parser.add_argument("model", type=Path, help="exported folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=count(1), default=100, help="tokens to add (default: 100)")
    parser.add_argument("--temperature", type=_temperature, default=0.8, help="0 takes the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=count(1), default=50, help="sample among the k likeliest (default: 50)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the sampling, below 2^32 (default: 0)")
    add_trust(parser)
    parser.epilog = 'example: python -m llm generate runs/stories/export/values --prompt "Mary and John were"'


def _temperature(text: str) -> float:
    """An argument type: 0, or a temperature at which logits stay numbers."""
    if (value := float(text)) != 0 and not COLDEST <= value <= HOTTEST:
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor from {COLDEST:g} to {HOTTEST:g}")
    return value


def _seed(text: str) -> int:
    """An argument type: a seed that every generator takes."""
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 4294967295")
    return value
