"""What the processes of one run do together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed.distributed_c10d as distributed_c10d
from lightning.pytorch.strategies import Strategy

from ..common.errors import UserError

T = TypeVar("T")
LOST = ("gloo", "nccl", "connection closed by peer")


class ReportedOnRankZeroError(UserError):
    """Rank zero has this error too, and tells the user; this rank ends without a word."""


def on_rank_zero(strategy: Strategy, work: Callable[[], T]) -> T:
    """What `work()` returns on rank zero, on every rank. Every rank has to call it.

    Raises:
        Exception: what `work` raised, on rank zero.
        ReportedOnRankZeroError: on the others, so that none waits for it.
    """
    result, problem = None, None
    if strategy.is_global_zero:
        try:
            result = work()
        except Exception as error:
            problem = error
    result, sentence = strategy.broadcast((result, problem and str(problem)))
    if problem is not None:
        raise problem
    if sentence is not None:
        raise ReportedOnRankZeroError(sentence)
    return result  # type: ignore[return-value]


def set_collective_timeout(seconds: float) -> None:
    """Let no collective wait longer than this for another rank, in any process group: DeepSpeed makes its own, which
    would wait for torch's default, ten minutes under NCCL and half an hour under gloo."""
    groups = list(distributed_c10d._world.pg_map) if torch.distributed.is_initialized() else []
    for group in groups:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def is_lost_rank_error(error: BaseException) -> bool:
    """Whether the error is of a collective that another rank did not take part in."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in LOST)
