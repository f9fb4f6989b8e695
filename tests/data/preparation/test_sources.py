"""Every document of every form, in order, or one sentence that says where it went wrong; never a silent end."""

import gzip
import json
import os
import re
import tracemalloc

import pyarrow
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import llm.data.preparation.files
import llm.data.preparation.sources
from llm.common.errors import UserError
from llm.data.preparation.documents import BadDocuments
from llm.data.preparation.files import FileSource
from llm.data.preparation.sources import open_sources
from llm.data.stories import MARKER, stories

from ..conftest import TEXT

TEXTS = [TEXT, "two\nlines", " \t", "𝒙" * 1000, MARKER, "", "last"]
PACK = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd.compress, ".jsonl.zstd": zstd.compress}


def lines(texts, key="text"):
    return "".join(
        json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
    ).encode()


def write_parquet(path, texts, key="text", **settings):
    parquet.write_table(pyarrow.table({"id": range(len(texts)), key: texts}), path, **settings)


def read(path, **settings):
    [source] = open_sources([str(path)], **settings)
    return [document.text for document in source.documents(BadDocuments())]


# ---- What is there is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines_of_every_packing(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](lines(TEXTS)))
    assert read(path) == TEXTS
    path.write_bytes(PACK[suffix](b"\n" + lines(TEXTS, "content").rstrip(b"\n")))  # a blank line, no last line break
    assert read(path, text_key="content") == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_files_of_several_frames_are_read_to_the_end(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    skippable = bytes.fromhex("502a4d18 04000000 00000000") if suffix == ".jsonl.zst" else b""
    path.write_bytes(PACK[suffix](lines(TEXTS)) + skippable + PACK[suffix](lines(["more"])))
    assert read(path) == [*TEXTS, "more"]


def test_a_zstd_frame_with_the_largest_window_is_read(tmp_path):
    parameter = zstd.CompressionParameter
    options = {parameter.window_log: 30, parameter.enable_long_distance_matching: 1}
    (tmp_path / "a.jsonl.zstd").write_bytes(zstd.compress(lines(TEXTS), options=options))
    assert read(tmp_path / "a.jsonl.zstd") == TEXTS


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_by_row_group(kind, tmp_path):
    write_parquet(tmp_path / "a.parquet", pyarrow.array(TEXTS, kind), "content", row_group_size=3)
    assert read(tmp_path / "a.parquet", text_key="content") == TEXTS


def test_text_is_split_at_markers_and_keeps_all_but_the_line_break_beside_them(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(f"\none\n{MARKER}\n\n two \n\n{MARKER}three{MARKER}\r\nfour\r\n{MARKER}\n".encode())
    assert read(path) == ["one", "\n two \n", "three", "four"]
    path.write_bytes(b"one\n\ntwo\n")
    assert read(path) == ["one\n\ntwo"]
    assert read(path, marker="\n\n") == ["one", "two"]


@given(texts=st.lists(st.text(alphabet="ab<|\n é𝒙"), min_size=1), marker=st.sampled_from([MARKER, "<|", "|", "é<"]))
def test_text_is_split_as_python_splits_it_wherever_the_chunks_end(texts, marker, tmp_path_factory):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    content = marker.join(texts) + "."
    path.write_text(content, newline="")
    expected = [llm.data.preparation.files._without_layout(text) for text in content.split(marker)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.data.preparation.files, "CHUNK", 3)
        assert read(path, marker=marker) == expected


def test_a_large_text_is_streamed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{TEXT * 100}{MARKER}" * 3000)
    assert path.stat().st_size > 20 * llm.data.preparation.files.CHUNK
    tracemalloc.start()
    [source] = open_sources([str(path)])
    assert sum(1 for _ in source.documents(BadDocuments())) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * llm.data.preparation.files.CHUNK


def test_progress_ends_at_the_size_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "b.txt").write_text("b")
    write_parquet(tmp_path / "c.parquet", TEXTS)
    for source in open_sources([str(tmp_path)]):
        reads = [document.read for document in source.documents(BadDocuments())]
        assert reads == sorted(reads)
        assert reads[-1] == source.size


def test_real_files(real_data):
    sources = open_sources([str(real_data / "nemotron-cc-layout")])
    for source in sources:
        raw = zstd.decompress((real_data / source.location).read_bytes()).decode()
        assert [d.text for d in source.documents(BadDocuments())] == [
            json.loads(line)["text"] for line in raw.splitlines()
        ]
    assert [source.name for source in sources] == ["00000-books-part-00000", "00001-books-part-00001"]
    sample = real_data / "tinystories" / "sample.txt"
    layout = re.compile(rf"\n?{re.escape(MARKER)}\n?")
    assert read(sample) == [text for text in layout.split(sample.read_text()[1:-1]) if text]


# ---- What is wrong is named ------------------------------------------------------------------------------------------

GOOD = lines(["fine", "too"])
DAMAGED = {
    "broken JSON": (".jsonl", GOOD + b'{"text": "cut', r"line 3: broken JSON \(Unterminated string.*\); repair"),
    "no JSON": (".jsonl", b"hello\n" + GOOD, r"line 1: broken JSON \(Expecting value.*\)"),
    "deep JSON": (".jsonl", GOOD + b"[" * 10**6, r"line 3: broken JSON \(maximum recursion"),
    "no object": (".jsonl", GOOD + b"[1]\n", r"line 3: not a JSON object but list"),
    "no key": (
        ".jsonl",
        GOOD + b'{"content": 1, "a": 2}\n',
        r"line 3: no key 'text' among \['a', 'content'\]; .*--text-key",
    ),
    "no text": (".jsonl", GOOD + b'{"text": ["a"]}\n', r"line 3: 'text' is not text but list; .*--text-key"),
    "null": (".jsonl", GOOD + b'{"text": null}\n', r"line 3: 'text' is not text but NoneType"),
    "half a pair": (".jsonl", GOOD + b'{"text": "a\\ud83d"}\n', r"line 3: character 1 is half a surrogate pair"),
    "UTF-8, lines": (".jsonl", GOOD + b'{"text": "\xff"}\n' + GOOD, r"line 3: invalid UTF-8, byte 0xff \(.*\); repair"),
    "UTF-8, packed": (".jsonl.zst", zstd.compress(GOOD + b'{"text": "\xe9"}\n'), r"line 3: invalid UTF-8, byte 0xe9"),
    "UTF-8, text": (
        ".txt",
        b"a\nb\n<|endoftext|>\nc\n\nd \x80\nmore",
        r"line 6: invalid UTF-8, byte 0x80 \(.*\); repair",
    ),
    "empty text": (".txt", b"", r"is empty: it holds no document with any text"),
    "markers only": (".txt", b"<|endoftext|>\n<|endoftext|>\n", r"is empty: it holds no document with any text"),
    "empty lines": (".jsonl", b"", r"is empty"),
    "blank lines": (".jsonl", b"\n\n", r"is empty"),
    "empty gzip": (".jsonl.gz", gzip.compress(b""), r"is empty"),
    "nothing in gzip": (".jsonl.gz", b"", r"is empty"),
    "nothing in zstd": (".jsonl.zst", b"", r"is truncated \(after 0 documents, at byte 0 of 0\); fetch"),
    "truncated gzip": (
        ".jsonl.gz",
        gzip.compress(GOOD)[:-5],
        r"is truncated \(after 2 documents, at byte \d+ of \d+\); fetch",
    ),
    "truncated zstd": (
        ".jsonl.zstd",
        zstd.compress(GOOD)[:-1],
        r"is truncated \(after \d documents, at byte \d+ of \d+\)",
    ),
    "second frame": (".jsonl.zst", zstd.compress(GOOD) * 2, None),
    "truncated second frame": (".jsonl.zst", (zstd.compress(GOOD) * 2)[:-1], r"is truncated \(after [234] documents"),
    "no zstd": (".jsonl.zst", GOOD, r"is corrupt \(after 0 documents, near byte 0 of \d+: .*\); fetch"),
    "no gzip": (".jsonl.gz", GOOD, r"is corrupt \(after 0 documents, near byte 0 of \d+: Not a gzipped file"),
    "junk after zstd": (".jsonl.zst", zstd.compress(GOOD) + b"junk", r"is corrupt \(after 2 documents"),
    "junk after gzip": (".jsonl.gz", gzip.compress(GOOD) + b"junk", r"is corrupt \(after 2 documents"),
    "flipped gzip": (".jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, r"is corrupt \(after 2 documents.*CRC"),
    "no parquet": (".parquet", GOOD, r"is truncated or corrupt, after row 0 \(.+\); fetch it again"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_told_with_place_and_reason(name, tmp_path):
    suffix, content, message = DAMAGED[name]
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    if message is None:
        assert read(path) == ["fine", "too"] * 2
        return
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_damaged_parquet_is_told_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["fine", None, "too"])
    with pytest.raises(UserError, match=r"a\.parquet, row 2: 'text' is not text but NoneType"):
        read(path)
    with pytest.raises(
        UserError, match=r"a\.parquet: no column 'body' among \['id', 'text'\]; name one with --text-key"
    ):
        read(path, text_key="body")
    write_parquet(path, [1, 2])
    with pytest.raises(UserError, match=r"a\.parquet, row 1: 'text' is not text but int"):
        read(path)
    write_parquet(path, [TEXT] * 999, compression="none", use_dictionary=False, write_page_checksum=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a\.parquet is truncated or corrupt, after row 0"):
        read(path)
    place = whole.index(b"hippocampus", len(whole) // 2)  # in the data, past the page header
    path.write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    with pytest.raises(UserError, match=r"a\.parquet is truncated or corrupt, after row \d+ \(.*CRC"):
        read(path)
    text = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    write_parquet(path, text)
    with pytest.raises(UserError, match=r"a\.parquet, row 2: invalid UTF-8, byte 0xff"):
        read(path)


def test_a_file_that_went_away_is_told(tmp_path):
    source = FileSource("a", str(tmp_path / "gone.txt"), 1, "text", None, MARKER)
    for use in (lambda: list(source.documents(BadDocuments())), source.description):
        with pytest.raises(UserError, match=r"gone\.txt cannot be read \(No such file"):
            use()


# ---- Patterns --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.txt", "deep/er/a.txt", "deep/c.parquet", ".hidden.txt", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(root, *patterns):
    return [source.location.removeprefix(f"{root}/") for source in open_sources(patterns)]


def test_files_folders_and_globs_are_sorted_whatever_their_order(tree, capsys):
    everything = ["a.txt", "b.jsonl", "deep/c.parquet", "deep/er/a.txt"]
    assert found(tree, ".") == found(tree, str(tree)) == found(tree, "deep", "b.jsonl", "a.txt") == everything
    assert "note: left out of ., being of no known form: 1 files, as README.md" in capsys.readouterr().err
    assert found(tree, "**/*.txt") == ["a.txt", "deep/er/a.txt"]
    assert found(tree, "deep/**") == found(tree, "dee?") == ["deep/c.parquet", "deep/er/a.txt"]
    names = [source.name for source in open_sources(["."])]
    assert names == ["00000-a", "00001-b", "00002-c", "00003-a"]


def test_a_linked_folder_is_followed_and_a_file_found_twice_refused(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "d.txt").write_text("x")
    (tree / "deep" / "link").symlink_to(elsewhere)
    assert str(elsewhere / "d.txt") in found(tree, "deep")
    (tree / "again.txt").symlink_to(tree / "a.txt")
    for patterns in (["a.txt", "./a.txt"], ["a.txt", "*.txt"], ["again.txt", "a.txt"], ["stories:1", "stories:1"]):
        with pytest.raises(UserError, match="named twice, so its documents would be counted twice; name it once"):
            open_sources(patterns)


def test_patterns_that_stand_for_nothing_are_refused(tree):
    (tree / "void").mkdir()
    for patterns, message in {
        ("missing.txt",): "no file matches missing.txt; give a file, a folder, a glob, a hub name or `stories`",
        ("*.gz",): r"no file matches \*\.gz; give",
        ("void",): r"the folder void holds no file of a known form \(\.txt, \.jsonl, .*\.parquet\)",
        (
            "README.md",
        ): r"README\.md is of no form that can be read; the known suffixes are \.txt, \.jsonl, \.jsonl\.gz",
        (): "no source is named",
    }.items():
        with pytest.raises(UserError, match=message):
            open_sources(patterns)
    with pytest.raises(UserError, match=r"--documents is the number of stories .* goes with the source `stories`"):
        open_sources(["a.txt"], documents=5)
    with pytest.raises(UserError, match="the marker between documents is empty"):
        open_sources(["a.txt"], marker="")


# ---- Stories ---------------------------------------------------------------------------------------------------------


def test_the_corpus_is_shared_out_whole(monkeypatch):
    monkeypatch.setattr(llm.data.preparation.sources, "STORIES_A_SOURCE", 30)
    sources = open_sources(["stories:7"], documents=100)
    assert [source.split for source in sources] == ["train"] * 4 + ["validation"]
    assert len({source.name for source in sources}) == 5
    for split, count in (("train", 100), ("validation", 5)):
        told = [d.text for source in sources if source.split == split for d in source.documents(BadDocuments())]
        assert told == list(stories(7, split, 0, count))
    assert sources == open_sources(["stories"], documents=100, seed=7)
    assert sources[0].description() != sources[1].description() == sources[1].description()


def test_what_is_there_and_cannot_be_read_is_told(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(["fine"]))
    (tmp_path / "in" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    for pattern in (tmp_path / "in", tmp_path / "in" / "*", tmp_path / "**" / "*.jsonl"):
        with pytest.raises(UserError, match=r"gone\.jsonl is not a file, perhaps a link to one that is gone"):
            open_sources([str(pattern)])
    (tmp_path / "in" / "gone.jsonl").unlink()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert [source.location for source in open_sources([str(tmp_path / "in")])] == [str(tmp_path / "in" / "a.jsonl")]
    (tmp_path / "in" / os.fsdecode(b"\xff.jsonl")).write_bytes(lines(["fine"]))
    with pytest.raises(UserError, match="is not UTF-8; rename the file"):
        open_sources([str(tmp_path / "in")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_told(tmp_path):
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(["fine"]))
    (tmp_path / "in" / "closed").chmod(0)
    for pattern in (tmp_path / "in", tmp_path / "in" / "**" / "*.jsonl"):
        with pytest.raises(UserError, match="closed cannot be read"):
            open_sources([str(pattern)])


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = "\ufeff".encode()
    (tmp_path / "a.jsonl").write_bytes(mark + lines(["first", "\ufeffsecond"]))
    assert read(tmp_path / "a.jsonl") == ["first", "\ufeffsecond"]
    (tmp_path / "a.txt").write_bytes(mark + f"first{MARKER}second".encode())
    assert read(tmp_path / "a.txt") == ["first", "second"]


def test_a_column_that_is_there_twice_is_told(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="more than one column 'text' among"):
        read(tmp_path / "a.parquet")
