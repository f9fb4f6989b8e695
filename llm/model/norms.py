"""Normalisations by name: RMSNorm (Zhang and Sennrich 2019, Eq. 4) and LayerNorm, torch's own."""

from torch import nn

NORMS: dict[str, type[nn.Module]] = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}


def norm(name: str, width: int, eps: float) -> nn.Module:
    """The normalisation over the last dimension called `name` ("rmsnorm" or "layernorm").

    Raises:
        ValueError: no normalisation has this name.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}: give one of {', '.join(NORMS)}")
    return NORMS[name](width, eps=eps)
