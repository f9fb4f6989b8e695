"""The columns of the matrix, a small `LlamaForCausalLM` and exports of ours, and the list of its rows.

docs/exports.md shows the matrix as a table; `test_page.py` compares both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm.model import DecoderConfig, DecoderForCausalLM

TOKENS = 257  # of tests/exported.py's byte_tokenizer
SIZES: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
PADDED: dict[str, Any] = {"vocab_size": 264, "unpadded_vocab_size": TOKENS}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def ours(style: Callable[..., DecoderConfig] = DecoderConfig.llama, **settings: Any) -> DecoderForCausalLM:
    return DecoderForCausalLM(style(**(SIZES | settings)))


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": llama,
    "classic": partial(ours, num_key_value_heads=2),
    "values": partial(ours, **PADDED, stream=["values"], num_key_value_heads=2),
    "queries": partial(ours, stream=["queries"], tie_word_embeddings=True),
    "accumulated": partial(
        ours, **PADDED, num_hidden_layers=3, stream=["queries", "keys", "values"], stream_source="accumulated",
        stream_weight="head", tie_word_embeddings=True,
    ),
    "NMDA": partial(ours, **PADDED, hidden_act="nmda", nmda_alpha=10.0, nmda_learnable=True),
    "GPT-2": partial(ours, DecoderConfig.gpt2, **PADDED),
}  # fmt: skip
ROWS: dict[str, str] = {}  # what the page calls it -> the test

Load = Callable[[str], PreTrainedModel]  # a fresh copy of the model of this kind, loaded from its folder


def row(title: str) -> Callable[[Callable], Callable]:
    """Make a test a row of the matrix: it runs once for each kind of model, and demands the same of all."""

    def mark(test: Callable) -> Callable:
        ROWS[title] = test.__name__
        return pytest.mark.parametrize("kind", KINDS)(test)

    return mark


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(1, TOKENS, (rows, length), generator=torch.Generator().manual_seed(seed))
