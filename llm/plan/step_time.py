"""How long a step takes over several nodes, from a throughput that was measured on one device or given.

Stages: a record of `python -m llm bench`, or a figure -> seconds of a micro-batch -> what a layout's collectives add to
it where they run beside nothing (`communication.py`) -> days and GPU-hours. Nothing here is guessed: without a
throughput there are only the seconds that the network takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from .communication import Collective, seconds_not_hidden


@dataclass(frozen=True)
class Network:
    """What connects nodes: `gigabits` per second leave each node of `devices` devices, over all its cards."""

    gigabits: float
    devices: int


def step_time(
    row: Mapping[str, Any], context: int, max_steps: int, network: Network, rate: float | None
) -> dict[str, float | None] | None:
    """Return the seconds of a step that compute, that send between nodes, and that only send; days and GPU-hours.

    Args:
        row: one layout of the plan.
        context: tokens of a row of data.
        max_steps: of the run.
        network: between the nodes.
        rate: tokens per second of one device that waits for no other; without it only what is sent is known.

    Returns:
        None if all devices are in one node: what NVLink takes is not counted.
    """
    devices = row["devices"]
    if devices <= network.devices:
        return None
    bytes_per_second = network.gigabits * 1e9 / 8
    time: dict[str, float | None] = dict.fromkeys(("compute", "sent", "not_hidden", "days", "gpu_hours"))
    time["sent"] = row["sent_bytes"] / bytes_per_second
    if rate is None:
        return time
    micro_batch = row["micro_batch"] * context / rate
    sums = [Collective(**each) for each in row["collectives"]]
    compute = micro_batch * row["micro_batches"]
    exposed = seconds_not_hidden(sums, devices, bytes_per_second, micro_batch)
    days = max_steps * (compute + exposed) / 86400
    return time | {"compute": compute, "not_hidden": exposed, "days": days, "gpu_hours": 24 * days * devices}


def benchmark(path: Path, wanted: Mapping[str, Any], stream: Sequence[str]) -> tuple[float, str]:
    """Return tokens per second of one device, the median that `python -m llm bench --json` recorded, and its path.

    Args:
        path: the record.
        wanted: parameters, context, precision, and device if it is known: what the record has to be of.
        stream: the model's residual streams, which say which of the record's contenders it is.

    Returns:
        The throughput; and what was measured, with the command.

    Raises:
        UserError: no such file, or it measured something else.
    """
    try:
        found = json.loads(path.read_text())
        rates = _of_run(found["tokens_per_second"], stream)
        measured = {name: found[name] for name in ("parameters", "context", "precision", "device")}
        rate = sorted(rates)[len(rates) // 2]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"--bench {path} is not a result of python -m llm bench --json: {error!r}") from error
    for name, value in wanted.items():
        if measured[name] != value:
            raise UserError(
                f"--bench {path} measured {name} {measured[name]}, this plan has {value}: "
                "run python -m llm bench with this config on this device"
            )
    source = f"{path}: one {measured['device']}, {measured['precision']}"
    if "command" in found:
        source += f", {found['command']}"
    return float(rate), source


def _of_run(rates: dict[str, list[float]], stream: Sequence[str]) -> list[float]:
    """Return the rates of the contender that is the run. Raises KeyError if none is."""
    alike = {(): "classic", ("values",): "values", ("queries", "keys"): "queries_keys"}.get(tuple(stream), "")
    return rates["config" if "config" in rates else alike]
