"""`python -m llm study plan`: what a study costs, before any of it is run.

Stages: runs -> for each size what its runs train, in tokens and FLOPs -> memory of a device -> device-hours, from a
throughput that is given, was benched, or was measured by the study's own runs. Nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..common.errors import UserError
from ..common.files import write_json
from ..common.tables import text_table
from ..plan.plan import Device, benchmark, device, lay_out
from ..runs.study_record import NULL_ARM, RECORD, TUNE, StudyRun, read_record
from .inspection import Inspected, Inspection
from .runs import study_runs
from .status import tokens_per_second

GIB = 2**30


@dataclass(frozen=True)
class Costs:
    """What the command line says of costs.

    Args:
        device, device_memory: name, and GiB of a device.
        headroom: share of the memory that may be planned.
        tokens_per_second: of one device, for each size in order.
        flops_per_second: of one device at every size.
        bench: files of `llm bench --json`, for each size in order.
    """

    device: str | None = None
    device_memory: float | None = None
    headroom: float = 0.9
    tokens_per_second: list[float] = field(default_factory=list)
    flops_per_second: float | None = None
    bench: list[Path] = field(default_factory=list)

    def check(self, inspection: Inspection) -> None:
        """UserError naming what cannot be."""
        sizes, problems = list(inspection.study.sizes), []
        given: dict[str, list] = {"--tokens-per-second": self.tokens_per_second, "--bench": self.bench}
        for option, values in given.items():
            if values and len(values) != len(sizes):
                problems.append(f"{option} needs a value for each of the sizes {', '.join(sizes)}, in this order")
        if sum(map(bool, [self.tokens_per_second, self.bench, self.flops_per_second])) > 1:
            problems.append("give one of --tokens-per-second, --flops-per-second and --bench")
        if min([*self.tokens_per_second, self.flops_per_second or 1.0]) <= 0:
            problems.append("--tokens-per-second and --flops-per-second must be above 0")
        if problems:
            raise UserError("; ".join(problems))

    def target(self) -> Device | None:
        """Return the device; None if none was named."""
        return device(self.device, self.device_memory) if self.device or self.device_memory else None


@dataclass(frozen=True)
class SizePlan:
    """What the runs of a size cost in one stage.

    Args:
        size, stage: of the runs.
        seeds: of each arm.
        parameters, non_embedding, flops_per_token: of the baseline; FLOPs forward and backward.
        runs, branches: how many, and how many of them start from a trunk's checkpoint.
        tokens: of each budget.
        trained_tokens, flops: that all these runs train, without what a branch takes over from its trunk.
        devices: of a run.
        memory_bytes: at most of a device, over the arms; with the micro-batch of the config, or the largest that fits.
        fits: whether that is within the device; None if no device was named.
        device_hours: None if no throughput is known.
    """

    size: str
    stage: str
    seeds: int
    parameters: int
    non_embedding: int
    flops_per_token: float
    runs: int
    branches: int
    tokens: list[int]
    trained_tokens: float
    flops: float
    devices: int
    memory_bytes: int
    fits: bool | None
    device_hours: float | None


def plans(inspection: Inspection, costs: Costs) -> list[SizePlan]:
    """Return the plan of each size, the searches first.

    Raises:
        UserError: a device or a throughput cannot be used.
    """
    costs.check(inspection)
    groups: dict[tuple[str, str], list[StudyRun]] = {}
    for run in study_runs(inspection):
        groups.setdefault((run.stage, run.size), []).append(run)
    return [_size_plan(inspection, costs, stage, size, runs) for (stage, size), runs in groups.items()]


def _size_plan(inspection: Inspection, costs: Costs, stage: str, size: str, runs: list[StudyRun]) -> SizePlan:
    study = inspection.study
    baseline = inspection.of(size, study.baseline)
    devices = study.slurm[size].devices
    target = costs.target()
    memory = [_memory(inspection.of(size, arm), devices, target, costs.headroom) for arm in study.arms]
    hours: float | None = 0.0
    for run in runs:
        rate = _throughput(inspection, costs, size, run.arm)
        hours = hours + run.tokens * run.share / rate / 3600 if rate and hours is not None else None
    return SizePlan(
        size=size,
        stage=stage,
        seeds=len({run.seed for run in runs}),
        parameters=baseline.parameters,
        non_embedding=baseline.non_embedding,
        flops_per_token=baseline.flops_per_token,
        runs=len(runs),
        branches=sum(run.trunk is not None for run in runs),
        tokens=sorted({run.tokens for run in runs}),
        trained_tokens=sum(run.tokens * run.share for run in runs),
        flops=sum(run.flops * run.share for run in runs),
        devices=devices,
        memory_bytes=max(memory),
        fits=None if target is None else max(memory) <= costs.headroom * target.memory,
        device_hours=hours,
    )


def _memory(found: Inspected, devices: int, target: Device | None, headroom: float) -> int:
    """Return the peak of a device, in bytes, as `llm plan` computes it."""
    kernels = Device("cpu" if found.on_cpu else "any", float("inf")) if target is None else target
    layout = found.run.layout(devices, not found.on_cpu, **found.layout)
    micro_batch = found.run.micro_batch
    if micro_batch and found.run.batch_size % (devices * micro_batch):
        micro_batch = found.run.batch_size // devices // found.data.micro_batches(devices)
    return int(lay_out(found.run, layout, kernels, headroom * kernels.memory, micro_batch)["peak_bytes"])


def _throughput(inspection: Inspection, costs: Costs, size: str, arm: str) -> float | None:
    """Return tokens per second of one device; None if nothing tells it."""
    place, found = list(inspection.study.sizes).index(size), inspection.of(size, arm)
    if costs.tokens_per_second:
        return costs.tokens_per_second[place]
    if costs.flops_per_second:
        return costs.flops_per_second / found.flops_per_token
    baseline = inspection.of(size, inspection.study.baseline)
    if costs.bench:
        target = costs.target() or Device("any", float("inf"))
        return benchmark(costs.bench[place], baseline.run.measured(target), baseline.run.config.stream or [])[0]
    folder = inspection.study.folder
    return tokens_per_second(read_record(folder), size) if (folder / RECORD).is_file() else None


def plan_lines(inspection: Inspection, planned: list[SizePlan]) -> Iterator[str]:
    """Yield the plan, line by line."""
    study = inspection.study
    arms = ", ".join([study.baseline, *(arm for arm in study.arms if arm != study.baseline)])
    null = f"; {NULL_ARM} is {study.baseline} with other initial weights" if study.null_arm else ""
    yield f"{study.path}: {arms} ({study.baseline} is the baseline{null})"
    numbers = {"size": len(study.sizes), "seed": len(study.seeds), "budget": len(study.tokens.budgets())}
    counts = ", ".join(f"{number} {name}{'' if number == 1 else 's'}" for name, number in numbers.items())
    yield f"{counts}; runs in {study.folder}"
    yield ""
    header = "size,parameters,non-embedding,tokens,runs,branches,FLOPs,devices,GiB each,device-hours".split(",")
    rows = [
        [
            f"{plan.size}, search" if plan.stage == TUNE else plan.size,
            _short(plan.parameters),
            _short(plan.non_embedding),
            ", ".join(map(_short, plan.tokens)),
            str(plan.runs),
            str(plan.branches),
            f"{plan.flops:.2e}",
            str(plan.devices),
            f"{plan.memory_bytes / GIB:.2f}" + (" (too much)" if plan.fits is False else ""),
            "unknown" if plan.device_hours is None else f"{plan.device_hours:,.2f}",
        ]
        for plan in planned
    ]
    hours = [plan.device_hours for plan in planned]
    total = f"{sum(each or 0 for each in hours):,.2f}" if None not in hours else "unknown"
    runs, branches = (str(sum(getattr(plan, name) for plan in planned)) for name in ("runs", "branches"))
    rows.append(["all", "", "", "", runs, branches, f"{sum(plan.flops for plan in planned):.2e}", "", "", total])
    yield text_table(header, rows)
    if None in hours:
        yield (
            "device-hours: give --tokens-per-second, --flops-per-second or --bench; a study that has begun uses what "
            "its runs measure"
        )
    yield f"the smallest gain that it can show: python -m evals study {study.path} --plan"
    yield from (f"note: {note}" for note in inspection.notes)
    for store in inspection.missing_stores:
        yield f"note: {store} is not here, so whether it has enough tokens was not checked"


def write(path: Path, planned: list[SizePlan]) -> None:
    """Write the plan as JSON, in bytes and tokens."""
    write_json(path, json.loads(json.dumps([asdict(plan) for plan in planned])))


def _short(number: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:g}"
