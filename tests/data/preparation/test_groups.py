"""Documents keep the group that they are parts of, and a group is on one side of the split."""

import json
from collections import defaultdict
from hashlib import sha256

import numpy as np
import pytest

from llm.cli import main
from llm.common.errors import UserError
from llm.data.preparation.documents import Grouping
from llm.data.preparation.prepare import prepare
from llm.data.store import TokenStore

from ..stores import SPLITS, documents_of
from .test_choice import write_records

BOOKS = [f"urn:book:{name}" for name in "abcdefghijklmnopqrstuvwx"]
RECORDS = [
    {"id": f"{book}:{chunk:04d}", "book": book, "text": f"Part {chunk} of {book[-1]}, {'and so ' * (chunk % 3)}on."}
    for book in BOOKS
    for chunk in range(8)
]


def number(group):
    return int.from_bytes(sha256(group.encode()).digest()[:8], "big")


def groups_by_text(store, tokenizer):
    """Each text with its split and group, as a reader of the store sees them."""
    found = {}
    for split in SPLITS:
        opened = TokenStore.open(store, split)
        groups = opened.document_groups(range(opened.documents)).tolist()
        for ids, group in zip(documents_of(store, split), groups, strict=True):
            found[tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)] = (split, group)
    return found


@pytest.mark.parametrize(
    ("choice", "form"),
    [
        ({"group_by": "book"}, "jsonl"),
        ({"group_by": "id", "group_separator": ":"}, "jsonl"),
        ({"group_by": "id", "group_separator": ":", "id_key": "id"}, "parquet"),
    ],
)
def test_a_group_is_on_one_side_and_kept_with_each_document(choice, form, bpe, bpe_folder, tmp_path):
    halves = RECORDS[::2], RECORDS[1::2]  # the chunks of each book are in two files
    for name, some in zip("ab", halves, strict=True):
        if form == "jsonl":
            write_records(tmp_path / f"in/{name}.jsonl", some)
        else:
            import pyarrow
            from pyarrow import parquet

            (tmp_path / "in").mkdir(exist_ok=True)
            parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / f"in/{name}.parquet")
    made = prepare(
        [str(tmp_path / "in")], tmp_path / "store", tokenizer=bpe_folder, workers=1, validation_fraction=0.4, **choice
    )
    held_out = {book for book in BOOKS if number(book) < 0.4 * 2**64}
    assert 2 < len(held_out) < len(BOOKS) - 2
    found = groups_by_text(tmp_path / "store", bpe)
    assert found == {
        record["text"]: ("validation" if record["book"] in held_out else "train", number(record["book"]))
        for record in RECORDS
    }
    store = TokenStore.open(tmp_path / "store", "validation")
    assert store.validation_groups == made.validation_groups == len(held_out)
    assert store.groups == ("book" if choice["group_by"] == "book" else "id up to the last ':'")
    assert f"{len(held_out)} validation groups" in str(made) and "only" in str(made)  # fewer than thirty
    store.check_sizes()
    assert store.verify() == []


def test_duplicates_go_with_their_groups(bpe, bpe_folder, tmp_path):
    """Of equal texts in a split the first stays, and so does its group."""
    records = [{"book": book, "text": f"{text} again and again"} for book in BOOKS for text in ("one", book)]
    write_records(tmp_path / "in.jsonl", records)
    prepare(
        [str(tmp_path / "in.jsonl")], tmp_path / "store", tokenizer=bpe_folder, workers=1, group_by="book",
        deduplicate=True, validation_fraction=0.4,
    )  # fmt: skip
    expected = defaultdict(list)
    for record in records:
        split = "validation" if number(record["book"]) < 0.4 * 2**64 else "train"
        if record["text"] not in [text for text, _ in expected[split]]:
            expected[split].append((record["text"], number(record["book"])))
    for split in SPLITS:
        store = TokenStore.open(tmp_path / "store", split)
        texts = [bpe.decode(ids[:-1], clean_up_tokenization_spaces=False) for ids in documents_of(store.path, split)]
        assert list(zip(texts, store.document_groups(range(store.documents)).tolist(), strict=True)) == expected[split]
        assert store.verify() == []


def test_groups_are_read_by_number_across_shards(bpe_folder, tmp_path):
    for name, books in (("a", BOOKS[:9]), ("b", BOOKS[9:])):
        write_records(tmp_path / f"in/{name}.jsonl", [{"book": book, "text": f"all of {book}"} for book in books])
    prepare(
        [str(tmp_path / "in")], tmp_path / "store", tokenizer=bpe_folder, workers=1, group_by="book",
        validation_fraction=0,
    )  # fmt: skip
    store = TokenStore.open(tmp_path / "store", "train")
    drawn = np.random.default_rng(0).permutation(len(BOOKS))
    assert store.document_groups(drawn).tolist() == [number(BOOKS[place]) for place in drawn]
    damaged = tmp_path / "store/train/00001-b.groups"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"b\.groups has 112 bytes, not the 120"):
        TokenStore.open(tmp_path / "store", "train").check_sizes()
    assert any("not those that its manifest describes" in problem for problem in store.verify())


def test_a_store_without_groups_is_as_before(bpe_folder, tmp_path):
    write_records(tmp_path / "in.jsonl", RECORDS)
    prepare([str(tmp_path / "in.jsonl")], tmp_path / "store", tokenizer=bpe_folder, workers=1)
    index = json.loads((tmp_path / "store/store.json").read_text())
    older = {key: value for key, value in index.items() if key not in ("groups", "validation_groups")}
    (tmp_path / "store/store.json").write_text(json.dumps(older))
    store = TokenStore.open(tmp_path / "store", "train")
    assert store.groups is None and not list((tmp_path / "store").rglob("*.groups"))
    assert "groups" not in json.loads((tmp_path / "store/plan.json").read_text())
    with pytest.raises(UserError, match="has no groups; prepare it with --group-by"):
        store.document_groups([0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--group-by", "author"], "no key 'author' among ['book', 'id', 'text']; name one with --group-by"),
        (["--group-by", "book", "--group-separator", "#"], "without '#'; pass another --group-separator"),
        (["--group-separator", ":"], "that --group-by names: pass both"),
    ],
)
def test_what_names_no_group_is_an_error(arguments, words, bpe_folder, tmp_path, capsys):
    write_records(tmp_path / "in.jsonl", RECORDS[:3])
    command = ["prepare", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "s"), "--tokenizer", str(bpe_folder)]
    assert main([*command, "--workers", "1", *arguments]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_text_files_have_no_groups(bpe_folder, tmp_path):
    (tmp_path / "in.txt").write_text("one<|endoftext|>two")
    with pytest.raises(UserError, match="no keys to group by; leave --group-by out"):
        prepare([str(tmp_path / "in.txt")], tmp_path / "store", tokenizer=bpe_folder, workers=1, group_by="book")


@pytest.mark.parametrize(
    ("value", "separator", "group"),
    [("a:b:1", ":", "a:b"), ("a:b:1", None, "a:b:1"), (7, None, "7"), ("a--1", "--", "a")],
)
def test_the_part_before_the_last_separator(value, separator, group):
    assert Grouping("id", separator).of({"id": value}, "here") == group
