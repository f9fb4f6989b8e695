"""What `slurm/first_minutes.sh` found, as a table for a report.

Stages: one short fit, a part (`record`) -> OUT/results/PART.json: losses, tokens/s, memory beside `llm plan`, where its
ranks ran, how it ended, and which of its checks failed -> one row of a table (`table`).
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_json
from ..runs import failure, reading

STOPPED = 75  # EX_TEMPFAIL: saved, and to be queued again
SIGNALLED = ("signal", "signal-first")
WARM_UP = 10  # steps, in which blocks are compiled
LOSS, MEMORY = 2e-3, 1.1  # tolerances: of a bf16 loss in nats; of measured memory as a multiple of the planned
COLUMNS = (
    "part",
    "devices",
    "exit status",
    "loss of step 1",
    "tokens/s of a device",
    "peak memory, bytes",
    "planned, bytes",
    "open files",
    "network",
    "seconds",
    "of these after the signal",
    "checks",
)
NETWORK = re.compile(r"NCCL INFO.*(NET/\w+)(?: *: Using)")


def ranks_of(folder: Path) -> list[dict[str, Any]]:
    """Return what each rank wrote by `placement.py`, in the order of ranks."""
    files = sorted(folder.glob("rank-*.json"), key=lambda file: int(file.stem.removeprefix("rank-")))
    return [read_json(file) for file in files]


def planned_bytes(run: Path, config: dict[str, Any], on_gpu: bool) -> int | None:
    """Return the peak of a device's memory that `llm plan` expects of the run, None if it cannot say."""
    devices = int(config["trainer.devices"]) * int(config["trainer.num_nodes"])
    rows = int(config["data.batch_size"]) // devices
    micro_batch = min(int(config["data.micro_batch_size"] or rows), rows)
    sharded = {"deepspeed": "ZeRO", "fsdp2": "FSDP2"}.get(config["strategy.name"])
    layout = f"{sharded} {config['strategy.stage']}" if sharded else "DDP" if devices > 1 else "one device"
    plan = run / "plan.json"
    command = [sys.executable, "-m", "llm", "plan", "--config", str(run / "config.yaml"), "--gpus", str(devices)]
    command += ["--micro-batch", str(micro_batch), "--device-memory", "10000", "--json", str(plan)]
    command += [] if on_gpu else ["--device", "cpu"]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
        return None
    return next(row["peak_bytes"] for row in read_json(plan)["layouts"] if row["layout"] == layout)


def record(out: Path, part: str, status: int, seconds: float, after: float | None, logs: str, attempt: str) -> None:
    """Write OUT/results/PART.json.

    Args:
        out: of the script.
        part: its name.
        status: of srun.
        seconds: that the part took.
        after: seconds from what was done to the run (a signal, a stopped rank) to its end.
        logs: what the names of the job's logs begin with.
        attempt: of the job.
    """
    run = out / ("one-gpu" if part == "resume" else part)
    rows = [row for row in reading.metrics(run) if row.get("train_loss")]
    ranks = ranks_of(run / "ranks")
    result: dict[str, Any] = {"part": part, "status": status, "seconds": seconds, "after": after, "ranks": ranks}
    if (run / "config.yaml").is_file():
        config = dict(reading.flat(reading.config(run)))
        result["devices"] = int(config["trainer.devices"]) * int(config["trainer.num_nodes"])
        result["batch_size"] = config["data.batch_size"]
        on_gpu = any(rank["device_id"] for rank in ranks)
        result["planned_bytes"] = planned_bytes(run, config, on_gpu) if ranks else None
        result["measured_bytes"] = max((rank["peak_bytes"] for rank in ranks), default=None) if on_gpu else None
        result["from_steps"] = [attempt["from_step"] for attempt in reading.record(run)["attempts"]]
    result["loss"] = float(rows[0]["train_loss"]) if rows else None
    result["steps"] = [int(row["step"]) for row in rows]
    rates = [float(row["tokens_per_second"]) for row in rows if int(row["step"]) > WARM_UP and row["tokens_per_second"]]
    result["tokens_per_second"] = statistics.median(rates) if rates else None
    result["checkpoints"] = [reading.step_of(path) for path in reading.folders(run / "checkpoints")]
    said = Path(f"{logs}-rank0.log").read_text(errors="replace") if Path(f"{logs}-rank0.log").is_file() else ""
    networks = NETWORK.findall(said)
    result["network"] = networks[-1] if networks else None
    srun = Path(f"{logs}-srun")
    messages = srun.read_text(errors="replace") if srun.is_file() else ""
    ended = failure.explain(failure.read_ranks(logs, attempt), messages).sentences
    result["failure"] = ended if status not in (0, STOPPED) else []
    reference = out / "results" / "one-gpu.json"
    result["failed_checks"] = failed_checks(result, read_json(reference) if reference.is_file() else None)
    write_json(out / "results" / f"{part}.json", result)
    print(f"part {part}: {', '.join(result['failed_checks']) or 'all checks passed'}")


def failed_checks(result: dict[str, Any], reference: dict[str, Any] | None) -> list[str]:
    """Return what is not as it should be, in words. `reference` is the part on one GPU."""
    part, status, ranks, failed = result["part"], result["status"], result["ranks"], []
    if part == "stop":
        last = f"rank {len(ranks) - 1} on"
        if status in (0, STOPPED) or last not in (result["failure"] or [""])[-1]:
            failed.append("the stopped rank is not named")
        return failed
    if status != (STOPPED if part in SIGNALLED else 0):
        return [f"ended with status {status}: {'; '.join(result['failure']) or 'see the logs'}"]
    if not result["steps"]:
        return ["no step was trained"]
    if part in SIGNALLED and result["checkpoints"][-1:] != result["steps"][-1:]:
        failed.append("the last step is not saved")
    if part in ("resume", "requeue"):
        starts = result["from_steps"]
        if len(starts) != 2 or starts[1] == 0 or result["steps"] != list(range(1, len(result["steps"]) + 1)):
            failed.append(f"attempts begin at steps {starts}")
    processes = {(rank["host"], rank["process"]) for rank in ranks}
    devices = {(rank["host"], rank["device_id"]) for rank in ranks if rank["device_id"]}
    if part != "signal-first" and len(processes) != result["devices"]:
        failed.append(f"{len(processes)} processes for {result['devices']} devices")
    if devices and len(devices) != result["devices"]:
        failed.append(f"{len(devices)} of {result['devices']} devices are used")
    alike = reference is not None and reference["batch_size"] == result["batch_size"]
    if reference is not None and alike and abs(result["loss"] - reference["loss"]) > LOSS:
        failed.append(f"loss of step 1 is {result['loss']:.4f}, on one GPU {reference['loss']:.4f}")
    measured, planned = result["measured_bytes"], result["planned_bytes"]
    if measured and planned and measured > MEMORY * planned:
        failed.append("more memory than planned")
    return failed


def table(out: Path) -> str:
    """Return the parts as a table in Markdown, in the order in which they ended."""
    files = sorted((out / "results").glob("*.json"), key=lambda file: file.stat().st_mtime)
    results = [read_json(file) for file in files]
    names = sorted({rank["device"] for result in results for rank in result["ranks"]})
    rows = [_row(result) for result in results]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "\n".join([f"Devices: {'; '.join(names) or 'none'}.", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _row(result: dict[str, Any]) -> list[str]:
    devices, rate = result.get("devices"), result["tokens_per_second"]
    files = max((rank["open_files"] for rank in result["ranks"]), default=None)
    values = [
        (devices, "{}"),
        (result["status"], "{}"),
        (result["loss"], "{:.4f}"),
        (rate / devices if rate and devices else None, "{:,.0f}"),
        (result.get("measured_bytes"), "{:,}"),
        (result.get("planned_bytes"), "{:,}"),
        (files, "{}"),
        (result["network"], "{}"),
        (result["seconds"], "{:.0f}"),
        (result["after"], "{:.0f}"),
    ]
    cells = ["" if value is None else form.format(value) for value, form in values]
    return [result["part"], *cells, "; ".join(result["failed_checks"]) or "passed"]


def main(arguments: Sequence[str]) -> None:
    """Run `record OUT PART STATUS SECONDS AFTER LOGS ATTEMPT`, `table OUT` or `last-rank FOLDER`."""
    command, folder, *rest = arguments
    if command == "record":
        part, status, seconds, after, logs, attempt = rest
        record(Path(folder), part, int(status), float(seconds), float(after) if after else None, logs, attempt)
    elif command == "last-rank":
        last = ranks_of(Path(folder))[-1]
        print(last["host"], last["process"])
    else:
        print(table(Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
