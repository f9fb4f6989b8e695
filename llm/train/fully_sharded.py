"""PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`) in the stages of ZeRO, on GPUs, and on CPUs over gloo.

Every parameter is cut along its first dimension, and each rank holds its rows as the fp32 master weights of which the
optimizer knows. Blocks gather and sum one by one; the root gathers and sums the embedding, the head and the last norm.
In bf16 a block gathers bf16 copies and computes with these, without autocast; gradients are summed in fp32. A block's
gathering runs during the block before, and its sum during the backward pass of the blocks below.

    stage   gathered weights                        summed gradients
    1       once a step, gone after the last        once a step; until then each rank adds up whole ones in fp32
            backward pass
    2       as 1                                    in every micro-batch
    3       twice in every micro-batch              in every micro-batch
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


class PolicyPrecision(Precision):
    """bf16 by FSDP2's policy; Lightning's own plugin would add autocast."""

    precision = "bf16-mixed"


class RoundedReduceScatter:
    """A reduce-scatter that sends fp32 gradients in bf16. (`reduce_dtype` would have micro-batches added up so too.)"""

    def allocate(self, size: Iterable[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        part = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        dist.reduce_scatter_tensor(part, input_tensor.bfloat16(), op=op, group=group)
        output_tensor.copy_(part)


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for sharded models; it shards the module's decoder itself.

    Args:
        stage: as in this file's first lines.
        half_precision: compute in bf16.
        rounded: send gradients in bf16.
        timeout: of collectives.
    """

    def __init__(self, stage: int, half_precision: bool, rounded: bool, timeout: timedelta) -> None:
        super().__init__(timeout=timeout)
        self.stage, self.half_precision, self.rounded = stage, half_precision, rounded
        self._decoder: Any = None

    def setup_environment(self) -> None:
        """Lightning's, without its mesh of two dimensions."""
        self._setup_distributed()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the decoder, then make the optimizer of what is left of it here."""
        module: Any = self.lightning_module
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if self.half_precision:
            self.precision_plugin = PolicyPrecision()
        self._shard(module.model)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, decoder: Any) -> None:
        # Of a block's result, which holds views (the stream's carry); nothing here changes one in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(self.root_device.type, (self.world_size,)),
            "mp_policy": half if self.half_precision else MixedPrecisionPolicy(),
        }
        for part in (*decoder.model.layers, decoder):  # the root's weights are needed again at once
            fully_shard(part, **settings, reshard_after_forward=self.stage == 3 and part is not decoder)
            if self.rounded and self.world_size > 1:
                part.set_custom_reduce_scatter(RoundedReduceScatter())
        self._decoder = decoder
        self._is_last(True)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """All but the last micro-batch of a step."""
        self._is_last(False)
        yield
        self._is_last(True)

    def _is_last(self, last: bool) -> None:
        self._decoder.set_requires_gradient_sync(last or self.stage > 1)
        self._decoder.set_reshard_after_backward(last or self.stage == 3)


def clip_sharded_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for gradients of which each rank holds a part: one sum over ranks of one number.

    Returns the norm of the whole gradient before clipping.
    """
    parts = [gradient.to_local() for gradient in (each.grad for each in parameters) if isinstance(gradient, DTensor)]
    total = torch.nn.utils.get_total_norm(parts).square()
    dist.all_reduce(total)
    norm = total.sqrt()
    torch._foreach_mul_(parts, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm
