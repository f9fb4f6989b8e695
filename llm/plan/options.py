"""Arguments of `python -m llm plan`, without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..train.declarations import names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm plan`."""
    parser.add_argument("--config", required=True, help="YAML of a run")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of devices in all (default: 1)")
    parser.add_argument(
        "--device", help=f"one of {', '.join(names('plan/plan.py', 'DEVICES'))}; or cpu, with --device-memory"
    )
    parser.add_argument(
        "--device-memory", type=float, metavar="GIB", help="memory of a device; overrides that of --device"
    )
    parser.add_argument("--headroom", type=float, default=0.9, help="share of it that may be planned (default: 0.9)")
    parser.add_argument("--micro-batch", type=int, help="rows of a forward pass (default: the most that fit)")
    parser.add_argument("--tokens-per-second", type=float, metavar="X", help="throughput of one device, for the days")
    parser.add_argument("--bench", type=Path, metavar="JSON", help="... or what `llm bench --json` recorded")
    parser.add_argument(
        "--network", type=gigabits, metavar="X", help="Gb/s that leave a node, over all its cards: 200, or 8x400"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="devices that share them (default: 8)")
    parser.add_argument("--json", type=Path, help="also write the plan here, in bytes")
    parser.add_argument("overrides", nargs="*", help="after --, dotted overrides of the config")
    parser.epilog = (
        "example: python -m llm plan --config configs/1b_values.yaml --gpus 8 64 --device h100 --network 8x400 "
        "-- --model.activation_checkpointing 2"
    )


def gigabits(text: str) -> float:
    """Return the Gb/s that leave a node: "200" is one card, "8x400" eight. Raises ValueError for anything else."""
    cards, _, each = text.rpartition("x")
    return int(cards or 1) * float(each)
