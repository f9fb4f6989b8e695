"""Small files that hold a document no memory does: refused by a sentence, in little memory."""

import gzip
import json
import tracemalloc

import pyarrow
import pytest
from backports import zstd
from pyarrow import parquet

from llm.common.errors import UserError
from llm.data.preparation.documents import BadDocuments
from llm.data.preparation.prepare import prepare
from llm.data.preparation.sources import open_sources
from llm.data.stories import MARKER

from ..stores import documents_of, plain_ids

MB = 1_000_000
HUGE = 200 * MB


def bomb(path):
    """A file of three documents, the second of `HUGE` characters."""
    if path.suffix == ".parquet":
        huge = pyarrow.array(["one", "x" * HUGE, "three"])
        parquet.write_table(pyarrow.table({"text": huge}), path, compression="zstd")
    elif path.suffix == ".txt":
        path.write_text(f"one{MARKER}\n" + "x\n" * (HUGE // 2) + f"{MARKER}three")
    else:
        pack = {".gz": gzip.compress, ".zst": zstd.compress, ".jsonl": bytes}[path.suffix]
        parts = [b'{"text": "one"}\n', b'{"text": "' + b"x" * HUGE + b'"}\n', b'{"text": "three"}\n']
        path.write_bytes(pack(b"".join(parts)))
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_document_that_is_too_large_is_a_bad_one(name, tmp_path):
    [source] = open_sources([str(bomb(tmp_path / name))], largest=MB)
    with pytest.raises(UserError, match=r"\d: a document of 200,000,0\d\d bytes, more than 1,000,000") as told:
        list(source.documents(BadDocuments()))
    for option in ("--max-bad-documents", "--max-document-bytes"):
        assert option in str(told.value)
    tracemalloc.start()
    bad = BadDocuments(1)
    assert [document.text.strip() for document in source.documents(bad)] == ["one", "three"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * MB and len(bad.sentences) == 1


def test_a_value_that_repeats_in_a_parquet_file_stays_one(tmp_path):
    """A dictionary of one text of a megabyte, a thousand times: 1 GB as plain values."""
    path = tmp_path / "a.parquet"
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), pyarrow.array(["x" * MB]))
    parquet.write_table(pyarrow.table({"text": text}), path)
    [source] = open_sources([str(path)])
    before = pyarrow.total_allocated_bytes()
    sizes, held = [], 0
    for document in source.documents(BadDocuments()):
        sizes.append(len(document.text))
        held = max(held, pyarrow.total_allocated_bytes() - before)
    assert sizes == [MB] * 1000 and held < 100 * MB


def test_the_ways_out_work(tmp_path, bpe_folder):
    """Leaving it out, and raising the limit; another limit makes another store."""
    path = tmp_path / "a.jsonl"
    texts = ["one", "two " * 50, "three"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"tokenizer": bpe_folder, "workers": 1, "validation_fraction": 0}
    with pytest.raises(UserError, match=r"line 2: a document of 2\d\d bytes, more than 100"):
        prepare([str(path)], tmp_path / "out", **settings, max_document_bytes=100)
    prepare([str(path)], tmp_path / "less", **settings, max_document_bytes=100, skip_bad=1)
    prepare([str(path)], tmp_path / "out", **settings, max_document_bytes=1000)
    for name, kept in (("less", [texts[0], texts[2]]), ("out", texts)):
        assert documents_of(tmp_path / name, "train") == [[*plain_ids(bpe_folder, text), 0] for text in kept]
    with pytest.raises(UserError, match="was begun with largest document: 1000, not None"):
        prepare([str(path)], tmp_path / "out", **settings)
    with pytest.raises(UserError, match="--max-document-bytes 0 must be at least 1"):
        prepare([str(path)], tmp_path / "other", **settings, max_document_bytes=0)
