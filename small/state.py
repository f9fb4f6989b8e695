"""What the training of one model goes on from: its weights, and the moments of Adam; what was measured of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from llm.common.files import write_file

Measured = TypeVar("Measured", bound=tuple)  # a NamedTuple of tensors


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every weight the moments that Adam's first step would, so that a checkpoint has where to go."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            optimizer.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight and of its moments."""
    for name, weight in model.named_parameters():
        yield name, weight
        for kind, tensor in optimizer.state[weight].items():
            yield f"adam.{kind}.{name}", tensor


def measured_once(path: Path, kind: type[Measured], how: dict[str, Any], measure: Callable[[], Measured]) -> Measured:
    """The tensors of a file, measured anew and written where it is not there, torn, or measured otherwise.

    Args:
        path: of a safetensors file.
        kind: a NamedTuple of tensors.
        how: all that they depend on, in terms of JSON.
        measure: makes them.
    """
    facts = {"how": json.dumps(how)}
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() == facts:
                return kind(*(file.get_tensor(name) for name in kind._fields))  # type: ignore[attr-defined]
    except (SafetensorError, OSError):  # none yet, or torn
        pass
    found = measure()
    tensors = {name: each.cpu().contiguous() for name, each in found._asdict().items()}  # type: ignore[attr-defined]
    write_file(path, save(tensors, facts))
    return kind(**tensors)
