"""The state of training by parameter name, whole tensors in fp32, however the strategy has cut it up.

Stages: every rank asks for each tensor in turn (ZeRO gathers it) -> rank zero keeps a copy in host memory. Loading goes
the other way: every rank reads each tensor and keeps its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside its count of steps


class State(Protocol):
    """Weights and AdamW's state of a model under some strategy."""

    def snapshot(self, keep: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies in host memory: (name -> weight, "STATE/name" -> AdamW's state). Every rank has to call it; those
        without `keep` get nothing."""

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take weights by name and AdamW's state by "STATE/name", which is empty before the first step."""


def state_of(model: nn.Module, strategy: Any, optimizer: torch.optim.Optimizer) -> State:
    """The state of `model` under Lightning's `strategy`."""
    if hasattr(strategy, "deepspeed_engine"):
        return sharded_state(model, strategy)
    return ReplicatedState(model, optimizer)


def sharded_state(model: nn.Module, strategy: Any) -> ShardedState | PartitionedState:
    """The state of `model` under DeepSpeed's ZeRO: stages 1 and 2, or 3."""
    kind = PartitionedState if strategy.stage == 3 else ShardedState
    return kind(model, strategy.deepspeed_engine.optimizer)


class ReplicatedState:
    """Every rank holds all of it: one device, and DDP."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = dict(model.named_parameters())  # tied ones once
        self.optimizer = optimizer

    def snapshot(self, keep: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not keep:
            return {}, {}
        weights = {name: _copy(parameter) for name, parameter in self.parameters.items()}
        moments = {
            f"{kind}/{name}": _copy(tensor)
            for name, parameter in self.parameters.items()
            for kind, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        return weights, moments

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        for key, tensor in optimizer.items():
            kind, name = key.split("/", 1)
            parameter = self.parameters[name]
            dtype = tensor.dtype if kind == "step" else parameter.dtype
            self.optimizer.state[parameter][kind] = tensor.to(parameter.device, dtype)


class _Zero:
    """What ZeRO's stages have in common: flat fp32 tensors, each with AdamW's state, of which a rank holds a part."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer

    def snapshot(self, keep: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}

        def take(kept: dict[str, Tensor], key: str, whole: Tensor) -> None:
            if keep:
                kept[key] = _copy(whole)

        counted = self._steps()
        if counted is not None:
            self._link_moments()
        for name, parameter in self.parameters.items():
            take(weights, name, safe_get_full_fp32_param(parameter))
            if counted is not None:
                take(moments, f"step/{name}", counted)
                for kind in MOMENTS:
                    take(moments, f"{kind}/{name}", safe_get_full_optimizer_state(parameter, kind))
        return weights, moments

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        self.load_weights(weights)
        if not optimizer:
            return
        count = optimizer[f"step/{next(iter(self.parameters))}"]
        for flat in self._flat():
            state = self.optimizer.optimizer.state[flat]
            state["step"] = count.clone().to(flat.device if flat.is_cuda else "cpu")
            state |= {kind: torch.zeros_like(flat) for kind in MOMENTS}
        self._link_moments()
        for name, parameter in self.parameters.items():
            for kind in MOMENTS:
                self._set(parameter, optimizer[f"{kind}/{name}"], kind)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take master weights by name, and make the working weights from them."""
        for name, parameter in self.parameters.items():
            self._set(parameter, weights[name], None)
        self._refresh()

    def _steps(self) -> Tensor | None:
        """AdamW's count of steps, equal for all parameters; None before the first."""
        return next((state["step"] for state in self.optimizer.optimizer.state.values() if "step" in state), None)

    def _flat(self) -> list[Tensor]:
        """This rank's flat fp32 tensors."""
        raise TypeError("of a stage")

    def _link_moments(self) -> None:
        """Make each parameter's part of the moments known to DeepSpeed; the moments of all flat tensors are there."""

    def _set(self, parameter: nn.Parameter, whole: Tensor, kind: str | None) -> None:
        """Write this rank's part of a parameter's master weight, or of a moment."""
        raise TypeError("of a stage")

    def _refresh(self) -> None:
        """Make the working weights of all ranks from the master weights."""
        raise TypeError("of a stage")


class ShardedState(_Zero):
    """ZeRO stages 1 and 2: each group of parameters is one flat tensor, cut into as many parts as there are ranks."""

    def _flat(self) -> list[Tensor]:
        return [group["params"][0] for group in self.optimizer.optimizer.param_groups]

    def _link_moments(self) -> None:
        """DeepSpeed's first step does so when only the first of several parameter groups has moments."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, whole: Tensor, kind: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind is None:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, kind)

    def _refresh(self) -> None:
        self.optimizer.update_lp_params()


class PartitionedState(_Zero):
    """ZeRO stage 3: each parameter is cut into as many equal parts as there are ranks, the last one padded."""

    def _flat(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def _set(self, parameter: nn.Parameter, whole: Tensor, kind: str | None) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        start = size * self.optimizer._get_param_partition_rank(parameter)
        part = whole.flatten()[start : start + size]
        part = F.pad(part, (0, size - part.numel()))
        if kind is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def _refresh(self) -> None:
        """As its step ends."""
        zero = self.optimizer
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _copy(tensor: Tensor) -> Tensor:
    """A copy in host memory, fp32, that nobody else writes to."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
