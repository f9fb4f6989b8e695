"""The whole way from text to store, against the plain tokenizer; undisturbed, killed, repeated and refused."""

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import llm.data.preparation.encode
import llm.data.preparation.settle
import llm.data.preparation.sources
from llm.cli import main
from llm.common.errors import UserError
from llm.data.preparation.prepare import add_arguments, prepare
from llm.data.preparation.recipe import PrepareSettings
from llm.data.shard import Manifest
from llm.data.store import TokenStore
from llm.data.stories import MARKER, stories
from llm.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe

from ..conftest import TEXT
from ..stores import SPLITS, children, documents_of, plain_ids, tree, write_lines

LOOK_ALIKES = [MARKER, f"a{MARKER}b", "<|endoftext", " ", "\n\n", "\u3000", "a" * 20_000, "𝒙é"]


# ---- What a store holds ----------------------------------------------------------------------------------------------


def test_every_document_is_in_the_store_once_on_its_side(corpus, bpe_folder, tmp_path):
    out = tmp_path / "out"
    summary = prepare([str(corpus)], out, tokenizer=bpe_folder, validation_fraction=0.2, workers=1)
    expected = {split: [] for split in SPLITS}
    for number in range(6):
        for line in (corpus / f"{number}.jsonl").read_text().splitlines():
            if text := json.loads(line)["text"]:
                held_out = int(sha256(text.encode()).hexdigest()[:16], 16) < 0.2 * 2**64
                expected["validation" if held_out else "train"].append([*plain_ids(bpe_folder, text), 0])
    assert 10 < len(expected["validation"]) < 60
    for split in SPLITS:
        assert documents_of(out, split) == expected[split]
        assert summary.tokens[split] == sum(map(len, expected[split]))
        assert TokenStore.open(out, split).verify() == []
    assert (summary.documents, summary.left_out) == (174, {"bad": 0, "empty": 6})
    assert summary.vocab_size == len(load_tokenizer(bpe_folder))
    store = TokenStore.open(out)
    assert store.end_of_document == 0
    assert store.tokenizer_fingerprint == tokenizer_fingerprint(load_tokenizer(bpe_folder))
    assert tokenizer_fingerprint(store.tokenizer()) == store.tokenizer_fingerprint


def test_a_manifest_tells_where_a_shard_came_from(corpus, bpe_folder, tmp_path):
    prepare([str(corpus)], tmp_path / "out", tokenizer=bpe_folder, validation_fraction=0.2, workers=1)
    manifests = [Manifest.read(tmp_path / "out" / split, "00003-3") for split in SPLITS]
    source, texts = corpus / "3.jsonl", [f"{TEXT} 3 {i}" for i in range(29)]
    for manifest in manifests:
        path = tmp_path / "out" / manifest.split / "00003-3.tokens"
        assert manifest.source == {
            "location": str(source),
            "size": source.stat().st_size,
            "sha256": sha256(source.read_bytes()).hexdigest(),
        }
        assert manifest.sha256["tokens"] == sha256(path.read_bytes()).hexdigest()
        assert manifest.bytes_out == path.stat().st_size == 2 * manifest.tokens
        assert manifest.versions.keys() == {"hippoformer", "tokenizers"}
    assert sum(manifest.documents for manifest in manifests) == 29
    assert [manifest.left_out for manifest in manifests if manifest.left_out] == [{"empty": 1}]
    assert sum(manifest.documents_in for manifest in manifests) == 30
    assert sum(manifest.bytes_in for manifest in manifests) == sum(len(text.encode()) for text in texts)


any_text = st.one_of(st.text(), st.text(alphabet=" \t\r\n"), st.lists(st.sampled_from(LOOK_ALIKES)).map("".join))


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(any_text, max_size=5))
def test_a_store_decodes_to_its_documents(texts, bpe, bpe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round")
    write_lines(folder / "a.jsonl", ["never empty", *texts])
    prepare([str(folder / "a.jsonl")], folder / "out", tokenizer=bpe_folder, validation_fraction=0, workers=1)
    documents = documents_of(folder / "out", "train")
    assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in documents)
    decoded = [bpe.decode(ids[:-1], clean_up_tokenization_spaces=False) for ids in documents]
    assert decoded == ["never empty", *(text for text in texts if text)]


def test_forms_do_not_matter(bpe_folder, tmp_path):
    texts = [TEXT, "two", f"{TEXT}\n\n{TEXT}"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.jsonl.zstd").write_bytes(zstd.compress(lines))
    (tmp_path / "c.txt").write_text(f"\n{MARKER}\n".join(texts) + "\n")
    settings = {"tokenizer": bpe_folder, "validation_fraction": 0, "workers": 1}
    stores = []
    for name in ("a.jsonl.gz", "b.jsonl.zstd", "c.txt"):
        prepare([str(tmp_path / name)], tmp_path / name[0], **settings)
        stores.append(TokenStore.open(tmp_path / name[0]))
    assert len({store.fingerprint for store in stores}) == 1


def test_real_books_with_the_real_tokenizer(real_data, tmp_path):
    gpt2 = real_data / "gpt2-tokenizer" / "tokenizer.json"
    prepare([str(real_data / "nemotron-cc-layout")], tmp_path / "out", tokenizer=gpt2, workers=2)
    texts = []
    for path in sorted((real_data / "nemotron-cc-layout").rglob("*.zstd")):
        texts += [json.loads(line)["text"] for line in zstd.decompress(path.read_bytes()).splitlines()]
    held_out = [int(sha256(text.encode()).hexdigest()[:16], 16) < 0.005 * 2**64 for text in texts]
    tokenizer = Tokenizer.from_file(str(gpt2))
    for split in SPLITS:
        mine = [text for text, held in zip(texts, held_out, strict=True) if held == (split == "validation")]
        plain = [[*encoding.ids, 50256] for encoding in tokenizer.encode_batch(mine)]
        assert np.array_equal(
            TokenStore.open(tmp_path / "out", split).read(0, sum(map(len, plain))), [i for ids in plain for i in ids]
        )
        assert TokenStore.open(tmp_path / "out", split).documents == len(mine)
    assert len(texts) == 1334


def test_the_corpus_with_a_tokenizer_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(llm.data.preparation.sources, "STORIES_A_SOURCE", 150)
    summary = prepare(["stories:3"], tmp_path / "out", train_tokenizer=600, documents=400, workers=1)
    for split, count in (("train", 400), ("validation", 20)):
        ids = [[*plain_ids(tmp_path / "out" / "tokenizer", text), 0] for text in stories(3, split, 0, count)]
        assert documents_of(tmp_path / "out", split) == ids
    assert TokenStore.open(tmp_path / "out").vocab_size == summary.vocab_size <= 600
    assert sorted(path.name for path in (tmp_path / "out" / "validation").iterdir()) == [
        f"00003-stories-validation.{kind}" for kind in ("ends", "json", "tokens")
    ]


def test_a_tokenizer_is_trained_on_training_documents_of_all_files_in_turn(tmp_path, monkeypatch):
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(5)])
    sources = llm.data.preparation.sources.open_sources([str(tmp_path)])
    assert list(llm.data.preparation.settle._sample(sources, PrepareSettings(validation_fraction=0)))[:5] == [
        "a0",
        "b0",
        "c0",
        "a1",
        "b1",
    ]
    sample = list(llm.data.preparation.settle._sample(sources, PrepareSettings(validation_fraction=0.5)))
    assert 0 < len(sample) < 15
    assert all(
        llm.data.preparation.encode.split_of(sources[0], sha256(text.encode()).digest(), 0.5) == "train"
        for text in sample
    )
    monkeypatch.setattr(llm.data.preparation.settle, "SAMPLE_BYTES", 7)
    assert list(llm.data.preparation.settle._sample(sources, PrepareSettings(validation_fraction=0))) == [
        "a0",
        "b0",
        "c0",
    ]


# ---- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_file_is_told_and_the_others_are_finished(workers, corpus, bpe_folder, tmp_path, capsys):
    whole = (corpus / "2.jsonl").read_bytes()
    (corpus / "2.jsonl").write_bytes(whole[:-9])
    (corpus / "4.txt").write_text("")
    arguments = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", str(bpe_folder)]
    arguments += ["--workers", str(workers)]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert f"error: {corpus}/2.jsonl, line 30: broken JSON (" in told
    assert f"{corpus}/4.txt is empty: it holds no document" in told
    assert "2 of 7 sources could not be prepared, the others are done; fix them and run the same command" in told
    assert "Traceback" not in told
    shards = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    assert shards[2::3] == ["00000-0.tokens", "00001-1.tokens", "00003-3.tokens", "00004-4.tokens", "00006-5.tokens"]
    assert not any(name.endswith(".partial") for name in shards)
    assert not (tmp_path / "out" / "store.json").exists()
    (corpus / "2.jsonl").write_bytes(whole)
    (corpus / "4.txt").write_text("mended")
    assert main(arguments) == 0
    assert TokenStore.open(tmp_path / "out").verify() == []


def test_other_settings_tokenizers_sources_or_texts_are_refused(corpus, bpe_folder, tmp_path):
    settings = {"tokenizer": bpe_folder, "validation_fraction": 0.2, "workers": 1}
    out = tmp_path / "out"
    prepare([str(corpus)], out, **settings)
    whole = tree(out)
    other = tmp_path / "other"
    train_bpe([TEXT], 300).save_pretrained(other)
    for sources, changed, message in (
        (corpus, {"tokenizer": other}, "was begun with another tokenizer; name another --out"),
        (corpus, {"tokenizer": None, "train_tokenizer": 300}, "was begun with another tokenizer"),
        (corpus, {"text_key": "body"}, "was begun with text key: 'text', not 'body'; name another --out"),
        (corpus, {"validation_fraction": 0.1}, r"was begun with validation fraction: 0\.2, not 0\.1"),
        (corpus / "[0-4]*", {}, r"was begun with other sources \(1 differ, as .*5\.jsonl\); name another --out"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([str(sources)], out, **{**settings, **changed})
    with (corpus / "3.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(
        UserError, match=r"3\.jsonl has changed since its shard was made; restore it or prepare another"
    ):
        prepare([str(corpus)], out, **settings)
    assert tree(out) == whole


def test_a_source_that_changes_while_it_is_read_is_refused(bpe_folder, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write_lines(path, ["one", "two"])
    encode = llm.data.preparation.encode._encode

    def encode_and_append(*rest):
        encode(*rest)
        with path.open("a") as file:
            file.write('{"text": "three"}\n')

    monkeypatch.setattr(llm.data.preparation.encode, "_encode", encode_and_append)
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read; run the same command again"):
        prepare([str(path)], tmp_path / "out", tokenizer=bpe_folder, workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"sources": '])
def test_a_damaged_plan_is_told(content, corpus, bpe_folder, tmp_path):
    prepare([str(corpus)], tmp_path / "out", tokenizer=bpe_folder, workers=1)
    (tmp_path / "out" / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json .*; delete its folder and prepare again"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=bpe_folder, workers=1)


def test_a_folder_of_the_users_own_stays(bpe_folder, tmp_path):
    """Empty before, it is empty after a run that could make nothing; the reason is told, not the cleaning up."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for out in ("mine", "link"):
        with pytest.raises(UserError, match=r"empty\.txt is empty: it holds no document"):
            prepare([str(tmp_path / "empty.txt")], tmp_path / out, tokenizer=bpe_folder, workers=1)
        assert list((tmp_path / "mine").iterdir()) == []


def test_many_failures_are_not_all_told(bpe_folder, tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text("")
    with pytest.raises(UserError) as error:
        prepare([str(tmp_path / "*.txt")], tmp_path / "out", tokenizer=bpe_folder, workers=1)
    told = str(error.value).splitlines()
    assert len(told) == 22
    assert "19.txt is empty" in told[19]
    assert told[20:] == [
        "  ... and 10 more",
        "30 of 30 sources could not be prepared; fix them and run the same command again, or leave them out with "
        "another --out",
    ]


def test_bad_input_leaves_nothing_behind(corpus, bpe_folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    good = {"sources": [str(corpus)], "out": out, "tokenizer": bpe_folder, "workers": 1}
    for changed, message in (
        ({"sources": [str(tmp_path / "empty.txt")]}, r"empty\.txt is empty: it holds no document"),
        ({"sources": ["missing.txt"]}, "no file matches missing.txt"),
        (
            {"text_key": "body"},
            r"0\.jsonl, line 1: no key 'body' among \['text'\]; (.*\n)*6 of 6 sources could not be prepared; fix them",
        ),
        ({"tokenizer": tmp_path / "none"}, "there is no tokenizer at"),
        ({"tokenizer": None}, "give either --tokenizer or --train-tokenizer"),
        ({"train_tokenizer": 300, "workers": 0}, "give either .*; --workers 0 must be at least 1"),
        ({"tokenizer": None, "train_tokenizer": 99}, "a byte-level vocabulary of 99 is too small"),
        ({"validation_fraction": 1}, "--validation-fraction 1 must be at least 0 and below 1"),
        (
            {"out": tmp_path / "taken"},
            r"taken is not empty and no token store of this command; name a new or empty folder",
        ),
        ({"out": tmp_path / "empty.txt"}, r"empty\.txt is a file; name a new or empty folder with --out"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(**{**good, **changed})
        assert not out.exists()
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_a_corpus_that_is_all_held_out_is_refused(bpe_folder, tmp_path):
    write_lines(tmp_path / "a.jsonl", [text for text in map(str, range(9)) if sha256(text.encode()).digest()[0] < 128])
    with pytest.raises(UserError, match=r"no document is left to train on; give .*, and another --out"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=bpe_folder, validation_fraction=0.5, workers=1)


def test_an_id_that_a_store_could_not_hold_is_refused(bpe_folder, tmp_path, monkeypatch):
    """Neither can come from a tokenizer that was loaded here; the store is kept from them all the same."""
    write_lines(tmp_path / "a.jsonl", ["text"])
    monkeypatch.setattr(llm.data.preparation.settle, "_check_on_documents", lambda *_: None)
    for ids, message in (
        ([400], "gave the token id 400, beyond the tokenizer's"),
        ([5, 0], "text inside a document the id 0"),
    ):
        monkeypatch.setattr(
            llm.data.preparation.encode.CountingEncoder,
            "encode",
            lambda _, texts, lost, ids=ids: [list(ids) for _ in texts],
        )
        with pytest.raises(UserError, match=message):
            prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=bpe_folder, workers=1)


def test_a_tokenizer_that_transformers_follows_otherwise_is_refused(bpe_folder, tmp_path, monkeypatch):
    """A sample of the documents is encoded both ways, as the workers do and as every use of the model does."""
    write_lines(tmp_path / "a.jsonl", ["fine", f"a {MARKER} b", TEXT])
    encode = llm.data.preparation.encode.CountingEncoder.encode

    def other_in_the_last(self, texts, lost):
        *same, last = encode(self, texts, lost)
        return [*same, last[::-1]]

    monkeypatch.setattr(llm.data.preparation.encode.CountingEncoder, "encode", other_in_the_last)
    with pytest.raises(UserError, match=r"transformers encodes the document 'The hippocampus .* otherwise than"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=bpe_folder, workers=1)
    assert not (tmp_path / "out").exists()


def test_a_killed_worker_is_told(corpus, bpe_folder, tmp_path):
    """As by a full memory: the workers of a run are killed while it waits for them."""
    for number in range(6):
        write_lines(corpus / f"{number}.jsonl", [TEXT * 40] * 400)
    run = subprocess.Popen(
        [sys.executable, "-m", "llm", "prepare", corpus, "--out", tmp_path / "out", "--tokenizer", bpe_folder],
        stderr=subprocess.PIPE,
        text=True,
    )
    while run.poll() is None and not list((tmp_path / "out").glob("train/*.partial")):
        time.sleep(0.01)
    victims = [p for p in children(run.pid) if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
    if not victims:
        run.kill()
        pytest.skip("finds the workers in /proc, which is not here")
    os.kill(victims[0], signal.SIGKILL)
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 2
    assert "error: a worker was killed, perhaps for want of memory; run the same command again with fewer" in told


def test_help_ends_with_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        main(["prepare", "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("  python -m llm prepare ")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for arguments in (
        [],
        ["a.txt", "--out", "x"],
        ["a.txt", "--out", "x", "--tokenizer", "t", "--train-tokenizer", "9"],
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert end.value.code == 2


def test_the_command_prints_one_line(corpus, bpe_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare", str(corpus), "--out", str(out), "--tokenizer", str(bpe_folder), "--workers", "1"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    store = TokenStore.open(out)
    assert line.startswith(f"{out}: 174 documents (left out: 6 empty), {store.tokens:,} training and ")
    shutil.rmtree(out)
