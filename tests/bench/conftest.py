"""The tokenizer of the tests of `llm.data`, for those of bench-data."""

from ..data.conftest import bpe, bpe_folder

__all__ = ["bpe", "bpe_folder"]
