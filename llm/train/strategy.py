"""How a run is spread over devices: one device, DDP, DeepSpeed's ZeRO, or FSDP2 (`fully_sharded.py`); through
Lightning's strategies.

What they all do alike, however a rank's part of the model looks: gradients are averaged over ranks, clipped by their
global norm, and a step whose gradient is not finite changes nothing.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from ..common.errors import UserError
from ..common.limits import config_problems
from .contradictions import of_strategy
from .fully_sharded import FullyShardedStrategy

STARTING = 600.0
SHARDED = ("deepspeed", "fsdp2")
NAMES = ("auto", "ddp", *SHARDED)
DTYPES = ("fp32", "bf16")


@dataclass
class StrategySettings:
    """How a run is spread over devices.

    Args:
        name: "auto" is one device, or DDP over several; "ddp"; "deepspeed"; "fsdp2", PyTorch's own sharding.
        stage: of ZeRO (Rajbhandari et al. 2020), under deepspeed and fsdp2. What each rank holds a part of: 1 master
            weights and moments, 2 gradients too, 3 weights too.
        offload_optimizer: deepspeed: master weights, moments and the update in host memory.
        bucket_elements: deepspeed: elements that are reduced or gathered at once. Larger is faster and needs as many
            times 4 bytes, twice. Stage 1 in bf16 ignores it: DeepSpeed sums all gradients there in one go, after the
            step's last backward pass, and gathers all weights after the update. Stage 2 sums every micro-batch's
            gradients, bucket by bucket, during its backward pass; DDP those of the last micro-batch, likewise.
        communication_dtype: of gradients on their way between devices, in bf16-mixed: "fp32", or "bf16", which sends
            half as much and rounds each gradient, and each partial sum, to 8 bits. Accumulation stays in fp32.
        timeout: seconds after which a rank that waits for the others gives up and ends the run. While the run starts,
            ten minutes at least: imports, and the look through the store, take one rank longer than another.
    """

    name: str = "auto"
    stage: int = 1
    offload_optimizer: bool = False
    bucket_elements: int = 50_000_000
    communication_dtype: str = "fp32"
    timeout: float = 1800.0

    @property
    def described(self) -> str:
        """Name and, where state is sharded, the stage."""
        return f"{self.name}, stage {self.stage}" if self.name in SHARDED else self.name

    def problems(self, precision: str, compiled: bool) -> list[str]:
        """Settings that cannot be: each a sentence."""
        problems = []
        if self.name not in NAMES:
            problems.append(f"strategy.name {self.name!r} is unknown: give one of {', '.join(NAMES)}")
        if self.communication_dtype not in DTYPES:
            problems.append(
                f"strategy.communication_dtype {self.communication_dtype!r} is unknown: give {' or '.join(DTYPES)}"
            )
        problems += of_strategy(self, precision, compiled, SHARDED)
        return problems + config_problems("strategy", vars(self).get)

    def build(self, devices: int, gradient_clip: float | None, half_precision: bool) -> Strategy | str:
        """The Lightning strategy for `devices` devices in all.

        Raises:
            UserError: deepspeed is asked for and not installed.
        """
        timeout = timedelta(
            seconds=max(STARTING, self.timeout)
        )  # `ranks.set_collective_timeout` makes it what it should be
        if self.name == "deepspeed":
            return ZeroStrategy(self, gradient_clip, half_precision, timeout)
        if self.name == "fsdp2":
            return FullyShardedStrategy(self.stage, half_precision, self.communication_dtype == "bf16", timeout)
        if self.name == "ddp" or devices > 1:
            kind = RoundingDDPStrategy if self.communication_dtype == "bf16" else DDPStrategy
            return kind(timeout=timeout, gradient_as_bucket_view=True)
        return "auto"


class RoundingDDPStrategy(DDPStrategy):
    """Lightning's DDP strategy, whose gradients travel in bf16."""

    def _register_ddp_hooks(self) -> None:
        """Lightning registers hooks on GPUs alone, and torch this one by its name; gloo sums bf16 as well."""
        model: Any = self.model
        model.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, on GPUs, and on CPUs over gloo; after each step it tells the module the norm.

    Weights are bf16 where `half_precision` is asked for (all of the model, norms too); master weights, accumulated
    gradients and moments are fp32 always.
    """

    def __init__(
        self, settings: StrategySettings, gradient_clip: float | None, half_precision: bool, timeout: timedelta
    ) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        try:
            import deepspeed
        except ImportError as error:
            raise UserError("strategy.name deepspeed needs deepspeed: pip install 'hippoformer[deepspeed]'") from error
        # On CPUs it would compile collectives over shared memory, which know no time-out: a rank that dies would leave
        # the others waiting for ever. gloo's have one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None  # forced, to standard output
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        zero: dict[str, Any] = {
            "stage": settings.stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": settings.bucket_elements,
            "allgather_bucket_size": settings.bucket_elements,
        }
        if settings.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config = {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host too, and needs no compiler
            "gradient_clipping": gradient_clip or 0.0,
            "bf16": {"enabled": half_precision, "check_grad_overflow": True},  # else NaN would be stepped with
            "data_types": {"grad_accum_dtype": "fp32"},  # its default is the weights'
            "communication_data_type": settings.communication_dtype,
            "steps_per_print": 2**62,
            "timers": {"throughput": {"enabled": False}},  # would wait for the device twice in every micro-batch
        }
        super().__init__(config=config, timeout=timeout)
        self.stage = settings.stage

    def setup_environment(self) -> None:
        """Lightning's, without its refusal of CPUs, on which DeepSpeed runs as well; it wants devices with an index."""
        if self.parallel_devices and self.parallel_devices[0].type == "cpu":
            self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # all ranks compute on the one there is

    def setup(self, trainer: pl.Trainer) -> None:
        """Wrap the model; the master weights are then the module's own, not their bf16 copies in fp32."""
        from .state import sharded_state  # needs deepspeed

        module = self._module()
        data = trainer.datamodule
        self.config["train_micro_batch_size_per_gpu"] = data.batch_size // (  # type: ignore[index]
            trainer.accumulate_grad_batches * self.world_size
        )
        limit = max(1, sum(parameter.numel() for parameter in module.parameters()))
        zero = self.config["zero_optimization"]  # type: ignore[index]
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            zero[key] = min(zero[key], limit)  # DeepSpeed allocates them whole, however small the model
        zero["stage3_param_persistence_threshold"] = min(100_000, limit // 100)  # its default keeps small models whole
        initial = {name: parameter.data for name, parameter in module.model.named_parameters()}
        super().setup(trainer)
        if trainer.training and self.config["bf16"]["enabled"]:  # type: ignore[index]
            sharded_state(module.model, self).load_weights(initial)

    def _module(self) -> Any:
        if self.lightning_module is None:
            raise RuntimeError("a strategy trains a module")
        return self.lightning_module

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the number of micro-batches; DeepSpeed would do so once more."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One micro-batch; after the last of a step the module knows its gradient's norm and whether it was skipped."""
        engine, module = self.deepspeed_engine, self._module()
        steps = engine.global_steps
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if engine.global_steps != steps:
            module.gradient_norm = _tensor(engine.get_global_grad_norm())
            module.skipped = not engine.was_step_applied()
            if module.skipped and self.stage < 3:
                # Under off-load DeepSpeed would add the next step's gradients to those that it has just refused.
                held = getattr(engine.optimizer, "averaged_gradients", {})  # stage 1 in bf16 has none
                held.update(dict.fromkeys(held))
        return result


def _tensor(value: Tensor | float) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))


def device_count(devices: int | str | list[int]) -> int:
    """How many devices of a node `trainer.devices` means: a number, a list of them, or "auto" and -1, all."""
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    return int(devices)


def plugins() -> list[Any]:
    """Under Slurm, Lightning's environment without its signal handlers: they save inside the handler and can hang.

    Also in a job named "interactive" or "bash" if srun started several ranks, where Lightning would take each of them
    for a shell and start ranks of its own.
    """
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return [SLURMEnvironment(auto_requeue=False)] if several or SLURMEnvironment.detect() else []


def terminate_children(trainer: pl.Trainer, patience: float) -> None:
    """Wait for the processes that Lightning started on this machine, and after `patience` seconds end them.

    One that hangs in a collective would outlive the run.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":  # it would end this process too, for a child that is ended here
            thread._run = lambda: True
    until = time.monotonic() + patience
    for process in getattr(trainer.strategy.launcher, "procs", None) or []:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
