"""What autocast does to matrix products, for functions that compute their own gradient and so have to do it too."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Of the matrix products that x enters: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
