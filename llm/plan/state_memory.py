"""What weights, gradients and the optimizer's state take on one device, in bytes: one device, DDP, DeepSpeed's ZeRO,
FSDP2.

What ZeRO divides is in Rajbhandari et al. 2020 (Section 3.1). What is allocated beside it was read in DeepSpeed 0.19.8
(`runtime/bf16_optimizer.py`, `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`) as `train/strategy.py` sets it
up: bf16 weights with fp32 master weights, or fp32; gradients accumulated and sent in fp32; optimizer state in fp32.

P parameters, N devices, b numbers in a bucket, w bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..model import DecoderConfig
from ..train.optim import OPTIMIZERS
from .activation_memory import Formats
from .parameters import (
    block_matrices,
    block_parameters,
    embedding_parameters,
    head_parameters,
    parameters,
    small_parameters,
    table,
)

# DeepSpeed's defaults, which `train/strategy.py` leaves as they are.
LIVE = 500_000_000  # weights that ZeRO-3 keeps gathered: half of stage3_max_reuse_distance, forward and back again
JOINED = 500_000_000  # numbers that BF16_Optimizer joins for one all-reduce (MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class Layout:
    """How the model's state lies on `devices` devices.

    Args:
        stage: 0 is one device, or DDP over several; 1, 2, 3 of ZeRO.
        devices: N.
        bucket: b, numbers reduced at once; never more than the model has.
        offload: master weights and moments in host memory.
        overlap: sums run beside the backward pass, from a second bucket (GPUs).
        optimizer: a name in `OPTIMIZERS`.
        fsdp: the stage is FSDP2's.
        rounded: gradients are sent in bf16. (What that takes, of a bucket or a block, is not counted.)
    """

    stage: int
    devices: int
    bucket: int
    offload: bool = False
    overlap: bool = True
    optimizer: str = "adamw"
    fsdp: bool = False
    rounded: bool = False

    @property
    def name(self) -> str:
        if self.stage == 0:
            return "one device" if self.devices == 1 else "DDP"
        if self.fsdp:
            return f"FSDP2 {self.stage}"
        return f"ZeRO {self.stage}" + (", off-load" if self.offload else "")


@dataclass
class State:
    """What a layout holds all through a step, and what it adds on the way, in bytes.

    Args:
        held: of each category.
        host: in host memory.
        per_gradient: of a gradient that stays once it is made, each number; below 0 where a sum takes its place.
        after_sum: of each category, held from the first sum over devices on.
        in_backward: whether gradients are summed while others are made, or when all are.
        summing: at work in a sum, given how many gradients are made.
        updating: at work in the update.
        gathered: gathered weights, given how many the rest of the pass needs.
    """

    held: dict[str, int]
    host: int = 0
    per_gradient: float = 0
    after_sum: dict[str, int] = field(default_factory=dict)
    in_backward: bool = False
    summing: Callable[[int], int] = lambda made: 0
    updating: int = 0
    gathered: Callable[[int], int] = lambda needed: 0


def formats(precision: str, stage: int) -> Formats:
    """Bytes of numbers for `trainer.precision`: autocast on one device and under DDP, bf16 weights under DeepSpeed."""
    if not precision.startswith("bf16"):
        return Formats(4, 4, 4)
    if precision == "bf16-mixed" and stage == 0:
        return Formats(4, 4, 2, autocast=True)
    return Formats(2, 2, 2)


def state(config: DecoderConfig, weight: int, layout: Layout, micro_batches: int) -> State:
    """What the layout holds of a model whose weights have `weight` bytes, in a step of `micro_batches`."""
    several = micro_batches > 1
    if layout.fsdp:
        return _fully_sharded(config, weight, layout, several)
    if layout.stage == 0:
        return _whole(config, weight, layout, several)
    if layout.stage == 3:
        return _zero_3(config, weight, layout)
    if layout.stage == 2:
        return _zero_2(config, weight, layout, several)
    if layout.offload:
        return _zero_1_offload(config, weight, layout, several)
    if weight == 2:
        return _zero_1_half(config, layout, several)
    return _zero_1(config, layout, several)


def _whole(config: DecoderConfig, weight: int, layout: Layout, several: bool) -> State:
    """Weights, gradients and optimizer state in one format. DDP's buckets are the gradients (gradient_as_bucket_view)
    and outlast the step; the sum of micro-batches that are not sent yet lies beside them."""
    p = parameters(config)
    kept = (layout.devices > 1) + several
    held = {"weights": weight * p, "optimizer": weight * _state(config, layout), "gradients": kept * weight * p}
    return State(held, per_gradient=0 if kept else weight)


def _zero_1_half(config: DecoderConfig, layout: Layout, several: bool) -> State:
    """DeepSpeed's BF16_Optimizer: bf16 gradients, and whole fp32 ones beside them, which are joined into one tensor to
    be summed unless the matrices alone are more than JOINED."""
    p, part = parameters(config), _part(config, layout)
    held = {
        "weights": 2 * p + 4 * part,
        "optimizer": 4 * _state(config, layout),
        "gradients": 4 * p + (2 * p if several else 0),
    }
    return State(held, per_gradient=0 if several else 2, summing=lambda made: 4 * p if p <= JOINED else 0)


def _zero_1(config: DecoderConfig, layout: Layout, several: bool) -> State:
    """fp32: the optimizer of stage 2 without its division of gradients. Master weights lie beside equal weights."""
    p, part, b = parameters(config), _part(config, layout), _bucket(config, layout)
    held = {
        "weights": 4 * p + 4 * part,
        "optimizer": 4 * _state(config, layout),
        "gradients": 4 * p if several else 0,
        "buffers": 4 * b * (1 + layout.overlap),
    }
    copied = _summing(config, 4, layout)  # and a device's own part is copied out of the bucket
    return State(held, 0, 0 if several else 4, summing=lambda made: copied(made) + 4 * part, updating=4 * part)


def _zero_1_offload(config: DecoderConfig, weight: int, layout: Layout, several: bool) -> State:
    """The same with fp32 gradients beside weights in `weight` bytes."""
    p, part, b = parameters(config), _part(config, layout), _bucket(config, layout)
    largest = weight * table(config)
    held = {
        "weights": weight * p,
        "gradients": 4 * p if several else 0,
        "buffers": largest + 4 * b * (1 + layout.overlap),
    }
    copied = _summing(config, 4, layout)
    return State(
        held,
        host=(8 + weight) * part + 4 * _state(config, layout) + largest,
        per_gradient=0 if several else 4,
        summing=lambda made: copied(made) + 4 * part,
    )


def _zero_2(config: DecoderConfig, weight: int, layout: Layout, several: bool) -> State:
    """Gradients divided too: those of other devices are gone once they are summed, in every micro-batch. In fp32 those
    of the micro-batch under way are copied beside the sum of the others."""
    p, part, b = parameters(config), _part(config, layout), _bucket(config, layout)
    held, host = {"weights": weight * p + 4 * part, "optimizer": 4 * _state(config, layout)}, 0
    if layout.offload:
        held = {"weights": weight * p, "buffers": weight * table(config)}
        host = (8 + weight) * part + 4 * _state(config, layout) + weight * table(config)
    bucket, again = weight * b * (1 + layout.overlap), 4 * part if several and weight == 4 else 0
    summing = _summing(config, weight, layout)
    return State(
        held,
        host,
        after_sum={"gradients": 4 * part},
        in_backward=True,
        summing=lambda made: (bucket if made else 0) + summing(made) + (again if made >= b else 0),
        updating=4 * part if weight == 4 else 0,
    )


def _summing(config: DecoderConfig, weight: int, layout: Layout) -> Callable[[int], int]:
    """A bucket joined anew, and in fp32 where it is not. A gradient larger than the bucket lies beside it whole, and
    goes by the devices' parts of it."""
    p, part, b = parameters(config), _part(config, layout), _bucket(config, layout)
    copies = weight + (4 if weight == 2 else 0)

    def summing(made: int) -> int:
        if made >= p and table(config) > b:
            return copies * min(table(config), b + part) + weight * table(config)
        return copies * b if made >= min(b + 1, p) else 0

    return summing


def _zero_3(config: DecoderConfig, weight: int, layout: Layout) -> State:
    """Weights divided too, and gathered for use; those that are soon used again stay. The bucket is fp32."""
    p, part, b = parameters(config), _part(config, layout), _bucket(config, layout)
    held = {
        "weights": (weight + 4) * part,
        "gradients": 4 * part,
        "optimizer": 4 * _state(config, layout),
        "buffers": 4 * b,
    }
    host, updating = 0, 4 * part
    if layout.offload:
        held |= {"weights": weight * part, "gradients": 0, "optimizer": 0}
        host, updating = 12 * part + 4 * _state(config, layout), 0

    def summing(made: int) -> int:
        if made >= p and table(config) > b:  # as it is made, in fp32, and in the order of the devices
            return (weight + (4 if weight == 2 else 0) + 4) * table(config)
        return 4 * b if made >= min(b + 1, p) else 0

    persistent = persistent_parameters(config)
    return State(
        held,
        host,
        in_backward=True,
        summing=summing,
        updating=updating,
        gathered=lambda needed: weight * max(persistent, min(needed, LIVE + table(config))),
    )


def _fully_sharded(config: DecoderConfig, weight: int, layout: Layout, several: bool) -> State:
    """FSDP2 (`train/fully_sharded.py`; torch 2.13): fp32 masters, and weights gathered of one block, or of all until
    their last backward pass; gradients of a block in the weights' format, whole sums in fp32 where stage 1 has several
    micro-batches, and what is sent of a block in fp32."""
    p, part, n = parameters(config), _part(config, layout), layout.devices
    root = embedding_parameters(config) + head_parameters(config)
    block = max(block_parameters(config, index) for index in range(config.num_hidden_layers))
    whole = several and layout.stage == 1
    held = {"weights": 4 * part, "optimizer": 4 * _state(config, layout)}
    if several:
        held["gradients"] = 4 * p if whole else 4 * part

    def summing(made: int) -> int:
        if made >= p:
            return int((4 + 4 / n + (4 if whole else weight)) * root)
        return int((4 + 4 / n + weight) * block) if made else 0

    def gathered(needed: int) -> int:
        if not needed:
            return 0
        return weight * (root + min(needed, 2 * block) if layout.stage == 3 else min(p, needed + root))

    return State(
        held,
        per_gradient=4 / n - 4 if whole else 0 if several else 4 / n,
        in_backward=True,
        summing=summing,
        gathered=gathered,
    )


def persistent_parameters(config: DecoderConfig) -> int:
    """Numbers that ZeRO-3 keeps gathered always, those of small parameters (stage3_param_persistence_threshold, as
    `train/strategy.py` sets it)."""
    return small_parameters(config, min(100_000, parameters(config) // 100))


def _part(config: DecoderConfig, layout: Layout) -> int:
    """P / N, rounded up."""
    return -(-parameters(config) // layout.devices)


def _state(config: DecoderConfig, layout: Layout) -> int:
    """Numbers that the optimizer keeps on one device."""
    in_blocks, elsewhere = (rule.state_tensors() for rule in OPTIMIZERS[layout.optimizer])
    hidden = sum(sum(block_matrices(config, index)) for index in range(config.num_hidden_layers))
    kept = in_blocks * hidden + elsewhere * (parameters(config) - hidden)
    return -(-kept // (layout.devices if layout.stage else 1))


def _bucket(config: DecoderConfig, layout: Layout) -> int:
    return min(layout.bucket, parameters(config))
