"""What an activation with parameters declares about itself."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)  # formats from which an activation computes in float32


class Parametric(nn.Module):
    """An activation with parameters.

    defaults: name -> default (float, bool or str) of each argument of the constructor; the config has them as
        ACTIVATION_NAME.
    in_float32: it computes in float32 in several kernels, which needs more memory in the backward pass.
    initial: name -> first value of each learned parameter of the module, all of shape (1,).
    """

    defaults: ClassVar[dict[str, Any]] = {}
    in_float32: ClassVar[bool] = False
    initial: dict[str, float]

    @classmethod
    def problems(cls, **settings: Any) -> list[str]:
        """What cannot be among the config's values, a sentence each."""
        return []

    @classmethod
    def learned_sizes(cls, **settings: Any) -> list[int]:
        """Elements of each learned parameter."""
        return []

    def learned(self) -> dict[str, Tensor]:
        """What a training run logs of this module: learned numbers by name."""
        return {}
