"""Muon on ZeRO's flat tensors and on FSDP2's sharded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedMuon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), also where DeepSpeed's ZeRO 1 or 2 has put a flat fp32 tensor, of which each
    rank holds a part, in the place of a group's matrices.

    Momentum is elementwise, so each rank keeps that of its own part. The orthogonalization needs whole matrices: a
    rank does it for those that lie in its part. Only a matrix that is cut by the border of two parts is sent.

    FSDP2 cuts every matrix: each rank gathers it whole, does the same, and keeps its own rows.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        for group in self.param_groups:
            group["matrices"] = group["params"]  # DeepSpeed replaces "params", and knows each one's part by these

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of whole matrices, or of this rank's part of them."""
        sharded = any(isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"])
        if not sharded and all(parameter.ndim == 2 for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._update_rows if sharded else self._update_part)(group)
        return loss

    def _update_rows(self, group: dict[str, Any]) -> None:
        """Update this rank's rows of the matrices of `group`."""
        for matrix in group["params"]:
            if matrix.grad is None:  # a skipped step
                continue
            momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
            momentum.lerp_(matrix.grad, 1 - group["momentum"])
            update = matrix.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            change = _orthogonal_step(update.full_tensor(), group)
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(distribute_tensor(change, matrix.device_mesh, matrix.placements, src_data_rank=None))

    def _update_part(self, group: dict[str, Any]) -> None:
        """Update this rank's flat part (n,) of the matrices of `group`."""
        (flat,) = group["params"]
        momentum = self.state[flat].setdefault("momentum_buffer", torch.zeros_like(flat))
        momentum.lerp_(flat.grad, 1 - group["momentum"])
        update = flat.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        if "cut" not in group:
            group["cut"] = _cut(group["matrices"], flat.device)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for matrix, cut in zip(group["matrices"], group["cut"], strict=True):
            part = matrix._hp_mapping  # where the matrix lies in this rank's flat tensor; None where it does not
            if part is None and not cut:
                continue
            whole = torch.zeros(matrix.shape, dtype=flat.dtype, device=flat.device)
            if part is not None:
                here, there = part.hp_fragment_address, part.lp_fragment_address
                own = whole.view(-1)[there.start : there.start + there.numel]
                own.copy_(update[here.start : here.start + here.numel])
            if cut:
                dist.all_reduce(whole, group=matrix._dp_group)  # a sum of disjoint parts: exact
            if part is not None:
                change = _orthogonal_step(whole, group).view(-1)[there.start : there.start + there.numel]
                flat[here.start : here.start + here.numel] += change


def _cut(matrices: list[nn.Parameter], device: torch.device) -> list[bool]:
    """Whether several ranks hold parts of each matrix; a collective, so that all ranks agree."""
    holders = torch.tensor([float(matrix._hp_mapping is not None) for matrix in matrices], device=device)
    dist.all_reduce(holders, group=matrices[0]._dp_group)
    return [count > 1 for count in holders.tolist()]


def _orthogonal_step(update: Tensor, group: dict[str, Any]) -> Tensor:
    """What Muon adds to a matrix whose momentum is `update` (rows, columns): torch's own, from a matrix of zeros."""
    matrix = nn.Parameter(torch.zeros_like(update))
    matrix.grad = update
    settings = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([matrix], **settings, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return matrix.detach()
