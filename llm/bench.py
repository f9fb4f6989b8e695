"""`python -m llm bench --config C`: throughput and peak memory of a config, beside the same-sized transformers model.

Stages: config -> three contenders (transformers in a bare loop; classic and values through the whole `fit` loop) ->
windows of steps in turn, A B C A B C -> ratios within each round, their median and range -> peak memory, each
contender in a process of its own.

Everyone gets rows of random tokens of the same number and length, the same precision, sdpa attention, fused AdamW and
clipping. transformers' model is the nearest that it has: switches off, and GPT-2 with all its biases. The steps at the
start of a window are not counted: they allocate and, where asked for, compile.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from transformers import PreTrainedModel

from .data.module import TokenDataModule
from .data.shard import SPLITS, ShardWriter, token_dtype
from .data.store import write_index
from .errors import UserError
from .model import DecoderConfig
from .model.convert import TO_HF_ACTIVATION, model_to_hf
from .train.callbacks import callbacks
from .train.cli import PRECISIONS, TRAINER_DEFAULTS, parse
from .train.environment import environment
from .train.loop import whole_step
from .train.measure import resident_peak
from .train.module import LanguageModule
from .train.optim import Schedule
from .train.run import RunFolder, RunSettings
from .train.saving import Checkpoints
from .train.signals import Signals

CONTENDERS = ("transformers", "classic", "values")
UNCOUNTED = 2  # steps at the start of a window
MIB = 2**20


@dataclass
class Plan:
    """What is measured: `rows` x `context` tokens a step, on `device` at `precision`."""

    module: LanguageModule
    precision: str
    context: int
    rows: int
    device: str
    compile: bool
    folder: Path

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context

    def data(self) -> TokenDataModule:
        return TokenDataModule(str(self.folder), self.context, self.rows, validate_every=10**9)


def random_store(folder: Path, vocab_size: int, tokens: int) -> None:
    """A token store of one document of random tokens in each split: speed does not depend on what is said."""
    generator, manifests = np.random.default_rng(0), {}
    for split in SPLITS:
        with ShardWriter(folder / split, "random", token_dtype(vocab_size)) as writer:
            writer.add(generator.integers(vocab_size, size=tokens), np.array([tokens]))
            manifests[split] = [writer.finish(split, {"location": "random", "size": 0, "sha256": ""}, "none", {})]
    write_index(folder, manifests, vocab_size=vocab_size, end_of_document=0, tokenizer_fingerprint="none")


def with_settings(config: DecoderConfig, **settings: Any) -> DecoderConfig:
    """A copy of the config with other settings."""
    changed = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed


def nearest_in_transformers(config: DecoderConfig) -> DecoderConfig:
    """The same sizes without what transformers' Llama and GPT-2 lack: switches off, GPT-2 with all its biases."""
    gated = config.feedforward == "gated"
    act = config.hidden_act if config.hidden_act in TO_HF_ACTIVATION else "silu" if gated else "gelu_new"
    biases = {} if gated else {"attention_bias": True, "mlp_bias": True}
    return with_settings(
        config, stream=[], softmax_scale=None, unpadded_vocab_size=config.vocab_size, hidden_act=act, **biases
    )


class StepTimes(pl.Callback):
    """The moment at which each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if whole_step(trainer, batch_idx):
            self.ends.append(now())


def now() -> float:
    """Seconds, after all work on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Fit:
    """Our model through the whole fit loop: loader, callbacks, CSV and TensorBoard loggers."""

    def __init__(self, plan: Plan, stream: list[str]) -> None:
        self.plan = plan
        given = plan.module
        self.module = LanguageModule(
            with_settings(given.decoder_config, stream=stream),
            given.optimizer_settings,
            Schedule(shape="constant"),
            gradient_clip=given.gradient_clip or 1.0,
            compile=plan.compile,
        )

    def window(self, steps: int) -> float:
        """Tokens per second over `steps` steps."""
        times = StepTimes()
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(RunSettings(f"{folder}/run", checkpoint_every=10**9), {})
            trainer = pl.Trainer(
                **TRAINER_DEFAULTS | {"limit_val_batches": 0},
                max_steps=steps + UNCOUNTED,
                accelerator=self.plan.device,
                precision=self.plan.precision,  # type: ignore[arg-type]
                callbacks=[times, *(c for c in callbacks(run, Signals()) if not isinstance(c, Checkpoints))],
            )
            trainer.loggers = run.open("", {})
            trainer.fit(self.module, datamodule=self.plan.data())
        return steps * self.plan.tokens_per_step / (times.ends[-1] - times.ends[UNCOUNTED - 1])


class Bare:
    """transformers' model of the same sizes in a bare PyTorch loop, at its best settings on this machine."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device = torch.device("cuda" if plan.device == "gpu" else "cpu")
        model: PreTrainedModel = model_to_hf(nearest_in_transformers(plan.module.decoder_config))
        model.set_attn_implementation("sdpa")
        half = torch.bfloat16 if plan.precision == "bf16-true" else torch.float32
        self.model = model.to(self.device, half).train()  # type: ignore[arg-type]
        self.model.config.use_cache = False
        self.optimizer = plan.module.optimizer_settings.build(self.model)
        self.clip = plan.module.gradient_clip or 1.0
        self.forward = torch.compile(self.model) if plan.compile else self.model

    def window(self, steps: int) -> float:
        """Tokens per second over `steps` steps."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.plan.rows, self.plan.context)
        vocabulary = self.model.config.vocab_size
        batches = [torch.randint(vocabulary, shape, generator=generator) for _ in range(steps + UNCOUNTED)]
        ends = []
        for batch in batches:
            ids = batch.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16-mixed"):
                loss = self.forward(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            ends.append(now())
        return steps * self.plan.tokens_per_step / (ends[-1] - ends[UNCOUNTED - 1])


def contender(name: str, plan: Plan) -> Fit | Bare:
    """The contender called `name`, its model built."""
    return Bare(plan) if name == "transformers" else Fit(plan, ["values"] if name == "values" else [])


def measure(plan: Plan, rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second of each contender in each round; within a round they run one after the other."""
    contenders = {name: contender(name, plan) for name in CONTENDERS}
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds):
        order = CONTENDERS if turn % 2 == 0 else CONTENDERS[::-1]  # a drift of the machine hits everyone alike
        for name in order:
            rates[name].append(contenders[name].window(steps))
            print(f"round {turn + 1}/{rounds}  {name:13}{rates[name][-1]:>12,.0f} tokens/s", file=sys.stderr)
    return rates


def peak_memory(plan: Plan, name: str) -> float:
    """MiB that two steps of one contender need beyond the imports: resident memory on a CPU, allocated on a GPU."""
    before = resident_peak()
    contender(name, plan).window(2)
    if plan.device == "gpu":
        return torch.cuda.max_memory_allocated() / MIB
    return (resident_peak() - before) / MIB


def peak_memory_elsewhere(args: argparse.Namespace, name: str) -> float:
    """`peak_memory` in a fresh process, whose high-water mark is its own."""
    words = [sys.executable, "-m", "llm", "bench", "--memory-of", name, *command_line(args)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def command_line(args: argparse.Namespace) -> list[str]:
    """The options that measure the same again."""
    words = ["--config", args.config, "--rounds", str(args.rounds), "--steps", str(args.steps)]
    words += ["--rows", str(args.rows)] if args.rows else []
    words += ["--precision", args.precision] if args.precision else []
    words += ["--compile"] if args.compile else []
    return words + (["--", *args.overrides] if args.overrides else [])


def ratio(rates: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median, least and greatest of the per-round ratios of two contenders."""
    each = [a / b for a, b in zip(rates[name], rates[to], strict=True)]
    return {"median": statistics.median(each), "least": min(each), "greatest": max(each)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm bench`."""
    parser.add_argument("--config", required=True, help="YAML of a run")
    parser.add_argument("--rows", type=int, help="rows a step (default: data.micro_batch_size or data.batch_size)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender has its turn (default: 5)")
    parser.add_argument("--steps", type=int, default=10, help="counted steps a turn (default: 10)")
    parser.add_argument("--precision", help="as trainer.precision (default: the config's)")
    parser.add_argument("--compile", action="store_true", help="torch.compile all three")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="after --, dotted overrides of the config")
    parser.epilog = (
        "example: python -m llm bench --config configs/stories_classic.yaml --rounds 5 -- --data.context 128"
    )


def run(args: argparse.Namespace) -> None:
    """Measure and print; with --json write the figures too."""
    if min(args.rounds, args.steps, args.rows or 1) < 1:
        raise UserError("--rounds, --steps and --rows must be at least 1")
    cli = parse(["--config", args.config, *args.overrides], run=False)
    data: TokenDataModule = cli.datamodule
    rows = args.rows or data.given_micro_batch_size or data.batch_size
    precision = args.precision or str(cli.trainer.precision)
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision!r} is unknown: give one of 32-true, bf16-mixed, bf16-true")
    device = "gpu" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        windows = rows * (args.steps + UNCOUNTED)
        vocabulary = cli.model.decoder_config.unpadded_vocab_size
        random_store(Path(folder), vocabulary, windows * data.context + 1)
        plan = Plan(cli.model, precision, data.context, rows, device, args.compile, Path(folder))
        if args.memory_of:
            print(peak_memory(plan, args.memory_of))
            return
        rates = measure(plan, args.rounds, args.steps)
    torch.cuda.empty_cache()  # the processes that measure memory come next
    memory = {name: peak_memory_elsewhere(args, name) for name in CONTENDERS}
    result = {
        "command": "python -m llm bench " + " ".join(command_line(args)),
        "precision": precision,
        "rows": rows,
        "context": data.context,
        "parameters": cli.model.model.num_parameters(),
        "compiled": args.compile,
        "tokens_per_second": rates,
        "classic_to_transformers": ratio(rates, "classic", "transformers"),
        "values_to_classic": ratio(rates, "values", "classic"),
        "peak_memory_mib": memory,
        **environment(),
    }
    report(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))


def report(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(
        f"{result['parameters']:,} parameters, {result['rows']} x {result['context']} tokens a step, "
        f"{result['precision']}, {'compiled' if result['compiled'] else 'eager'}, {result['device']}"
    )
    print(f"{'':15}{'tokens/s':>12}{'range':>24}{'peak memory':>16}")
    for name, rates in result["tokens_per_second"].items():
        span = f"{min(rates):,.0f} to {max(rates):,.0f}"
        memory = f"{result['peak_memory_mib'][name]:,.0f} MiB"
        print(f"{name:15}{statistics.median(rates):>12,.0f}{span:>24}{memory:>16}")
    for name in ("classic_to_transformers", "values_to_classic"):
        r = result[name]
        print(f"{name.replace('_', ' ')}: {r['median']:.3f} ({r['least']:.3f} to {r['greatest']:.3f} over the rounds)")
