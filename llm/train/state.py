"""The state of training by parameter name, whole tensors in fp32, however the strategy has cut it up.

Stages: every rank asks for each tensor in turn (ZeRO gathers it) -> rank zero keeps a copy in host memory. Loading goes
the other way: every rank reads each tensor and keeps its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class State(Protocol):
    """Weights and the optimizer's state of a model under some strategy."""

    def snapshot(self, keep: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies in host memory: (name -> weight, "STATE/name" -> optimizer state). Every rank has to call it; those
        without `keep` get nothing."""

    def state_keys(self) -> set[str]:
        """The "STATE/name" of every parameter's optimizer state, as it is after the first step."""

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take weights by name and the optimizer's state by "STATE/name", which is empty before the first step."""


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

    def state_keys(self) -> set[str]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        groups = self.optimizer.param_groups
        return {f"{kind}/{names[id(p)]}" for group in groups for p in group["params"] for kind in group["state_names"]}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        for key, tensor in optimizer.items():
            kind, name = key.split("/", 1)
            parameter = self.parameters[name]
            dtype = tensor.dtype if kind == "step" else parameter.dtype
            self.optimizer.state[parameter][kind] = tensor.to(parameter.device, dtype)


@dataclass
class FlatGroup:
    """A flat fp32 tensor of which this rank holds a part.

    Args:
        flat: this rank's part, with which the optimizer works.
        parameters: what it is made of.
        state_names: what the optimizer keeps for each (`optim.py`).
    """

    flat: Tensor
    parameters: list[nn.Parameter]
    state_names: tuple[str, ...]


class _Zero:
    """What ZeRO's stages have in common: flat fp32 tensors with the optimizer's state, of which a rank holds a part."""

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

        states = self.optimizer.optimizer.state
        groups = self._by_parameter() if any(states.values()) else {}  # there is no state before the first step
        if groups:
            self._link_moments()
        for name, parameter in self.parameters.items():
            take(weights, name, safe_get_full_fp32_param(parameter))
            for kind in groups[name].state_names if groups else ():
                counted = kind == "step"
                whole = states[groups[name].flat][kind] if counted else safe_get_full_optimizer_state(parameter, kind)
                take(moments, f"{kind}/{name}", whole)
        return weights, moments

    def state_keys(self) -> set[str]:
        return {f"{kind}/{name}" for name, group in self._by_parameter().items() for kind in group.state_names}

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        self.load_weights(weights)
        if not optimizer:
            return
        groups = self._by_parameter()
        for name, group in groups.items():
            state = self.optimizer.optimizer.state[group.flat]
            if not state:
                state |= {kind: torch.zeros_like(group.flat) for kind in group.state_names}
                if "step" in state:
                    count = optimizer[f"step/{name}"].clone()
                    state["step"] = count.to(group.flat.device if group.flat.is_cuda else "cpu")
        self._link_moments()
        for name, parameter in self.parameters.items():
            for kind in groups[name].state_names:
                if kind != "step":
                    self._set(parameter, optimizer[f"{kind}/{name}"], kind)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take master weights by name, and make the working weights from them."""
        for name, parameter in self.parameters.items():
            self._set(parameter, weights[name], None)
        self._refresh()

    def _by_parameter(self) -> dict[str, FlatGroup]:
        """The flat tensor of each parameter by its name."""
        of = {id(parameter): group for group in self._flat() for parameter in group.parameters}
        return {name: of[id(parameter)] for name, parameter in self.parameters.items()}

    def _flat(self) -> list[FlatGroup]:
        """The flat tensors."""
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

    def _flat(self) -> list[FlatGroup]:
        zero = self.optimizer
        parts = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
        groups = zip(zero.optimizer.param_groups, parts, strict=True)
        return [FlatGroup(group["params"][0], part, group["state_names"]) for group, part in groups]

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

    def _flat(self) -> list[FlatGroup]:
        zero = self.optimizer
        groups = zero.optimizer.param_groups
        return [
            FlatGroup(flat, part, groups[zero.sub_group_to_group_id[index]]["state_names"])
            for index, (flat, part) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        ]

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
