"""`python -m llm bench-ranks --config C`: what several processes cost and gain, beside one.

Stages: config -> layouts (one process, DDP, ZeRO, FSDP2), each a real `python -m llm fit` on random tokens, in turn,
round after round -> what a callback measures in each process -> shares, medians and ranges as a table and as JSON.

Every layout has the same global batch, and each of its processes the same number of threads, so that on CPUs two
processes work with twice the cores of one. What is measured inside a process, and how, is in `probe.py`. Of it

    throughput      is that of the steps without checkpoint and profiler, after a warm-up
    communication   is the share of time in collectives: sending, and waiting for a slower rank; `alone` the part of it
                    in which nothing was computed beside
    sent            are the bytes of a step from each process, and the share of them that a backward pass can hide, by
                    the collectives' sizes and times (`traffic.py`)
    a checkpoint    holds training up while the state is gathered and copied (`Checkpoints.seconds` of rank zero); its
                    writing goes on beside the steps (of one process on a core of its own) and shows in their throughput
    peak memory     is that of the rank that needs most
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.environment import environment
from ..common.errors import UserError
from ..common.files import write_json
from ..common.processes import available_cores
from ..data.module import TokenDataModule
from ..train.cli import parse
from ..train.options import PRECISIONS
from ..train.strategy import StrategySettings
from .contenders import random_store
from .data import spread
from .options import LAYOUTS
from .probe import PROFILED, WARM_UP

# ---- The fits --------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The fits of a command: `sizes` as in its JSON, `folder` for the store and one run at a time."""

    args: argparse.Namespace
    sizes: dict[str, Any]
    folder: Path

    @property
    def max_steps(self) -> int:
        return WARM_UP + 2 * self.args.steps + PROFILED

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def processes(self, name: str) -> int:
        return 1 if name == "plain" else self.args.processes

    def words(self, name: str) -> list[str]:
        """The command line of a layout's fit, which differs from the config's where it has to."""
        run, args = self.folder / "run", self.args
        settings = {
            "data.store": self.store,
            "data.packing": "packed",  # all full
            "data.batch_size": self.sizes["rows"],
            "data.validate_every": 10**9,
            "model.schedule.warmup_steps": 0,  # that of the config may be longer than these few steps
            "model.schedule.cooldown_steps": 0,
            "run.folder": run,
            "run.loggers": "[csv]",
            "run.checkpoint_every": WARM_UP + args.steps,
            "run.keep_checkpoints": 1,
            "run.keep_every": "null",
            "strategy.timeout": 300,
            "trainer.max_steps": self.max_steps,
            "trainer.limit_val_batches": 0,
            "trainer.num_nodes": 1,
            "trainer.devices": self.processes(name),
            "trainer.accelerator": args.accelerator,
            "trainer.precision": self.sizes["precision"],
        }
        probe = {
            "class_path": "llm.bench.probe.Probe",
            "init_args": {"out": str(self.folder / "out"), "steps": args.steps},
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        words += [*layout_arguments(name), f"--trainer.callbacks+={json.dumps(probe)}"]
        return [sys.executable, "-m", "llm", "fit", "--config", args.config, *args.overrides, *words]

    def fit(self, name: str) -> list[dict[str, Any]]:
        """One fit of a layout, in processes of its own; what each of its ranks measured.

        Raises:
            UserError: it failed.
        """
        run, out, log = (self.folder / part for part in ("run", "out", "log"))
        out.mkdir()
        try:
            with log.open("w") as stream:
                status = run_group(
                    self.words(name), child_environment(self.sizes["threads"], self.args.accelerator), stream
                )
            files = sorted(out.glob("rank-*.json"), key=lambda file: int(file.stem.split("-")[1]))
            if status or len(files) != self.processes(name):
                said = [line for line in log.read_text().splitlines() if line.strip()] or ["it said nothing"]
                why = next((line for line in said if line.startswith("error: ")), said[-1])
                raise UserError(f"the fit of {name} failed with status {status}: {why.removeprefix('error: ')}")
            return [json.loads(file.read_text()) for file in files]
        finally:
            shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(out)


def layout_arguments(name: str) -> list[str]:
    return [word for key, value in LAYOUTS[name].items() for word in (f"--strategy.{key}", str(value).lower())]


def child_environment(threads: int, accelerator: str) -> dict[str, str]:
    """The environment of a fit that starts its own processes, also within a job of Slurm."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if accelerator == "cpu" else {}
    place = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") and key not in place}
    given = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TORCH_FR_BUFFER_SIZE": "20000"}
    return kept | hidden | given


def run_group(words: list[str], environment: dict[str, str], log: Any) -> int:
    """Run a command and return its status; however this ends, nothing that it started goes on."""
    process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, so that temporary folders and processes go."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def time_layouts(plan: Plan, layouts: list[str], rounds: int) -> dict[str, list[list[dict[str, Any]]]]:
    """What the ranks of each layout measured in each round; the order is turned round from one to the next."""
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in layouts}
    for turn in range(rounds):
        for name in layouts[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(plan.fit(name))
            seconds = statistics.fmean(found[name][-1][0]["plain_step_seconds"])
            print(f"round {turn + 1}/{rounds}  {name:8}{seconds:10.3f} s a step", file=sys.stderr)
    return found


# ---- Figures ---------------------------------------------------------------------------------------------------------


def figures(ranks: list[dict[str, Any]], tokens: int, steps: int, every: int) -> dict[str, float]:
    """Of one fit of `tokens` a step; shares are of time. `every`: steps between the checkpoints of the config."""
    zero, profiled = ranks[0], [rank["profiled"] for rank in ranks]
    plain, saved = sum(zero["plain_step_seconds"]), sum(zero["with_checkpoint_step_seconds"])
    shares = {
        f"{kind}_share": [rank[f"{kind}_seconds"] / rank["seconds"] for rank in profiled]
        for kind in ("communication", "alone")
    }
    return {
        "tokens_per_second": steps * tokens / plain,
        "tokens_per_second_with_checkpoint": steps * tokens / saved,
        "checkpoint_share": zero["held_up_seconds"] / saved,
        "checkpoint_share_at_config": zero["held_up_seconds"] / (zero["held_up_seconds"] + every * plain / steps),
        "held_up_seconds": zero["held_up_seconds"],
        "writing_seconds": zero["written"]["seconds"],
        "checkpoint_bytes": sum(zero["written"]["bytes"].values()),
        **{name: each[0] for name, each in shares.items()},
        **{f"{name}_of_any_rank": max(each) for name, each in shares.items()},
        "communication_seconds_a_step": profiled[0]["communication_seconds"] / PROFILED,
        "sent_bytes_a_step": profiled[0]["sent_bytes"] / PROFILED,
        "sent_in_backward_share": profiled[0]["sent_in_backward_bytes"] / max(1.0, profiled[0]["sent_bytes"]),
        "profiled_to_plain": (profiled[0]["seconds"] / PROFILED) / (plain / steps),
        "peak_memory_mib": max(rank["peak_memory_mib"]["plain"] for rank in ranks),
        "peak_memory_mib_with_checkpoint": max(rank["peak_memory_mib"]["with_checkpoint"] for rank in ranks),
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Each layout's figures over the rounds, and its throughput to that of one process within a round."""
    given = (result["rows"] * result["context"], result["steps"], result["checkpoint_every_of_config"])
    each = {name: [figures(ranks, *given) for ranks in rounds] for name, rounds in result["raw"].items()}
    found: dict[str, Any] = {}
    for name, rounds in each.items():
        found[name] = {key: spread([figure[key] for figure in rounds]) for key in rounds[0]}
        if "plain" in each:
            pairs = zip(rounds, each["plain"], strict=True)
            found[name]["to_plain"] = spread([a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs])
    return found


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result: medians, with ranges over the rounds where they say most."""

    def ranged(values: dict[str, float], digits: int) -> str:
        return f"{values['median']:,.{digits}f} ({values['least']:,.{digits}f} to {values['greatest']:,.{digits}f})"

    speed = [["", "tokens/s", "to one process", "communication", "most of a rank", "alone"]]
    speed[0] += ["sent MB a step", "in backward", "peak MiB", "saving too"]
    steps, every = result["steps"], result["checkpoint_every_of_config"]
    saving = [["a checkpoint", "holds up, s", f"of {steps} steps", f"of {every:,}", "written in, s", "MB", "tokens/s"]]
    for name, of in result["layouts"].items():
        to = ranged(of["to_plain"], 3) if "to_plain" in of else ""
        median = {key: values["median"] for key, values in of.items()}
        shares = ("communication_share", "communication_share_of_any_rank", "alone_share")
        memory = ("peak_memory_mib", "peak_memory_mib_with_checkpoint")
        speed.append([name, ranged(of["tokens_per_second"], 0), to, *(f"{median[key]:.1%}" for key in shares)])
        speed[-1] += [f"{median['sent_bytes_a_step'] / 1e6:,.1f}", f"{median['sent_in_backward_share']:.0%}"]
        speed[-1] += [f"{median[key]:,.0f}" for key in memory]
        saving.append([name, f"{median['held_up_seconds']:.3f}", f"{median['checkpoint_share']:.2%}"])
        saving[-1] += [f"{median['checkpoint_share_at_config']:.4%}", f"{median['writing_seconds']:.3f}"]
        saving[-1] += [f"{median['checkpoint_bytes'] / 1e6:,.1f}", ranged(of["tokens_per_second_with_checkpoint"], 0)]
    yield (
        f"{result['parameters']:,} parameters, {result['rows']} x {result['context']} tokens a step, "
        f"{result['precision']}, {result['processes']} processes (plain: 1) of {result['threads']} thread(s) on "
        f"{result['cores']} cores, {result['device'].split(',')[0]}"
    )
    yield from aligned(speed)
    yield from aligned(saving)


def aligned(rows: list[list[str]]) -> Iterator[str]:
    """Rows of cells as lines, the first cell to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "   ".join([first.ljust(widths[0]), *cells])


# ---- Command ---------------------------------------------------------------------------------------------------------


def command_line(args: argparse.Namespace) -> str:
    """The words that measure the same again."""
    words = ["--config", args.config, "--layouts", *args.layouts, "--processes", str(args.processes)]
    for name in ("threads", "rows", "rounds", "steps", "precision", "accelerator"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join([*words, *(["--", *args.overrides] if args.overrides else [])])


def check(args: argparse.Namespace, precision: str, compiled: bool) -> None:
    """UserError naming all that cannot be."""
    problems = []
    if min(args.rounds, args.steps, args.rows or 1, args.threads or 1) < 1 or args.processes < 2:
        problems.append("--rounds, --steps, --rows and --threads must be at least 1, --processes at least 2")
    if precision not in PRECISIONS:
        problems.append(f"--precision {precision!r} is unknown: give one of 32-true, bf16-mixed, bf16-true")
    devices = torch.cuda.device_count()
    if args.accelerator == "gpu" and args.processes > devices:
        problems.append(f"--processes {args.processes} are more than the {devices} GPU(s): give fewer, or cpu")
    sharded = [name for name in args.layouts if LAYOUTS[name]["name"] == "deepspeed"]
    if sharded and importlib.util.find_spec("deepspeed") is None:
        problems.append(f"{', '.join(sharded)} need deepspeed: pip install 'hippoformer[deepspeed]', or --layouts")
    of_strategies = [
        sentence
        for name in args.layouts
        for sentence in StrategySettings(**LAYOUTS[name]).problems(precision, compiled)
    ]
    if problems := [*problems, *dict.fromkeys(of_strategies)]:
        raise UserError("; ".join(problems))


def run(args: argparse.Namespace) -> None:
    """Measure and print; with --json write the figures too. Raises UserError for input that cannot be used."""
    args.accelerator = args.accelerator or ("gpu" if torch.cuda.is_available() else "cpu")
    if args.folder and not args.folder.is_dir():
        raise UserError(f"there is no folder {args.folder}; make it or name another --folder")
    here = [
        *layout_arguments("plain"),
        "--trainer.devices",
        "1",
        "--trainer.num_nodes",
        "1",
        "--trainer.accelerator",
        "cpu",
    ]
    cli = parse(["--config", args.config, *args.overrides, *here], run=False)
    data: TokenDataModule = cli.datamodule
    precision = args.precision or str(cli.trainer.precision)
    check(args, precision, cli.model.compiled)
    data.batch_size = args.rows or data.batch_size
    data.micro_batches(args.processes)  # raises UserError where the rows do not divide
    cores = available_cores()
    sizes = {
        "precision": precision,
        "rows": data.batch_size,
        "context": data.context,
        "parameters": cli.model.parameter_count,
        "checkpoint_every_of_config": cli.config["run"]["checkpoint_every"],
        "accelerator": args.accelerator,
        "processes": args.processes,
        "threads": args.threads or max(1, cores // args.processes),
        "cores": cores,
        "steps": args.steps,
    }
    vocabulary = cli.model.decoder_config.unpadded_vocab_size
    del cli, data  # and with them the model
    with terminated_as_interrupted(), tempfile.TemporaryDirectory(dir=args.folder) as name:
        plan = Plan(args, sizes, Path(name))
        random_store(plan.store, vocabulary, sizes["rows"] * sizes["context"] * plan.max_steps + 1)
        (plan.store / "tokenizer").mkdir()  # which a run copies
        raw = time_layouts(plan, list(dict.fromkeys(args.layouts)), args.rounds)
    result = {"command": f"python -m llm bench-ranks {command_line(args)}", **sizes, "raw": raw, **environment()}
    result["layouts"] = summary(result)
    print(*table(result), sep="\n")
    if args.json:
        write_json(args.json, result, indent=1)
