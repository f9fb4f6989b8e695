"""What a tokenizer loses of a text, against a count character by character."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from llm.cli import main
from llm.common.errors import UserError
from llm.data.lost_text import CountingEncoder, LostText, total
from llm.data.preparation.prepare import prepare
from llm.data.shard import Manifest
from llm.data.tokenizer import encode_documents

from .stores import write_lines

LETTERS = "abcdefghij"


def character_bpe(alphabet=LETTERS, unknown=None):
    """A BPE without byte fallback whose entries are single characters."""
    vocabulary = {"<end>": 0, **{letter: number for number, letter in enumerate(alphabet, 1)}}
    if unknown:
        vocabulary[unknown] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def saved(tokenizer, folder):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    return folder


@hypothesis.given(st.lists(st.text(f"{LETTERS}xyé漢🙂 \n\u3000"), max_size=4), st.sampled_from([None, "<unk>"]))
def test_every_character_without_an_id_is_counted(texts, unknown):
    tokenizer, lost = character_bpe(unknown=unknown), LostText()
    assert CountingEncoder(tokenizer).encode(texts, lost) == encode_documents(tokenizer, texts)
    visible = [mark for text in texts for mark in text if not mark.isspace()]
    missing = [mark for mark in visible if mark not in LETTERS]
    assert lost.characters == len(visible)
    assert (lost.untraced, lost.unknown) == ((0, len(missing)) if unknown else (len(missing), 0))
    assert lost.unknown_tokens == (len(missing) if unknown else 0)
    assert (missing[0] in lost.example) if missing else str(lost) == ""
    assert lost.share == pytest.approx(len(missing) / max(1, len(visible)))


def test_a_normalizer_that_drops_characters_is_seen():
    tokenizer = character_bpe()
    tokenizer.normalizer = normalizers.Replace("b", "")
    lost = LostText()
    CountingEncoder(tokenizer).encode(["abc"], lost)
    assert (lost.untraced, lost.example) == (1, "abc")


def test_a_tokenizer_with_an_id_for_every_byte_can_lose_nothing(bpe):
    tokenizer = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    assert not CountingEncoder(tokenizer).can_lose
    tokenizer.normalizer = normalizers.StripAccents()
    assert CountingEncoder(tokenizer).can_lose


def test_counts_add_up_and_say_so_in_words():
    first, second = LostText(100, 2, 0, 0, "as here"), LostText(100, 0, 3, 1, "and here")
    both = total([vars(first), {}, vars(second)])
    assert both == LostText(200, 2, 3, 1, "as here")
    assert str(both) == (
        "2 characters (1.00%) leave no trace in the ids and 1 unknown tokens stand for 3 characters (1.50%), "
        "as in 'as here'"
    )


def test_prepare_and_inspect_tell_what_is_lost(tmp_path, capsys):
    """A quarter per cent is told; above 1% is an error, which an option allows."""
    tokenizer = saved(character_bpe(), tmp_path / "tokenizer")
    write_lines(tmp_path / "a.jsonl", ["abcdefghij" * 19 + "abcdefghié", "abcdefghij" * 20] * 9)
    words = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer), "--workers", "1"]
    assert main([*words, "--out", str(tmp_path / "out"), "--validation-fraction", "0"]) == 0
    said = "9 characters (0.25%) leave no trace in the ids, as in 'hijabcdefghié'"
    assert said in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out"), "--windows", "0"]) == 0
    assert f"the tokenizer loses text: {said}" in capsys.readouterr().out
    assert Manifest.read(tmp_path / "out" / "train", "00000-a").lost["untraced"] == 9

    write_lines(tmp_path / "a.jsonl", ["abcdefghié" * 20] * 9)
    assert main([*words, "--out", str(tmp_path / "early")]) == 2
    assert "the tokenizer loses text: 180 characters (10.00%)" in capsys.readouterr().err
    assert not (tmp_path / "early").exists()
    assert main([*words, "--out", str(tmp_path / "early"), "--allow-lossy-tokenizer"]) == 0


def test_what_only_later_documents_lose_is_found_at_the_end(tmp_path):
    tokenizer = saved(character_bpe(), tmp_path / "tokenizer")
    write_lines(tmp_path / "a.jsonl", [*["abc"] * 300, "é" * 100])
    settings = {"tokenizer": tokenizer, "workers": 1, "validation_fraction": 0}
    with pytest.raises(UserError, match=r"loses text: 100 characters \(10\.00%\).*--allow-lossy-tokenizer"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "store.json").exists()
    before = (tmp_path / "out" / "train" / "00000-a.tokens").stat().st_mtime_ns
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **settings, allow_lossy_tokenizer=True)
    assert (tmp_path / "out" / "train" / "00000-a.tokens").stat().st_mtime_ns == before  # the way out makes no shard
    assert np.fromfile(tmp_path / "out" / "train" / "00000-a.tokens", "<u2")[:4].tolist() == [1, 2, 3, 0]


def test_a_document_without_ids_is_an_empty_one(tmp_path):
    """White space under a tokenizer that drops it: no document of an end alone, from which nothing is predicted."""
    tokenizer = saved(character_bpe(), tmp_path / "tokenizer")
    write_lines(tmp_path / "a.jsonl", ["abc", "  \n", "", "c"])
    settings = {"tokenizer": tokenizer, "workers": 1, "validation_fraction": 0, "deduplicate": True}
    summary = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **settings)
    assert (summary.documents, summary.left_out["empty"]) == (2, 2)
    assert np.fromfile(tmp_path / "out" / "train" / "00000-a.tokens", "<u2").tolist() == [1, 2, 3, 0, 3, 0]
