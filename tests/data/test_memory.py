"""A store of 84 billion tokens, sparse on the disk, costs no more memory than a small one."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llm.bench.data_read import TOKENS, sparse_store
from llm.data.shard import Manifest
from llm.data.store import TokenStore
from llm.data.store_index import write_index

MB = 10**6

# A process of its own: what it holds is then its own. Prints bytes resident and their peak, before and after.
READ_WINDOWS = """
import json, random, re, sys
import torch

def memory():
    status = open("/proc/self/status").read()
    return [1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", status)[1]) for name in ("VmRSS", "VmHWM")]

before = memory()
from llm.data.mixture import MixtureOrder
from llm.data.rows import Rows, TrainingBatches
from llm.data.store import TokenStore

store = TokenStore.open(sys.argv[1])
store.check_sizes()
draw = random.Random(0)
for _ in range(1000):
    assert len(store.read(draw.randrange(store.tokens - 4097), 4097)) == 4097
rows = Rows([store], 4096)
batches = TrainingBatches(rows, MixtureOrder(rows.counts, [1000], 8, 0), 1, 0, 1)
for step in range(10**6, 10**6 + 125):
    assert batches[step]["input_ids"].shape == (8, 4096)
print(json.dumps([store.tokens, before, memory()]))
"""


@pytest.fixture
def proc():
    if not Path("/proc/self/status").exists():
        pytest.skip("the memory of a process is read from /proc, which is not here")


# A file for each of the 31,279 source files takes 5 s to make: there `bench-data` is, and half a test.
@pytest.mark.parametrize("shards", [8, 2000])
def test_a_thousand_windows_of_84_billion_tokens_fit_in_150_mb(shards, proc, tmp_path):
    sparse_store(tmp_path / "store", TOKENS, shards)
    words = [sys.executable, "-c", READ_WINDOWS, str(tmp_path / "store")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    tokens, before, after = json.loads(done.stdout)
    assert tokens > 0.999 * TOKENS
    assert all(now - then < 150 * MB for now, then in zip(after, before, strict=True))


def test_31_279_shards_open_by_their_index(tmp_path):
    shards, tokens = 31_279, TOKENS // 31_279
    one = Manifest("", "train", {}, 1, 1, {}, [], tokens, 0, 0, {"tokens": "0" * 64, "ends": ""}, "uint16", "", {})
    named = [replace(one, name=f"{i:05d}-CC-MAIN-2013-20-part-{i:05d}") for i in range(shards)]
    write_index(
        tmp_path,
        {"train": named, "validation": named},
        vocab_size=50_257,
        end_of_document=50_256,
        tokenizer_fingerprint="",
    )
    store = TokenStore.open(tmp_path)  # by the index alone: not one of the files is there
    assert store.tokens == shards * tokens
