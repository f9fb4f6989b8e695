"""`python -m llm bench --config C`: throughput, parts of a step and peak memory of a config, beside transformers.

With --find-micro-batch instead the largest micro-batch for a budget of memory (`micro_batch.py`).

Stages: config -> contenders (`contenders.py`) -> windows of steps in turn, A B C C B A -> ratios within each
round, their median, range and interval -> peak memory: on a CPU of each contender in a process of its own, on a GPU
what its windows allocate beyond the weights of the others.

Everyone gets rows of random tokens of the same number and length, the same precision and attention, fused AdamW,
clipping, and the config's activation checkpointing. transformers' model is the nearest that it has: switches off, and
GPT-2 with all its biases. It is measured as it comes, compiled as a whole, compiled by blocks, and with Liger-Kernel.
Utilisation is of the rate at which this device multiplies large matrices in this precision, by torch or by
`model/fast_linear.py`, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ..common.environment import environment
from ..common.errors import UserError
from ..common.files import write_json
from ..common.processes import peak_rss, reset_peak_rss, resident
from ..data.module import TokenDataModule
from ..model.fast_linear import matmul, use_onednn
from ..plan.plan import read
from ..train.attention import attention_problems
from ..train.cli import parse
from ..train.flops import flops_per_token
from ..train.module import LanguageModule
from ..train.options import PRECISIONS
from . import micro_batch
from .contenders import (
    MIB,
    PARTS,
    TRANSFORMERS,
    Plan,
    TrainerLoop,
    TransformersBaseline,
    Window,
    contender,
    fast_paths_of,
    now,
)
from .options import CONTENDERS

AGAINST = {
    "hf": ["transformers", "transformers_compiled", "transformers_blocks"],
    "hf-liger": list(TRANSFORMERS),
    "hf-eager": ["transformers"],
    "none": [],
}
CUBE = {"cpu": 4096, "gpu": 8192}  # side of the matrices whose product gives the rate: large enough to be at its best


Contenders = dict[str, TrainerLoop | TransformersBaseline]


def take_turns(
    plan: Plan, contenders: Contenders, rounds: int, steps: int
) -> tuple[dict[str, list[Window]], list[float]]:
    """The windows of each contender in each round, one after the other; and the FLOP/s of matrix products."""
    names = list(contenders)
    windows: dict[str, list[Window]] = {name: [] for name in names}
    rates = []
    for turn in range(rounds):
        rates.append(matrix_rate(plan))
        for name in names if turn % 2 == 0 else names[::-1]:  # a drift of the machine hits everyone alike
            if plan.device == "gpu":
                windows[name].append(window_on_gpu(contenders[name], steps))
            else:
                windows[name].append(contenders[name].window(steps, parts=True))
            print(
                f"round {turn + 1}/{rounds}  {name:23}{windows[name][-1].tokens_per_second:>12,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    return windows, rates


def window_on_gpu(one: TrainerLoop | TransformersBaseline, steps: int) -> Window:
    """The parts of steps, which makes them longer, then throughput and peak memory of as many that nobody looks into.

    Raises:
        UserError: the memory is not enough.
    """
    try:
        parts = one.window(steps, parts=True)  # the first one compiles
        torch.cuda.empty_cache()  # of what the others left
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - sum(each.nbytes for each in one.model.parameters() if each.is_cuda)
        window = one.window(steps, parts=False)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is not enough for a step of one contender and the weights of all others: give "
            "fewer --rows, or fewer --contenders, or --baseline none"
        ) from error
    window.peak_mib = (torch.cuda.max_memory_allocated() - others) / MIB
    window.parts, window.first_step = parts.parts, parts.first_step
    return window


def matrix_rate(plan: Plan) -> float:
    """FLOP/s of a product of two large matrices in the plan's precision, the best of three by torch and by us."""
    side, device = CUBE[plan.device], "cuda" if plan.device == "gpu" else "cpu"
    half = plan.precision.startswith("bf16")
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if half else None) for _ in range(2))
    times = []
    for product in (torch.mm, lambda a, b: matmul(a, b, use_onednn(a))):
        product(one, other)  # not counted
        for _ in range(3):
            began = now()
            product(one, other)
            times.append(now() - began)
    return 2 * side**3 / min(times)


def peak_memory(plan: Plan, name: str, steps: int) -> dict[str, float]:
    """MiB that steps of one contender need beyond the imports: resident memory on a CPU, allocated on a GPU. And their
    throughput."""
    gc.collect()  # what making the config's model has left
    before = resident()
    reset_peak_rss()
    window = contender(name, plan).window(steps, parts=False)
    peak = torch.cuda.max_memory_allocated() if plan.device == "gpu" else peak_rss() - before
    return {"peak_mib": peak / MIB, "tokens_per_second": window.tokens_per_second}


def peak_memory_elsewhere(args: argparse.Namespace, name: str) -> float:
    """MiB of `peak_memory` in a fresh process; not a number where it ended without an answer, which is told."""
    few = command_line(argparse.Namespace(**vars(args) | {"steps": 2}))
    words = [sys.executable, "-m", "llm", "bench", "--memory-of", name, *few]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        print(f"the memory of {name} could not be measured: {said}", file=sys.stderr)
        return math.nan
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def command_line(args: argparse.Namespace) -> list[str]:
    """The options that measure the same again."""
    words = ["--config", args.config, "--rounds", str(args.rounds), "--steps", str(args.steps)]
    words += ["--baseline", args.against] if args.against != "hf" else []
    words += ["--contenders", *args.contenders] if args.contenders != CONTENDERS else []
    words += ["--fast-paths"] if args.fast_paths else []
    words += ["--rows", str(args.rows)] if args.rows else []
    words += ["--micro-batches", str(args.micro_batches)] if args.micro_batches > 1 else []
    words += ["--precision", args.precision] if args.precision else []
    words += ["--compile"] if args.compile else []
    return words + (["--", *args.overrides] if args.overrides else [])


def ratio(windows: dict[str, list[Window]], name: str, to: str) -> dict[str, Any]:
    """Median, least and greatest of the per-round ratios of two contenders' throughputs, and a 95% interval.

    The interval is Student's of the mean of their logarithms, over rounds; null for one round.
    """
    pairs = zip(windows[name], windows[to], strict=True)
    each = [one.tokens_per_second / other.tokens_per_second for one, other in pairs]
    interval = None
    if len(each) > 1:
        logs = np.log(each)
        half = stats.t.ppf(0.975, len(each) - 1) * logs.std(ddof=1) / math.sqrt(len(each))
        interval = [math.exp(logs.mean() - half), math.exp(logs.mean() + half)]
    return {"median": statistics.median(each), "least": min(each), "greatest": max(each), "interval": interval}


def run(args: argparse.Namespace) -> None:
    """Measure and print; with --json write the figures too."""
    if min(args.rounds, args.steps, 1 if args.rows is None else args.rows, args.micro_batches) < 1:
        raise UserError("--rounds, --steps, --rows and --micro-batches must be at least 1")
    if len(set(args.contenders)) < len(args.contenders):
        raise UserError(f"--contenders has one twice: {' '.join(args.contenders)}")
    if args.memory is not None and not (args.fit and args.memory > 0):
        raise UserError("--memory-budget goes with --find-micro-batch and is above 0 GiB")
    if args.fit and (args.rows or args.contenders != CONTENDERS or args.against != "hf" or args.micro_batches > 1):
        raise UserError(
            "--find-micro-batch measures the config alone: leave out --rows, --micro-batches, --contenders, --baseline"
        )
    if args.fast_paths and (args.fit or args.contenders != CONTENDERS or args.against != "hf"):
        raise UserError(
            "--fast-paths compares the config with itself: leave out --contenders, --baseline, --find-micro-batch"
        )
    if args.fit:
        fit(args)
        return
    cli, rows, precision, device = resolve_options(args.config, args.overrides, args.rows, args.precision)
    if args.against == "hf-liger":
        check_liger(cli.model, device)
    data: TokenDataModule = cli.datamodule
    names = [*AGAINST[args.against], *args.contenders]
    if args.fast_paths:
        names = ["config", *(f"without_{name}" for name in fast_paths_of(cli.model)), "without_all"]
    with tempfile.TemporaryDirectory() as folder:
        compiled = args.compile or cli.model.compiled
        masked = data.mask_documents
        plan = Plan(
            cli.model, precision, data.context, rows, device, compiled, Path(folder), args.micro_batches, masked
        )
        plan.fill(args.steps)
        if args.memory_of:
            print(json.dumps(peak_memory(plan, args.memory_of, args.steps)))
            return
        windows, rates = take_turns(plan, {name: contender(name, plan) for name in names}, args.rounds, args.steps)
    if device == "gpu":
        memory = {name: max(window.peak_mib for window in windows[name]) for name in names}
    else:
        memory = {name: peak_memory_elsewhere(args, name) for name in names}
    result = {
        "command": "python -m llm bench " + " ".join(command_line(args)),
        "precision": precision,
        "rows": rows,
        "micro_batches": args.micro_batches,
        "context": data.context,
        "parameters": cli.model.model.num_parameters(),
        "compiled": plan.compile,
        "activation_checkpointing": cli.model.every_nth,
        **figures(plan, names, windows, rates),
        "peak_memory_mib": memory,
        **environment(),
    }
    print_comparison(result)
    if args.fast_paths:
        print(advice(result))
    write(args.json, result)


def resolve_options(
    config: str, overrides: list[str], rows: int | None = None, precision: str | None = None
) -> tuple[Any, int, str, str]:
    """What the options mean: the config's command line, rows of a micro-batch, precision, and gpu or cpu.

    Raises:
        UserError: it cannot be trained here.
    """
    cli = parse(["--config", config, *overrides], run=False)
    rows = rows or cli.datamodule.given_micro_batch_size or cli.datamodule.batch_size
    precision = precision or str(cli.trainer.precision)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    check(cli.model, cli.datamodule, precision, device)
    return cli, rows, precision, device


def check(module: LanguageModule, data: TokenDataModule, precision: str, device: str) -> None:
    """Refuse what cannot be trained here.

    Raises:
        UserError: every problem, each with its fix.
    """
    problems = module.problems(10**9, data.context)
    if precision not in PRECISIONS:
        problems.append(f"--precision {precision!r} is unknown: give one of 32-true, bf16-mixed, bf16-true")
    problems += attention_problems(
        module.attention,
        on_gpu=device == "gpu",
        half="bf16" in precision,
        masked=data.mask_documents,
        dropout=module.decoder_config.attention_dropout,
    )
    if problems:
        raise UserError("; ".join(problems))


def check_liger(module: LanguageModule, device: str) -> None:
    """Refuse Liger-Kernel where it cannot be taken.

    Raises:
        UserError: with what would do.
    """
    c = module.decoder_config
    if device != "gpu" or importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--baseline hf-liger needs a GPU and pip install liger-kernel: give hf")
    if (c.norm, c.position, c.feedforward) != ("rmsnorm", "rope", "gated"):
        raise UserError("--baseline hf-liger: Liger-Kernel has Llama's parts only, not GPT-2's: give hf")


def fit(args: argparse.Namespace) -> None:
    """Print what `micro_batch.py` finds for the config; with --json write it too."""
    run = read(args.config, args.overrides)  # without the memory of a model

    def words(every: int, size: int, micro_batches: int) -> list[str]:
        one = argparse.Namespace(**vars(args) | {"rows": size, "micro_batches": micro_batches})
        one.overrides = [*args.overrides, "--model.activation_checkpointing", str(every)]
        return ["--memory-of", "config", *command_line(one)]

    budget = 1024 * args.memory if args.memory else micro_batch.SHARE * micro_batch.free_memory()
    precision = args.precision or run.precision
    command = [
        "python -m llm bench --find-micro-batch",
        *(["--memory-budget", f"{args.memory:g}"] if args.memory else []),
    ]
    result = {
        "command": " ".join([*command, *command_line(args)]),
        "precision": precision,
        **micro_batch.tune_micro_batch(run, precision, args.compile or run.compiled, budget, args.rounds, words),
        **environment(),
    }
    micro_batch.print_search(result)
    write(args.json, result)


def write(path: Path | None, result: dict[str, Any]) -> None:
    """As JSON, where a path is given."""
    if path is not None:
        write_json(path, result, indent=1)


def figures(plan: Plan, names: list[str], windows: dict[str, list[Window]], rates: list[float]) -> dict[str, Any]:
    """What was measured, in terms of JSON."""
    flops = flops_per_token(plan.module.decoder_config, plan.context)
    first, *others = [name for name in names if name not in TRANSFORMERS]
    pairs = [(name, first) for name in others]
    pairs += [(name, theirs) for name in (first, *others) for theirs in names if theirs in TRANSFORMERS]
    return {
        "tokens_per_second": {name: [each.tokens_per_second for each in windows[name]] for name in names},
        "seconds_of_parts": {
            name: {part: [each.parts[part] for each in windows[name]] for part in PARTS} for name in names
        },
        "seconds_to_first_step": {name: windows[name][0].first_step for name in names},
        "matrix_flops_per_second": rates,
        "model_flops_per_token": flops,
        "model_flop_utilisation": {
            name: [each.tokens_per_second * flops / rate for each, rate in zip(windows[name], rates, strict=True)]
            for name in names
        },
        **{f"{name}_to_{to}": ratio(windows, name, to) for name, to in pairs},
    }


def print_comparison(result: dict[str, Any]) -> None:
    """The result as a table."""
    rate = statistics.median(result["matrix_flops_per_second"])
    print(
        f"{result['parameters']:,} parameters, {result['rows']} x {result['context']} tokens a step, "
        f"{result['precision']}, {'compiled' if result['compiled'] else 'eager'}, {result['device']}; matrix products "
        f"{rate / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':23}{'tokens/s':>12}{'range':>24}{'of the rate':>14}{'peak memory':>14}{'first step':>12}")
    for name, rates in result["tokens_per_second"].items():
        span = f"{min(rates):,.0f} to {max(rates):,.0f}"
        used = statistics.median(result["model_flop_utilisation"][name])
        memory, first = f"{result['peak_memory_mib'][name]:,.0f} MiB", f"{result['seconds_to_first_step'][name]:.1f} s"
        print(f"{name:23}{statistics.median(rates):>12,.0f}{span:>24}{used:>14.1%}{memory:>14}{first:>12}")
    print(f"\n{'ms of a step':23}" + "".join(f"{part:>12}" for part in PARTS))
    for name, parts in result["seconds_of_parts"].items():
        print(f"{name:23}" + "".join(f"{1e3 * statistics.median(parts[part]):>12.1f}" for part in PARTS))
    print()
    for name, r in result.items():
        if isinstance(r, dict) and "median" in r:
            interval = "" if r["interval"] is None else "; 95% interval {:.3f} to {:.3f}".format(*r["interval"])
            print(
                f"{name.replace('_', ' ')}: {r['median']:.3f} ({r['least']:.3f} to {r['greatest']:.3f} over the "
                f"rounds{interval})"
            )


def advice(result: dict[str, Any]) -> str:
    """Which fast paths to switch off: those without which a step is faster, by the whole interval."""
    prefix, suffix = "without_", "_to_config"
    slower = [
        key.removeprefix(prefix).removesuffix(suffix)
        for key, found in result.items()
        if key.startswith(prefix) and key.endswith(suffix) and found["interval"] and found["interval"][0] > 1
    ]
    slower = [name for name in slower if name != "all"]
    if not slower:
        return "\nno fast path is shown to make a step slower here: leave model.disable_fast_paths empty"
    return f"\nslower here than torch's own: set model.disable_fast_paths to [{', '.join(slower)}]"
