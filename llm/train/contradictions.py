"""Settings of a run that contradict each other, a sentence each.

Imports no torch: the options of `fit` are checked by these functions before the classes that hold them are imported.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any


def of_schedule(schedule: Any, max_steps: int, decays: Container[str]) -> list[str]:
    """Why a run of `max_steps` cannot follow a schedule; `decays` names the shapes that use the cool-down."""
    problems = []
    if schedule.shape in decays and schedule.cooldown_steps == 0:
        problems.append(
            f"model.schedule.shape {schedule.shape} decays over the last steps: set model.schedule.cooldown_steps, "
            "usually 10 to 20% of trainer.max_steps"
        )
    if max_steps < 1:
        problems.append(f"trainer.max_steps {max_steps} must be at least 1: the schedule is a function of it")
    elif schedule.warmup_steps + schedule.cooldown_steps > max_steps:
        problems.append(
            f"warm-up {schedule.warmup_steps} and cool-down {schedule.cooldown_steps} are longer than the run of "
            f"{max_steps} steps: lower --model.schedule.warmup_steps and --model.schedule.cooldown_steps or raise "
            "--trainer.max_steps"
        )
    return problems


def of_context(context: int, position: str, positions: int) -> list[str]:
    """Whether rows of `context` tokens have more positions than a model with learned ones."""
    if position == "learned" and context > positions:
        return [f"data.context {context} is beyond decoder.max_position_embeddings {positions}"]
    return []


def of_strategy(strategy: Any, precision: str, compiled: bool, sharded: Container[str]) -> list[str]:
    """What of a strategy does not go with the precision, with compiled blocks or with its own name; `sharded` lists
    the names of those without a whole copy of the weights on each device."""
    name, problems = strategy.name, list[str]()
    if strategy.offload_optimizer and name != "deepspeed":
        problems.append("strategy.offload_optimizer needs strategy.name deepspeed")
    if name in sharded and precision == "bf16-true":
        problems.append(f"trainer.precision bf16-true has no fp32 master weights under {name}: give bf16-mixed")
    if name == "deepspeed" and strategy.stage == 3 and compiled:
        problems.append(
            "strategy.stage 3 gathers weights in hooks within every block, and torch would compile those again and "
            "again: set model.compile false, or strategy.stage 1 or 2"
        )
    if strategy.communication_dtype == "bf16" and precision != "bf16-mixed":
        problems.append(
            f"strategy.communication_dtype bf16 would round gradients of trainer.precision {precision}, which are "
            "sent as they are: set fp32, or trainer.precision bf16-mixed"
        )
    return problems


def of_interval(key: str, value: int | None, checkpoint_every: int) -> list[str]:
    """Whether an interval is not a multiple of that between checkpoints."""
    if value and value % max(1, checkpoint_every):
        return [f"{key} {value} must be a multiple of run.checkpoint_every {checkpoint_every}"]
    return []
