"""A checkpoint's tensors, from the devices of all ranks to the host memory of rank zero, while training goes on.

Stages: each rank copies what it holds to host memory of its own, which it keeps for the next checkpoint (`HostCopies`)
-> every rank sends its copies to rank zero, piece by piece (`assembled`) -> there each tensor is whole.

Only an optimizer's step changes what is copied. So training goes on at once, and waits before its next step until the
copies are made. Sending takes no part of a device: it goes over gloo, from host memory, in a process group of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

PIECE = 1 << 22  # elements: 16 MiB, of all ranks together; gloo takes three times as long for 64 MiB

Tensors = dict[str, Tensor]


class Part(NamedTuple):
    """The elements `first` to `last` of what a rank holds: those of the parameter `name` from its `place`-th on."""

    name: str
    shape: torch.Size
    first: int
    last: int
    place: int


class Share(NamedTuple):
    """Part of a checkpoint that this rank holds.

    Args:
        kind: "" for weights, else the optimizer's name of a state ("exp_avg").
        held: of any shape and type. Only the optimizer's step may change it.
        size: elements that each rank sends, at least those of `held`.
        parts: what the ranks hold, in their order; of one rank only, if it holds all. Empty except on rank zero.
    """

    kind: str
    held: Tensor
    size: int
    parts: list[list[Part]]


class HostCopies:
    """Copies of shares in host memory, which stays for those of the next checkpoint: pinned, to which a GPU copies
    several times as fast as to other memory."""

    def __init__(self) -> None:
        self._copies: list[Tensor] = []

    def make(self, shares: Sequence[Share], ready: torch.cuda.Event | None) -> list[Tensor]:
        """Return a flat fp32 copy [size] of each share, there until the next call.

        Args:
            shares: of this rank.
            ready: after which event the shares of a GPU are what they should be.
        """
        if ready is None:
            self._allocate(shares, pinned=False)
            self._copy(shares)
            return self._copies
        device = next(share.held.device for share in shares if share.held.is_cuda)
        with torch.cuda.device(device):  # a thread begins with the first one
            self._allocate(shares, pinned=True)
            stream = torch.cuda.Stream()  # training has another
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                self._copy(shares)
            stream.synchronize()
        return self._copies

    def _allocate(self, shares: Sequence[Share], pinned: bool) -> None:
        if [len(copy) for copy in self._copies] != [share.size for share in shares]:
            self._copies = []  # before there are others
            self._copies = [torch.empty(share.size, dtype=torch.float32, pin_memory=pinned) for share in shares]

    def _copy(self, shares: Sequence[Share]) -> None:
        for share, copy in zip(shares, self._copies, strict=True):
            held = share.held.detach().reshape(-1)
            copy[: len(held)].copy_(held, non_blocking=True)


def assembled(
    shares: Sequence[Share], copies: Sequence[Tensor], names: Sequence[str], group: Any, keep: bool
) -> tuple[Tensors, Tensors]:
    """Return on rank zero, which gives `keep`, all weights by name and the optimizer's state by "KIND/NAME".

    Every rank has to call it that has shares; the others get nothing.

    Args:
        shares: of this rank, as many and in the same order on every rank.
        copies: those of `HostCopies`.
        names: of all parameters, in the order of the result.
        group: gloo's; every rank is in it.
        keep: whether this is rank zero.
    """
    found: dict[str, Tensors] = {}
    for share, copy in zip(shares, copies, strict=True):
        of_kind = found.setdefault(share.kind, {})
        if len(share.parts) == 1:
            wholes = {part.name: copy[part.first : part.last].view(part.shape) for part in share.parts[0]}
            if len(wholes) > 1:  # of one memory, which safetensors would write once
                wholes = {name: whole.clone() for name, whole in wholes.items()}
            of_kind |= wholes
            continue
        for part in share.parts[0] if keep else ():
            of_kind.setdefault(part.name, torch.empty(part.shape))
        for start, pieces in _gathered(copy, group, keep):
            for rank, piece in enumerate(pieces):
                for part in share.parts[rank]:
                    _place(part, of_kind[part.name].view(-1), piece, start)
    weights = found.pop("", {})
    moments = {f"{kind}/{name}": found[kind][name] for name in names for kind in found if name in found[kind]}
    return ({name: weights[name] for name in names}, moments) if keep else ({}, {})


def _place(part: Part, whole: Tensor, piece: Tensor, start: int) -> None:
    """Copy to a flat whole tensor what a piece [n] of a rank's copy, from its `start`-th element on, has of it."""
    first, last = max(part.first, start), min(part.last, start + len(piece))
    if first < last:
        place = part.place + first - part.first
        whole[place : place + last - first] = piece[first - start : last - start]


def _gathered(copy: Tensor, group: Any, keep: bool) -> Iterator[tuple[int, Tensor]]:
    """Send rank zero this rank's copy, as long on every rank: (start, pieces of all ranks from there on [ranks, n]).

    Every rank has to go through it to its end; only rank zero gets any pieces. They are there until the next.
    """
    ranks = torch.distributed.get_world_size(group)
    size = max(1, PIECE // ranks)
    received = torch.empty(ranks * min(size, len(copy)) if keep else 0)
    for start in range(0, len(copy), size):
        piece = copy[start : start + size]
        pieces = received[: ranks * len(piece)].view(ranks, -1) if keep else received.view(0, 1)
        torch.distributed.gather(piece, list(pieces) if keep else None, dst=0, group=group)
        yield start, pieces
