"""What one device sends in a training step, in bytes, under DDP and DeepSpeed's ZeRO as `train/strategy.py` sets them
up.

Every collective is counted as a ring over N devices: of S bytes, each device sends (N - 1) / N S in a reduce-scatter or
an all-gather and twice that in an all-reduce (Patarasuk & Yuan 2009; Rajbhandari et al. 2020, Section 7). DeepSpeed
0.19.8 sums the gradients of stages 1 and 2 by all-reduces (`use_multi_rank_bucket_allreduce`, BF16_Optimizer's
fallback) where the paper has reduce-scatters; what is here is what is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model import DecoderConfig
from .parameters import parameters, table
from .state_memory import LIVE, Layout, persistent_parameters

RING = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}  # times (N - 1) / N of the payload


@dataclass(frozen=True)
class Collective:
    """`times` times a step, `payload` bytes of `what` through `operation`."""

    what: str
    operation: str
    payload: int
    times: int

    def sent(self, devices: int) -> float:
        """Bytes that each device sends in a step."""
        return RING[self.operation] * (devices - 1) / devices * self.payload * self.times


def collectives(config: DecoderConfig, weight: int, layout: Layout, micro_batches: int) -> list[Collective]:
    """The collectives of a step of `micro_batches`, those of a few numbers left out; `weight` bytes of a weight."""
    p, stage = parameters(config), layout.stage
    if layout.devices == 1:
        return []
    if stage == 0:  # no_sync until the last micro-batch
        return [Collective("gradients", "all-reduce", weight * p, 1)]
    if stage < 3:  # from stage 2 on nobody keeps all gradients, so each micro-batch's are summed
        return [
            Collective("fp32 gradients", "all-reduce", 4 * p, micro_batches if stage == 2 else 1),
            Collective("weights", "all-gather", weight * p, 1),
        ]
    persistent = persistent_parameters(config)
    again = max(0, p - LIVE - table(config))  # gone between the forward and the backward pass
    return [
        Collective("weights, forward", "all-gather", weight * (p - persistent), micro_batches),
        Collective("weights, backward", "all-gather", weight * again, micro_batches),
        Collective("fp32 gradients", "reduce-scatter", 4 * p, micro_batches),
        Collective("small weights, after the update", "all-gather", weight * persistent, 1),
    ]


def bytes_sent(config: DecoderConfig, weight: int, layout: Layout, micro_batches: int) -> float:
    """Bytes that each device sends in a step."""
    return sum(c.sent(layout.devices) for c in collectives(config, weight, layout, micro_batches))
