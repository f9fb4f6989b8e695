"""Exported folders of tiny models, written without a run: with the files of `llm.model` and a byte-level tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm.model import DecoderConfig, DecoderForCausalLM

END = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """257 ids: the end of text, then the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([END, *alphabet])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


def write_export(folder: Path, card: dict[str, Any] | None = None, tokenizer: Any = None, **settings: Any) -> Path:
    """An exported folder with random weights; `card` is its hippoformer.json."""
    tokenizer = tokenizer or byte_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = DecoderConfig.llama(vocab_size=len(tokenizer), **{**sizes, **ids, "initializer_range": 0.2, **settings})
    DecoderForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "hippoformer.json").write_text(json.dumps(card))
    return folder


def edit_config(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Change keys of a folder's configuration."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def append(file: Path, code: str) -> None:
    """Put code at the end of a file."""
    with file.open("a") as opened:
        opened.write(f"\n\n{code}\n")
