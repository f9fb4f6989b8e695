"""`python -m llm study`: plan, run, status, tasks, bench. docs/study.md describes a study's YAML."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.arguments import add_command
from ..common.errors import UserError
from ..runs import reading
from ..runs.study_record import read_record
from .description import read_study
from .status import status_lines

EXAMPLE = "configs/studies/toy.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm study`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    plan = add_command(
        commands,
        "plan",
        "runs, parameters, tokens, FLOPs, memory and device-hours",
        "Check a study, and print what it costs. Nothing is trained and no file is written but that of --json.",
        f"python -m llm study plan {EXAMPLE}",
    )
    plan.add_argument("--device", help="as in `llm plan`: memory is compared with that of this device")
    plan.add_argument("--device-memory", type=float, metavar="GIB", help="memory of a device")
    plan.add_argument("--headroom", type=float, default=0.9, help="share of it that may be planned (default: 0.9)")
    plan.add_argument(
        "--tokens-per-second", type=float, nargs="+", default=[], metavar="X", help="of one device, for each size"
    )
    plan.add_argument("--flops-per-second", type=float, metavar="X", help="... or FLOP/s of one device, at every size")
    plan.add_argument(
        "--bench", type=Path, nargs="+", default=[], metavar="JSON", help="... or what `llm bench --json` recorded"
    )
    plan.add_argument("--json", type=Path, help="also write the plan here")
    run = add_command(
        commands,
        "run",
        "train what is missing, on this machine",
        "Train the runs that are missing. May be killed and repeated at any time; several at once share the runs.",
        f"python -m llm study run {EXAMPLE} --jobs 2",
    )
    run.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the cores and GPUs (default: 1)")
    run.add_argument("--task", metavar="I/N", help="only every Nth chain of runs, from the Ith on (default: all)")
    status = add_command(
        commands,
        "status",
        "how far the runs are",
        "Print how many runs of each size are done, running, failed or missing, and how long the rest takes.",
        f"python -m llm study status {EXAMPLE}",
    )
    status.add_argument("--json", action="store_true", help="print a JSON list, one object a run")
    tasks = add_command(
        commands,
        "tasks",
        "job arrays and their runs, for slurm/study.sh",
        "Print a line for each job array: stage, size, tasks, nodes, GPUs and cores per node, time. With --stage, "
        "--size and --task, print the config of each run of that task that is not over.",
        f"python -m llm study tasks {EXAMPLE}",
    )
    tasks.add_argument("--stage", choices=("tune", "main"), help="of the array")
    tasks.add_argument("--size", help="of the array")
    tasks.add_argument("--task", metavar="I/N", help="of the array")
    bench = _add_bench(commands)
    for command in (plan, run, status, tasks, bench):
        command.add_argument("study", type=Path, metavar="STUDY", help="YAML of the study")


def _add_bench(commands: Any) -> argparse.ArgumentParser:
    bench = add_command(
        commands,
        "bench",
        "step time of every arm",
        "Time a step of every arm, in turns on one device, for the verdict. Writes bench.json to the study's folder.",
        f"python -m llm study bench {EXAMPLE}",
    )
    bench.add_argument("--size", help="of the models (default: the largest)")
    bench.add_argument("--rounds", type=int, default=5, help="rounds in which each arm is measured once (default: 5)")
    bench.add_argument("--steps", type=int, default=10, help="timed steps of a measurement (default: 10)")
    return bench


def run(args: argparse.Namespace) -> None:
    """Run one of the commands.

    Raises:
        UserError: a study that cannot be run, or runs that failed.
        StoppedError: a signal stopped the runs, whose states are saved.
    """
    {"plan": _plan, "run": _run, "status": _status, "tasks": _tasks, "bench": _bench}[args.action](args)


def _plan(args: argparse.Namespace) -> None:
    from .inspection import inspect
    from .plan import Costs, plan_lines, plans, write

    inspection = inspect(read_study(args.study))
    names = ("device", "device_memory", "headroom", "tokens_per_second", "flops_per_second", "bench")
    planned = plans(inspection, Costs(**{name: getattr(args, name) for name in names}))
    print(*plan_lines(inspection, planned), sep="\n")
    if args.json:
        write(args.json, planned)


def _run(args: argparse.Namespace) -> None:
    study = read_study(args.study)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    from .inspection import inspect
    from .run import train

    train(inspect(study), args.jobs, args.task)


def _status(args: argparse.Namespace) -> None:
    record = read_record(args.study)
    if args.json:
        listed = [asdict(run) | asdict(record.state(run)) for run in record.runs]
        print(json.dumps(reading.finite(listed), indent=1, allow_nan=False))
    else:
        print(*status_lines(record), sep="\n")


def _tasks(args: argparse.Namespace) -> None:
    study = read_study(args.study)
    from .inspection import inspect
    from .tasks import arrays, task_configs

    given = (args.stage, args.size, args.task)
    if any(given) and not all(given):
        raise UserError("give --stage, --size and --task together")
    inspection = inspect(study)
    print(*(task_configs(inspection, *given) if all(given) else arrays(inspection)), sep="\n")


def _bench(args: argparse.Namespace) -> None:
    study = read_study(args.study)
    size = args.size or list(study.sizes)[-1]
    if size not in study.sizes:
        raise UserError(f"--size {size} is unknown: give one of {', '.join(study.sizes)}")
    if min(args.rounds, args.steps) < 1:
        raise UserError("--rounds and --steps must be at least 1")
    from .bench import bench

    bench(study, size, args.rounds, args.steps)
