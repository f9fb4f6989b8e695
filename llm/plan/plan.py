"""`python -m llm plan --config C --gpus 8 64 --device h100`: what a run needs, before any GPU-hour is spent.

Stages: config -> sizes, tokens, FLOPs -> for each number of devices and each layout of the model's state the largest
micro-batch that fits, its memory and what is sent -> days, where a throughput was given or measured -> table, JSON.

Nothing is built and no store is read. Memory is `llm/plan/step_memory.py`, traffic `llm/plan/communication.py`, FLOPs
`llm/train/flops.py`. Time is never guessed: it comes from --tokens-per-second or from a recorded `llm bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.errors import UserError
from ..common.files import write_json
from ..model import DecoderConfig
from ..train.cli import CLI, parse
from ..train.flops import PEAKS, flops_per_token
from ..train.optim import Optimizer
from .activation_memory import Work, block_terms
from .communication import bytes_sent, collectives
from .parameters import head_matrix, parameters
from .report import format_plan
from .state_memory import Layout, formats
from .step_memory import Moment, Step, largest_micro_batch
from .step_time import Network, benchmark, step_time

GIB = 2**30
# Memory in GB (10^9 bytes) of the vendor's data sheets; the name in PEAKS. What a driver reports is a little more.
DEVICES: dict[str, tuple[float, str]] = {
    "b200": (180, "NVIDIA B200"),
    "gh200": (96, "NVIDIA GH200 480GB"),
    "h200": (141, "NVIDIA H200"),
    "h100": (80, "NVIDIA H100 80GB HBM3"),
    "h100-nvl": (94, "NVIDIA H100 NVL"),
    "h100-pcie": (80, "NVIDIA H100 PCIe"),
    "a100-80": (80, "NVIDIA A100-SXM4-80GB"),
    "a100-80-pcie": (80, "NVIDIA A100 80GB PCIe"),
    "a100-40": (40, "NVIDIA A100-SXM4-40GB"),
    "a100-40-pcie": (40, "NVIDIA A100-PCIE-40GB"),
    "l40s": (48, "NVIDIA L40S"),
    "a4000": (16, "NVIDIA RTX A4000"),
    "mi300x": (192, "AMD Instinct MI300X"),
}


@dataclass(frozen=True)
class Device:
    """One device: its memory in bytes, and its whole name, None where only the memory is known."""

    name: str
    memory: float
    driver_name: str | None = None

    def peak(self, half: bool) -> float | None:
        """FLOP/s of the data sheet, None where the device is not known."""
        return None if self.driver_name is None else PEAKS[self.driver_name][0 if half else 1]


@dataclass(frozen=True)
class PlannedRun:
    """What a config says that decides what its run needs."""

    config: DecoderConfig
    context: int
    batch_size: int
    micro_batch: int | None
    max_steps: int
    precision: str
    recompute: int
    compiled: bool
    attention: str
    plain: list[str]
    masked: bool
    bucket: int
    rounded: bool
    optimizer: Optimizer

    @property
    def tokens(self) -> int:
        return self.max_steps * self.batch_size * self.context

    @property
    def half(self) -> bool:
        return "bf16" in self.precision

    def recomputed_share(self) -> float:
        """Of the model's FLOPs: a forward pass, a third, of each recomputed block."""
        if self.recompute <= 0:
            return 0.0
        layers = self.config.num_hidden_layers
        whole = flops_per_token(self.config, self.context)
        in_blocks = 1 - 6 * head_matrix(self.config) / whole
        return len(range(0, layers, self.recompute)) / layers * in_blocks / 3

    def measured(self, target: Device) -> dict[str, Any]:
        """What a benchmark has to be of to be this run's."""
        wanted = {"parameters": parameters(self.config), "context": self.context, "precision": self.precision}
        return wanted | ({"device": target.driver_name} if target.driver_name is not None else {})

    def layouts(self, devices: int, overlap: bool) -> list[Layout]:
        """The ways to lay the state on `devices`; sharded, bf16-true has no fp32 master weights."""
        layouts = [self.layout(devices, overlap, 0)]
        if self.precision != "bf16-true":
            zero = [(stage, offload) for offload in (False, True) for stage in (1, 2, 3)]
            possible = [each for each in zero if not self.optimizer.sharding_problems(*each)]
            layouts += [self.layout(devices, overlap, stage, offload) for stage, offload in possible]
            layouts += [self.layout(devices, overlap, stage, fsdp=True) for stage in (1, 2, 3)]
        return layouts

    def layout(self, devices: int, overlap: bool, stage: int, offload: bool = False, fsdp: bool = False) -> Layout:
        """One of them."""
        return Layout(stage, devices, self.bucket, offload, overlap, self.optimizer.name, fsdp, self.rounded)


def read(path: str, overrides: list[str]) -> PlannedRun:
    """The run of a config and dotted overrides; its model is made on the meta device.

    Raises:
        UserError: the config cannot be used.
    """
    cli = instantiate(path, overrides)
    model, data = cli.model, cli.datamodule
    if problems := [*model.problems(cli.trainer.max_steps, data.context), *data.problems()]:
        raise UserError("; ".join(problems))
    return run_of(cli)


def instantiate(config: str, overrides: Sequence[str] = ()) -> CLI:
    """Make what a config (its path, or its text) names, on one CPU, the model on the meta device. Raises UserError."""
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"]
    here += ["--strategy.name", "auto", "--strategy.offload_optimizer", "false"]
    with torch.device("meta"):
        return parse(["--config", config, *overrides, *here], run=False)


def run_of(cli: CLI) -> PlannedRun:
    """Return what the plan needs of a config."""
    model, data = cli.model, cli.datamodule
    return PlannedRun(
        model.decoder_config,
        data.context,
        data.batch_size,
        data.given_micro_batch_size,
        cli.trainer.max_steps,
        str(cli.trainer.precision),
        model.every_nth,
        cli.config["model.compile"],
        model.attention,
        model.disable_fast_paths,
        data.mask_documents,
        cli.config["strategy.bucket_elements"],
        cli.config["strategy.communication_dtype"] == "bf16",
        model.optimizer_settings,
    )


def device(name: str | None, gib: float | None) -> Device:
    """The device of --device, or one of --device-memory alone.

    Raises:
        UserError: neither is given, or the name is not known.
    """
    if gib is not None and gib <= 0:
        raise UserError(f"--device-memory {gib:g} must be above 0 GiB")
    if name is None and gib is None:
        raise UserError(f"give --device, one of {', '.join(DEVICES)}, or --device-memory GIB")
    if name is None:
        return Device(f"{gib:g} GiB", (gib or 0) * GIB)
    if name == "cpu":
        if gib is None:
            raise UserError("--device cpu needs --device-memory, the GiB that each process may take")
        return Device(name, gib * GIB)
    if name not in DEVICES:
        raise UserError(f"--device {name!r} is unknown: give one of {', '.join(DEVICES)}, or --device-memory GIB")
    gigabytes, driver_name = DEVICES[name]
    return Device(name, gigabytes * 1e9 if gib is None else gib * GIB, driver_name)


def rows_per_device(batch_size: int, devices: int, micro_batch: int | None) -> int:
    """Rows of a step on each device.

    Raises:
        UserError: they do not divide; the message names the nearest batch size that does.
    """
    unit = devices * (micro_batch or 1)
    if batch_size % unit:
        nearest = max(1, round(batch_size / unit)) * unit
        what = f"{devices} devices" + (f" x micro-batch {micro_batch}" if micro_batch else "")
        raise UserError(f"data.batch_size {batch_size} is not a multiple of {what}: the nearest that is, is {nearest}")
    return batch_size // devices


def lay_out(run: PlannedRun, layout: Layout, target: Device, limit: float, micro_batch: int | None) -> dict[str, Any]:
    """One row of the plan: the micro-batch, its memory at the highest moment, what is sent."""
    rows = rows_per_device(run.batch_size, layout.devices, micro_batch)
    kernels = "cpu" if target.name == "cpu" else "cuda"

    def step(size: int) -> Step:
        form = formats(run.precision, layout.stage)
        work = Work(run.config, size, run.context, form, kernels, run.masked, run.compiled)
        return Step(work, layout, rows // size, run.recompute)

    def highest(size: int) -> Moment:
        return step(size).peak()

    chosen = micro_batch or largest_micro_batch(rows, lambda size: highest(size).total <= limit) or 1
    moment, weight = highest(chosen), formats(run.precision, layout.stage).weights
    accumulation = rows // chosen
    return {
        "layout": layout.name,
        "devices": layout.devices,
        "rows_per_device": rows,
        "micro_batch": chosen,
        "micro_batches": accumulation,
        "fits": moment.total <= limit,
        "peak_bytes": moment.total,
        "peak_moment": moment.name,
        "bytes": moment.device,
        "host_bytes": moment.host,
        "block_bytes": block_terms(step(chosen).work, 1),
        "sent_bytes": bytes_sent(run.config, weight, layout, accumulation),
        "collectives": [vars(c) for c in collectives(run.config, weight, layout, accumulation)],
    }


def timing(run: PlannedRun, target: Device, devices: list[int], rate: float, source: str) -> dict[str, Any]:
    """Days and GPU-hours at `rate` tokens per second and device, and the share of the device's peak that it means."""
    peak = target.peak(run.half)
    used = rate * flops_per_token(run.config, run.context)
    return {
        "tokens_per_second_per_device": rate,
        "source": source,
        "days": {str(n): run.tokens / (rate * n) / 86400 for n in devices},
        "gpu_hours": run.tokens / rate / 3600,
        "model_flop_utilisation": used / peak if peak else None,
    }


def run(args: argparse.Namespace) -> None:
    """Compute and print; with --json write the figures too."""
    check(args)
    target = device(args.device, args.device_memory)
    planned = read(args.config, args.overrides)
    limit = args.headroom * target.memory
    overlap = target.name != "cpu"
    rows = [
        lay_out(planned, layout, target, limit, args.micro_batch)
        for gpus in args.gpus
        for layout in planned.layouts(gpus, overlap)
    ]
    rate, source = args.tokens_per_second, "--tokens-per-second"
    if args.bench is not None:
        rate, source = benchmark(args.bench, planned.measured(target), planned.config.stream or [])
    time = timing(planned, target, args.gpus, rate, source) if rate else None
    network = None
    if args.network is not None:
        network = Network(args.network, args.gpus_per_node)
        for row in rows:
            row["time"] = step_time(row, planned.context, planned.max_steps, network, rate)
    per_token = flops_per_token(planned.config, planned.context)
    result = {
        "config": args.config,
        "overrides": args.overrides,
        "parameters": parameters(planned.config),
        "context": planned.context,
        "batch_size": planned.batch_size,
        "max_steps": planned.max_steps,
        "tokens": planned.tokens,
        "precision": planned.precision,
        "activation_checkpointing": planned.recompute,
        "compiled": planned.compiled,
        "attention": planned.attention,
        "plain": planned.plain,
        "flops_per_token": per_token,
        "flops": per_token * planned.tokens,
        "recomputed_share": planned.recomputed_share(),
        "device": {"name": target.name, "memory_bytes": target.memory, "peak_flops": target.peak(planned.half)},
        "headroom": args.headroom,
        "config_micro_batch": planned.micro_batch,
        "layouts": rows,
        "network": vars(network) if network else None,
        "time": time,
    }
    print(format_plan(result))
    if args.json:
        write_json(args.json, result, indent=1)


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be.

    Raises:
        UserError: every problem, each with its fix.
    """
    problems = []
    if min(args.gpus) < 1:
        problems.append(f"--gpus {min(args.gpus)} must be at least 1")
    if args.micro_batch is not None and args.micro_batch < 1:
        problems.append(f"--micro-batch {args.micro_batch} must be at least 1")
    if not 0 < args.headroom <= 1:
        problems.append(f"--headroom {args.headroom:g} must be above 0 and at most 1")
    if args.tokens_per_second is not None and not args.tokens_per_second > 0:
        problems.append(f"--tokens-per-second {args.tokens_per_second:g} must be above 0")
    if args.network is not None and not args.network > 0:
        problems.append(f"--network {args.network:g} must be above 0 Gb/s")
    if args.gpus_per_node < 1:
        problems.append(f"--gpus-per-node {args.gpus_per_node} must be at least 1")
    if args.tokens_per_second is not None and args.bench is not None:
        problems.append("give --tokens-per-second or --bench, not both")
    if not Path(args.config).is_file():
        problems.append(f"--config {args.config} is not there: give the YAML of a run, such as those in configs/")
    if problems:
        raise UserError("; ".join(problems))
