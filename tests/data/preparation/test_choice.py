"""Which documents get into a store, and what becomes of the others: subsets, duplicates, bad ones, path parts."""

import gzip
import json
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import llm.data.preparation.deduplicate
import llm.data.preparation.subset
from llm.cli import main
from llm.common.errors import UserError
from llm.data.preparation.prepare import prepare
from llm.data.preparation.sources import open_sources
from llm.data.preparation.subset import Subset, place, survey
from llm.data.shard import Manifest
from llm.data.store import TokenStore
from llm.data.tokenizer import train_bpe

from ..conftest import TEXT
from ..stores import SPLITS, documents_of, plain_ids, tree, write_lines


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def texts_of(store, tokenizer):
    """The texts in a store, of both splits."""
    ids = [document for split in SPLITS for document in documents_of(store, split)]
    return [tokenizer.decode(document[:-1], clean_up_tokenization_spaces=False) for document in ids]


# ---- Subsets ---------------------------------------------------------------------------------------------------------


def test_places_are_uniform_and_independent_of_the_seed():
    places = np.array([[place(seed, str(i)) for i in range(4000)] for seed in (0, 1)], dtype=float) / 2**64
    assert all(stats.kstest(row, "uniform").pvalue > 0.001 for row in places)
    assert abs(np.corrcoef(places)[0, 1]) < 0.05
    assert place(7, "a") == int(sha256(b"subset 7 a").hexdigest()[:16], 16)


def test_a_subset_is_a_function_of_seed_and_id(bpe, bpe_folder, tmp_path):
    """Whatever file a document is in, whatever its text; a larger subset of the seed holds the smaller."""
    records = [{"warc": f"urn:{i}", "text": f"{TEXT} {i}"} for i in range(400)]
    write_records(tmp_path / "in" / "a.jsonl", records)
    write_records(tmp_path / "again" / "b.jsonl", records[200:])
    write_records(tmp_path / "again" / "c.jsonl", records[:200][::-1])
    common = {"tokenizer": bpe_folder, "id_key": "warc", "workers": 1}

    def taken(name, folder="in", **choice):
        prepare([str(tmp_path / folder)], tmp_path / name, **common, **choice)
        return set(texts_of(tmp_path / name, bpe))

    quarter = taken("quarter", subset_fraction=0.25, seed=5)
    assert quarter == {r["text"] for r in records if place(5, r["warc"]) < 0.25 * 2**64}
    assert 60 < len(quarter) < 140
    assert taken("elsewhere", "again", subset_fraction=0.25, seed=5) == quarter
    assert quarter < taken("half", subset_fraction=0.5, seed=5)
    assert taken("other", subset_fraction=0.25, seed=6) != quarter
    assert taken("all", subset_fraction=1.0) == {r["text"] for r in records}
    manifest = Manifest.read(tmp_path / "quarter" / "train", "00000-a")
    assert manifest.documents_in == manifest.documents + manifest.left_out["subset"]
    by_text = {"tokenizer": bpe_folder, "workers": 1, "subset_fraction": 0.25, "seed": 5}
    prepare([str(tmp_path / "in")], tmp_path / "by text", **by_text)
    assert set(texts_of(tmp_path / "by text", bpe)) == {
        r["text"] for r in records if place(5, sha256(r["text"].encode()).hexdigest()) < 0.25 * 2**64
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_number_of_tokens_is_met_to_a_document_where_all_is_surveyed(workers, bpe_folder, tmp_path):
    lengths = []
    for number in range(3):
        texts = [f"{TEXT * (1 + i % 7)} {number} {i}" for i in range(150)]
        lengths += [(len(plain_ids(bpe_folder, text)) + 1, sha256(text.encode()).hexdigest()) for text in texts]
        write_lines(tmp_path / "in" / f"{number}.jsonl", texts)
    for tokens in (1, 20_000, sum(length for length, _ in lengths)):
        out = tmp_path / f"{tokens}"
        store = {"tokenizer": bpe_folder, "workers": workers, "validation_fraction": 0.1, "seed": 3}
        by_place = sorted((place(3, identity), length) for length, identity in lengths)
        below = np.cumsum([length for _, length in by_place])
        expected = int(below[np.searchsorted(below, tokens)])
        try:
            summary = prepare([str(tmp_path / "in")], out, subset_tokens=tokens, **store)
        except UserError as error:
            assert tokens == 1, error  # one document: it may be held out
            continue
        assert sum(summary.tokens.values()) == expected
        settled = json.loads((out / "subset.json").read_text())
        assert settled["threshold"] == by_place[int(np.searchsorted(below, tokens))][0] + 1
    with pytest.raises(UserError, match=r"the sources hold about [\d,]+ tokens, not 10,000,000; give a smaller"):
        prepare([str(tmp_path / "in")], tmp_path / "more", subset_tokens=10_000_000, **store)
    assert not (tmp_path / "more").exists()


def test_a_number_of_tokens_is_estimated_where_not_all_is_surveyed(bpe_folder, tmp_path, monkeypatch):
    """Four of twenty sources read, a fifth of their text tokenized: within 3 % here, 6,000 documents a file."""
    monkeypatch.setattr(llm.data.preparation.subset, "SURVEYED_SOURCES", 4)
    monkeypatch.setattr(llm.data.preparation.subset, "SURVEYED_BYTES", 40_000)
    for number in range(20):
        write_lines(tmp_path / "in" / f"{number:02}.jsonl", [f"{TEXT} {number} {i}" for i in range(600)])
    summary = prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer=bpe_folder, subset_tokens=100_000, workers=1)
    assert sum(summary.tokens.values()) == pytest.approx(100_000, rel=0.06)
    fraction = json.loads((tmp_path / "out" / "subset.json").read_text())["fraction"]
    whole = prepare([str(tmp_path / "in")], tmp_path / "whole", tokenizer=bpe_folder, workers=1)
    assert fraction * sum(whole.tokens.values()) == pytest.approx(100_000, rel=0.06)


def test_the_estimate_is_exact_below_fifty_megabytes_however_unlike_the_files(bpe_folder, tmp_path):
    """The beginnings of files are not like their ends, nor one file like another."""
    lengths = []
    for number, repeats in enumerate((1, 40, 1)):
        texts = [f"{'a' * 400} {number} {i}" for i in range(300)] + [
            TEXT * repeats + f"{number} {i}" for i in range(300)
        ]
        lengths += [(place(0, sha256(t.encode()).hexdigest()), len(plain_ids(bpe_folder, t)) + 1) for t in texts]
        write_lines(tmp_path / "in" / f"{number}.jsonl", texts)
    below = np.cumsum([length for _, length in sorted(lengths)])
    summary = prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer=bpe_folder, subset_tokens=100_000, workers=2)
    assert sum(summary.tokens.values()) == below[np.searchsorted(below, 100_000)]


def test_a_survey_keeps_to_its_budget_and_knows_what_it_tokenized(tmp_path):
    texts = [f"{'x' * (i % 50)} {i}" for i in range(5000)]
    write_lines(tmp_path / "a.jsonl", texts)
    [source] = open_sources([str(tmp_path / "a.jsonl")])
    asked = []

    def lengths(some):
        asked.extend(some)
        return [len(text) // 3 for text in some]

    places, estimates = survey(0, lengths, 0, (source, 5000), lambda *_: None)
    assert sum(map(len, asked)) < 5 * 5000 + 2 * 256 * 60
    assert [int(p) for p in places] == [place(0, sha256(text.encode()).hexdigest()) for text in texts]
    exact = np.array([len(text) // 3 for text in texts])
    assert np.sum(estimates == exact) >= len(asked)
    assert estimates.sum() == pytest.approx(exact.sum(), rel=0.05)


def test_one_broken_source_does_not_keep_the_others_from_a_subset(bpe_folder, tmp_path, capsys):
    for number in range(3):
        write_lines(tmp_path / "in" / f"{number}.jsonl", [f"{TEXT} {number} {i}" for i in range(50)])
    (tmp_path / "in" / "1.jsonl").write_text("{\n")
    words = ["prepare", str(tmp_path / "in"), "--workers", "1", "--validation-fraction", "0"]
    for name, how in (
        ("a", ["--tokenizer", str(bpe_folder), "--subset-tokens", "2000"]),
        ("b", ["--train-tokenizer", "300"]),
    ):
        assert main([*words, *how, "--out", str(tmp_path / name)]) == 2
        assert "1.jsonl, line 1: broken JSON" in capsys.readouterr().err
        done = sorted(path.name for path in (tmp_path / name / "train").glob("*.json"))
        assert done == ["00000-0.json", "00002-2.json"]


def test_a_subset_of_nothing_holds_nothing():
    assert "a" not in Subset(0, 0)
    assert "a" in Subset(0, 2**64)


# ---- Duplicates ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(files=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12), min_size=1, max_size=5))
def test_of_equal_texts_the_first_stays(files, bpe, bpe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal")
    for number, texts in enumerate(files):
        write_lines(folder / "in" / f"{number}.jsonl", ["always", *texts])
    store = {"tokenizer": bpe_folder, "validation_fraction": 0.0, "workers": 1, "deduplicate": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.data.preparation.deduplicate, "PART_DOCUMENTS", 4)
        patch.setattr(llm.data.preparation.deduplicate, "PIECE", 5)
        summary = prepare([str(folder / "in")], folder / "out", **store)
    every = [text for texts in files for text in ["always", *texts]]
    expected = list(dict.fromkeys(every))
    assert texts_of(folder / "out", bpe) == expected
    assert summary.left_out == {"bad": 0, "duplicate": len(every) - len(expected)}
    assert TokenStore.open(folder / "out").verify() == []
    manifests = [Manifest.read(folder / "out" / "train", f"{n:05d}-{n}") for n in range(len(files))]
    assert sum(m.bytes_in for m in manifests) == sum(map(len, expected))
    assert all(m.documents_in == m.documents + m.left_out["duplicate"] for m in manifests)
    prepare([str(folder / "in")], folder / "out", **store)  # nothing to do


def test_a_damaged_shard_is_made_again_without_its_duplicates(bpe_folder, tmp_path):
    for number in range(3):
        write_lines(tmp_path / "in" / f"{number}.jsonl", [f"{TEXT} {i}" for i in range(number, 40, 2)])
    store = {"tokenizer": bpe_folder, "validation_fraction": 0.2, "workers": 1, "deduplicate": True}
    prepare([str(tmp_path / "in")], tmp_path / "out", **store)
    whole = tree(tmp_path / "out")
    assert Manifest.read(tmp_path / "out" / "train", "00002-2").documents == 0  # all of it was in the first
    (tmp_path / "out" / "train" / "00001-1.tokens").write_bytes(b"")
    (tmp_path / "out" / "train" / "00002-2.hashes").unlink()
    prepare([str(tmp_path / "in")], tmp_path / "out", **store)
    assert tree(tmp_path / "out") == whole


# ---- Bad documents ---------------------------------------------------------------------------------------------------


def damaged(good):
    """(name, content, what is told, documents that can be read) of files that are broken each in its own way."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in good).encode()
    broken = lines.splitlines(keepends=True)
    frame = zstd.compress(lines, options={zstd.CompressionParameter.checksum_flag: 1})  # as the zstd command does
    return [
        ("json.jsonl", b"".join([broken[0], b'{"text": \n', *broken[1:]]), "line 2: broken JSON", good),
        ("utf8.jsonl", b"".join([*broken, b'{"text": "\xff"}\n']), f"line {len(good) + 1}: invalid UTF-8", good),
        ("key.jsonl", b"".join([b'{"body": "a"}\n', *broken]), "line 1: no key 'text'", good),
        ("type.jsonl", b"".join([b'{"text": 3}\n', *broken]), "line 1: 'text' is not text but int", good),
        ("list.jsonl", b"".join([*broken, b"[1]\n"]), "not a JSON object but list", good),
        ("cut.jsonl.gz", gzip.compress(lines)[:-20], "is truncated (after ", None),
        ("cut.jsonl.zst", frame[: len(frame) // 2], "is truncated (after ", None),
        ("cut.jsonl.zstd", frame[:-1], "is truncated (after ", None),
        ("flip.jsonl.zst", frame[:40] + bytes([frame[40] ^ 255]) + frame[41:], "is corrupt (after ", None),
        ("empty.jsonl", b"", "is empty: it holds no document", []),
        ("text.txt", b"one<|endoftext|>\xff\xff<|endoftext|>three", "line 1: invalid UTF-8", ["one", "three"]),
    ]


@pytest.mark.parametrize("case", range(11))
def test_what_is_broken_stops_its_file_or_is_counted(case, bpe, bpe_folder, tmp_path, capsys):
    good = [f"{TEXT * 30} {np.random.default_rng(i).integers(10**15)}" for i in range(20)]
    name, content, told, readable = damaged(good)[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    write_lines(tmp_path / "in" / "whole.jsonl", ["whole"])
    words = ["prepare", str(tmp_path / "in"), "--tokenizer", str(bpe_folder), "--workers", "1"]
    words += ["--validation-fraction", "0"]
    assert main([*words, "--out", str(tmp_path / "strict")]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'in' / name}" in message
    assert told in message
    assert [path.stem for path in (tmp_path / "strict" / "train").glob("*.json")] == ["00001-whole"]
    assert not list((tmp_path / "strict").rglob("*.partial"))

    assert main([*words, "--out", str(tmp_path / "skipped"), "--max-bad-documents", "1"]) == 0
    assert "left out: 1 bad" in capsys.readouterr().out
    [manifest] = [
        manifest
        for path in (tmp_path / "skipped" / "train").glob("00000-*.json")
        if (manifest := Manifest.read(path.parent, path.stem))
    ]
    assert len(manifest.bad) == 1
    assert told in manifest.bad[0]
    kept = texts_of(tmp_path / "skipped", bpe)
    assert kept[-1] == "whole"
    assert kept[:-1] == (good[: len(kept) - 1] if readable is None else readable)


def test_more_bad_documents_than_allowed_stop_the_file(bpe_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + "{\n" * 4)
    common = {"tokenizer": bpe_folder, "workers": 1, "validation_fraction": 0}
    with pytest.raises(UserError, match=r"a\.jsonl, line 5: broken JSON"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "three", skip_bad=3, **common)
    summary = prepare([str(tmp_path / "a.jsonl")], tmp_path / "four", skip_bad=4, **common)
    assert (summary.documents, summary.left_out) == (1, {"bad": 4})


# ---- Path parts, ids, begin-of-sequence ids --------------------------------------------------------------------------


def test_path_parts_choose_files(bpe, bpe_folder, tmp_path):
    for quality in ("high", "low", "mid"):
        for kind in ("actual", "synthetic"):
            write_lines(tmp_path / f"quality={quality}" / f"kind={kind}" / "a.jsonl", [f"{quality} {kind}"])

    def taken(*where):
        out = tmp_path / f"out {len(list(tmp_path.iterdir()))}"
        settings = {"tokenizer": bpe_folder, "workers": 1, "validation_fraction": 0, "where": where}
        prepare([str(tmp_path / "quality=*")], out, **settings)
        return Counter(texts_of(out, bpe))

    assert taken("quality=high", "kind=actual") == Counter(["high actual"])
    assert taken("quality=high", "quality=low", "kind=actual") == Counter(["high actual", "low actual"])
    assert sum(taken().values()) == 6
    with pytest.raises(UserError, match=r"none of 6 files has quality=best in its path, as .*; change --path-filter"):
        taken("quality=best")
    with pytest.raises(UserError, match="none of 6 files"):
        taken("quality=hig")  # a whole part, not a piece of one
    with pytest.raises(UserError, match="no source is a file; leave it out"):
        prepare(["stories"], tmp_path / "none", tokenizer=bpe_folder, where=["quality=high"])


def test_ids_must_be_there_and_be_ids(bpe_folder, tmp_path):
    common = {"tokenizer": bpe_folder, "workers": 1}
    for record, told in (
        ({"text": "a"}, "line 1: no key 'id' among .*; name one with --id-key"),
        ({"text": "a", "id": 1.5}, "line 1: 'id' is neither text nor a number but float"),
        ({"text": "a", "id": None}, "line 1: 'id' is neither text nor a number but NoneType"),
    ):
        write_records(tmp_path / "a.jsonl", [record])
        with pytest.raises(UserError, match=told):
            prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", id_key="id", **common)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": "\\ud800"}\n')
    with pytest.raises(UserError, match="line 1: character 0 is half a surrogate pair"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", id_key="id", subset_fraction=0.5, **common)
    with pytest.raises(UserError, match="have no keys; leave --id-key out"):
        prepare(["stories"], tmp_path / "out", id_key="id", **common)


def test_documents_begin_with_an_id_where_asked(tmp_path, bpe_folder):
    tokenizer = train_bpe([TEXT] * 4, 400)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [TEXT, "<s> is text", " ", "<|endoftext|><s>"]
    write_lines(tmp_path / "a.jsonl", texts)
    common = {"workers": 1, "validation_fraction": 0, "bos": True}
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=tmp_path / "tokenizer", **common)
    begin = tokenizer.convert_tokens_to_ids("<s>")
    expected = [[begin, *plain_ids(tmp_path / "tokenizer", text), 0] for text in texts]
    assert documents_of(tmp_path / "out", "train") == expected
    store = TokenStore.open(tmp_path / "out")
    assert (store.begin_of_document, store.end_of_document) == (begin, 0)
    assert store.verify() == []
    with pytest.raises(UserError, match="begins and ends documents with one token; leave --bos out"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "same", tokenizer=bpe_folder, **common)
    without = {"workers": 1, "validation_fraction": 0}
    with pytest.raises(UserError, match=r"was begun with (another tokenizer|begin-of-sequence ids: True, not False)"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=tmp_path / "tokenizer", **without)
