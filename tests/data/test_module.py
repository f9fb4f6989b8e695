"""Batches: the same global batch for any number of ranks and micro-batches, every window once an epoch."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llm.data.module import Rows, TokenDataModule, TrainingBatches, ValidationBatches
from llm.data.order import WindowOrder
from llm.data.store import TokenStore
from llm.errors import UserError


@pytest.fixture(scope="module")
def store(story_store: Path) -> TokenStore:
    return TokenStore.open(story_store, "train")


def global_batch(rows: Rows, order: WindowOrder, step: int, micro: int, ranks: int) -> torch.Tensor:
    """What all ranks together see at a step, as sorted rows of inputs and labels."""
    parts = []
    for rank in range(ranks):
        batches = TrainingBatches(rows, order, micro, rank, ranks)
        parts += [batches[step * micro + which] for which in range(micro)]
    whole = torch.cat([torch.cat([part["input_ids"], part["shift_labels"]], dim=1) for part in parts])
    assert len({part["num_items_in_batch"] for part in parts}) == 1
    assert parts[0]["num_items_in_batch"] == sum((part["shift_labels"] != -100).sum() for part in parts)
    return whole[np.lexsort(whole.numpy().T[::-1])]


@pytest.mark.parametrize("kind", ["windows", "documents"])
def test_one_global_batch_however_it_is_split(store: TokenStore, kind: str) -> None:
    rows = Rows(store, 64, kind)
    order = WindowOrder(rows.count, 16, seed=5)
    for step in (0, 7, rows.count // 16, 1000):  # across the end of an epoch too
        expected = global_batch(rows, order, step, 1, 1)
        for micro, ranks in ((2, 1), (1, 2), (4, 2), (2, 8), (16, 1)):
            assert torch.equal(global_batch(rows, order, step, micro, ranks), expected)


def test_windows_are_the_stream_and_documents_are_documents(store: TokenStore) -> None:
    stream = store.read(0, store.tokens)
    batch = Rows(store, 50, "windows").tensors([0, 3])
    assert np.array_equal(batch["input_ids"], [stream[:50], stream[150:200]])
    assert np.array_equal(batch["shift_labels"], [stream[1:51], stream[151:201]])
    rows = Rows(store, 1000, "documents")
    batch = rows.tensors([2, 5])
    for line, document in enumerate((2, 5)):
        tokens = store.document_tokens(document)
        assert tokens[-1] == store.end_of_document
        assert np.array_equal(batch["input_ids"][line][: len(tokens) - 1], tokens[:-1])
        assert np.array_equal(batch["shift_labels"][line][: len(tokens) - 1], tokens[1:])
        assert (batch["shift_labels"][line][len(tokens) - 1 :] == -100).all()
    cut = Rows(store, 10, "documents").tensors([2])
    assert np.array_equal(cut["shift_labels"][0], store.document_tokens(2)[1:11])


def test_an_epoch_holds_every_window_once(store: TokenStore) -> None:
    rows = Rows(store, 256, "windows")
    assert rows.count == (store.tokens - 1) // 256
    order = WindowOrder(rows.count, 4, seed=1)
    steps = rows.count // 4
    seen = [item for step in range(steps) for item in order.rows(step, 0, 4)]
    assert len(set(seen)) == len(seen)
    assert rows.count - len(seen) < 4


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_sees_each_row_once(store: TokenStore, ranks: int) -> None:
    rows, count = Rows(store, 32, "windows"), 101
    seen: list[bytes] = []
    for rank in range(ranks):
        batches = ValidationBatches(rows, count, 8, rank, ranks)
        seen += [row.numpy().tobytes() for batch in batches for row in batch["input_ids"]]
        assert sum(1 for _ in batches) == len(batches)
    assert sorted(seen) == sorted(
        rows.tensors(list(range(count)))["input_ids"][i].numpy().tobytes() for i in range(count)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_batches(store: TokenStore, workers: int) -> None:
    rows = Rows(store, 64, "windows")
    batches = TrainingBatches(rows, WindowOrder(rows.count, 8, seed=2), 2, 0, 1)
    loaded = list(DataLoader(batches, batch_size=None, sampler=range(6, 14), num_workers=workers))
    assert all(torch.equal(a["input_ids"], batches[i]["input_ids"]) for i, a in zip(range(6, 14), loaded, strict=True))


def trainer(**facts: object) -> SimpleNamespace:
    common = {"world_size": 1, "global_rank": 0, "global_step": 0, "max_steps": 10, "accumulate_grad_batches": 1}
    return SimpleNamespace(**(common | facts))


def test_a_resumed_loader_goes_on_where_the_run_stands(story_store: Path) -> None:
    module = TokenDataModule(str(story_store), 32, batch_size=8, micro_batch_size=4, seed=3, validate_every=5)
    module.trainer = trainer()  # type: ignore[assignment]
    module.setup("fit")
    assert module.trainer.accumulate_grad_batches == 2
    assert module.trainer.val_check_interval == 10
    whole = [batch["input_ids"] for batch in module.train_dataloader()]
    assert len(whole) == 20
    module.trainer.global_step = 7
    rest = [batch["input_ids"] for batch in module.train_dataloader()]
    assert len(rest) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole[14:], rest, strict=True))


def test_a_batch_that_does_not_divide_names_the_nearest(story_store: Path) -> None:
    module = TokenDataModule(str(story_store), 32, batch_size=100, micro_batch_size=8)
    with pytest.raises(UserError, match="nearest that is, is 96"):
        module.micro_batches(ranks=4)
    assert TokenDataModule(str(story_store), 32, batch_size=64).micro_batches(ranks=4) == 1
