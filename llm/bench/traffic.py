"""Bytes that a rank sends, from torch's flight recorder, which notes every collective with its tensors and its time.

Counted as in `llm.plan.communication`: by rings, without what a library adds. What a collective sends is hidden as far
as it begins before the backward pass of its micro-batch has come to the first block; by how much depends on the network
and the device.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.communication import RING

ELEMENT = {"Float": 4, "BFloat16": 2, "Half": 2, "Double": 8, "Long": 8, "Int": 4, "Byte": 1, "Bool": 1}
KINDS = {  # name in the recorder, less its library: the collective of a ring, and which of its tensors is whole
    "all_reduce": ("all-reduce", "input"),
    "all_gather": ("all-gather", "output"),
    "_all_gather_base": ("all-gather", "output"),
    "all_gather_into_tensor_coalesced": ("all-gather", "output"),
    "reduce_scatter": ("reduce-scatter", "input"),
    "_reduce_scatter_base": ("reduce-scatter", "input"),
}


class BackwardPasses:
    """When each backward pass of a decoder began and came to its first block: `spans`, in ns since 1970."""

    def __init__(self, embedding: nn.Module) -> None:
        self.spans: list[tuple[int, int]] = []
        self._began = 0
        self._hook = embedding.register_forward_hook(self._watch)

    def begin(self) -> None:
        self._began = time.time_ns()

    def _watch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.spans.append((self._began, time.time_ns())))

    def end(self) -> None:
        self._hook.remove()


def recorded() -> list[dict[str, Any]]:
    """The collectives of this process that the recorder still has: the last `TORCH_FR_BUFFER_SIZE`."""
    c10d: Any = torch._C._distributed_c10d
    dump = c10d._dump_nccl_trace_json if torch.cuda.is_available() else c10d._dump_fr_trace_json
    return json.loads(dump()).get("entries", [])


def traffic(
    entries: Iterable[dict[str, Any]], spans: list[tuple[int, int]], since: int, ranks: int
) -> dict[str, float]:
    """Bytes that the collectives since a time send from each rank, and of these those during a backward pass."""
    sent = {"sent_bytes": 0.0, "sent_in_backward_bytes": 0.0}
    for entry in entries:
        if entry["time_created_ns"] < since:
            continue
        kind = KINDS.get(entry["profiling_name"].partition(":")[2])
        if kind is None:
            continue
        tensors = zip(entry[f"{kind[1]}_sizes"], entry[f"{kind[1]}_dtypes"], strict=True)
        payload = sum(math.prod(shape) * ELEMENT[dtype] for shape, dtype in tensors)
        count = RING[kind[0]] * (ranks - 1) / ranks * payload
        sent["sent_bytes"] += count
        if any(begin <= entry["time_created_ns"] <= end for begin, end in spans):
            sent["sent_in_backward_bytes"] += count
    return sent
