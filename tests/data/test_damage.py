"""What is wrong with a store is told: when it is opened, when it is read, and all of it by `verify`."""

import copy
import hashlib
import json
import os
import shutil
import threading

import numpy as np
import pytest

import llm.data.store
from llm.common.errors import UserError
from llm.data.preparation.prepare import prepare
from llm.data.shard import shard_problems, token_dtype
from llm.data.store import TokenStore
from llm.data.tokenizer import train_bpe

from .by_hand import BEGIN, END, some_shards, write_store
from .stores import write_lines


def test_a_shard_of_the_wrong_size_is_told_when_it_is_read(tmp_path):
    path = write_store(tmp_path / "store", [[[1, 2]], [[3]]])
    victim = path / "train" / "00001-part.tokens"
    victim.write_bytes(victim.read_bytes()[:-1])
    store = TokenStore.open(path)
    assert store.read(0, 3).tolist() == [1, 2, END]
    with pytest.raises(
        UserError, match=r"00001-part\.tokens has 3 bytes, not the 4 that store\.json lists; run the same"
    ):
        store.read(0, 5)
    with pytest.raises(UserError, match=r"00001-part\.tokens has 3 bytes, not the 4"):
        store.check_sizes()
    victim.unlink()
    with pytest.raises(UserError, match=r"00001-part\.tokens cannot be opened"):
        store.check_sizes()
    with pytest.raises(
        UserError, match=r"00001-part\.tokens cannot be opened \(No such file.*\); run the same prepare"
    ):
        store.read(3, 1)
    (path / "train" / "00000-part.ends").write_bytes(b"")
    with pytest.raises(UserError, match=r"00000-part\.ends has 0 bytes, not the 8"):
        store.document(0)
    with (path / "train" / "00000-part.tokens").open("wb"):
        pass
    with pytest.raises(UserError, match=r"00000-part\.tokens was truncated while it was read"):
        store.read(0, 1)


def test_sizes_are_checked_by_several_threads(tmp_path, monkeypatch):
    """The first file that is wrong is named, whichever thread is first."""
    path = write_store(tmp_path / "store", [[[1]] for _ in range(23)])
    store = TokenStore.open(path)
    asked, stat, lock = [], os.stat, threading.Lock()

    def counted(name, *words, **settings):
        with lock:
            asked.append(str(name))
        return stat(name, *words, **settings)

    monkeypatch.setattr(llm.data.store, "STATS", 4)
    monkeypatch.setattr(os, "stat", counted)
    store.check_sizes()
    assert store.files == 46
    assert sorted(asked) == sorted(str(file) for kind in ("tokens", "ends") for file in path.glob(f"train/*.{kind}"))
    for shard in (19, 7, 14):
        (path / "train" / f"{shard:05d}-part.tokens").write_bytes(b"1")
        with pytest.raises(UserError, match=f"{min(shard, 19 if shard == 19 else 7):05d}-part"):
            store.check_sizes()


def test_what_is_no_finished_store_is_told(tmp_path):
    with pytest.raises(UserError, match=r"there is no token store .*nowhere; make one with `python -m llm prepare"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"is not a finished token store: it has no store\.json; run the same prepare command"
    ):
        TokenStore.open(tmp_path)
    (tmp_path / "plan.json").write_text('{"sources": ["a", "b", "c"]}')
    for shard in ("train/0-a", "validation/0-a", "train/1-b"):
        (tmp_path / shard).parent.mkdir(exist_ok=True)
        (tmp_path / f"{shard}.json").touch()
    with pytest.raises(
        UserError, match=r"no store\.json \(2 of its 3 sources are done\); run the same prepare command"
    ):
        TokenStore.open(tmp_path)
    for content in (b"{", b"[]", b"{}"):
        (tmp_path / "store.json").write_bytes(content)
        with pytest.raises(UserError, match=r"store\.json cannot be read \(.+\); run the same prepare command again"):
            TokenStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match=r"token store of another format \(99\)"):
        TokenStore.open(tmp_path)


WRONG = {
    "vocab_size": ["400", None, -1],
    "dtype": ["<f8", None],
    "end_of_document": ["0"],
    "begin_of_document": ["1"],
    "fingerprint": [None],
    "splits": [None, [], {}, {"train": {}}, {"train": None, "validation": None}],
    "names": [None, ["../../other/shard"], ["/etc/passwd"], [".."], ["a\0b"], [3], []],
    "tokens": [[-1], ["9"], [1, 2]],
    "sha256": [[None]],
}


@pytest.mark.parametrize("key", WRONG)
def test_an_index_that_says_what_cannot_be_is_refused_in_one_sentence(key, bpe, tmp_path):
    path = write_store(tmp_path / "store", [[[1, 2, 3]]], tokenizer=bpe, validation=[[[1, 2]]])
    whole = json.loads((path / "store.json").read_text())
    for value in WRONG[key]:
        index = copy.deepcopy(whole)
        (index if key in index else index["splits"]["train"])[key] = value
        (path / "store.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"store\.json is damaged \(.+\); run the same prepare command again"):
            TokenStore.open(path)


def test_the_same_command_writes_a_damaged_index_again(bpe_folder, tmp_path):
    """The way out of the refusal."""
    write_lines(tmp_path / "a.jsonl", ["one", "two"])
    settings = {"tokenizer": bpe_folder, "workers": 1, "validation_fraction": 0}
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **settings)
    whole = (tmp_path / "out" / "store.json").read_bytes()
    (tmp_path / "out" / "store.json").write_bytes(whole[:-20])
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **settings)
    assert (tmp_path / "out" / "store.json").read_bytes() == whole


def rewrite(change):
    """A damage: change the array that lies in a file."""

    def damage(path, dtype):
        values = np.fromfile(path, dtype)
        change(values)
        values.tofile(path)

    return damage


DAMAGE = {
    "an id": (
        "tokens",
        rewrite(lambda v: v.__setitem__(1, v[1] % 397 + 1)),
        ["its files are not those that its manifest"],
    ),
    "an id beyond": (
        "tokens",
        rewrite(lambda v: v.__setitem__(1, 400)),
        ["are not those", "the token id 400 is beyond the vocabulary of 400"],
    ),
    "an end too early": (
        "tokens",
        rewrite(lambda v: v.__setitem__(1, END)),
        ["are not those", "the end-of-document ids are not where the documents end"],
    ),
    "a begin in a document": (
        "tokens",
        rewrite(lambda v: v.__setitem__(1, BEGIN)),
        ["are not those", "the begin-of-document ids are not where the documents begin"],
    ),
    "no begin": (
        "tokens",
        rewrite(lambda v: v.__setitem__(0, 7)),
        ["are not those", "the begin-of-document ids are not where the documents begin"],
    ),
    "ends out of order": (
        "ends",
        rewrite(lambda v: v.__setitem__(slice(0, 2), v[1::-1].copy())),
        [
            "are not those",
            "the document ends do not ascend",
            "where the documents end",
            "begin-of-document ids are not",
        ],
    ),
    "a last end": (
        "ends",
        rewrite(lambda v: v.__setitem__(-1, v[-1] + 1)),
        ["are not those", "the last document does not end at the last token", "are not where the documents end"],
    ),
    "no manifest": ("json", lambda path, _: path.unlink(), ["00003-part.json is missing or no manifest"]),
    "another manifest": ("json", lambda path, _: path.write_text("{}"), ["00003-part.json is missing or no manifest"]),
    "no file": ("tokens", lambda path, _: path.unlink(), ["are not those"]),
}


@pytest.mark.parametrize("begin", [None, BEGIN])
@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_the_shard_and_what_is_wrong(name, begin, bpe, tmp_path):
    kind, damage, expected = DAMAGE[name]
    expected = [part for part in expected if begin is not None or "begin-of-document" not in part]
    store = TokenStore.open(write_store(tmp_path / "store", some_shards(), tokenizer=bpe, begin=begin))
    assert store.begin_of_document == begin
    assert store.verify() == []
    damage(tmp_path / "store" / "train" / f"00003-part.{kind}", token_dtype(400) if kind == "tokens" else "<u8")
    problems = store.verify()
    assert len(problems) == len(expected)
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem
        assert "00003-part" in problem


def test_every_file_that_a_manifest_lists_is_verified(bpe, tmp_path):
    path = write_store(tmp_path / "store", some_shards(), tokenizer=bpe) / "train" / "00002-part.json"
    manifest = json.loads(path.read_text())
    path.with_suffix(".hashes").write_bytes(b"16 bytes a piece")
    manifest["sha256"]["hashes"] = hashlib.sha256(b"16 bytes a piece").hexdigest()
    path.write_text(json.dumps(manifest))
    store = TokenStore.open(tmp_path / "store")
    assert store.verify() == []
    path.with_suffix(".hashes").write_bytes(b"16 bytes a peace")
    assert ["00002-part: its files are not those" in problem for problem in store.verify()] == [True]
    del manifest["sha256"]["ends"], manifest["sha256"]["hashes"]
    path.write_text(json.dumps(manifest))
    assert ["00002-part: its files are not those" in problem for problem in store.verify()] == [True]


def test_verify_holds_the_index_and_the_tokenizer_too(bpe, tmp_path):
    path = write_store(tmp_path / "store", some_shards(), tokenizer=bpe)
    index = json.loads((path / "store.json").read_text())
    index["splits"]["train"]["sha256"][2] = "0" * 64
    (path / "store.json").write_text(json.dumps(index))
    train_bpe(["another text"], 300).save_pretrained(path / "tokenizer")
    problems = TokenStore.open(path).verify()
    for problem, part in zip(
        problems,
        [
            "its fingerprint is not that of the shards",
            "not the tokenizer that made",
            "00002-part: its manifest is not the",
        ],
        strict=True,
    ):
        assert part in problem


def test_verify_goes_on_where_something_cannot_be_read(bpe, tmp_path, monkeypatch):
    path = write_store(tmp_path / "store", some_shards(), tokenizer=bpe)
    shutil.rmtree(path / "tokenizer")
    (path / "train" / "00004-part.tokens").unlink()

    def failing(folder, name, *ids):
        if name == "00002-part":
            raise OSError(5, "Input/output error")
        return shard_problems(folder, name, *ids)

    monkeypatch.setattr(llm.data.store, "shard_problems", failing)
    problems = TokenStore.open(path).verify()
    told = ["there is no tokenizer at", "00002-part: cannot be read (Input/output error)", "00004-part: its files are"]
    assert len(problems) == 3
    assert all(part in problem for problem, part in zip(problems, told, strict=True))
