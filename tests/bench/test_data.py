"""bench-data measures every task in every round, and says so in a table and in JSON."""

import json
import os
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm.bench.data_read
from llm.bench.data import long_files, time_tasks
from llm.bench.data_read import READERS, cold_tasks, random_store, run_seconds, sparse_store
from llm.cli import main
from llm.common.errors import UserError
from llm.data.preparation.documents import BadDocuments
from llm.data.preparation.sources import open_sources
from llm.data.store import TokenStore

from ..data.conftest import TEXT
from ..data.stores import write_lines


@pytest.fixture
def small(monkeypatch):
    """Stores and turns of a hundredth of a second."""
    monkeypatch.setattr(llm.bench.data_read, "WARM_TOKENS", 1 << 16)
    monkeypatch.setattr(llm.bench.data_read, "SECONDS", 0.01)
    monkeypatch.setattr(llm.bench.data_read, "TOKENS", 10**7)


def test_every_task_is_measured_in_every_round(small, bpe_folder, tmp_path, capsys):
    write_lines(tmp_path / "in.jsonl", [f"{i} {TEXT}" for i in range(50)])
    words = ["--tokenizer", str(bpe_folder), "--text-mib", "0.02", "--shards", "20", "--rounds", "3"]
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    assert main(["bench-data", str(tmp_path / "in.jsonl"), *words, "--out", str(tmp_path / "new" / "b.json")]) == 0
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    result = json.loads((tmp_path / "new" / "b.json").read_text())
    assert result["command"] == f"python -m llm bench-data {tmp_path / 'in.jsonl'} {' '.join(words)}"
    assert result["cores"] >= 1
    assert {"device", "versions", "git_commit"} <= result.keys()
    figures = result["figures"]
    assert [name for name in figures if "prepare" in name or "encode" in name] == [
        "encode_batch",
        "encode_batch_fast",
        "prepare, 1 worker",
        "prepare, 2 workers",
    ]
    assert sum("4,097 tokens" in name for name in figures) == 4
    assert all(len(values) == 3 and min(values) > 0 for units in figures.values() for values in units.values())
    one, plain = figures["prepare, 1 worker"]["tokens/s"], figures["encode_batch"]["tokens/s"]
    each = [a / b for a, b in zip(one, plain, strict=True)]
    assert result["ratios"]["prepare, 1 worker / encode_batch"] == {
        "median": statistics.median(each),
        "least": min(each),
        "greatest": max(each),
    }
    table = capsys.readouterr().out
    assert all(name in table for name in figures)
    assert "prepare, 2 workers / prepare, 1 worker" in table


def test_a_round_is_turned_round_after_the_other():
    order = []
    figures = time_tasks({name: lambda name=name: order.append(name) or {"s": len(order)} for name in "abc"}, 2)
    assert order == list("abccba")
    assert figures == {"a": {"s": [1, 6]}, "b": {"s": [2, 5]}, "c": {"s": [3, 4]}}


def test_long_files_hold_the_documents_again_and_again(tmp_path):
    write_lines(tmp_path / "in.jsonl", texts := [f"{i} {TEXT}" for i in range(5)])
    written = long_files(open_sources([str(tmp_path / "in.jsonl")]), tmp_path / "out", 2000)
    size = sum(len(text.encode()) for text in written)
    assert 2000 <= size < 2000 + max(len(text.encode()) for text in texts)
    assert written == [texts[i % 5] for i in range(len(written))]
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 2
    for source in open_sources([str(tmp_path / "out")]):
        assert [document.text for document in source.documents(BadDocuments())] == written


def test_the_readers_read_alike_and_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(llm.bench.data_read, "COLD_SHARD", 1 << 19)
    try:
        tasks = cold_tasks(tmp_path / "cold", 1 / 64)  # 16 MiB in eight shards
        figures = {name: task() for name, task in tasks.items()}
    except UserError as error:  # no Linux, or a folder in memory
        pytest.skip(str(error))
    assert len(figures) == 9
    for name, values in figures.items():
        window = int(name.split(", ", 1)[1].split(" ")[0].replace(",", ""))
        assert values["bytes read/used"] > (0.9 if window == 4097 else 3), name
    for window in ("4,097 tokens, 1/256", "257 tokens, 1/4096"):
        used = {reader: figures[f"{reader}, {window} of the store"]["bytes read/used"] for reader in READERS}
        assert used["TokenStore"] <= used["np.memmap"]
    reads = [reader(tmp_path / "cold") for reader in READERS.values()]
    for shard in range(8):
        first, *others = (read(shard, 1000, 257).tolist() for read in reads)
        assert all(other == first for other in others)
    with pytest.raises(UserError, match="GiB free; name another --folder or a smaller --cold"):
        cold_tasks(tmp_path / "larger", 1e9)


def test_stores_of_random_tokens_and_of_none(tmp_path):
    random_store(tmp_path / "random", 80_000, 4)
    store = TokenStore.open(tmp_path / "random")
    store.check_sizes()
    assert (store.tokens, store.documents, store.dtype.itemsize) == (80_000, 4, 4)
    assert len(np.unique(store.read(0, 80_000))) > 40_000
    sparse_store(tmp_path / "sparse", 10**9, 10, documents=1000)
    for split, tokens in (("train", 10**9), ("validation", 10**8)):
        store = TokenStore.open(tmp_path / "sparse", split)
        store.check_sizes()
        assert store.tokens == tokens
        assert not store.read(tokens - 1000, 1000).any()
    assert sum(path.stat().st_blocks for path in (tmp_path / "sparse").rglob("*")) * 512 < 10**6


def test_stalls_that_fit_into_what_is_read_ahead_cost_nothing():
    """Ten of 0.4 s in 250 micro-batches of 40 ms each, all of a sudden: 16 are 0.64 s of work."""
    reads = [0.4 if number % 25 == 20 else 0.001 for number in range(250)]
    assert run_seconds(reads, 0.04, 1) == pytest.approx(10 + 10 * (0.4 - 0.04), abs=0.02)
    assert run_seconds(reads, 0.04, 16) == pytest.approx(10, abs=0.02)
    assert run_seconds([0.1] * 50, 0.04, 16) == pytest.approx(5.04)  # what is too slow on the whole cannot be hidden


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 20))
def test_the_time_of_a_run_is_that_of_a_clock_that_ticks(reads, step, ahead):
    """A reader and a trainer, tick by tick; a batch is begun when less than `ahead` are there or being read."""
    clock = begun = read = taken = computing = 0
    left = None  # of the read under way
    while taken < len(reads) or computing:
        while True:  # all that happens at this moment
            if left is None and begun < min(len(reads), taken + ahead):
                left, begun = reads[begun], begun + 1
            if left == 0:
                left, read = None, read + 1
            elif not computing and taken < read:
                taken, computing = taken + 1, step
            elif left is not None or begun >= min(len(reads), taken + ahead):
                break
        clock, computing = clock + 1, max(0, computing - 1)
        left = None if left is None else left - 1
    assert run_seconds(reads, step, ahead) == clock


def test_the_stalls_of_a_users_store_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(llm.bench.data_read, "READS", 20)
    monkeypatch.setattr(llm.bench.data_read, "WINDOWS", (17, 33))
    random_store(tmp_path / "store", 10_000, 4)
    words = ["bench-data", "--stalls", str(tmp_path / "store"), "--step-ms", "5", "--rounds", "2"]
    assert main([*words, "--out", str(tmp_path / "stalls.json")]) == 0
    result = json.loads((tmp_path / "stalls.json").read_text())
    assert result["command"] == "python -m llm " + " ".join(words)
    ((name, figures),) = result["figures"].items()
    assert name == "a micro-batch of 8 x 32 tokens, 4 shards"
    median, slowest = figures["ms, the median"], figures["ms, the slowest"]
    assert all(0 < low <= high for low, high in zip(median, slowest, strict=True))
    ahead = [f"% longer, {count} read ahead" for count in (1, 16)]
    assert all(one >= many >= 0 for one, many in zip(*(figures[name] for name in ahead), strict=True))
    assert all(unit in capsys.readouterr().out for unit in ahead[:1])
    assert main(["bench-data", "--stalls", str(tmp_path / "nowhere")]) == 2
    assert "there is no token store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds", "0"], "--rounds and --shards must be at least 1"),
        (["--cold", "0", "--text-mib", "0.01", "--shards", "2"], "--text-mib and --cold above 0"),
        (["--folder", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_measured_is_told(words, told, bpe_folder, tmp_path, capsys):
    write_lines(tmp_path / "in.jsonl", [TEXT])
    assert main(["bench-data", str(tmp_path / "in.jsonl"), "--tokenizer", str(bpe_folder), *words]) == 2
    assert told in capsys.readouterr().err
