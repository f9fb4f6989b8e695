"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019).

    Args:
        lr: peak learning rate.
        betas, eps: of the moments.
        weight_decay: on matrices only (two dimensions, embeddings among them); never on norms, biases, stream
            weights or the scalars of a learned NMDA.
        fused: torch's fused kernel.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool = True

    def problems(self) -> list[str]:
        """What cannot be: each a sentence."""
        allowed = {
            "lr": self.lr > 0,
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0,
        }
        rules = {"lr": "above 0", "betas": "from 0 to below 1", "eps": "above 0", "weight_decay": "0 or more"}
        return [
            f"model.optimizer.{name} {getattr(self, name)} must be {rules[name]}"
            for name, ok in allowed.items()
            if not ok
        ]

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over the model's parameters, in two groups."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim == 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=self.fused)


@dataclass
class Schedule:
    """Learning rate as a factor of the peak, a pure function of the step, so that nothing of it needs saving.

    Warm-up is a straight line to the peak over `warmup_steps`. Then `shape`: "cosine" falls from the peak to
    `min_lr_ratio` at the last step, "constant" stays. Over the last `cooldown_steps` a straight line leads from where
    the shape stands to 0 (Burns et al. 2025, Section 5.1: 500 steps of warm-up, cosine, 5,000 of cool-down).
    """

    shape: str = "cosine"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    min_lr_ratio: float = 0.0

    def problems(self, max_steps: int) -> list[str]:
        """Why a run of `max_steps` cannot follow this schedule: each a sentence."""
        problems = []
        if self.shape not in ("cosine", "constant"):
            problems.append(f"model.schedule.shape {self.shape!r} is unknown: give cosine or constant")
        if min(self.warmup_steps, self.cooldown_steps) < 0 or not 0 <= self.min_lr_ratio <= 1:
            problems.append(
                "model.schedule needs warmup_steps and cooldown_steps of 0 or more and a min_lr_ratio from 0 to 1"
            )
        if max_steps < 1:
            problems.append(f"trainer.max_steps {max_steps} must be at least 1: the schedule is a function of it")
        elif self.warmup_steps + self.cooldown_steps > max_steps:
            problems.append(
                f"warm-up {self.warmup_steps} and cool-down {self.cooldown_steps} are longer than the run of "
                f"{max_steps} steps: lower --model.schedule.warmup_steps and --model.schedule.cooldown_steps or raise "
                "--trainer.max_steps"
            )
        return problems

    def factor(self, step: int, max_steps: int) -> float:
        """The factor for the update that takes step `step` (from 0) to `step + 1`, above 0 and at most 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        cooldown_start = max_steps - self.cooldown_steps
        if step < cooldown_start:
            return self._shape(step, max_steps)
        return self._shape(cooldown_start, max_steps) * (max_steps - step) / self.cooldown_steps

    def _shape(self, step: int, max_steps: int) -> float:
        if self.shape == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
