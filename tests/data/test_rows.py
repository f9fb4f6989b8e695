"""Rows and batches: the same global batches for any number of ranks and workers, every token a label once."""

import hashlib
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llm.common.errors import UserError
from llm.data.mixture import MixtureOrder, Pattern
from llm.data.module import TokenDataModule
from llm.data.order import WindowOrder
from llm.data.rows import DIGESTS, IGNORED, Rows, TrainingBatches, ValidationBatches, positions, row_digest
from llm.data.store import TokenStore
from llm.model import loss

from .by_hand import END, write_store
from .random_stores import random_store

SPLITS = [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1), (8, 2)]  # (ranks, workers)
CONTEXT, BATCH, STEPS = 24, 16, 12
KEYS = ("input_ids", "shift_labels")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return random_store(folder / "a", seed=1), random_store(folder / "b", seed=2, documents=90, longest=60)


@pytest.fixture(scope="module")
def store(stores: tuple[Path, Path]) -> TokenStore:
    return TokenStore.open(stores[0], "train")


def test_a_loading_process_needs_neither_lightning_nor_transformers() -> None:
    words = (
        "import sys, llm.data.rows; sys.exit(bool({'lightning', 'transformers', 'pytorch_lightning'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
    assert IGNORED == loss.IGNORED == torch.nn.CrossEntropyLoss().ignore_index


# ---- Training batches ------------------------------------------------------------------------------------------------


def loaders(data: dict[str, Any], ranks: int, workers: int, start: int, stop: int) -> list[Iterator[dict[str, Any]]]:
    """What each rank's DataLoader of a run that stands at step `start` gives."""
    found = []
    for rank in range(ranks):
        module = TokenDataModule(**data, micro_batch_size=2, workers=workers)
        facts = {"world_size": ranks, "global_rank": rank, "global_step": start, "max_steps": stop}
        module.trainer = SimpleNamespace(**facts)  # type: ignore[assignment]
        module.setup("fit")
        found.append(iter(module.train_dataloader()))
    return found


def global_batches(data: dict[str, Any], ranks: int, workers: int, start: int, stop: int) -> list[dict[str, Any]]:
    """The steps' global batches put together from all ranks: tensors (rows, T) in the order of the rows, digest,
    tokens."""
    each = loaders(data, ranks, workers, start, stop)
    whole = []
    for _ in range(start, stop):
        parts = [next(rank) for _ in range(BATCH // (2 * ranks)) for rank in each]
        tensors = [name for name in parts[0] if isinstance(parts[0][name], torch.Tensor)]
        step: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in tensors}
        step["data_digest"] = sum(part["data_digest"] for part in parts) % DIGESTS
        assert {part["num_items_in_batch"] for part in parts} == {int((step["shift_labels"] != IGNORED).sum())}
        whole.append(step)
    assert all(next(rank, None) is None for rank in each)
    return whole


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys()
        and all(torch.equal(x[name], y[name]) if torch.is_tensor(x[name]) else x[name] == y[name] for name in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("what", ["windows", "masked", "documents", "mixture"])
def test_one_global_batch_for_all_ranks_and_workers_and_after_a_stop(stores: tuple[Path, Path], what: str) -> None:
    a, b = map(str, stores)
    data: dict[str, Any] = {
        "store": {a: 0.7, b: 0.3} if what == "mixture" else a,
        "packing": "per_document" if what == "documents" else "packed",
        "mask_documents": what == "masked",
        "context": CONTEXT,
        "batch_size": BATCH,
        "seed": 5,
    }
    expected = global_batches(data, 1, 0, 0, STEPS)
    assert len({step["data_digest"] for step in expected}) == STEPS
    for n, (ranks, workers) in enumerate(SPLITS):
        assert same(global_batches(data, ranks, workers, 0, STEPS), expected)
        later = SPLITS[(n + 1) % len(SPLITS)]
        stop = 3 + n
        assert same(global_batches(data, ranks, workers, 0, stop), expected[:stop])
        assert same(global_batches(data, *later, stop, STEPS), expected[stop:])
    other = global_batches(data | {"seed": 6}, 1, 0, 0, STEPS)
    assert not any(x["data_digest"] == y["data_digest"] for x, y in zip(expected, other, strict=True))


def test_batches_and_digests_are_those_worked_out_by_hand(store: TokenStore) -> None:
    stream = store.read(0, store.tokens)
    windows = (len(stream) - 1) // CONTEXT
    order = WindowOrder(windows, BATCH, 3)
    batches = TrainingBatches(Rows([store], CONTEXT), MixtureOrder([windows], [1000], BATCH, 3), 2, rank=1, ranks=4)
    for step in (0, 1, windows // BATCH, 1000):  # across the end of an epoch too
        for which in range(2):
            first = 8 * which + 2
            digest = 0
            for row, (ids, labels) in enumerate(zip(*map(batches[2 * step + which].get, KEYS), strict=True), first):
                window = stream[CONTEXT * order.item(step, row) :][: CONTEXT + 1]
                assert ids.tolist() == window[:-1].tolist()
                assert labels.tolist() == window[1:].tolist()
                told = struct.pack(f"<{CONTEXT + 3}q", step, row, *window.tolist())
                digest += int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")
            assert batches[2 * step + which]["data_digest"] == digest % 2**63


def test_a_digest_tells_every_difference() -> None:
    ids = np.arange(10)
    swapped = ids[[1, 0, *range(2, 10)]]
    cases = [(0, 0, ids), (1, 0, ids), (0, 1, ids), (0, 0, swapped), (0, 0, ids[:9]), (0, 0, ids + 1)]
    assert len({row_digest(*case) for case in cases}) == len(cases)
    assert row_digest(0, 0, ids) == row_digest(0, 0, ids.astype(">i8"))


# ---- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 2, 7, 24, 100])
def test_every_token_is_a_label_once_an_epoch(store: TokenStore, context: int) -> None:
    """Positions 1 to count * T of the stream: not the first, which nothing stands before, and not the fewer than T at
    the end that are no whole window. No window reads beyond the last token."""
    rows = Rows([store], context)
    (count,) = rows.counts
    marked = SimpleNamespace(
        read=lambda start, n: np.arange(start, start + n), vocab_size=store.tokens
    )  # ids: positions
    order = MixtureOrder([count], [1000], 1, seed=2)
    rows.stores = [marked]  # type: ignore[list-item]
    times = np.zeros(store.tokens, int)
    for step in range(count):
        (tokens,) = rows.read(order.rows(step, 0, 1))
        assert len(tokens) == context + 1
        assert tokens[-1] < store.tokens
        np.add.at(times, tokens[1:], 1)
    rows.stores = [store]
    assert times[0] == 0
    assert (times[1 : count * context + 1] == 1).all()
    assert (times[count * context + 1 :] == 0).all()
    assert rows.unread(0) == store.tokens - 1 - count * context < context


def test_windows_fit_to_the_last_token(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", [[[5] * 20]], validation=[[[6] * 19]])  # 21 and 20 tokens
    exact, short = (Rows([TokenStore.open(path, split)], 5) for split in ("train", "validation"))
    assert (exact.counts, exact.unread(0)) == ([4], 0)
    assert (short.counts, short.unread(0)) == ([3], 4)
    assert [len(tokens) for tokens in exact.read([(0, 3)])] == [6]


def test_documents_are_documents(store: TokenStore) -> None:
    rows = Rows([store], 1000, "documents")
    items = [(0, 2), (0, 5)]
    batch = rows.tensors(rows.read(items))
    for line, (_, document) in enumerate(items):
        tokens = store.document_tokens(document)
        assert tokens[-1] == store.end_of_document
        assert np.array_equal(batch["input_ids"][line][: len(tokens) - 1], tokens[:-1])
        assert np.array_equal(batch["shift_labels"][line][: len(tokens) - 1], tokens[1:])
        assert (batch["shift_labels"][line][len(tokens) - 1 :] == IGNORED).all()
    assert rows.predicted(items) == int((batch["shift_labels"] != IGNORED).sum())
    cut = Rows([store], 10, "documents")
    longest = max(range(store.documents), key=lambda index: len(store.document_tokens(index)))
    labels = cut.tensors(cut.read([(0, longest)]))["shift_labels"]
    assert np.array_equal(labels[0], store.document_tokens(longest)[1:11])


def test_an_id_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", [[[5, 399, 5]]], validation=[[[5]]])
    store = TokenStore.open(path, "train")
    store.vocab_size = 399
    with pytest.raises(UserError, match="id 399 beyond its vocabulary"):
        Rows([store], 3).read([(0, 0)])


def test_too_little_text_is_named(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few for one row of 100000"):
        Rows([store], 100_000)
    empty = write_store(tmp_path / "s", [[[5]]])
    with pytest.raises(UserError, match="no validation tokens"):
        Rows([TokenStore.open(empty, "validation")], 4)


# ---- Masked documents ------------------------------------------------------------------------------------------------


def test_positions_restart_after_every_end(store: TokenStore) -> None:
    """Against a loop; and nothing else of a batch changes."""
    plain, masked = Rows([store], CONTEXT), Rows([store], CONTEXT, mask_documents=True)
    items = [(0, item) for item in range(plain.counts[0])]
    before, after = (rows.tensors(rows.read(items)) for rows in (plain, masked))
    assert before.keys() == set(KEYS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["position_ids"].dtype == torch.int64
    for ids, found in zip(after["input_ids"].tolist(), after["position_ids"].tolist(), strict=True):
        place, expected = 0, []
        for token in ids:
            expected.append(place)
            place = 0 if token == END else place + 1
        assert found == expected
    assert (after["position_ids"].diff() != 1).any(dim=1).sum() > 10


def test_positions_of_some_rows() -> None:
    ids = np.array([[0, 0, 5, 6, 0], [5, 0, 6, 0, 7], [1, 2, 3, 4, 5]])
    assert positions(ids, END).tolist() == [[0, 0, 0, 1, 2], [0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]


# ---- Validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_sees_each_row_once(store: TokenStore, ranks: int) -> None:
    rows, count = Rows([store], 8), 61
    seen: list[bytes] = []
    for rank in range(ranks):
        batches = ValidationBatches(rows, Pattern.even([1000]), count, 8, rank, ranks)
        seen += [row.numpy().tobytes() for batch in batches for row in batch["input_ids"]]
        assert sum(1 for _ in batches) == len(batches)
    stream = store.read(0, store.tokens)
    assert sorted(seen) == sorted(stream[8 * row : 8 * row + 8].tobytes() for row in range(count))
