"""What one device sends in a training step, in bytes, under DDP, DeepSpeed's ZeRO and FSDP2 as `train/strategy.py` and
`train/fully_sharded.py` set them up.

Every collective is counted as a ring over N devices: of S bytes, each device sends (N - 1) / N S in a reduce-scatter or
an all-gather and twice that in an all-reduce (Patarasuk & Yuan 2009; Rajbhandari et al. 2020, Section 7). DeepSpeed
0.19.8 sums the gradients of stages 1 and 2 by all-reduces (`use_multi_rank_bucket_allreduce`, BF16_Optimizer's
fallback) where the paper has reduce-scatters; what is here is what is sent. The gradients of the embedding, the head's
too where they are tied, are made last: what sums them has no backward pass left to overlap with.

Between nodes a ring has one link out of each node, so what leaves a node is what one device sends, however many
devices it has and over however many network cards NCCL spreads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..model import DecoderConfig
from .parameters import embedding_parameters, head_parameters, parameters, table
from .state_memory import LIVE, Layout, persistent_parameters

RING = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}  # times (N - 1) / N of the payload


@dataclass(frozen=True)
class Collective:
    """`times` times a step, `payload` bytes of `what` through `operation`.

    overlaps: the pass of a micro-batch during which it runs, "forward" or "backward"; "" while nothing is computed.
    """

    what: str
    operation: str
    payload: int
    times: int
    overlaps: str = ""

    def sent(self, devices: int) -> float:
        """Bytes that each device sends in a step."""
        return RING[self.operation] * (devices - 1) / devices * self.payload * self.times


def collectives(config: DecoderConfig, weight: int, layout: Layout, micro_batches: int) -> list[Collective]:
    """The collectives of a step of `micro_batches`, those of a few numbers left out; `weight` bytes of a weight."""
    p, stage = parameters(config), layout.stage
    if layout.devices == 1:
        return []
    sent = 2 if layout.rounded else weight if stage == 0 else 4  # bytes of a gradient on its way
    if layout.fsdp:
        return _fully_sharded(config, weight, layout, micro_batches, sent)
    if stage == 0:  # no_sync until the last micro-batch
        return _summed(config, "all-reduce", sent, 1, "backward")
    # BF16_Optimizer, which is stage 1 in bf16, sums when all gradients are made, whatever `overlap_comm` says.
    overlaps = layout.overlap and (stage > 1 or weight == 4 or layout.offload)
    backward = "backward" if overlaps else ""
    if stage < 3:  # from stage 2 on nobody keeps all gradients, so each micro-batch's are summed
        sums = _summed(config, "all-reduce", sent, micro_batches if stage == 2 else 1, backward)
        return [*sums, Collective("weights", "all-gather", weight * p, 1)]
    persistent = persistent_parameters(config)
    again = max(0, p - LIVE - table(config))  # gone between the forward and the backward pass
    return [
        Collective("weights, forward", "all-gather", weight * (p - persistent), micro_batches, backward and "forward"),
        Collective("weights, backward", "all-gather", weight * again, micro_batches, backward),
        *_summed(config, "reduce-scatter", sent, micro_batches, backward),
        Collective("small weights, after the update", "all-gather", weight * persistent, 1),
    ]


def _fully_sharded(
    config: DecoderConfig, weight: int, layout: Layout, micro_batches: int, sent: int
) -> list[Collective]:
    """FSDP2: weights once a step before stage 3, gradients once a step in stage 1. The first block waits for the root,
    which holds what is not in blocks."""
    root = embedding_parameters(config) + head_parameters(config)
    blocks = weight * (parameters(config) - root)
    forward, backward = ("forward", "backward") if layout.overlap else ("", "")
    passes = micro_batches if layout.stage == 3 else 1
    weights = [
        Collective("weights outside of blocks", "all-gather", weight * root, passes),
        Collective("weights of blocks, forward", "all-gather", blocks, passes, forward),
    ]
    if layout.stage == 3:
        weights.append(Collective("weights of blocks, backward", "all-gather", blocks, passes, backward))
    return weights + _summed(config, "reduce-scatter", sent, 1 if layout.stage == 1 else micro_batches, backward)


def _summed(config: DecoderConfig, operation: str, each: int, times: int, overlaps: str) -> list[Collective]:
    """The sum over devices of all gradients, `each` bytes of one."""
    last = embedding_parameters(config)
    return [
        Collective("gradients", operation, each * (parameters(config) - last), times, overlaps),
        Collective("gradients of the embedding", operation, each * last, times),
    ]


def bytes_sent(config: DecoderConfig, weight: int, layout: Layout, micro_batches: int) -> float:
    """Bytes that each device sends in a step."""
    return sum(c.sent(layout.devices) for c in collectives(config, weight, layout, micro_batches))


def seconds_not_hidden(sums: Sequence[Collective], devices: int, rate: float, micro_batch: float) -> float:
    """Seconds of a step during which devices only send, at best: what runs during a pass is hidden up to its length.

    Args:
        sums: the collectives of a step.
        devices: N.
        rate: bytes per second that leave a node.
        micro_batch: seconds of the forward and backward pass of one; the backward pass is two thirds of its FLOPs.
    """
    shares = {"": 0.0, "forward": 1 / 3, "backward": 2 / 3}
    left = 0.0
    for overlaps, share in shares.items():
        here = [c for c in sums if c.overlaps == overlaps and c.payload]
        room = share * micro_batch * max((c.times for c in here), default=0)
        left += max(0.0, sum(c.sent(devices) for c in here) / rate - room)
    return left
