"""What inspect says against numpy on the raw documents."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import llm.data.inspect
import llm.data.store_figures
from llm.cli import main
from llm.data.store import TokenStore
from llm.data.store_figures import Figures, Lengths, histogram, length_edges

from .by_hand import some_shards, write_store
from .conftest import TEXT
from .stores import SPLITS, plain_ids

FILES = 7


def inspect(capsys, *words):
    """The lines that inspect prints."""
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def prepared(bpe_folder, tmp_path_factory):
    """A store of seven files: two empty documents, two broken lines and three repeats in each."""
    folder = tmp_path_factory.mktemp("inspect")
    texts = {}
    for number in range(FILES):
        texts[number] = [f"{number} {i} " + TEXT * (1 + (number + i) ** 3 % 17) for i in range(40)]
        lines = [json.dumps({"text": text}) for text in [*texts[number], "", "", *texts[number][:3]]]
        (folder / f"{number}.jsonl").write_text("\n".join([*lines[:5], "{broken", *lines[5:], "[1]"]) + "\n")
    words = [
        "--tokenizer",
        str(bpe_folder),
        "--validation-fraction",
        "0.2",
        "--deduplicate",
        "--max-bad-documents",
        "5",
    ]
    assert main(["prepare", str(folder), "--out", str(folder / "store"), *words, "--workers", "1"]) == 0
    return folder / "store", [text for number in range(FILES) for text in texts[number]]


def test_the_figures_are_those_of_the_raw_documents(prepared, capsys):
    path, texts = prepared
    lengths = np.array([len(plain_ids(path / "tokenizer", text)) + 1 for text in texts])
    lines = inspect(capsys, path, "--windows", 0, "--context", 64)
    shown = "\n".join(lines)
    counted = {split: TokenStore.open(path, split).documents for split in SPLITS}
    assert sum(counted.values()) == len(texts)
    assert min(counted.values()) > 0
    # Which documents are held out is prepare's to say and is tested there; here, which lengths they have.
    for split in SPLITS:
        store = TokenStore.open(path, split)
        documents = [tuple(store.document_tokens(index).tolist()) for index in range(store.documents)]
        of_ids = {(*plain_ids(path / "tokenizer", text), store.end_of_document): text for text in texts}
        mine = np.array([len(ids) for ids in documents])
        size = sum(len(of_ids[ids].encode()) for ids in documents)
        block = shown[shown.index(f"{split}: {len(mine):,} documents, {mine.sum():,} tokens") :]
        quantile = {q: np.quantile(mine, q, method="inverted_cdf") for q in (0.5, 0.95)}
        assert f"  {size / (mine.sum() - len(mine)):.2f} bytes of text a token" in block
        assert (
            f"  tokens a document: mean {mine.mean():,.1f}, median {quantile[0.5]:,}, 95th percentile "
            f"{quantile[0.95]:,}, longest {mine.max():,}\n"
        ) in block
        windows = (mine.sum() - 1) // 64
        assert f"  context 64: {windows:,} windows an epoch, {mine.sum() - 64 * windows - 1:,} tokens at the" in block
    left_out = [dict(zip(("empty", "duplicate"), counts, strict=True)) for counts in left_out_counts(lines)]
    assert sum(counts["empty"] for counts in left_out) == 2 * FILES
    assert sum(counts["duplicate"] for counts in left_out) == 3 * FILES
    assert lengths.sum() == sum(TokenStore.open(path, split).tokens for split in SPLITS)


def left_out_counts(lines):
    """(empty, duplicate) of each split."""
    for line in lines:
        if line.startswith("  left out of"):
            yield [
                int(found[1]) if (found := re.search(rf"(\d+) {reason}", line)) else 0
                for reason in ("empty", "duplicate")
            ]


def test_sources_and_bad_documents_are_listed(prepared, capsys):
    path, texts = prepared
    few, all_of_them = inspect(capsys, path, "--windows", 0), inspect(capsys, path, "--windows", 0, "--sources")
    assert "7 sources, the first 5 (--sources lists all), tokens in train and validation:" in few
    assert "7 sources, tokens in train and validation:" in all_of_them
    for number in range(FILES):
        tokens = sum(len(plain_ids(path / "tokenizer", text)) + 1 for text in texts[40 * number : 40 * number + 40])
        lines = [line.split() for line in all_of_them if line.endswith(f"/{number}.jsonl")]
        assert len(lines) == 1
        assert sum(int(count.replace(",", "")) for count in lines[0][:2]) == tokens
    assert "bad documents left out: 14, the first 5 (--sources lists all)" in few
    assert sum("line 6: broken JSON" in line for line in all_of_them) == FILES
    assert sum("line 47: not a JSON object but list" in line for line in all_of_them) == FILES


def test_windows_are_text_of_the_store(prepared, capsys):
    path, _ = prepared
    store = TokenStore.open(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer" / "tokenizer.json"))

    def shown(*words):
        return [line for line in inspect(capsys, path, *words) if line.startswith("train from token")]

    first = shown("--tokens", 20)
    assert len(first) == 3
    for line in first:
        start = int(re.match(r"train from token ([\d,]+): ", line)[1].replace(",", ""))
        assert line.partition(": ")[2] == repr(tokenizer.decode(store.read(start, 20), skip_special_tokens=False))
    assert shown("--tokens", 20) == first != shown("--tokens", 20, "--seed", 1)
    assert len(shown("--windows", 5)) == 5
    assert not shown("--windows", 0)
    end = store.tokens - 3
    assert shown("--at", end) == [f"train from token {end:,}: {tokenizer.decode(store.read(end, 3), False)!r}"]
    assert main(["inspect", str(path), "--at", str(store.tokens + 1)]) == 2
    assert "has no positions" in capsys.readouterr().err


def test_the_plot_is_a_png(prepared, tmp_path, capsys):
    file = tmp_path / "new" / "lengths.png"
    inspect(capsys, prepared[0], "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    (tmp_path / "taken.png").mkdir()
    for words, told in (
        (["--plot", tmp_path / "a.pdf"], "is drawn as a PNG; name it"),
        (["--plot", tmp_path / "taken.png"], "cannot be written (Is a directory); free space, or give"),
        (["--context", 0, "--tokens", 0], "--tokens 0 must be at least 1; --context 0 must be at least 1"),
    ):
        assert main(["inspect", str(prepared[0]), *map(str, words)]) == 2
        assert told in capsys.readouterr().err


# ---- Lengths ---------------------------------------------------------------------------------------------------------


@given(
    batches=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=9), min_size=1, max_size=5),
    percent=st.integers(1, 100),
)
def test_lengths_are_counted_exactly_however_long(batches, percent, long_from_20):
    counted, every = Lengths(), np.concatenate(batches)
    for lengths in batches:
        counted.add(np.array(lengths, dtype=np.int64))
    values, counts = counted.distinct()
    expected = np.unique(every, return_counts=True)
    assert values.tolist() == expected[0].tolist()
    assert counts.tolist() == expected[1].tolist()

    class Store:
        split, documents, tokens, begin_of_document = "train", len(every), int(every.sum()), None

    figures = Figures(Store, values, counts)
    reached = [length for length in sorted(every) if 100 * (every <= length).sum() >= percent * len(every)]
    assert figures.percentile(percent) == reached[0]
    for bins in (1, 2, 4):
        edges = length_edges(figures, bins)
        assert edges[0] <= every.min()
        assert edges[-1] > every.max()
        documents, tokens = figures.shares(edges)
        for low, high, of_documents, of_tokens in zip(edges, edges[1:], documents, tokens, strict=False):
            inside = every[(every >= low) & (every < high)]
            assert of_documents == pytest.approx(len(inside) / len(every))
            assert of_tokens == pytest.approx(inside.sum() / every.sum())
    assert len(list(histogram(figures))) == 1 + len(length_edges(figures, 4)) - 1


@pytest.fixture(scope="module")
def long_from_20():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.data.store_figures, "SHORT", 20)
        yield


# ---- Verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_names_all_that_is_wrong(workers, bpe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llm.data.inspect, "available_cores", lambda: workers)
    monkeypatch.setattr(llm.data.inspect, "BYTES_A_WORKER", 1)
    path = write_store(tmp_path / "store", some_shards(9), tokenizer=bpe, validation=some_shards(2, seed=1))
    assert "verified: every shard is what its manifest says" in inspect(capsys, path, "--verify")
    (path / "train" / "00002-part.tokens").write_bytes(b"")
    (path / "train" / "00005-part.json").unlink()
    (path / "train" / "00007-part.ends").write_bytes(b"12345678")
    (path / "validation" / "00001-part.tokens").unlink()
    assert main(["inspect", str(path), "--verify"]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    for name in ("train/00002-part", "train/00005-part", "train/00007-part", "validation/00001-part"):
        assert name in printed.err
    assert "00003-part" not in printed.err
    assert "run the same prepare command again" in printed.err
    assert main(["inspect", str(path)]) == 2
    assert "00007-part.ends has 8 bytes, not the" in capsys.readouterr().err


def test_a_manifest_that_is_missing_is_told_without_verify(bpe, tmp_path, capsys):
    path = write_store(tmp_path / "store", some_shards(3), tokenizer=bpe)
    (path / "train" / "00001-part.json").unlink()
    assert main(["inspect", str(path)]) == 2
    assert "00001-part.json is missing or no manifest; run the same prepare command" in capsys.readouterr().err


def test_a_store_that_is_not_finished_says_how_far_it_is(bpe, tmp_path, capsys):
    path = write_store(tmp_path / "store", some_shards(3), tokenizer=bpe)
    (path / "store.json").unlink()
    (path / "plan.json").write_text(json.dumps({"sources": [f"{n}.jsonl" for n in range(24)]}))
    assert main(["inspect", str(path), "--verify"]) == 2
    assert "no store.json (3 of its 24 sources are done); run the same prepare command" in capsys.readouterr().err
