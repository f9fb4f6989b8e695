"""The state of training by parameter name, whole tensors in fp32, however the strategy has cut it up.

What a rank holds of it are its shares, from which `gathering.py` makes whole tensors on rank zero. Loading goes the
other way: every rank reads each tensor and keeps its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .gathering import Part, Share


class State(Protocol):
    """Weights and the optimizer's state of a model under some strategy.

    parameters: by name, tied ones once; in the order of a checkpoint's.
    replicated: whether every rank holds all of it.
    """

    parameters: dict[str, nn.Parameter]
    replicated: bool

    def shares(self, keep: bool) -> list[Share]:
        """What this rank holds of weights and optimizer state, as many shares in the same order on every rank but
        those that rank zero, which gives `keep`, holds alone: they come last."""

    def state_keys(self) -> set[str]:
        """The "STATE/name" of every parameter's optimizer state, as it is after the first step."""

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take weights by name and the optimizer's state by "STATE/name", which is empty before the first step."""


def state_of(model: nn.Module, strategy: Any, optimizer: torch.optim.Optimizer) -> State:
    """The state of `model` under Lightning's `strategy`."""
    if hasattr(strategy, "deepspeed_engine"):
        return sharded_state(model, strategy)
    if isinstance(model, FSDPModule):
        return FullyShardedState(model, optimizer)
    return ReplicatedState(model, optimizer)


def sharded_state(model: nn.Module, strategy: Any) -> ShardedState | PartitionedState:
    """The state of `model` under DeepSpeed's ZeRO: stages 1 and 2, or 3."""
    kind = PartitionedState if strategy.stage == 3 else ShardedState
    return kind(model, strategy.deepspeed_engine.optimizer)


class ReplicatedState:
    """Every rank holds all of it: one device, and DDP."""

    replicated = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = dict(model.named_parameters())  # tied ones once
        self.optimizer = optimizer

    def shares(self, keep: bool) -> list[Share]:
        return [
            Share(kind, tensor, tensor.numel(), [[Part(name, tensor.shape, 0, tensor.numel(), 0)]])
            for kind, name, tensor in (_tensors(self.parameters, self.optimizer) if keep else ())
        ]

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


def _tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, str, Tensor]]:
    """Each parameter, and each tensor that the optimizer keeps for it: (kind, name, tensor)."""
    for name, parameter in parameters.items():
        yield "", name, parameter
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            yield kind, name, tensor


class FullyShardedState(ReplicatedState):
    """FSDP2: each tensor is cut along its first dimension, into as many parts as there are ranks; the first are of
    equal size, the last ones smaller or empty."""

    replicated = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a validation leaves the gathered weights in the places of these
        super().__init__(model, optimizer)

    def shares(self, keep: bool) -> list[Share]:
        sharded, alone = [], []
        for kind, name, tensor in _tensors(self.parameters, self.optimizer):
            if not isinstance(tensor, DTensor):  # AdamW's count of steps
                alone.append(Share(kind, tensor, 1, [[Part(name, tensor.shape, 0, 1, 0)]]))
                continue
            rows, row = _rows(tensor), tensor.shape[1:].numel()
            parts = [[Part(name, tensor.shape, 0, len(own) * row, own.start * row)] for own in (rows if keep else ())]
            sharded.append(Share(kind, tensor.to_local(), len(rows[0]) * row, parts))
        return sharded + (alone if keep else [])

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            _keep_own(parameter, weights[name])
        for key, tensor in optimizer.items():
            kind, name = key.split("/", 1)
            parameter = self.parameters[name]
            kept = tensor if kind == "step" else torch.zeros_like(parameter)
            self.optimizer.state[parameter][kind] = kept.to(parameter.device)
            if kind != "step":
                _keep_own(self.optimizer.state[parameter][kind], tensor)


def _rows(tensor: DTensor) -> list[range]:
    """The rows of a tensor that each rank holds."""
    ranks, length = tensor.device_mesh.size(), len(tensor)
    each = -(-length // ranks)
    return [range(min(length, rank * each), min(length, (rank + 1) * each)) for rank in range(ranks)]


def _keep_own(tensor: Tensor, whole: Tensor) -> None:
    """Write this rank's rows of a sharded tensor."""
    assert isinstance(tensor, DTensor)
    own = _rows(tensor)[tensor.device_mesh.get_local_rank()]
    tensor.to_local().copy_(whole[own.start : own.stop])


class FlatGroup(NamedTuple):
    """A flat fp32 tensor of which this rank holds a part, and what the optimizer keeps for it (`optim.py`)."""

    flat: Tensor
    parameters: list[nn.Parameter]
    state_names: tuple[str, ...]


class _Zero:
    """What ZeRO's stages have in common: flat fp32 tensors with the optimizer's state, of which a rank holds a part."""

    replicated = False

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer

    def shares(self, keep: bool) -> list[Share]:
        ranks = torch.distributed.get_world_size() if keep else 0
        sharded, alone = [], []
        for index, group in enumerate(self._flat()):
            parts = [self._parts(index, rank) for rank in range(ranks)]
            for kind, held in {"": group.flat, **self.optimizer.optimizer.state.get(group.flat, {})}.items():
                if held.shape == group.flat.shape:
                    sharded.append(Share(kind, held, held.numel(), parts))
                elif keep:  # one number for all: AdamW's count of steps
                    names = [Part(part.name, held.shape, 0, 1, 0) for part in parts[0]]
                    alone.append(Share(kind, held, 1, [names]))
        return sharded + alone

    def _parts(self, group: int, rank: int) -> list[Part]:
        """What a rank's flat tensor of a group holds, of every parameter of the group."""
        raise TypeError("of a stage")

    def state_keys(self) -> set[str]:
        return {f"{kind}/{name}" for name, group in self._by_parameter().items() for kind in group.state_names}

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        self.load_weights(weights)
        if not optimizer:
            return
        groups = self._by_parameter()
        for name, group in {group.flat: (name, group) for name, group in groups.items()}.values():
            state = {kind: torch.zeros_like(group.flat) for kind in group.state_names if kind != "step"}
            if "step" in group.state_names:
                state["step"] = optimizer[f"step/{name}"].to(group.flat.device if group.flat.is_cuda else "cpu")
            self.optimizer.optimizer.state[group.flat] |= state
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

    def _parts(self, group: int, rank: int) -> list[Part]:
        """The master weights lie in the flat tensor where DeepSpeed has put the working weights in one of theirs."""
        zero = self.optimizer
        working = (zero.bf16_groups_flat if hasattr(zero, "bf16_groups_flat") else zero.bit16_groups_flat)[group]
        size = len(self._flat()[group].flat)
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

    def _flat(self) -> list[FlatGroup]:
        zero = self.optimizer
        groups = zero.optimizer.param_groups
        return [
            FlatGroup(flat, part, groups[zero.sub_group_to_group_id[index]]["state_names"])
            for index, (flat, part) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        ]

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
