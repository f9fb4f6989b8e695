"""Dropout on CPUs, where torch draws a random number of its own kind for every element and is slower at it than at the
rest of a block.

An element is kept where its bits are not below p: 15 bits in bfloat16, 31 in float32, so that the probability is p to
2^-16 or 2^-32. They are torch's generator's, 64 at a time, so a seed gives the same numbers again and a recomputed
block draws what it drew before. On other devices, and in compiled code, dropout is torch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .fast_paths import fast

WHOLE = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # integers of the same size


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`, which draws other elements from the same seed."""
    if not training or p == 0:
        return x
    return x * keep_factors(x, p) if by_bits(x, p, x.dtype) else F.dropout(x, p)


def by_bits(x: Tensor, p: float, dtype: torch.dtype) -> bool:
    """Whether the bits of this file are for what is made of x in this dtype."""
    on_cpu = x.device.type == "cpu" and dtype in WHOLE and fast("dropout")
    return on_cpu and p < 1 and not torch.compiler.is_compiling()


def keep_factors(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in the shape and dtype of x."""
    whole = WHOLE[x.dtype]
    size = whole.itemsize
    bits = torch.empty(-(-x.numel() * size // 8), dtype=torch.int64).random_(-(2**63), None).view(whole)[: x.numel()]
    factor = torch.tensor(1 / (1 - p), dtype=x.dtype).view(whole).item()
    # Without a comparison, whose booleans are slow to turn to numbers: -1 (all bits) where dropped, else 0.
    top = 2 ** (8 * size - 1)
    dropped = bits.bitwise_and_(top - 1).sub_(round(p * top)).bitwise_right_shift_(8 * size - 1)
    return dropped.bitwise_and_(factor).bitwise_xor_(factor).view(x.dtype).view(x.shape)
