"""The state of training by parameter name, whole tensors in fp32, however the strategy has cut it up.

Stages: the parts of all ranks go to rank zero (`gathering.py`) -> it puts them together in host memory. Loading goes
the other way: every rank reads each tensor and keeps its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gathering import gathered, to_host

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
        weights = {name: to_host(parameter) for name, parameter in self.parameters.items()}
        moments = {
            f"{kind}/{name}": to_host(tensor)
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


class Part(NamedTuple):
    """The elements `first` to `last` of a rank's flat tensor: those of a parameter from its `place`-th on."""

    name: str
    shape: torch.Size
    first: int
    last: int
    place: int


class _Zero:
    """What ZeRO's stages have in common: flat fp32 tensors, each with AdamW's state, of which a rank holds a part."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer

    def snapshot(self, keep: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        kinds = []
        for group, flat in enumerate(self._flat()):
            self._take(weights, "", group, flat, keep)
            kinds = list(self.optimizer.optimizer.state.get(flat, {}))
            for kind in kinds:
                self._take(moments, f"{kind}/", group, self.optimizer.optimizer.state[flat][kind], keep)
        names = list(self.parameters) if keep else []  # in the order that every strategy has
        keys = [f"{kind}/{name}" for name in names for kind in kinds]
        return {name: weights[name] for name in names}, {key: moments[key] for key in keys}

    def _take(self, kept: dict[str, Tensor], prefix: str, group: int, held: Tensor, keep: bool) -> None:
        """On rank zero, put together the parameters of a group, of which each rank's flat tensor `held` has a part."""
        ranks = range(torch.distributed.get_world_size() if keep else 0)
        parts = [self._parts(group, rank) for rank in ranks]
        if held.shape != self._flat()[group].shape:  # one number for all: AdamW's count of steps
            kept |= {prefix + part.name: to_host(held) for part in (parts[0] if keep else ())}
            return
        kept |= {prefix + part.name: torch.empty(part.shape) for part in (parts[0] if keep else ())}
        for start, pieces in gathered(held, next(iter(self.parameters.values())).device, keep):
            for part, piece in ((part, piece) for of, piece in zip(parts, pieces, strict=True) for part in of):
                first, last = max(part.first, start), min(part.last, start + len(piece))
                if first < last:
                    place, whole = part.place + first - part.first, kept[prefix + part.name].view(-1)
                    whole[place : place + last - first] = piece[first - start : last - start]

    def _parts(self, group: int, rank: int) -> list[Part]:
        """What a rank's flat tensor of a group holds, of every parameter of the group."""
        raise TypeError("of a stage")

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

    def _parts(self, group: int, rank: int) -> list[Part]:
        """The master weights lie in the flat tensor where DeepSpeed has put the working weights in one of theirs."""
        zero = self.optimizer
        working = (zero.bf16_groups_flat if hasattr(zero, "bf16_groups_flat") else zero.bit16_groups_flat)[group]
        size = len(self._flat()[group])
        parts = []
        for name, parameter in self.parameters.items():
            if parameter.untyped_storage().data_ptr() == working.untyped_storage().data_ptr():
                begin = parameter.storage_offset() - working.storage_offset() - rank * size
                first, last = max(0, begin), min(size, begin + parameter.numel())
                parts.append(Part(name, parameter.shape, first, last, first - begin))
        return parts

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

    def _parts(self, group: int, rank: int) -> list[Part]:
        names = {parameter: name for name, parameter in self.parameters.items()}
        parts, first = [], 0
        for parameter in self.optimizer.fp16_groups[group]:
            size = parameter.ds_tensor.numel()
            last = first + min(size, parameter.ds_numel - rank * size)
            parts.append(Part(names[parameter], parameter.ds_shape, first, last, rank * size))
            first += size
        return parts

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
