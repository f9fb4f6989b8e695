"""Arguments of `bench`, `bench-loss`, `bench-growth` and `bench-ranks`, without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..common.arguments import accept_old_name
from ..train.declarations import names

CONTENDERS = ["classic", "values"]  # of `bench` by default
FP32, BF16 = {"communication_dtype": "fp32"}, {"communication_dtype": "bf16"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"name": "auto", "offload_optimizer": False, **FP32},
    "ddp": {"name": "ddp", "offload_optimizer": False, **FP32},
    **{f"zero{stage}": {"name": "deepspeed", "stage": stage, **FP32} for stage in (1, 2, 3)},
}
DEFAULT_LAYOUTS = list(LAYOUTS)
LAYOUTS |= {f"fsdp2-{stage}": {"name": "fsdp2", "stage": stage, **FP32} for stage in (1, 2, 3)}
LAYOUTS |= {f"{name}-bf16": LAYOUTS[name] | BF16 for name in list(LAYOUTS) if name != "plain"}  # gradients sent so


def add_step(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm bench`."""
    variants = names("bench/contenders.py", "VARIANTS")
    parser.add_argument("--config", required=True, help="YAML of a run")
    parser.add_argument(
        "--baseline", dest="against", choices=names("bench/step.py", "AGAINST"), default="hf",
        help="hf, transformers eager, compiled, and its blocks compiled (default); hf-liger, and with Liger-Kernel on "
        "a GPU; hf-eager; none",
    )  # fmt: skip
    parser.add_argument(
        "--contenders", nargs="+", choices=variants, default=CONTENDERS, metavar="NAME",
        help=f"variants of the config, the first of which the others are compared with: {', '.join(variants)} "
        f"(default: {' '.join(CONTENDERS)})",
    )  # fmt: skip
    parser.add_argument(
        "--fast-paths", action="store_true", help="compare the config with itself without each of its fast paths"
    )
    parser.add_argument("--rows", type=int, help="rows a step (default: data.micro_batch_size or data.batch_size)")
    parser.add_argument("--micro-batches", type=int, default=1, help="of so many rows each, a step (default: 1)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds in which each contender is measured once (default: 5)"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a measurement (default: 10)")
    parser.add_argument("--precision", help="as trainer.precision (default: the config's)")
    parser.add_argument("--compile", action="store_true", help="torch.compile our blocks")
    parser.add_argument(
        "--find-micro-batch", dest="fit", action="store_true",
        help="find the largest micro-batch that fits into memory, and print what to set",
    )  # fmt: skip
    parser.add_argument(
        "--memory-budget", dest="memory", type=float, metavar="GIB",
        help="memory budget of --find-micro-batch (default: 0.9 of what is free)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the result here")
    without = [f"without_{name}" for name in (*names("model/fast_paths.py", "FAST_PATHS"), "all")]
    parser.add_argument(
        "--memory-of", choices=[*names("bench/contenders.py", "TRANSFORMERS"), *variants, *without],
        help=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", help="after --, dotted overrides of the config")
    for old, new in (("--against", "--baseline"), ("--fit", "--find-micro-batch"), ("--memory", "--memory-budget")):
        accept_old_name(parser, old, new)
    parser.epilog = (
        "example: python -m llm bench --config configs/stories_classic.yaml --rounds 5 -- --data.context 128"
    )


def add_loss(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm bench-loss`."""
    parser.add_argument("--config", required=True, help="YAML of a run")
    parser.add_argument("--rows", type=int, help="rows at once (default: data.micro_batch_size or data.batch_size)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds in which either way is measured once (default: 7)"
    )
    parser.add_argument("--precision", help="as trainer.precision (default: the config's)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--memory-of", choices=names("bench/loss.py", "WAYS"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="after --, dotted overrides of the config")
    parser.epilog = "example: python -m llm bench-loss --config configs/tinystories_8m_classic.yaml --rows 8"


def add_growth(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm bench-growth`."""
    sizes = names("bench/growth.py", "SIZES")
    parser.add_argument("--config", required=True, help="YAML of a run: the sizes in the middle")
    parser.add_argument("--sweep", nargs="+", choices=sizes, default=sizes, metavar="SIZE", help="which (all)")
    parser.add_argument("--rows", type=int, help="rows a step (default: data.micro_batch_size or data.batch_size)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which each size is measured once (default: 3)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a measurement (default: 3)")
    parser.add_argument("--precision", help="as trainer.precision (default: the config's)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--out", type=Path, required=True, help="folder for growth.json and growth.png")
    parser.add_argument("overrides", nargs="*", help="after --, dotted overrides of the config")
    parser.epilog = (
        "example: python -m llm bench-growth --config configs/stories_classic.yaml --out runs/growth "
        "-- --data.context 128"
    )


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm bench-ranks`."""
    parser.add_argument("--config", required=True, help="YAML of a run")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=DEFAULT_LAYOUTS,
        help="plain is one process; -bf16 sends gradients in bf16 (default: plain, ddp, zero1, zero2, zero3)",
    )
    parser.add_argument("--processes", type=int, default=2, help="of every layout but plain (default: 2)")
    parser.add_argument("--threads", type=int, help="of each process (default: the cores over the processes)")
    parser.add_argument("--rows", type=int, help="rows a step over all processes (default: data.batch_size)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds in which each layout is measured once (default: 3)"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps without and with a checkpoint")
    parser.add_argument("--precision", help="as trainer.precision (default: the config's)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), help="default: gpu where there is one")
    parser.add_argument("--folder", type=Path, help="of the disk where the temporary runs are written")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("overrides", nargs="*", help="after --, dotted overrides of the config")
    parser.epilog = (
        "example: python -m llm bench-ranks --config configs/stories_classic.yaml --rounds 5 -- --data.context 128"
    )
