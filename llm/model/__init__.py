"""The decoder and its parts. Inside this package only `from .name import thing`: the files travel with checkpoints.

The two classes are imported when they are asked for, since what a config alone rules out (`contradictions.py`) is found
without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DecoderConfig
    from .decoder import DecoderForCausalLM

__all__ = ["DecoderConfig", "DecoderForCausalLM"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import decoder

    return getattr(decoder, name)
