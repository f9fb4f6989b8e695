"""Datasets of the hub: every row in order, by workers without network or `datasets`, or one sentence that says why not.

The library loads a local folder of files as it loads a repository of the hub, so folders `owner/name` stand for these.
"""

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import llm.data.preparation.hub
from llm.common.errors import UserError
from llm.data.preparation.documents import BadDocuments
from llm.data.preparation.hub import hub_sources, is_hub_name

from ..conftest import TEXT

datasets = pytest.importorskip("datasets")

NAME = "owner/TinyTales"
TEXTS = [f"{TEXT}{'𝒙é' * (i % 50)} {i}" for i in range(2500)] + ["", " \n"]
FILES = [TEXTS[:1001], TEXTS[1001:1002], TEXTS[1002:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the dataset `owner/TinyTales`, to be written; the library's cache is beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(llm.data.preparation.hub, "ROWS_A_SOURCE", 300)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    return tmp_path / NAME


def write_parquet(folder, files=FILES, split="train", **columns):
    for index, texts in enumerate(files):
        path = folder / f"{split}-{index:05d}-of-{len(files):05d}.parquet"
        table = {
            "id": [f"{split} {index} {row}" for row in range(len(texts))],
            "text": texts,
            "words": [3] * len(texts),
        }
        parquet.write_table(pyarrow.table(table | columns), path, row_group_size=700)


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def load(name=NAME, first=0, text_key="text", id_key=None):
    return hub_sources(name, first, text_key=text_key, id_key=id_key)


def documents(sources, bad=None):
    return [document for source in sources for document in source.documents(bad or BadDocuments())]


def texts_of(sources, split=None):
    return [document.text for document in documents([source for source in sources if source.split == split])]


# ---- What is there is read -------------------------------------------------------------------------------------------


def test_all_rows_of_many_files_in_order(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", "100KB")  # of a file of the cache
    write_parquet(folder)
    sources = load(first=7)
    written = pyarrow.concat_tables(parquet.read_table(path) for path in sorted(folder.iterdir()))
    assert texts_of(sources) == written["text"].to_pylist() == TEXTS
    assert {document.id for document in documents(sources)} == {None}
    assert [document.id for document in documents(load(id_key="id"))] == written["id"].to_pylist()
    assert {document.id for document in documents(load(id_key="words"))} == {"3"}
    assert len({piece.path for source in sources for piece in source.pieces}) > 3
    assert any(len(source.pieces) > 1 for source in sources)
    assert [source.name for source in sources[:2]] == [
        "00007-owner_TinyTales-train-0000000000",
        "00008-owner_TinyTales-train-0000000300",
    ]
    assert [source.start for source in sources] == list(range(0, len(TEXTS), 300))
    assert sources[-1].location == "owner/TinyTales, train 2400 to 2502"


@pytest.mark.parametrize("rows", [1, 999, 1000, 1001, 10**6])
def test_ranges_of_any_length_hold_the_same(rows, folder, monkeypatch):
    texts = TEXTS[-1003:]
    write_parquet(folder, [texts[:3], texts[3:]])
    monkeypatch.setattr(llm.data.preparation.hub, "ROWS_A_SOURCE", rows)
    sources = load()
    assert len(sources) == -(-len(texts) // rows)
    assert texts_of(sources) == texts


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_short_and_long_strings(kind, folder):
    write_parquet(folder, [TEXTS], text=pyarrow.array(TEXTS, kind))
    assert texts_of(load()) == TEXTS


@pytest.mark.parametrize("validation", ["validation", "valid", "dev", "val"])
def test_a_validation_split_of_its_own_is_kept_and_comes_last(validation, folder, capsys):
    for split, texts in {"test": ["t"], validation: TEXTS[:400], "train": TEXTS[400:]}.items():
        write_lines(folder / f"{split}.jsonl", texts)
    sources = load()
    assert [source.split for source in sources] == ["train"] * 8 + ["validation"] * 2  # 2,102 and 400 rows by 300
    assert texts_of(sources, "train") == TEXTS[400:]
    assert texts_of(sources, "validation") == TEXTS[:400]
    told = capsys.readouterr().err
    assert "loading owner/TinyTales from the hub ..." in told
    assert "note: left out of owner/TinyTales, being neither training nor validation: test" in told


@pytest.mark.parametrize("validation", ["valid", "dev", "val"])
def test_splits_by_names_of_the_dataset_s_own(validation, folder, capsys):
    write_lines(folder / "a.jsonl", TEXTS[:3])
    write_lines(folder / "b.jsonl", TEXTS[3:5])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - {split: train, path: a.jsonl}\n"
        f"  - {{split: {validation}, path: b.jsonl}}\n  - {{split: extra, path: b.jsonl}}\n"
        "- config_name: other\n  data_files: b.jsonl\n---\n"
    )
    train, held_out = load(f"{NAME}:plain_text")
    assert (train.name, train.split) == ("00000-owner_TinyTales_plain_text-train-0000000000", "train")
    assert (held_out.location, held_out.split) == (f"owner/TinyTales:plain_text, {validation} 0 to 2", "validation")
    assert (
        "left out of owner/TinyTales:plain_text, being neither training nor validation: extra"
        in capsys.readouterr().err
    )
    assert texts_of([held_out], "validation") == TEXTS[3:5]
    assert texts_of(load(f"{NAME}:other")) == TEXTS[3:5]
    with pytest.raises(
        UserError, match=r"available configs: \['plain_text', 'other'\].*; name one configuration as own"
    ):
        load()
    with pytest.raises(UserError, match=r"'c' not found.*; name one configuration as owner/TinyTales:CONFIGURATION$"):
        load(f"{NAME}:c")


def test_progress_ends_at_the_size_which_is_about_that_of_the_text(folder):
    write_parquet(folder)
    sources = load()
    for source in sources:
        reads = [document.read for document in source.documents(BadDocuments())]
        assert reads == sorted(reads)
        assert reads[-1] == source.size
    assert sum(source.size for source in sources) == pytest.approx(sum(len(text.encode()) for text in TEXTS), rel=0.05)


IN_A_WORKER = """
import pickle, socket, sys
def raise_problems(*_): raise RuntimeError("no network here")
socket.socket.connect = socket.getaddrinfo = raise_problems
from llm.data.preparation.documents import BadDocuments
sources = pickle.load(sys.stdin.buffer)
texts = [document.text for source in sources for document in source.documents(BadDocuments())]
described = [source.description() for source in sources]
heavy = {"datasets", "pandas", "torch", "transformers", "huggingface_hub"} & set(sys.modules)
pickle.dump((texts, described, heavy), sys.stdout.buffer)
"""


def test_a_worker_needs_neither_network_nor_the_library(folder, tmp_path):
    write_parquet(folder)
    sources = load(id_key="id")
    shutil.rmtree(folder)  # the worker reads the cache alone
    assert max(len(pickle.dumps(source)) for source in sources) < 1000
    worker = subprocess.run(
        [sys.executable, "-c", IN_A_WORKER], input=pickle.dumps(sources), stdout=subprocess.PIPE, check=True, cwd="/"
    )
    texts, described, heavy = pickle.loads(worker.stdout)
    assert texts == TEXTS
    assert described == [source.description() for source in sources]
    assert not heavy


def test_a_dataset_in_the_cache_needs_no_network(folder, tmp_path):
    write_parquet(folder)
    expected = [source.description() for source in load()]
    # What was downloaded from the hub lies in the cache under the name of its owner; what came from a folder does not.
    (tmp_path / "cache" / "tiny_tales").rename(tmp_path / "cache" / "owner___tiny_tales")
    shutil.rmtree(folder)
    sources = load()
    assert "owner___tiny_tales" in sources[0].pieces[0].path
    assert [source.description() for source in sources] == expected


# ---- Descriptions ----------------------------------------------------------------------------------------------------


def sha256(*columns):
    """Of rows: the values of each, by length and UTF-8."""
    digest = hashlib.sha256()
    for row in zip(*columns, strict=True):
        for value in row:
            data = b"" if value is None else str(value).encode()
            digest.update((2**64 - 1 if value is None else len(data)).to_bytes(8, "little") + data)
    return digest.hexdigest()


def test_descriptions_are_those_of_the_rows(folder, monkeypatch):
    texts = ["ab", "", None, "𝒙é\n"]
    write_parquet(folder, [texts], number=[1, -2, None, 2**40])
    [plain], [named], [numbered] = load(), load(id_key="id"), load(id_key="number")
    location = "owner/TinyTales, train 0 to 4"
    assert plain.description() == {"location": location, "size": 9, "sha256": sha256(texts)}
    assert named.description()["sha256"] == sha256(texts, [f"train 0 {row}" for row in range(4)])
    assert numbered.description()["sha256"] == sha256(texts, [1, -2, None, 2**40])


def test_descriptions_do_not_depend_on_the_cache(folder, tmp_path, monkeypatch):
    write_parquet(folder)
    here = load(id_key="id")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "elsewhere")
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", "50KB")
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 7)
    there = load(id_key="id")
    with pyarrow.memory_map(there[0].pieces[0].path) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        assert len(stream.read_next_batch()) == 7
    assert {piece.path for source in here for piece in source.pieces}.isdisjoint(
        piece.path for source in there for piece in source.pieces
    )
    assert [source.description() for source in here] == [source.description() for source in there]
    assert [source.name for source in here] == [source.name for source in there]


# ---- What is wrong is named ------------------------------------------------------------------------------------------


def test_bad_rows_are_told_by_number_and_left_out_where_they_may_be(folder):
    data: list[bytes | None] = [text.encode() for text in TEXTS[:700]]
    data[350], data[351], data[699] = b"ab\xff", None, b"half a pair \xed\xa0\xbd"
    write_parquet(folder, [TEXTS[:700]], text=pyarrow.array(data, pyarrow.binary()).view(pyarrow.string()))
    bad = BadDocuments(3)
    assert [document.text for document in documents(load(), bad)] == TEXTS[:350] + TEXTS[352:699]
    assert bad.sentences == [
        "owner/TinyTales, train 300 to 600, row 350: invalid UTF-8, byte 0xff (invalid start byte); "
        "repair the file or leave it out",
        "owner/TinyTales, train 300 to 600, row 351: 'text' is not text but NoneType; name another key with --text-key",
        "owner/TinyTales, train 600 to 700, row 699: invalid UTF-8, byte 0xed (invalid continuation byte); "
        "repair the file or leave it out",
    ]
    with pytest.raises(UserError, match="row 351"):
        documents(load(), BadDocuments(1))
    assert all(source.description() == source.description() for source in load())


def test_an_id_that_is_null_is_told(folder):
    write_parquet(folder, [["a", "b"]], id=["1", None])
    with pytest.raises(
        UserError, match=r"train 0 to 2, row 1: 'id' is neither text nor a number but NoneType; .* with --id-key"
    ):
        documents(load(id_key="id"))


def test_half_a_surrogate_pair_is_told(folder):
    (folder / "train.jsonl").write_text('{"text": "a\\ud83d"}\n')
    with pytest.raises(UserError, match=r"surrogate pair in string is invalid.*; download its files \(hf download own"):
        load()


def test_columns_that_are_missing_or_of_another_kind_are_told_together(folder):
    write_parquet(folder, [["a"]], words=[1.5])
    columns = r"\['id', 'text', 'words'\]"
    for keys, message in {
        (
            "body",
            None,
        ): rf"^the dataset owner/TinyTales: no column 'body' among {columns}; name another with --text-key$",
        ("text", "key"): rf"no column 'key' among {columns}; name another with --id-key$",
        ("body", "key"): r"no column 'body' .* --text-key; no column 'key' .* --id-key$",
        ("words", None): "column 'words' is not text but double; name another with --text-key",
        ("text", "words"): "column 'words' is not text or whole numbers but double; name another with --id-key",
    }.items():
        with pytest.raises(UserError, match=message):
            load(text_key=keys[0], id_key=keys[1])


def test_a_dataset_without_training_rows_is_told(folder):
    write_lines(folder / "test.jsonl", ["a"])
    with pytest.raises(UserError, match=r"has no rows of a split `train`, but \{'test': 1\}; download its files"):
        load()


def test_a_damaged_cache_is_told(folder):
    write_parquet(folder, [TEXTS[:600]])
    first, second = load()
    path = Path(second.pieces[0].path)
    whole = path.read_bytes()
    fix = re.escape(f"; delete {path.parent} and run the same command again")
    with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        batches = list(stream)
        with pyarrow.OSFile(str(path) + ".cut", "wb") as file, pyarrow.ipc.new_stream(file, stream.schema) as cut:
            cut.write_batch(batches[0].slice(0, 500))
    cut_between = Path(f"{path}.cut").read_bytes()[:-8]  # without the mark of the end
    for content, reason in {
        cut_between: r"it ends after 200 rows of 300",
        whole[: len(whole) // 2]: r".+",
        b"": r".+",
        whole[:100]: r".+",
    }.items():
        path.write_bytes(content)
        for use in (lambda: documents([second]), second.description):
            with pytest.raises(UserError, match=rf"^owner/TinyTales, train 300 to 600 cannot be .* \({reason}\){fix}$"):
                use()
    path.unlink()
    with pytest.raises(UserError, match=rf"No such file.*{fix}$"):
        first.description()


def test_a_hub_that_is_out_of_reach_is_told(folder, capsys):
    with pytest.raises(UserError, match="run it once where there is a network, or there download its files") as error:
        load("nobody/nothing")  # HF_HUB_OFFLINE is set in the tests
    assert str(error.value).startswith(
        "no file nobody/nothing here, and no dataset could be loaded from the hub (ConnectionError: Couldn't reach"
    )
    assert "\n" not in str(error.value)
    (folder / "TinyTales.py").write_text("")
    with pytest.raises(
        UserError, match=r"scripts are no longer supported, but found TinyTales\.py.*; download its files"
    ):
        load()


GENERATION = datasets.exceptions.DatasetGenerationError("An error occurred")
GENERATION.__cause__ = ValueError("row 2\nis broken.")
FAILURES = [
    (
        FileNotFoundError("x: LocalEntryNotFoundError: y"),
        r"\(FileNotFoundError: x.*\); run it once where there is a net",
    ),
    (
        datasets.exceptions.DatasetNotFoundError("It's gated."),
        r"\(DatasetNotFoundError: It's gated\); check the name, ",
    ),
    (OSError(28, "No space left"), r"\(OSError: \[Errno 28\] No space left\); download its files \(hf download a/b --"),
    (GENERATION, r"\(ValueError: row 2 is broken\); download its files"),
    (RuntimeError("long " * 1000), r"\(RuntimeError: long .{200,300} \.\.\.\); download"),
]


@pytest.mark.parametrize(("error", "told"), FAILURES)
def test_whatever_the_library_raises_is_told_with_what_to_do(error, told, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=told):
        load("a/b")


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_names_of_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in (
        "roneneldan/TinyStories",
        "Skylion007/openwebtext:plain_text",
        "a-b/c.d_e:20231101.en",
        "a/b:sample-10BT",
    ):
        assert is_hub_name(name), name
    for name in (
        *(
            "stories",
            "gpt2",
            "a/b/c",
            "./a/b",
            "/a/b",
            "~/a",
            "../b",
            "a/",
            "/b",
            "a/b:",
            "a/b:c:d",
            "a/*",
            "a b/c",
            "",
        ),
        *("data/corpus", "corpus/part.jsonl", "corpus/part.jsonl.zst", "corpus/a.parquet", "a\n/b"),
    ):
        assert not is_hub_name(name), name
