"""Initial weights from a published model: `fit --init`.

folder, or name on the hub -> its weights under this decoder's names -> checked against the run's decoder and the
store's tokenizer -> copied; what has no counterpart there, as a stream's weights, starts as the config says
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

from ..common.errors import UserError
from ..common.exported import weights_sha256
from ..common.files import first_line
from ..data.store import TokenStore
from ..model import DecoderConfig, DecoderForCausalLM
from ..model.activations import FIELDS

FILES = ["*.json", "*.safetensors"]  # of a model on the hub
# In these a source and the decoder that starts from it are the same.
SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim norm "
    "norm_eps position rope_parameters feedforward attention_bias mlp_bias qk_norm tie_word_embeddings"
).split()
# In these they may differ, and the first loss is then another.
OF_STREAMS = ("stream", "stream_source", "stream_weight", "stream_own", "stream_arriving", "stream_layers")
CHANGES = ("hidden_act", *FIELDS, "softmax_scale", "final_logit_softcapping", "parametrization", "unpadded_vocab_size")
SAMPLE = 2048  # tokens of the store that both tokenizers encode


@dataclass(frozen=True)
class Source:
    """A model to start from: `name` as it was given, its `folder`, and the sha256 of its weights."""

    name: str
    folder: Path
    model: DecoderForCausalLM
    sha256: str


def read_source(name: str) -> Source:
    """Read an export, or LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM or GPT2LMHeadModel.

    Raises:
        UserError: there is none, it has code of its own, or this decoder has no counterpart of it.
    """
    from ..pretrained import load_model  # most runs start without it

    folder = Path(name)
    if any((folder / file).is_file() for file in ("run.json", "manifest.json")):
        raise UserError(
            f"--init {name} is a run or a checkpoint: give an export of it (python -m llm export), or --resume"
        )
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=FILES))
        except Exception as error:  # of the network, the hub's client or the name
            raise UserError(
                f"--init {name} is no folder, and the hub gives no such model ({first_line(error)}): give the folder "
                "of an export or of a transformers model"
            ) from error
    model = load_model(folder, dtype=torch.float32)
    if not isinstance(model, DecoderForCausalLM):
        try:
            model = DecoderForCausalLM.from_hf(model)
        except ValueError as error:
            raise UserError(f"--init {name}: {error}") from error
    return Source(name, folder, model, weights_sha256(folder))


@torch.no_grad()
def start_from(source: Source, model: DecoderForCausalLM) -> list[str]:
    """Copy the source's weights; return what there is to know, a sentence each.

    Raises:
        UserError: the model is not of the source's sizes and parts; all that differ are named.
    """
    theirs, ours = source.model.config, model.config
    shared = [*SHARED, *(["max_position_embeddings"] if theirs.position == "learned" else [])]
    given = ", ".join(
        f"decoder.{key} {getattr(theirs, key)} (not {getattr(ours, key)})"
        for key in shared
        if getattr(theirs, key) != getattr(ours, key)
    )
    if given:
        raise UserError(f"--init {source.name} needs its own sizes and parts: give {given}")
    weights, own = dict(source.model.named_parameters()), dict(model.named_parameters())
    if homeless := sorted(weights.keys() - own.keys()):
        raise UserError(
            f"--init {source.name} has {homeless[0]}, for which this decoder has no place: leave out the switch of the "
            "decoder section that removes or replaces it"
        )
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return list(_notes(source, ours, sorted(own.keys() - weights.keys())))


def _notes(source: Source, ours: DecoderConfig, alone: list[str]) -> list[str]:
    theirs = source.model.config
    notes = [f"the run starts from the weights of {source.name}"]
    if alone:
        notes.append(f"{len(alone)} parameters have no counterpart there and start as the config says: {alone[0]}, ...")
    silent = not theirs.stream and (not ours.stream or (ours.stream_arriving == 0 and ours.stream_own == 1))
    keys = (
        *(() if silent else OF_STREAMS),
        *(() if ours.value_embedding_gate == 0 else ("value_embedding",)),
        *CHANGES,
    )
    if different := [key for key in keys if getattr(theirs, key) != getattr(ours, key)]:
        named = ", ".join(f"decoder.{key} {getattr(ours, key)}" for key in different)
        notes.append(f"its first loss is not that of {source.name}, which has other values of {named}")
        if not theirs.stream and ours.stream and not silent:
            notes.append("stream_arriving 0 with stream_weight layer, head or mix would start at the source's own loss")
    return notes


def check_tokenizer(source: Source, store: TokenStore, tokenizer: Path | None) -> str | None:
    """Compare the source's tokenizer with the store's on a piece of the store; return why that cannot be, or None.

    Raises:
        UserError: they give different ids.
    """
    files = [source.folder / "tokenizer.json", *([tokenizer / "tokenizer.json"] if tokenizer is not None else [])]
    if len(files) < 2 or not all(file.is_file() for file in files):
        missing = source.name if tokenizer is not None and files[1].is_file() else "the store"
        return f"{missing} has no tokenizer.json: that the store's ids are those of {source.name} is not checked"
    theirs, ours = (Tokenizer.from_file(str(file)) for file in files)
    text = ours.decode(store.read(0, min(SAMPLE, store.tokens)).tolist(), skip_special_tokens=True)
    if theirs.encode(text, add_special_tokens=False).ids != ours.encode(text, add_special_tokens=False).ids:
        raise UserError(
            f"--init {source.name} has another tokenizer than the store: prepare the text again with --tokenizer "
            f"{source.folder}"
        )
    return None
