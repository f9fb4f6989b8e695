"""What PyTorch allocates on a CPU, and what collectives carry: recorded by its profiler, with no figure of ours in it.

As a script it runs commands of `python -m llm` under the recorder, one after the other: FOLDER/commands.json has their
words by name, and each leaves FOLDER/NAME-rank-N.json: the peak of the steps in bytes, what collectives carried in one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

# Functions of torch.distributed: what their payload is called, and which argument is the whole of it.
WATCHED = {
    "all_reduce": ("all-reduce", "tensor", 0),
    "all_gather_into_tensor": ("all-gather", "output_tensor", 0),
    "reduce_scatter_tensor": ("reduce-scatter", "input", 1),
    "all_gather_single": ("all-gather", "output_tensor", 0),
    "reduce_scatter_single": ("reduce-scatter", "input", 1),
    "_broadcast_coalesced": ("", "", 0),  # DDP's, once, when the model is wrapped
}
collectives: list[tuple[int, int, str, int]] = []  # begin and end in ns, kind, payload in bytes


@dataclass
class Recording:
    """Changes of allocated memory (nanoseconds, bytes) and when each update of the weights ended."""

    changes: list[tuple[int, int]] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)

    def peak(self, begin: int = 0, end: int = 2**63) -> int:
        """Bytes allocated at the highest between two times."""
        now, highest = 0, 0
        for moment, size in self.changes:
            now += size
            highest = max(highest, now) if begin <= moment <= end else highest
        return highest


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Record what is done inside, from the first tensor on."""
    recording = Recording()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield recording
    allocations, operations = [], []
    roots = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    stack: list[tuple[Any, bool]] = [(event, False) for event in roots]
    while stack:
        event, inside = stack.pop()
        if event.tag == _EventType.Allocation:
            extra = event.extra_fields
            allocations.append((event.start_time_ns, extra.ptr, extra.alloc_size, inside))
        else:
            operations.append((event.end_time_ns, event.name))
        inside = inside or event.name.startswith("c10d::")
        stack.extend((child, inside) for child in event.children)
    recording.changes = list(changes(sorted(allocations)))
    recording.updates = updates(operations)


def changes(allocations: list[tuple[int, int, int, bool]]) -> Iterator[tuple[int, int]]:
    """Allocations (time, address, bytes, inside a collective) -> changes (time, bytes).

    Without what gloo and DDP copy for a collective: NCCL sends from where the tensors are. What gloo's threads free the
    profiler does not see: that would count until its address is given out again.
    """
    live: dict[int, int] = {}
    for moment, address, size, inside in allocations:
        if address in live:
            yield moment, -live.pop(address)
        copied = inside or any(begin <= moment <= end for begin, end, _, _ in collectives)
        if size > 0 and not copied:
            live[address] = size
            yield moment, size


def updates(operations: list[tuple[int, str]]) -> list[int]:
    """When each update ended. DeepSpeed steps its optimizer once for each of AdamW's groups, so those without a loss
    between them are one update."""
    of_loss = "_SummedLoss"
    marks = sorted(
        (end, name == of_loss) for end, name in operations if name == of_loss or name.startswith("Optimizer.step")
    )
    followed = zip(marks, [is_loss for _, is_loss in marks[1:]] + [True], strict=True)
    return [end for (end, is_loss), loss_follows in followed if loss_follows and not is_loss]


def watch_collectives() -> None:
    """Have the functions of torch.distributed tell what they carry; DDP's own sums go past them."""
    for name, of_name in WATCHED.items():
        setattr(torch.distributed, name, watched(getattr(torch.distributed, name), *of_name))


def watched(original: Any, kind: str, argument: str, position: int) -> Any:
    def collective(*args: Any, **kwargs: Any) -> Any:
        begin, size = time.time_ns(), 0
        if kind:
            whole = kwargs[argument] if argument in kwargs else args[position]
            size = whole.numel() * whole.element_size()
        result = original(*args, **kwargs)
        time.sleep(0.02)  # gloo's thread lets go of the tensors, so that it is ours that frees them
        collectives.append((begin, time.time_ns(), kind, size))
        return result

    return collective


def payloads(begin: int, end: int) -> dict[str, int]:
    """Bytes of each kind of collective between two times."""
    sums: Counter[str] = Counter()
    for moment, _, kind, size in collectives:
        if begin <= moment <= end:
            sums[kind] += size
    return dict(sums)


def main() -> None:
    from llm.cli import main as command

    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    watch_collectives()
    for name, words in json.loads((folder / "commands.json").read_text()).items():
        with recorded() as recording:
            status = command(words)
        first, *_, last = recording.updates
        result = {"status": status, "peak": recording.peak(first, last), "payloads": payloads(first, last)}
        (folder / f"{name}-rank-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
