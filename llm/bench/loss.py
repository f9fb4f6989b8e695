"""`python -m llm bench-loss --config C`: head and cross-entropy by chunks (`model/loss.py`), beside all logits at once.

Stages: sizes of the config -> hidden states, head and targets at random -> loss and gradients of either way, in turn,
round after round -> ratio of their times; peak memory of each in a process of its own, beyond what it was given.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.environment import environment
from ..common.errors import UserError
from ..common.processes import peak_rss, reset_peak_rss, resident
from ..model.fast_linear import linear
from ..model.fast_loss import fused_linear_cross_entropy
from ..model.loss import next_token_loss
from .contenders import MIB, Window, now
from .step import ratio, resolve_options, write


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor, items: int) -> Tensor:
    return next_token_loss(linear(hidden, weight), targets, items)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "chunks": fused_linear_cross_entropy, "plain": _plain,
}  # fmt: skip


@dataclass
class Sizes:
    """What the head gets: `tokens` hidden states of `width`, and how many logits each has."""

    tokens: int
    width: int
    vocabulary: int
    precision: str
    device: str


def once(sizes: Sizes) -> Callable[[str], None]:
    """A function that computes loss and gradients in one of the `WAYS`."""
    half = torch.bfloat16 if sizes.precision == "bf16-true" else None
    hidden, weight = (
        torch.randn(size, sizes.width, device=sizes.device, dtype=half) for size in (sizes.tokens, sizes.vocabulary)
    )
    weight.mul_(0.02)
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.randint(sizes.vocabulary, (sizes.tokens,), device=sizes.device)

    def compute(way: str) -> None:
        with torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.precision == "bf16-mixed"):
            loss = WAYS[way](hidden, weight, targets, sizes.tokens)
        loss.backward()
        hidden.grad = weight.grad = None

    return compute


def peak_memory(sizes: Sizes, way: str) -> float:
    """MiB at most while loss and gradients are computed, beyond hidden states, head and targets."""
    compute = once(sizes)
    if sizes.device == "cuda":
        before = torch.cuda.memory_allocated()
        compute(way)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    before = resident()
    reset_peak_rss()
    compute(way)
    return (peak_rss() - before) / MIB


def run(args: argparse.Namespace) -> None:
    """Measure and print; with --json write the figures too."""
    if min(args.rounds, args.rows or 1) < 1:
        raise UserError("--rounds and --rows must be at least 1")
    cli, rows, precision, device = resolve_options(args.config, args.overrides, args.rows, args.precision)
    config, device = cli.model.decoder_config, "cuda" if device == "gpu" else "cpu"
    tokens = rows * cli.datamodule.context
    sizes = Sizes(tokens, config.hidden_size, config.unpadded_vocab_size, precision, device)
    if args.memory_of:
        print(peak_memory(sizes, args.memory_of))
        return
    compute, windows = once(sizes), {way: list[Window]() for way in WAYS}
    for turn in range(-1, args.rounds):  # the first is not counted
        for way in list(WAYS)[:: 1 if turn % 2 else -1]:
            began = now()
            compute(way)
            if turn >= 0:
                windows[way].append(Window(sizes.tokens / (now() - began), {}, 0.0))
    words = command_line(args)
    memory = {way: float(_elsewhere([*words[:2], "--memory-of", way, *words[2:]])) for way in WAYS}
    result = {
        "command": "python -m llm bench-loss " + " ".join(words),
        **vars(sizes),
        "tokens_per_second": {way: [each.tokens_per_second for each in windows[way]] for way in WAYS},
        "chunks_to_plain": ratio(windows, "chunks", "plain"),
        "peak_memory_mib": memory,
        "peak_memory_chunks_to_plain": memory["chunks"] / memory["plain"],
        **environment(),
    }
    for way in WAYS:
        rate = statistics.median(each.tokens_per_second for each in windows[way])
        print(f"{way:10}{rate:>12,.0f} tokens/s{memory[way]:>10,.0f} MiB")
    speed = "{median:.3f} ({least:.3f} to {greatest:.3f})".format(**result["chunks_to_plain"])
    print(f"chunks to plain: speed {speed}, memory {result['peak_memory_chunks_to_plain']:.3f}")
    write(args.json, result)


def command_line(args: argparse.Namespace) -> list[str]:
    """The options that measure the same again."""
    words = ["--config", args.config, "--rounds", str(args.rounds)]
    words += ["--rows", str(args.rows)] if args.rows else []
    words += ["--precision", args.precision] if args.precision else []
    return words + (["--", *args.overrides] if args.overrides else [])


def _elsewhere(words: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "llm", "bench-loss", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"measuring memory failed: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return done.stdout.split()[-1]
