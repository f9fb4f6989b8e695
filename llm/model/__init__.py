"""The decoder and its parts. Inside this package only `from .name import thing`: the files travel with checkpoints."""

from .config import DecoderConfig
from .decoder import DecoderForCausalLM

__all__ = ["DecoderConfig", "DecoderForCausalLM"]
