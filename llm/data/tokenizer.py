"""Tokenizers of any kind, brought to one: a fast Hugging Face tokenizer that never mistakes text for structure.

    folder | tokenizer.json | SentencePiece .model | hub name  ->  load_tokenizer
    texts                                                      ->  train_bpe
    tokenizer, documents                                       ->  encode_documents

A document that contains the characters `<|endoftext|>` (or `</s>`) is text like any other: its ids are never those of
the special token, so that a store's end-of-document id ends documents and nothing else.

transformers is imported inside the functions that need it: it brings torch (2.4 s and 300 MB), which the workers of
`llm.data.preparation.prepare` do without.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..common.errors import UserError
from .stories import MARKER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# What ends a document, by name, for a tokenizer.json that comes without the configuration that would say so.
END_TOKENS = (MARKER, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
SAMPLING = ("dropout", "alpha", "nbest_size")  # of BPE and of unigram models
LARGEST_FILE = 1 << 29  # bytes: fifteen times the tokenizer.json of Gemma
BYTES = 256  # the alphabet of a byte-level BPE
# Texts on which a converted SentencePiece model must agree with SentencePiece itself: spaces, line ends, accents,
# ligatures, other scripts, emoji, long runs.
PROBES = (
    "Once upon a time, there was a hippocampus.",
    "  two  spaces ",
    "x = 3.14;\tif (a<b) {\r\n\treturn 1000;\n}\n\n",
    "Größe naïve ﬁ é 你好 🙂 \u200b\u3000wide",
    "a" * 100,
    "",
    " ",
)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, a tokenizer.json, a SentencePiece .model or, where none of these exists, the hub.

    Where there is a tokenizer.json its ids are the tokenizer's, whatever class its configuration names. What would make
    them depend on more than the text is switched off, with a note.

    Raises UserError where there is no such tokenizer, it cannot be read, or it has no fast (Rust) version.
    """
    path = Path(name_or_path)
    for file in (path, path / "tokenizer.json", path / "tokenizer.model"):
        if file.is_file() and (size := file.stat().st_size) > LARGEST_FILE:
            raise UserError(f"{file} has {size:,} bytes, too many for a tokenizer; give another")
    if path.is_dir():
        tokenizer = _from_folder(path)
    elif path.is_file():
        tokenizer = _from_sentencepiece(path) if path.suffix == ".model" else _from_json(path)
    else:
        tokenizer = _from_hub(str(name_or_path))
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {name_or_path} has no fast version; give one that has a tokenizer.json")
    if switched_off := keep_to_the_text(tokenizer.backend_tokenizer):
        print(f"note: {', '.join(switched_off)} of {_called(tokenizer)} switched off", file=sys.stderr)
    _keep_specials_out_of_text(tokenizer.backend_tokenizer)
    return tokenizer


def keep_to_the_text(backend: Tokenizer) -> list[str]:
    """Switch off what makes ids depend on more than the text: how a file was last called, and sampling. Names it."""
    model, found = backend.model, []
    if backend.truncation is not None:
        found.append(f"truncation to {backend.truncation['max_length']} tokens")
        backend.no_truncation()
    if backend.padding is not None:
        found.append("padding")
        backend.no_padding()
    for name in SAMPLING:
        if getattr(model, name, None):
            found.append(f"{name} {getattr(model, name):g}")
            setattr(model, name, None)
    return found


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` entries (fewer where the texts hold no more repeated pairs).

    Id 0 is `<|endoftext|>`, which begins, ends and pads as in GPT-2; the next 256 are the bytes, so that any text can
    be encoded. The result depends on the texts and the size alone. Raises UserError for a size below 257.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < BYTES + 1:
        raise UserError(f"a byte-level vocabulary of {vocab_size} is too small; it takes at least {BYTES + 1}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[MARKER], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=MARKER, eos_token=MARKER, pad_token=MARKER)


def encode_documents(tokenizer: PreTrainedTokenizerBase | Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without any special token, neither around it nor for text that looks like one."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    # Set at each call: the flag is not saved with the tokenizer, and transformers' own calls reset it.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> str:
    """sha256 over what decides the ids of a text: normaliser, pre-tokenizer, model and added tokens.

    Left out: truncation and padding, which calls change, and post-processor and decoder, which never touch a document.
    """
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    whole = json.loads(backend.to_str())
    deciding = {key: whole[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that follows each document: the tokenizer's end-of-sequence token. Raises UserError where it has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{_called(tokenizer)} names no end-of-sequence token, so nothing would end a "
            'document; add "eos_token" to the tokenizer_config.json next to its tokenizer.json'
        )
    return int(tokenizer.eos_token_id)


def begin_of_document(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's begin-of-sequence id. Raises UserError where it has none, or the one that ends documents."""
    if tokenizer.bos_token_id is None:
        raise UserError(f"{_called(tokenizer)} names no begin-of-sequence token; leave --bos out")
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        raise UserError(f"{_called(tokenizer)} begins and ends documents with one token; leave --bos out")
    return int(tokenizer.bos_token_id)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of entries, added tokens included. Raises UserError where an id lies beyond it (ids with holes)."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= len(tokenizer):
        raise UserError(
            f"{_called(tokenizer)} gives the token id {largest}, beyond its vocabulary of "
            f"{len(tokenizer)} entries; give a tokenizer whose ids have no holes"
        )
    return len(tokenizer)


def _from_folder(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if (path / "tokenizer_config.json").is_file():
        try:
            loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # transformers lets through whatever its parsers raise
            raise UserError(f"the folder {path} holds no tokenizer that can be read: {_first_line(error)}") from error
        return _as_in_its_file(loaded, path / "tokenizer.json")
    for name, load in (("tokenizer.json", _from_json), ("tokenizer.model", _from_sentencepiece)):
        if (path / name).is_file():
            return load(path / name)
    raise UserError(f"the folder {path} holds no tokenizer.json; name a folder that save_pretrained has written")


def _from_json(path: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        return _from_folder(path.parent)  # its special tokens are named there
    backend = _backend(path)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    end = next((name for name in END_TOKENS if name in special), None)
    if padding := backend.padding:
        backend.no_padding()  # transformers would add its token to the vocabulary
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(path), eos_token=end)
    if padding:
        loaded.backend_tokenizer.enable_padding(**padding)  # for `keep_to_the_text` to name
    return loaded


def _backend(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(
            f"{path} is not a tokenizer.json ({_first_line(error)}); give a tokenizer.json, a SentencePiece .model, "
            "a folder with either, or a hub name"
        ) from error


def _as_in_its_file(loaded: PreTrainedTokenizerBase, file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with the steps and the model of its tokenizer.json.

    transformers builds some classes of tokenizer from the vocabulary alone, with steps of the class's own: where a
    configuration names another class than the file was made with, text is cut otherwise.
    """
    from transformers import PreTrainedTokenizerFast

    if not (file.is_file() and loaded.is_fast):
        return loaded
    backend = _backend(file)
    if tokenizer_fingerprint(backend) == tokenizer_fingerprint(loaded):
        return loaded
    kept = {"model_max_length": loaded.model_max_length, "chat_template": loaded.chat_template}
    own = PreTrainedTokenizerFast(tokenizer_object=backend, **kept, **loaded.special_tokens_map)
    own.name_or_path = loaded.name_or_path
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(loaded):
        print(f"note: {file} is followed, not the class {type(loaded).__name__} of its configuration", file=sys.stderr)
    return own


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    fix = "give a folder, a tokenizer.json or a SentencePiece .model that exists, or a hub name such as gpt2"
    # Two names and one slash could be a hub name, unless the first is a folder here: then a file was meant.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir()):
        raise UserError(f"there is no tokenizer at {name}; {fix}")
    try:
        loaded = AutoTokenizer.from_pretrained(name)
        file = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # no network, no such name, a broken file: each has its own exception
        raise UserError(
            f"no tokenizer {name} here and none could be loaded from the hub ({_first_line(error)}); {fix}"
        ) from error
    return loaded if file is None else _as_in_its_file(loaded, Path(file))


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """Convert a SentencePiece model and hold the result against SentencePiece itself."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made by protobuf at import
    try:
        proto.ParseFromString(path.read_bytes())
        reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # protobuf and sentencepiece each raise their own
        raise UserError(f"{path} is not a SentencePiece model; give the tokenizer.json of this tokenizer") from error
    backend = _converted(proto, path)
    _keep_specials_out_of_text(backend)
    probes = [
        *PROBES,
        *(f"a{piece.piece}b {piece.piece}" for piece in proto.pieces if piece.type == piece.USER_DEFINED),
    ]
    for text, ids in zip(probes, encode_documents(backend, probes), strict=True):
        if ids != reference.encode(text):
            raise UserError(
                f"{path} cannot be converted faithfully: {text!r} is encoded differently than by SentencePiece; "
                "give the tokenizer.json of this tokenizer"
            )
    named = {"bos_token": reference.bos_id(), "eos_token": reference.eos_id(), "pad_token": reference.pad_id()}
    tokens = {name: reference.id_to_piece(index) for name, index in named.items() if index >= 0}
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(path), **tokens)


def _converted(proto: Any, path: Path) -> Tokenizer:
    """The `tokenizers` twin of a SentencePiece model: same normalisation, pieces, merges and byte fallback."""
    training, spec = proto.trainer_spec, proto.normalizer_spec
    if training.model_type == training.UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        model: models.Model = models.Unigram(pieces, unk_id=training.unk_id, byte_fallback=training.byte_fallback)
    elif training.model_type == training.BPE:
        model = models.BPE(
            {piece.piece: index for index, piece in enumerate(proto.pieces)},
            list(_merges(proto)),
            unk_token=training.unk_piece,
            fuse_unk=True,
            byte_fallback=training.byte_fallback,
        )
    else:
        raise UserError(f"{path} is neither a unigram nor a BPE model; SentencePiece's other types are not read")
    steps: list = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else undo)
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != piece.USER_DEFINED)
            for piece in proto.pieces
            if piece.type in (piece.CONTROL, piece.USER_DEFINED, piece.UNKNOWN)
        ]
    )
    return backend


def _merges(proto: Any) -> Iterator[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first: SentencePiece keeps scores, `tokenizers` merges."""
    rank = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL}
    score = {piece.piece: piece.score for piece in proto.pieces}
    splits = ((whole, whole[:cut], whole[cut:]) for whole in rank for cut in range(1, len(whole)))
    joins = [join for join in splits if join[1] in rank and join[2] in rank]
    joins.sort(key=lambda join: (-score[join[0]], rank[join[1]], rank[join[2]]))
    return ((left, right) for _, left, right in joins)


def _keep_specials_out_of_text(backend: Tokenizer) -> None:
    """Split text that spells a special token after its first character, where the model would take it whole.

    `encode_special_tokens` stops only the search for added tokens. A unigram or word-level model also has the special
    token in its own vocabulary, and would still find it in the text.
    """
    special = {index: t.content for index, t in backend.get_added_tokens_decoder().items() if t.special}
    backend.encode_special_tokens = True
    spelled = backend.encode_batch(list(special.values()), add_special_tokens=False)
    found = [
        text
        for (index, text), encoding in zip(special.items(), spelled, strict=True)
        # Only where one token spans it: unknown characters inside it give the id of <unk> by right.
        if len(text) > 1 and (index, (0, len(text))) in zip(encoding.ids, encoding.offsets, strict=True)
    ]
    if found:
        spellings = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in found)
        guard = pre_tokenizers.Split(Regex(spellings), "merged_with_previous")
        before = backend.pre_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([before, guard]) if before else guard


def _called(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path}".rstrip()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
