"""What the training of one model goes on from: its weights, and the moments of Adam."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


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
