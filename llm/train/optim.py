"""Optimizers and learning-rate schedules, by name.

An optimizer is an `Algorithm` and an entry in `OPTIMIZERS`, a schedule an entry in `SHAPES`. Checkpoints, sharding and
`plan` follow from these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..common.limits import config_problems
from ..model.parametrization import Scales, scales
from .contradictions import of_schedule
from .muon import ShardedMuon

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Algorithm:
    """An update rule.

    Args:
        build: torch's optimizer for parameter groups that have their own `lr` and `weight_decay`.
        state_names: what it keeps for each parameter: tensors of the parameter's shape, and "step" if it counts steps.
        whole_matrices: whether the update of a matrix needs all of it, which ZeRO 3 and off-load have in no place.
        width_power: the learning rate of the blocks' matrices falls as width^-width_power under `completep`: 1 if an
            update has elements of one size, as Adam's; 1/2 for orthogonal updates scaled to such a size, whose largest
            singular value grows with the root of the width alone (Yang et al. 2023, Condition 1).
    """

    build: Callable[[Optimizer, Groups], torch.optim.Optimizer]
    state_names: tuple[str, ...]
    whole_matrices: bool = False
    width_power: float = 1.0

    def state_tensors(self) -> int:
        """Number of state tensors per parameter."""
        return len(set(self.state_names) - {"step"})


def _adamw(settings: Optimizer, groups: Groups) -> torch.optim.Optimizer:
    s = settings
    return torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, eps=s.eps, fused=s.fused)


def _muon(settings: Optimizer, groups: Groups) -> torch.optim.Optimizer:
    return ShardedMuon(groups, momentum=settings.muon_momentum, adjust_lr_fn="match_rms_adamw")


ADAMW = Algorithm(_adamw, ("step", "exp_avg", "exp_avg_sq"))
MUON = Algorithm(_muon, ("momentum_buffer",), whole_matrices=True, width_power=0.5)
# name -> algorithm of the blocks' matrices, and of all other parameters
OPTIMIZERS: dict[str, tuple[Algorithm, Algorithm]] = {"adamw": (ADAMW, ADAMW), "muon": (MUON, ADAMW)}


@dataclass
class Optimizer:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

    Args:
        name: "adamw" (Loshchilov & Hutter 2019) or "muon" (Jordan et al. 2024). Embeddings, the output head and what
            is not a matrix have AdamW either way.
        lr: peak learning rate.
        betas: decay rates of AdamW's moments.
        eps: added to AdamW's denominator.
        weight_decay: on matrices only (two dimensions, embeddings among them); never on norms, biases, stream
            weights or the scalars of a learned activation.
        fused: torch's fused kernel of AdamW.
        muon_lr: peak learning rate under Muon; None is `lr`. Muon's update is scaled to the root mean square of
            AdamW's, 0.2 (Liu et al. 2025), so one rate serves both.
        muon_momentum: of Muon (Nesterov).
    """

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool = True
    muon_lr: float | None = None
    muon_momentum: float = 0.95

    def problems(self) -> list[str]:
        """One sentence for each setting that cannot be."""
        problems = config_problems("model.optimizer", vars(self).get)
        if self.name not in OPTIMIZERS:
            problems.append(f"model.optimizer.name {self.name} must be one of {', '.join(OPTIMIZERS)}")
        return problems

    def sharding_problems(self, stage: int, offload: bool) -> list[str]:
        """Why DeepSpeed's ZeRO `stage` cannot shard this optimizer."""
        if any(rule.whole_matrices for rule in OPTIMIZERS[self.name]) and (stage == 3 or offload):
            return [
                f"model.optimizer.name {self.name} updates whole matrices, which strategy.stage 3 and "
                "strategy.offload_optimizer cut up: set strategy.stage 1 or 2 without off-load, or adamw"
            ]
        return []

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters, in groups with their `initial_lr` and `state_names`.

        The rates, decays and eps are those of `llm/model/parametrization.py`."""
        in_blocks, elsewhere = OPTIMIZERS[self.name]
        scale = scales(getattr(model, "config", None))
        scaled = scale != Scales()
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        grouped_by_place = scaled or in_blocks is not elsewhere
        apart = _table_ids(model) if grouped_by_place else {id(parameter) for _, parameter in trained}
        hidden = [p for _, p in trained if p.ndim == 2 and id(p) not in apart]
        tables = [p for _, p in trained if p.ndim == 2 and id(p) in apart]
        within = [p for name, p in trained if p.ndim != 2 and scaled and ".layers." in name]  # with an eps of their own
        around = [p for name, p in trained if p.ndim != 2 and not (scaled and ".layers." in name)]
        rate = scale.rate(in_blocks.width_power)
        groups = [
            (in_blocks, hidden, self.weight_decay / rate, (self.muon_lr or self.lr) * rate, scale.eps(in_blocks=True)),
            (elsewhere, tables, self.weight_decay, self.lr, scale.eps(in_blocks=False)),
            (elsewhere, within, 0.0, self.lr, scale.eps(in_blocks=True)),
            (elsewhere, around, 0.0, self.lr, scale.eps(in_blocks=False)),
        ]
        by_rule: dict[Algorithm, Groups] = {}
        for rule, parameters, decay, lr, eps in groups:
            group = {"params": parameters, "weight_decay": decay, "lr": lr, "initial_lr": lr}
            if "exp_avg" in rule.state_names:  # Muon's eps, of its own, is no part of it
                group["eps"] = self.eps * eps
            if parameters:
                by_rule.setdefault(rule, []).append(group | {"state_names": rule.state_names})
        parts = [rule.build(self, own) for rule, own in by_rule.items()]
        return parts[0] if len(parts) == 1 else Combined(parts)


def _table_ids(model: nn.Module) -> set[int]:
    """Identities of the parameters of embeddings and of the output head, which is as wide as the vocabulary."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {id(parameter) for module in [*tables, head] if module is not None for parameter in module.parameters()}


class Combined(torch.optim.Optimizer):
    """Several optimizers as one, with their groups and their state; each group is updated by its own."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for index, part in enumerate(parts):
            for group in part.param_groups:
                group["part"] = index
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. ZeRO calls this with one group at a time, and with flat tensors in the place of parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            part = self.parts[group["part"]]
            part.param_groups = [group]
            part.step()
        return loss


@dataclass
class Schedule:
    """Learning rate as a factor of the peak, a pure function of the step, so that nothing of it needs saving.

    Warm-up is a straight line to the peak over `warmup_steps`. Then `shape`: "cosine" falls from the peak to
    `min_lr_ratio` at the last step, "constant" stays. Over the last `cooldown_steps` a straight line leads from where
    the shape stands to 0 (Burns et al. 2025, Section 5.1: 500 steps of warm-up, cosine, 5,000 of cool-down).
    "wsd" is warm-up, stable, decay (Hu et al. 2024, MiniCPM): constant, then over the `cooldown_steps` down to
    `min_lr_ratio` as 1 - sqrt, the best of the forms that Hägele et al. 2024 compare.

    Args:
        shape: between warm-up and cool-down.
        warmup_steps: steps of warm-up.
        cooldown_steps: steps of cool-down.
        min_lr_ratio: share of the peak at which cosine and wsd end.
    """

    shape: str = "cosine"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    min_lr_ratio: float = 0.0

    def problems(self, max_steps: int) -> list[str]:
        """One sentence for each reason why a run of `max_steps` cannot follow this schedule."""
        problems = config_problems("model.schedule", vars(self).get)
        if self.shape not in SHAPES:
            problems.append(f"model.schedule.shape {self.shape!r} is unknown: give {' or '.join(SHAPES)}")
        return problems + of_schedule(self, max_steps, DECAYS)

    def factor(self, step: int, max_steps: int) -> float:
        """The factor for the update that takes step `step` (from 0) to `step + 1`, above 0 and at most 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        cooldown_start = max_steps - self.cooldown_steps
        if step < cooldown_start:
            return self._shape(step, max_steps)
        if self.shape in DECAYS:
            return DECAYS[self.shape]((step - cooldown_start) / self.cooldown_steps, self.min_lr_ratio)
        return self._shape(cooldown_start, max_steps) * (max_steps - step) / self.cooldown_steps

    def _shape(self, step: int, max_steps: int) -> float:
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return SHAPES[self.shape](progress, self.min_lr_ratio)


def _cosine(progress: float, least: float) -> float:
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))


# name -> factor at a progress from 0 (after warm-up) to 1 (the last step), given min_lr_ratio
SHAPES: dict[str, Callable[[float, float], float]] = {
    "cosine": _cosine,
    "constant": lambda progress, least: 1.0,
    "wsd": lambda progress, least: 1.0,
}
# name -> factor at a share from 0 to 1 of the cool-down, given min_lr_ratio; of all other shapes, a straight line to 0
DECAYS: dict[str, Callable[[float, float], float]] = {
    "wsd": lambda share, least: least + (1 - least) * (1 - math.sqrt(share))
}
