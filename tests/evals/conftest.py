"""Tiny models in ordinary transformers folders, with a tokenizer trained here, and a network that is switched off."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # as `python -m evals run --data` sets them

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..real_data import find, need
from .rows import arc_rows, piqa_rows, write_rows

END = "<|endoftext|>"
TEXT = [
    f"When {a} and {b} went to the {p}, {a} gave the bag to {b}. After that, an apple and a drink and the ball."
    for a, b in (("John", "Mary"), ("Tom", "James"), ("Dan", "Emily"), ("Sam", "Amy"))
    for p in ("shops", "park")
] * 4


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for a network fails here at once instead of waiting for one."""

    def raise_problems(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a network connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", raise_problems)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads, many times so where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_tokenizer(ids: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `ids` ids; with 257 it knows the bytes and the end of text alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=ids, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


MakeExport = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """`words`: every name of the IOI task is one token. `bytes`: none is. `gpt2`: the published one, where it is."""
    known = {"words": train_tokenizer(400), "bytes": train_tokenizer(257)}
    if file := find("gpt2-tokenizer/tokenizer.json"):
        known["gpt2"] = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=END)
    return known


@pytest.fixture
def make_export(tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast]) -> MakeExport:
    """Write an exported folder of a tiny random model, padded to `vocabulary` ids, and return its path."""

    def make(
        name: str = "model",
        style: str = "gpt2",
        tokenizer: str = "words",
        seed: int = 0,
        context: int = 512,
        vocabulary: int = 400,
        info: dict[str, object] | None = None,
    ) -> Path:
        torch.manual_seed(seed)
        if style == "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": context, "initializer_range": 0.4}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes))
        else:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            sizes |= {"max_position_embeddings": context, "initializer_range": 0.4}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizers[tokenizer].save_pretrained(folder)
        if info is not None:
            (folder / "hippoformer.json").write_text(json.dumps(info))
        return folder

    return make


@pytest.fixture(scope="session")
def real_items() -> Path:
    """Real items of PIQA, HellaSwag and OpenBookQA."""
    return need("evals")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Made-up items of PIQA and ARC-Easy, so that the tests hold without the real ones too."""
    folder = tmp_path / "data"
    for task, rows, evaluated in (("piqa", piqa_rows, "validation"), ("arc_easy", arc_rows, "test")):
        write_rows(folder / task, "train", rows("example", 12))
        write_rows(folder / task, evaluated, rows("item", 6))
    return folder
