"""Tokenizers of every kind encode as their own library does, and text never becomes a special token."""

import io
import json
import shutil
from itertools import groupby

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from llm.common.errors import UserError
from llm.data.stories import stories
from llm.data.tokenizer import (
    encode_documents,
    end_of_document,
    load_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
    vocabulary_size,
)

from .conftest import TEXT

LOOK_ALIKES = [
    "<|endoftext|>",
    "a<|endoftext|>b",
    " <|endoftext|>\n",
    "<|endoftext|><|endoftext|>",
    "<s></s><unk>",
    "</s",
]
PROBES = [TEXT, "", " ", "  a  b ", "tab\tand\r\nline", "ﬁ ½ ｆｕｌｌ 你好 🙂 e\u0301", "x" * 200, *LOOK_ALIKES]
any_text = st.one_of(
    st.text(), st.text(alphabet=" \t\n\r\u3000"), st.lists(st.sampled_from([*LOOK_ALIKES, "a", "<", "|"])).map("".join)
)


# ---- Trained ---------------------------------------------------------------------------------------------------------


def test_a_trained_bpe_opens_with_the_marker_and_all_bytes(bpe):
    assert bpe.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert bpe.eos_token_id == bpe.bos_token_id == bpe.pad_token_id == end_of_document(bpe) == 0
    assert 257 < vocabulary_size(bpe) <= 400
    alphabet = {bpe.convert_ids_to_tokens(index) for index in range(1, 257)}
    assert alphabet == set(pre_tokenizers.ByteLevel.alphabet())


def test_training_is_deterministic_and_streams(real_data):
    text = (real_data / "tinystories" / "sample.txt").read_text()
    texts = text.split("<|endoftext|>") * 3
    first, second = train_bpe(iter(texts), 1000), train_bpe(iter(texts), 1000)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocabulary of 256 is too small; it takes at least 257"):
        train_bpe(["text"], 256)


@given(texts=st.lists(any_text, min_size=1, max_size=4))
def test_any_text_comes_back_and_none_of_it_is_special(bpe, texts):
    encoded = encode_documents(bpe, texts)
    assert [bpe.decode(ids, clean_up_tokenization_spaces=False) for ids in encoded] == texts
    assert all(end_of_document(bpe) not in ids for ids in encoded)


def test_encoding_does_not_depend_on_earlier_calls_of_transformers(bpe):
    expected = encode_documents(bpe, LOOK_ALIKES)
    assert 0 in bpe(LOOK_ALIKES[0]).input_ids  # transformers finds the special token, and sets the backend to
    assert encode_documents(bpe, LOOK_ALIKES) == expected


# ---- Loaded ----------------------------------------------------------------------------------------------------------


def test_gpt2_from_its_file_or_folder_encodes_as_published(real_data):
    for path in (real_data / "gpt2-tokenizer", real_data / "gpt2-tokenizer" / "tokenizer.json"):
        gpt2 = load_tokenizer(path)
        assert encode_documents(gpt2, ["Hello world"]) == [[15496, 995]]
        assert (end_of_document(gpt2), vocabulary_size(gpt2)) == (50256, 50257)
        assert all(50256 not in ids for ids in encode_documents(gpt2, LOOK_ALIKES))


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_a_saved_tokenizer_comes_back_the_same(bpe, bpe_folder, name):
    loaded = load_tokenizer(bpe_folder / name)
    assert loaded.eos_token_id == 0
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(bpe)
    assert encode_documents(loaded, PROBES) == encode_documents(bpe, PROBES)


def test_the_fingerprint_is_of_the_encoding_alone(bpe_folder):
    tokenizer = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(5)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.normalizer = normalizers.Lowercase()
    lower = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["hippo"])
    assert len({before, lower, tokenizer_fingerprint(tokenizer)}) == 3


def test_a_special_token_in_the_models_own_vocabulary_is_not_found_in_text(tmp_path):
    """Word-level and unigram models would take `</s>` out of the text themselves, as `tokenizers` lets them."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.encode_special_tokens = True
    assert backend.encode("a </s>").ids == [2, 1]
    backend.save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(tmp_path / "words.json")
    assert end_of_document(loaded) == 1
    assert encode_documents(loaded, ["a </s> a"]) == [[2, 0, 0, 2]]
    loaded.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "saved")) == tokenizer_fingerprint(loaded)


def trained_otherwise(folder):
    """A tokenizer.json that cuts digits one by one, which the class GPT2Tokenizer does not."""
    backend = train_bpe([TEXT, "12 34 5678 12 34 5678 " * 20], 600).backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return backend


@pytest.mark.parametrize("given", ["", "tokenizer.json"])
def test_a_tokenizer_json_is_followed_whatever_class_is_named(tmp_path, given, capsys):
    backend = trained_otherwise(tmp_path / "odd")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "model_max_length": 77}
    (tmp_path / "odd" / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path / "odd" / given)
    assert "is followed, not the class GPT2Tokenizer" in capsys.readouterr().err
    texts = ["5678", *PROBES]
    expected = [backend.encode(text, add_special_tokens=False).ids for text in texts[:1]]
    assert encode_documents(loaded, texts[:1]) == expected and len(expected[0]) == 4
    assert encode_documents(loaded, texts) == encode_documents(backend, texts)
    assert (loaded.eos_token_id, loaded.model_max_length) == (0, 77)
    loaded.save_pretrained(tmp_path / "saved")
    assert encode_documents(load_tokenizer(tmp_path / "saved"), texts) == encode_documents(backend, texts)
    assert "followed" not in capsys.readouterr().err  # what is saved names a class that follows its file


def test_call_time_state_and_sampling_are_switched_off_and_named(tmp_path, bpe, capsys):
    plain = encode_documents(bpe, PROBES)
    backend = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.model.dropout = 0.5
    backend.save(str(tmp_path / "called.json"))
    loaded = load_tokenizer(tmp_path / "called.json")
    assert "note: truncation to 3 tokens, padding, dropout 0.5 of the tokenizer" in capsys.readouterr().err
    assert encode_documents(loaded, PROBES) == plain
    loaded(PROBES, truncation=True, max_length=3)  # transformers leaves its settings behind
    assert encode_documents(loaded, PROBES) == plain
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(bpe)


def test_a_file_that_is_too_large_for_a_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.data.tokenizer.LARGEST_FILE", 10)
    (tmp_path / "tokenizer.json").write_text("{" + " " * 10)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match="has 11 bytes, too many for a tokenizer"):
            load_tokenizer(path)


# ---- SentencePiece ---------------------------------------------------------------------------------------------------

LOSSLESS = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECE = {
    "unigram": {"model_type": "unigram", "vocab_size": 250},
    "unigram, lossless": {"model_type": "unigram", "vocab_size": 500, "pad_id": 3, **LOSSLESS},
    "bpe": {"model_type": "bpe", "vocab_size": 250},
    "bpe, as Llama": {"model_type": "bpe", "vocab_size": 500, "split_digits": True, **LOSSLESS},
    "bpe, as Gemma": {
        "model_type": "bpe",
        "vocab_size": 500,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<start>", "\n\n"],
        **LOSSLESS,
    },
}


def train_sentencepiece(path, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*stories(0, "train", 0, 200), *TEXT.splitlines() * 20]),
        model_writer=model,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def without_repeats(ids):
    return [index for index, _ in groupby(ids)]


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_sentencepiece_model_encodes_as_sentencepiece_does(name, tmp_path):
    reference = train_sentencepiece(tmp_path / "spiece.model", **SENTENCEPIECE[name])
    tokenizer = load_tokenizer(tmp_path / "spiece.model")
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (tokenizer, load_tokenizer(tmp_path / "saved")):
        assert vocabulary_size(loaded) == reference.vocab_size()
        assert end_of_document(loaded) == reference.eos_id()
        assert all(loaded.eos_token_id not in ids for ids in encode_documents(loaded, PROBES))
        for text, ids in zip(PROBES, encode_documents(loaded, PROBES), strict=True):
            # Unknown characters next to each other are one <unk>, but for those on both sides of the guard's cut.
            assert without_repeats(ids) == without_repeats(reference.encode(text))
            assert ids == reference.encode(text) or (text in LOOK_ALIKES and name == "unigram")
    if "lossless" in name or "as" in name:
        for text, ids in zip(PROBES, encode_documents(tokenizer, PROBES), strict=True):
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text == reference.decode(ids)


def test_a_folder_with_a_sentencepiece_model_alone_is_enough(tmp_path):
    reference = train_sentencepiece(tmp_path / "tokenizer.model", **SENTENCEPIECE["bpe, as Llama"])
    assert encode_documents(load_tokenizer(tmp_path), [TEXT]) == [reference.encode(TEXT)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "char", "vocab_size": 50}, "neither a unigram nor a BPE model"),
        ({**SENTENCEPIECE["bpe, as Gemma"], "add_dummy_prefix": True}, "cannot be converted faithfully: 'a<start>b"),
    ],
)
def test_a_sentencepiece_model_that_cannot_be_rebuilt_is_refused(settings, message, tmp_path):
    train_sentencepiece(tmp_path / "odd.model", **settings)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "odd.model")


# ---- Refused ---------------------------------------------------------------------------------------------------------


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.model").write_bytes(b"\x00\xff no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in {
        tmp_path / "broken.json": r"broken\.json is not a tokenizer\.json \(.+\); give a tokenizer\.json",
        tmp_path / "broken.model": r"broken\.model is not a SentencePiece model; give the tokenizer\.json",
        tmp_path / "empty": r"the folder .*empty holds no tokenizer\.json; name a folder",
        tmp_path / "config": r"the folder .*config holds no tokenizer that can be read: ",
        tmp_path / "missing": r"there is no tokenizer at .*missing; give a folder",
        "./gpt2": r"there is no tokenizer at \./gpt2; give a folder",
        "tests/gpt2": r"there is no tokenizer at tests/gpt2; give a folder",
        "nobody/nothing": r"no tokenizer nobody/nothing here and none could be loaded from the hub \(.+\); give",
    }.items():
        with pytest.raises(UserError, match=message):
            load_tokenizer(name)


def test_a_tokenizer_without_a_fast_version_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no fast version; give one"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(bpe_folder, tmp_path):
    shutil.copytree(bpe_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match=r'names no end-of-sequence token.*add "eos_token"'):
        end_of_document(load_tokenizer(tmp_path))


def test_an_id_beyond_the_vocabulary_is_refused():
    holes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))
    with pytest.raises(UserError, match="gives the token id 7, beyond its vocabulary of 2 entries; give a tokenizer"):
        vocabulary_size(holes)
