"""`python -m llm bench-growth --config C --out FOLDER`: how the time of a token grows with width, depth, context and
vocabulary, beside its FLOPs.

Stages: config -> one size at a time multiplied by each factor, the others as in the config -> windows of steps of all
of them in turn, round after round -> medians, and time against FLOPs from each size to the next -> growth.json,
growth.png.

Width grows with the number of heads, whose own width stays. A step has as nearly the same number of tokens at every
size as whole rows allow. Time that grows faster than FLOPs by more than `TOLERATED` is named.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..common.environment import environment
from ..common.errors import UserError
from ..model import DecoderConfig
from ..train.flops import flops_per_token
from .contenders import UNCOUNTED, Plan, TrainerLoop, Variant, random_store, with_settings
from .step import resolve_options, write

FACTORS = (0.5, 1, 2, 4)
SIZES = {  # name -> fields of the config that grow together; context is the data's
    "width": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "depth": ("num_hidden_layers",),
    "context": (),
    "vocabulary": ("vocab_size", "unpadded_vocab_size"),
}
TOLERATED = 1.15  # of time to FLOPs, from one size to the next


def variants(config: DecoderConfig, context: int, name: str) -> list[tuple[int, dict[str, int], int]]:
    """The sizes of one sweep: (size, settings of the decoder, context), those that are whole numbers."""
    found = []
    for factor in FACTORS:
        values = {field: getattr(config, field) * factor for field in SIZES[name]}
        longer = context * factor if name == "context" else context
        if name == "context":
            values["max_position_embeddings"] = max(config.max_position_embeddings, longer)
        if all(value == int(value) and value >= 1 for value in (*values.values(), longer)):
            settings = {field: int(value) for field, value in values.items()}
            size = int(longer) if name == "context" else settings[SIZES[name][0]]
            found.append((size, settings, int(longer)))
    return found


def growth(seconds: list[float], flops: list[float]) -> list[float]:
    """From each size to the next: how much more than its FLOPs the time of a token grew; 1 is alike."""
    return [(seconds[i + 1] / seconds[i]) / (flops[i + 1] / flops[i]) for i in range(len(seconds) - 1)]


def measure_growth(
    plan: Plan, sweeps: dict[str, list[tuple[int, dict[str, int], int]]], rounds: int, steps: int
) -> dict:
    """Seconds of a token at every size of every sweep, one for each round; every round goes through all."""
    tokens = plan.tokens_per_step
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds):
        points = [(name, *point) for name, sweep in sweeps.items() for point in sweep]
        for name, size, settings, context in points if turn % 2 == 0 else points[::-1]:
            rows = max(1, round(tokens / context))
            config = with_settings(plan.module.decoder_config, **settings)
            with tempfile.TemporaryDirectory() as folder:
                own = replace(plan, context=context, rows=rows, folder=Path(folder))
                vocabulary = int(config.unpadded_vocab_size or 0)
                random_store(own.folder, vocabulary, (steps + UNCOUNTED) * own.tokens_per_step + 1)
                torch._dynamo.reset()  # or it would give up compiling after eight forms of a block
                window = TrainerLoop.of_variant(own, Variant(settings)).window(steps, parts=False)
            seconds.setdefault((name, size), []).append(1 / window.tokens_per_second)
            rate = f"{window.tokens_per_second:,.0f} tokens/s"
            print(f"round {turn + 1}/{rounds}  {name} {size:<10,}{rate:>22}", file=sys.stderr, flush=True)
    return {
        name: {
            "size": [size for size, _, _ in sweep],
            "tokens_per_step": [max(1, round(tokens / context)) * context for _, _, context in sweep],
            "seconds_per_token": [seconds[name, size] for size, _, _ in sweep],
            "flops_per_token": [
                flops_per_token(with_settings(plan.module.decoder_config, **settings), context)
                for _, settings, context in sweep
            ],
        }
        for name, sweep in sweeps.items()
    }


def run(args: argparse.Namespace) -> None:
    """Measure, print, write and draw."""
    if min(args.rounds, args.steps, args.rows or 1) < 1:
        raise UserError("--rounds, --steps and --rows must be at least 1")
    cli, rows, precision, device = resolve_options(args.config, args.overrides, args.rows, args.precision)
    data, config = cli.datamodule, cli.model.decoder_config
    plan = Plan(cli.model, precision, data.context, rows, device, args.compile, Path())
    sweeps = {name: variants(config, data.context, name) for name in args.sweep}
    result = {
        "command": "python -m llm bench-growth " + " ".join(command_line(args)),
        "precision": precision,
        "compiled": args.compile,
        "tokens_per_step": plan.tokens_per_step,
        "context": data.context,
        "sweeps": measure_growth(plan, sweeps, args.rounds, args.steps),
        **environment(),
    }
    print_growth(result)
    write(args.out / "growth.json", result)
    draw(result, args.out / "growth.png")
    print(f"{args.out / 'growth.png'}")


def command_line(args: argparse.Namespace) -> list[str]:
    """The options that measure the same again."""
    words = ["--config", args.config, "--rounds", str(args.rounds), "--steps", str(args.steps)]
    words += ["--sweep", *args.sweep] if args.sweep != list(SIZES) else []
    words += ["--rows", str(args.rows)] if args.rows else []
    words += ["--precision", args.precision] if args.precision else []
    words += ["--compile"] if args.compile else []
    return words + (["--", *args.overrides] if args.overrides else [])


def print_growth(result: dict[str, Any]) -> None:
    """A table: each size, and time against FLOPs from the one before."""
    print(f"{result['tokens_per_step']} tokens a step, {result['precision']}, {result['device']}")
    print(f"{'':22}{'us a token':>12}{'MFLOP a token':>16}{'GFLOP/s':>10}{'time to FLOPs, from the size before':>38}")
    for name, sweep in result["sweeps"].items():
        medians = [statistics.median(each) for each in sweep["seconds_per_token"]]
        grown = [math.nan, *growth(medians, sweep["flops_per_token"])]
        for size, time, flops, more in zip(sweep["size"], medians, sweep["flops_per_token"], grown, strict=True):
            said = "" if math.isnan(more) else f"{more:.2f}" + ("  faster than FLOPs" if more > TOLERATED else "")
            print(f"{name:12}{size:>10,}{1e6 * time:>12.2f}{flops / 1e6:>16.2f}{flops / time / 1e9:>10.0f}{said:>38}")


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel a size: time of a token with its range over rounds, and FLOPs scaled to the first size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    sweeps = result["sweeps"]
    figure = Figure(figsize=(3.2 * len(sweeps), 3.4), layout="constrained")
    for axes, (name, sweep) in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True):
        times = [[1e6 * second for second in each] for each in sweep["seconds_per_token"]]
        medians = [statistics.median(each) for each in times]
        flops = sweep["flops_per_token"]
        axes.fill_between(sweep["size"], [min(t) for t in times], [max(t) for t in times], alpha=0.25, color="C0")
        axes.plot(sweep["size"], medians, "o-", color="C0", label="time")
        axes.plot(sweep["size"], [medians[0] * f / flops[0] for f in flops], "--", color="C1", label="FLOPs, scaled")
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(sweep["size"], [f"{size:,}" for size in sweep["size"]])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
    figure.axes[0].set_ylabel("microseconds a token")
    figure.axes[0].legend()
    figure.suptitle(f"{result['precision']}, {result['tokens_per_step']} tokens a step, {result['device']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
