"""Tensors of a device, or parts of all ranks' devices, in the host memory of rank zero, piece by piece.

A piece goes through pinned memory, which a GPU writes to several times as fast as to other memory, and while one is on
its way, the one before is copied on. On a CPU nothing is staged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed
from torch import Tensor

PIECE = 1 << 22  # elements: 16 MiB, of all ranks together; gloo takes three times as long for 64 MiB


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, fp32, that nobody else writes to."""
    if tensor.device.type == "cpu":
        return tensor.detach().to(torch.float32, copy=True).contiguous()
    whole, source = torch.empty(tensor.shape, dtype=torch.float32), tensor.detach().reshape(-1)
    for start, piece in _staged((start, source[start : start + PIECE]) for start in range(0, len(source), PIECE)):
        whole.view(-1)[start : start + len(piece)] = piece
    return whole


def gathered(part: Tensor, device: torch.device, keep: bool) -> Iterator[tuple[int, Tensor]]:
    """Send rank zero this rank's `part`, as long on every rank: (start, pieces of all ranks from there on [ranks, n]).

    Every rank has to go through it to its end; only rank zero, which gives `keep`, gets anything. A piece is there
    until the next one is asked for.

    Args:
        part: [n] fp32.
        device: that of the process group; `part` may be elsewhere.
    """
    pieces = _sent(part, device, keep)
    if keep:
        ranks = torch.distributed.get_world_size()
        yield from ((start, piece.view(ranks, -1)) for start, piece in _staged(pieces))
    else:
        for _ in pieces:
            pass


def _sent(part: Tensor, device: torch.device, keep: bool) -> Iterator[tuple[int, Tensor]]:
    ranks = torch.distributed.get_world_size()
    size = max(1, PIECE // ranks)
    received = torch.empty(ranks * min(size, len(part)) if keep else 0, device=device)
    for start in range(0, len(part), size):
        piece = part[start : start + size].detach().to(device)
        pieces = received[: ranks * len(piece)]
        torch.distributed.gather(piece, list(pieces.view(ranks, -1)) if keep else None, dst=0)
        yield start, pieces


def _staged(pieces: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """The flat pieces in host memory, each there until the next one is asked for."""
    pinned: list[Tensor] = []
    before: tuple[int, Tensor, torch.cuda.Event] | None = None
    for number, (start, piece) in enumerate(pieces):
        if piece.device.type != "cuda":
            yield start, piece
            continue
        if number < 2:
            pinned.append(torch.empty(len(piece), dtype=torch.float32, pin_memory=True))  # none is longer
        here, copied = pinned[number % 2][: len(piece)], torch.cuda.Event()
        here.copy_(piece, non_blocking=True)
        copied.record()
        if before is not None:
            before[2].synchronize()
            yield before[0], before[1]
        before = start, here, copied
    if before is not None:
        before[2].synchronize()
        yield before[0], before[1]
