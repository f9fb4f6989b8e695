"""Small files that hold a document no memory does: refused by a sentence, in little memory."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pytest
from backports import zstd
from pyarrow import parquet

from llm.common.errors import UserError
from llm.data.preparation.documents import BadDocuments
from llm.data.preparation.parquet_pages import page_sizes
from llm.data.preparation.prepare import prepare
from llm.data.preparation.sources import open_sources
from llm.data.stories import MARKER

from ..stores import documents_of, plain_ids

ROOT = Path(__file__).parents[3]
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


def long_window(path):
    """A frame that asks for a window of 2 GiB, as `zstd --long=31` writes them."""
    pack = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 31})
    path.write_bytes(pack.compress(b'{"text": "one"}\n{"text": "two"}\n') + pack.flush())
    return path


def test_a_window_is_no_larger_than_a_document(tmp_path):
    path = long_window(tmp_path / "a.jsonl.zst")
    [source] = open_sources([str(path)])
    with pytest.raises(UserError, match=r"a window of more than 134,217,728 bytes; raise --max-document-bytes to 2147"):
        list(source.documents(BadDocuments(9)))
    [source] = open_sources([str(path)], largest=1 << 31)
    assert [document.text for document in source.documents(BadDocuments())] == ["one", "two"]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_dictionary": False}, {"compression": "zstd", "write_statistics": False}]
)
def test_sizes_of_pages_add_up_to_what_the_footer_says(version, settings, tmp_path):
    """The footer counts the headers too, which lie before their pages."""
    path = tmp_path / "a.parquet"
    texts = [f"document {index} " * (index % 90) if index % 7 else None for index in range(6000)]
    table = pyarrow.table({"text": texts, "id": range(6000)})
    parquet.write_table(table, path, data_page_version=version, data_page_size=1 << 12, row_group_size=2000, **settings)
    metadata = parquet.read_metadata(path)
    for group in range(3):
        for column in range(2):
            chunk = metadata.row_group(group).column(column)
            with path.open("rb") as file:
                sizes = list(page_sizes(file, chunk))
            headers = chunk.total_uncompressed_size - sum(sizes)
            assert (
                10 * len(sizes) < headers < 6000 * len(sizes) and len(sizes) > 1
            )  # with the least and the greatest text


def test_ids_are_held_to_the_limit_too(tmp_path):
    path = tmp_path / "a.parquet"
    ids = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 1], pyarrow.int32()), pyarrow.array(["a", "x" * MB]))
    parquet.write_table(pyarrow.table({"text": ["one", "two", "three"], "id": ids}), path)
    [source] = open_sources([str(path)], id_key="id", largest=1000)
    bad = BadDocuments(2)
    assert [document.text for document in source.documents(bad)] == ["one"] and len(bad.sentences) == 2


# Reads bombs in a process that may take 300 MB more than it has after its imports; prints what each says.
LITTLE = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from llm.common.errors import UserError
from llm.data.preparation.documents import BadDocuments
from llm.data.preparation.sources import open_sources
from small.vision.archive import opened

size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000,) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        if path.name.startswith("text"):
            [source] = open_sources([str(path)], largest=1_000_000)
            print(len(list(source.documents(BadDocuments(1)))), "documents")
        else:
            with opened(path, 200_000_000) as files:
                print(len(files.names), "files")
    except UserError as error:
        print(error)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_bombs_in_a_process_with_little_memory(tmp_path):
    """Of 200 MB in a line, 600 MB in a page and 8 GB in an archive none needs more than 300 MB."""
    texts = [bomb(tmp_path / f"text{suffix}") for suffix in (".jsonl.gz", ".jsonl.zst", ".txt")]
    page = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"text": ["x" * (600 * MB)]}), page, compression="zstd")
    tar, packed = tmp_path / "images.tar.gz", tmp_path / "images.zip"
    header = tarfile.TarInfo("train.bin")
    header.size = 8 << 30
    tar.write_bytes(gzip.compress(header.tobuf()))
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.bin", bytes(80 * MB))
    words = [
        sys.executable,
        "-c",
        LITTLE,
        *map(str, [*texts, page, long_window(tmp_path / "text.jsonl.zstd"), tar, packed]),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert said[:3] == ["2 documents"] * 3
    wanted = [
        "a page of 600,0",
        "a window of more than",
        "unpacks to 8,589,934,592 bytes",
        "unpacks to 240,000,000 bytes",
    ]
    assert all(part in line for part, line in zip(wanted, said[3:], strict=True)), said
    assert page.stat().st_size < MB and packed.stat().st_size < MB


def test_a_damaged_page_header_is_said(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one"] * 50}), path)
    chunk = parquet.read_metadata(path).row_group(0).column(0)
    for content in (b"", b"\x15\x00", b"\x1c" * 40, b"\x15" + b"\xff" * 20, b"\x00"):
        with pytest.raises((ValueError, EOFError)):
            list(page_sizes(io.BytesIO(b"PAR1" + content), chunk))
