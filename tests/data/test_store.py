"""A store against plain arrays: what is read is what lies there, however it is cut into shards."""

import gc
import hashlib
import json
import os
import pickle
import random
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import llm.data.store
from llm.data.shard import Manifest, ShardWriter, is_whole, token_dtype
from llm.data.store import TokenStore, check_tokenizer, check_vocabulary, write_index
from llm.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe
from llm.errors import UserError

END = 0  # the end-of-document id of the small BPE


def write_store(path, shards, vocab_size=400, tokenizer=None, validation=()):
    """A store written with numpy alone. `shards` holds lists of documents, each a list of ids without its end."""
    manifests = {}
    for split, contents in (("train", shards), ("validation", validation)):
        folder = path / split
        folder.mkdir(parents=True)
        manifests[split] = []
        for number, documents in enumerate(contents):
            name = f"{number:05d}-part"
            ids = np.array([i for document in documents for i in [*document, END]], token_dtype(vocab_size))
            ends = np.cumsum([len(document) + 1 for document in documents], dtype="<u8")
            ids.tofile(folder / f"{name}.tokens")
            ends.tofile(folder / f"{name}.ends")
            manifest = Manifest(
                name=name,
                split=split,
                source={"location": "by hand", "size": 0, "sha256": ""},
                documents=len(documents),
                empty_documents=0,
                tokens=len(ids),
                bytes_in=0,
                bytes_out=ids.nbytes,
                sha256={
                    k: hashlib.sha256((folder / f"{name}.{k}").read_bytes()).hexdigest() for k in ("tokens", "ends")
                },
                dtype=ids.dtype.name,
                tokenizer_fingerprint="",
                versions={},
            )
            (folder / f"{name}.json").write_text(json.dumps(asdict(manifest)))
            manifests[split].append(manifest)
    fingerprint = "none"
    if tokenizer is not None:
        tokenizer.save_pretrained(path / "tokenizer")
        fingerprint = tokenizer_fingerprint(tokenizer)
    write_index(path, manifests, vocab_size=vocab_size, end_of_document=END, tokenizer_fingerprint=fingerprint)
    return path


def some_shards(count=7, seed=0):
    draw = random.Random(seed)
    return [
        [[draw.randrange(1, 400) for _ in range(draw.randrange(40))] for _ in range(draw.randrange(30))]
        for _ in range(count)
    ]


def joined(shards):
    """All ids in one row and the end of each document in it, the plain way."""
    ids, ends = [], []
    for documents in shards:
        for document in documents:
            ids += [*document, END]
            ends.append(len(ids))
    return np.array(ids, np.int64), np.array(ends, np.int64)


ids = st.lists(st.integers(1, 69_999), max_size=6)
layouts = st.lists(st.lists(ids, max_size=4), max_size=6)


# ---- Reading ---------------------------------------------------------------------------------------------------------


@given(shards=layouts, vocab_size=st.sampled_from([65_537, 70_000]), data=st.data())
def test_reads_are_slices_of_the_whole(shards, vocab_size, data, tmp_path_factory):
    path = write_store(tmp_path_factory.mktemp("store"), shards, vocab_size)
    whole, ends = joined(shards)
    store = TokenStore.open(path)
    assert (store.tokens, store.documents, store.dtype) == (len(whole), len(ends), np.dtype("<u4"))
    start = data.draw(st.integers(0, store.tokens))
    count = data.draw(st.integers(0, store.tokens - start))
    read = store.read(start, count)
    assert read.dtype == np.int64
    assert read.tolist() == whole[start : start + count].tolist()
    between = store.ends_between(start, start + count)
    assert between.dtype == np.int64
    assert between.tolist() == [end for end in ends if start < end <= start + count]
    spans = [store.document(index) for index in range(store.documents)]
    assert spans == list(zip([0, *ends][:-1], ends, strict=True)) if len(ends) else spans == []
    for index, (first, last) in enumerate(spans):
        assert store.document_tokens(index).tolist() == whole[first:last].tolist()


def test_few_files_stay_open_and_pieces_are_put_together(tmp_path, monkeypatch):
    shards = some_shards(40)
    whole, ends = joined(shards)
    monkeypatch.setattr(llm.data.store, "OPEN_FILES", 3)
    monkeypatch.setattr(llm.data.store, "PIECE", 7)
    monkeypatch.setattr(llm.data.store, "ENDS_AT_ONCE", 2)
    store = TokenStore.open(write_store(tmp_path / "store", shards))
    for start in random.Random(1).sample(range(store.tokens - 257), 200):
        assert np.array_equal(store.read(start, 257), whole[start : start + 257])
        expected = ends[(ends > start) & (ends <= start + 257)]
        assert np.array_equal(store.ends_between(start, start + 257), expected)
        assert len(store._files) <= 3
    opened = list(store._files.values())
    store.close()
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_positions_outside_the_split_are_refused(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "store", [[[1, 2]], [[3]]], validation=[[[4]]]))
    assert TokenStore.open(tmp_path / "store", "validation").read(0, 2).tolist() == [4, END]
    for start, count in ((0, 6), (5, 1), (-1, 2), (3, -1)):
        with pytest.raises(UserError, match=r"the train split of .*store has no positions .*; it holds 5 tokens"):
            store.read(start, count)
    for index in (-1, 2):
        with pytest.raises(UserError, match=rf"has no document {index}; it holds 2"):
            store.document(index)


class Windows:
    """A data set as `llm.data.module` has one: it goes to the workers by fork or by pickle."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return self.store.tokens // 10

    def __getitem__(self, index):
        return self.store.read(10 * index, 10), os.getpid()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same(start, tmp_path):
    shards = some_shards(3)
    whole, _ = joined(shards)
    store = TokenStore.open(write_store(tmp_path / "store", shards))
    store.read(0, 10)  # the file is open before the workers are
    loader = DataLoader(Windows(store), batch_size=None, num_workers=2, multiprocessing_context=start)
    read, processes = zip(*loader, strict=True)
    assert np.array_equal(np.concatenate(read), whole[: 10 * len(read)])
    assert os.getpid() not in processes
    assert len(set(processes)) == 2


def test_a_pickled_store_opens_its_own_files(tmp_path, monkeypatch):
    write_store(tmp_path / "store", [[[1, 2]]])
    monkeypatch.chdir(tmp_path)
    store = TokenStore.open("store")
    store.read(0, 1)
    copy = pickle.loads(pickle.dumps(store))
    monkeypatch.chdir("/")
    assert not copy._files
    assert copy.read(0, 3).tolist() == [1, 2, END]


# ---- Size ------------------------------------------------------------------------------------------------------------


def test_31_279_shards_open_at_once_and_84_billion_tokens_take_no_memory(tmp_path):
    shards, tokens = 31_279, 84_000_000_000 // 31_279
    one = Manifest("", "train", {}, 1, 0, tokens, 0, 0, {"tokens": "0" * 64, "ends": ""}, "uint16", "", {})
    named = [replace(one, name=f"{i:05d}-CC-MAIN-2013-20-part-{i:05d}") for i in range(shards)]
    write_index(
        tmp_path,
        {"train": named, "validation": named},
        vocab_size=50_257,
        end_of_document=50_256,
        tokenizer_fingerprint="",
    )
    seconds = []
    for _ in range(3):
        gc.collect()
        began = time.process_time()
        store = TokenStore.open(tmp_path)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.2
    assert store.tokens == shards * tokens

    (tmp_path / "train").mkdir()
    drawn = random.Random(0).sample(range(shards), 300)
    for index in drawn:
        with (tmp_path / "train" / f"{named[index].name}.tokens").open("wb") as file:
            file.truncate(2 * tokens)  # sparse: zeros that take no room on the disk
    resident = resident_bytes()
    for index in drawn * 10:
        assert not store.read(index * tokens + random.randrange(tokens - 257), 257).any()
    assert resident_bytes() - resident < 10e6


def resident_bytes():
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pytest.skip("the memory of a process is read from /proc, which is not here")


# ---- Damage ----------------------------------------------------------------------------------------------------------


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


def test_what_is_no_finished_store_is_told(tmp_path):
    with pytest.raises(UserError, match=r"there is no token store .*nowhere; make one with `python -m llm prepare"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"no finished token store, having no store\.json; run the same prepare command"
    ):
        TokenStore.open(tmp_path)
    for content in (b"{", b"[]", b"{}"):
        (tmp_path / "store.json").write_bytes(content)
        with pytest.raises(UserError, match=r"store\.json cannot be read \(.+\); delete it and run prepare again"):
            TokenStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match=r"token store of another format \(99\)"):
        TokenStore.open(tmp_path)


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
        rewrite(lambda v: v.__setitem__(0, v[0] % 399 + 1)),
        ["its files are not those that its manifest"],
    ),
    "an id beyond": (
        "tokens",
        rewrite(lambda v: v.__setitem__(0, 400)),
        ["are not those", "the token id 400 is beyond the vocabulary of 400"],
    ),
    "an end too early": (
        "tokens",
        rewrite(lambda v: v.__setitem__(0, END)),
        ["are not those", "the end-of-document ids are not where the documents end"],
    ),
    "ends out of order": (
        "ends",
        rewrite(lambda v: v.__setitem__(slice(0, 2), v[1::-1].copy())),
        ["are not those", "the document ends do not ascend", "are not where the documents end"],
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


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_the_shard_and_what_is_wrong(name, bpe, tmp_path):
    kind, damage, expected = DAMAGE[name]
    store = TokenStore.open(write_store(tmp_path / "store", some_shards(), tokenizer=bpe))
    assert store.verify() == []
    damage(tmp_path / "store" / "train" / f"00003-part.{kind}", token_dtype(400) if kind == "tokens" else "<u8")
    problems = store.verify()
    assert len(problems) == len(expected)
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem
        assert "00003-part" in problem


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


# ---- Checks and writing ----------------------------------------------------------------------------------------------


def test_the_tokenizer_and_the_vocabulary_are_held_against_the_store(bpe, bpe_folder, tmp_path):
    store = TokenStore.open(write_store(tmp_path / "store", [[[1]]], tokenizer=bpe))
    check_tokenizer(store, bpe)
    check_tokenizer(store, load_tokenizer(bpe_folder))
    check_tokenizer(store, store.tokenizer())
    with pytest.raises(UserError, match=r"store was made with another tokenizer; use the one in .*store/tokenizer"):
        check_tokenizer(store, train_bpe(["another text"], 300))
    check_vocabulary(store, 400)
    with pytest.raises(
        UserError, match="token ids up to 399, beyond the model's vocabulary of 399; set vocab_size to at"
    ):
        check_vocabulary(store, 399)


def test_the_fingerprint_is_of_the_tokens_and_not_of_the_place(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, shards in zip(paths, ([[[1], [2]]], [[[1], [2]]], [[[1], [3]]]), strict=True):
        write_store(path, shards)
    first, second, third = (TokenStore.open(path).fingerprint for path in paths)
    assert first == second != third


@given(batches=st.lists(st.lists(ids, max_size=4), max_size=4), vocab_size=st.sampled_from([65_536, 65_537, 70_000]))
def test_the_writer_writes_what_numpy_writes(batches, vocab_size, tmp_path_factory):
    dtype = token_dtype(vocab_size)
    batches = [[[i % vocab_size for i in document] for document in batch] for batch in batches]
    folder = tmp_path_factory.mktemp("shard")
    with ShardWriter(folder / "train", "a", dtype) as writer:
        for documents in batches:
            flat = np.array([i for document in documents for i in document], np.int64)
            writer.add(flat, np.array([len(document) for document in documents], np.int64))
        assert not (folder / "train" / "a.tokens").exists()
        manifest = writer.finish("train", {}, "", {})
    whole = [i for documents in batches for document in documents for i in document]
    assert (folder / "train" / "a.tokens").read_bytes() == np.array(whole, dtype).tobytes()
    ends = np.cumsum([len(document) for documents in batches for document in documents])
    assert np.fromfile(folder / "train" / "a.ends", "<u8").tolist() == ends.tolist()
    assert sorted(path.name for path in (folder / "train").iterdir()) == ["a.ends", "a.json", "a.tokens"]
    assert Manifest.read(folder / "train", "a") == manifest
    assert is_whole(folder / "train", manifest)
    assert (dtype.itemsize == 2) == (vocab_size <= 65_536)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, "a", token_dtype(9)) as writer:
        writer.add(np.array([1]), np.array([1]))
        raise KeyError
    assert list(tmp_path.iterdir()) == []
