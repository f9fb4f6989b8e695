"""A store against plain arrays: what is read is what lies there, however it is cut into shards."""

import os
import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import llm.data.store
from llm.common.errors import UserError
from llm.data.shard import Manifest, ShardWriter, is_complete, token_dtype
from llm.data.store import TokenStore, check_tokenizer, check_vocabulary
from llm.data.tokenizer import load_tokenizer, train_bpe

from .by_hand import END, joined, some_shards, write_store

ids = st.lists(st.integers(1, 69_999), max_size=6)
layouts = st.lists(st.lists(ids, max_size=4), max_size=6)


# ---- Reading ---------------------------------------------------------------------------------------------------------


@given(shards=layouts, vocab_size=st.sampled_from([65_537, 70_000]), data=st.data())
def test_reads_are_slices_of_the_whole(shards, vocab_size, data, tmp_path_factory):
    path = write_store(tmp_path_factory.mktemp("store"), shards, vocab_size)
    whole, ends = joined(shards)
    store = TokenStore.open(path)
    assert (store.tokens, store.documents, store.dtype) == (len(whole), len(ends), np.dtype("<u4"))
    assert store.begin_of_document is None
    start = data.draw(st.integers(0, store.tokens))
    count = data.draw(st.integers(0, store.tokens - start))
    read = store.read(start, count)
    assert read.dtype == np.int64
    assert read.tolist() == whole[start : start + count].tolist()
    spans = [store.document(index) for index in range(store.documents)]
    assert spans == list(zip([0, *ends][:-1], ends, strict=True)) if len(ends) else spans == []
    for index, (first, last) in enumerate(spans):
        assert store.document_tokens(index).tolist() == whole[first:last].tolist()
    lengths = [length for some in store.document_lengths() for length in some]
    assert lengths == [last - first for first, last in spans]


def test_few_files_stay_open_and_pieces_are_put_together(tmp_path, monkeypatch):
    shards = some_shards(40)
    whole, ends = joined(shards)
    monkeypatch.setattr(llm.data.store, "OPEN_FILES", 3)
    monkeypatch.setattr(llm.data.store, "PIECE", 7)
    monkeypatch.setattr(llm.data.store, "ENDS_IN_A_ROW", 3)
    store = TokenStore.open(write_store(tmp_path / "store", shards))
    for start in random.Random(1).sample(range(store.tokens - 257), 200):
        assert np.array_equal(store.read(start, 257), whole[start : start + 257])
        assert len(store._files) <= 3
    assert np.array_equal(np.concatenate(list(store.document_lengths())), np.diff(ends, prepend=0))
    opened = list(store._files.values())
    store.close()
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_as_many_shards_stay_open_as_the_process_may_have(tmp_path, monkeypatch):
    """All of them, if it may: then each is opened once, however often it is read. Else a quarter of what it may."""
    store = TokenStore.open(write_store(tmp_path / "store", shards := some_shards(40)))
    opened, open_file = [], os.open
    monkeypatch.setattr(os, "open", lambda *words: opened.append(words[0]) or open_file(*words))
    starts = random.Random(2).choices(range(store.tokens), k=1000)
    for start in starts:
        store.read(start, 1)
    assert len(opened) == len(set(opened)) <= len(shards)
    monkeypatch.setattr(llm.data.store, "open_file_limit", lambda: 40)
    for start in starts:
        store.read(start, 1)
    assert len(opened) == len(set(opened))  # what is open stays so until another is opened
    store.close()
    for start in starts:
        store.read(start, 1)
        assert len(store._files) <= 10
    assert len(opened) > 2 * len(set(opened))


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
    assert is_complete(folder / "train", manifest)
    assert (dtype.itemsize == 2) == (vocab_size <= 65_536)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, "a", token_dtype(9)) as writer:
        writer.add(np.array([1]), np.array([1]))
        raise KeyError
    assert list(tmp_path.iterdir()) == []
