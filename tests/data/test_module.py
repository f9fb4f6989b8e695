"""The data module: what it sets, where a loader goes on, what it says and refuses; a mixture's validation."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from llm.common.errors import UserError
from llm.data import module
from llm.data.module import TokenDataModule
from llm.data.store import TokenStore

from .random_stores import random_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return random_store(folder / "web" / "store", seed=1), random_store(folder / "code" / "store", seed=2, documents=90)


def at(step: int = 0, **facts: int) -> SimpleNamespace:
    """A trainer as far as the data asks it."""
    common = {"world_size": 1, "global_rank": 0, "global_step": step, "max_steps": 10, "accumulate_grad_batches": 1}
    return SimpleNamespace(**(common | facts))


def set_up(module: TokenDataModule, trainer: SimpleNamespace) -> TokenDataModule:
    module.trainer = trainer  # type: ignore[assignment]
    module.setup("fit")
    return module


def test_a_resumed_loader_goes_on_where_the_run_stands(stores: tuple[Path, Path]) -> None:
    module = TokenDataModule(str(stores[0]), 32, batch_size=8, micro_batch_size=4, seed=3, validate_every=5)
    trainer = at()
    set_up(module, trainer)
    assert trainer.accumulate_grad_batches == 2
    assert trainer.val_check_interval == 10
    whole = [batch["input_ids"] for batch in module.train_dataloader()]
    assert len(whole) == 20
    trainer.global_step = 7
    rest = [batch["input_ids"] for batch in module.train_dataloader()]
    assert len(rest) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole[14:], rest, strict=True))


def test_a_batch_that_does_not_divide_names_the_nearest() -> None:
    module = TokenDataModule("any", 32, batch_size=100, micro_batch_size=8)
    with pytest.raises(UserError, match="nearest that is, is 99"):
        module.micro_batches(ranks=3)
    with pytest.raises(UserError, match="nearest that is, is 128"):
        module.micro_batches(ranks=128)
    assert TokenDataModule("any", 32, batch_size=64).micro_batches(ranks=4) == 1


@given(st.integers(1, 600), st.integers(1, 64), st.none() | st.integers(1, 20))
def test_a_step_is_divided_evenly_into_as_few_micro_batches_as_fit(batch: int, ranks: int, most: int | None) -> None:
    module = TokenDataModule("any", 32, batch, most)
    if batch % ranks:
        with pytest.raises(UserError, match="nearest"):
            module.micro_batches(ranks)
        return
    count = module.micro_batches(ranks)
    rows, left = divmod(batch, ranks * count)
    assert left == 0
    assert rows <= (most or batch)
    fewer = [n for n in range(1, count) if batch % (ranks * n) == 0]
    assert all(batch // (ranks * n) > (most or batch) for n in fewer)
    assert f"{ranks} device(s) x {count} micro-batch(es) x {rows} rows" in module.division(ranks)


def test_all_problems_come_together() -> None:
    module = TokenDataModule({"a": 0.0, "b": 1.0}, 0, 8, packing="per_document", mask_documents=True, workers=-1)
    problems = "; ".join(module.problems())
    for part in ("data.context 0", "data.workers -1", "mask_documents", "weight 0.0 of a"):
        assert part in problems
    assert TokenDataModule({"a": 0.2, "b": 1}, 4, 8, mask_documents=True).problems() == []


def test_one_store_is_the_same_as_a_mixture_of_one(stores: tuple[Path, Path]) -> None:
    path = str(stores[0])
    plain, mixed = (set_up(TokenDataModule(store, 16, 8, seed=3), at()) for store in (path, {path: 0.2}))
    for loader in ("train_dataloader", "val_dataloader"):
        for a, b in zip(getattr(plain, loader)(), getattr(mixed, loader)(), strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert a.get("data_digest") == b.get("data_digest")
    assert plain.fingerprint == mixed.fingerprint == TokenStore.open(path).fingerprint
    assert plain.named == mixed.named == path
    assert plain.epochs(5) == mixed.epochs(5) == {"epochs": 40 / plain.training.counts[0]}


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_mixtures_validation_is_in_proportion_until_a_store_runs_out(stores: tuple[Path, Path], ranks: int) -> None:
    a, b = map(str, stores)
    weights = {a: 0.8, b: 0.2}
    streams = {path: store.read(0, store.tokens) for path in weights for store in [TokenStore.open(path, "validation")]}
    rows = {
        path: [ids[8 * n : 8 * n + 8].tobytes() for n in range((len(ids) - 1) // 8)] for path, ids in streams.items()
    }
    for limit, seed in ((None, 0), (None, 1), (10, 2)):
        dealt: list[list[bytes]] = []
        counts: list[int] = []
        for rank in range(ranks):
            module = TokenDataModule(weights, 8, 3 * ranks, 3, seed=seed, validation_rows=limit)
            set_up(module, at(world_size=ranks, global_rank=rank))
            batches = list(module.val_dataloader())
            counts.append(len(batches))
            labelled = [(ids, labels) for b in batches for ids, labels in zip(*b.values(), strict=True)]
            dealt.append([ids.numpy().tobytes() for ids, labels in labelled if (labels != -100).any()])
        assert len(set(counts)) == 1
        seen = [dealt[n % ranks][n // ranks] for n in range(sum(map(len, dealt)))]
        drawn = {path: [row for row in seen if row in mine] for path, mine in rows.items()}
        for path, mine in rows.items():
            assert drawn[path] == mine[: len(drawn[path])]  # each once, in the store's own order
        share = len(drawn[a]) / len(seen)
        assert abs(share - 0.8) < 1 / len(seen)
        assert len(seen) == 10 if limit else len(drawn[a]) == len(rows[a])  # the first to run out


def test_a_run_is_told_its_epochs(stores: tuple[Path, Path]) -> None:
    tokens = [TokenStore.open(path).tokens for path in stores]
    a, b = map(str, stores)
    module = set_up(TokenDataModule({b: 0.25, a: 0.75}, 16, 100, seed=3), at())
    said = dict(part.split(": ", 1) for part in module.summary(20).split("; "))
    for path, count, share in ((a, tokens[0], 0.75), (b, tokens[1], 0.25)):
        windows = (count - 1) // 16
        left = count - 1 - 16 * windows
        assert said[path].startswith(f"{windows} windows an epoch, {left} tokens of the end in none, ")
        assert said[path].endswith(f" {2000 * share / windows:.2f} epochs in 20 steps")
    counted = module.epochs(20)
    assert counted.keys() == {"epochs_web/store", "epochs_code/store"}
    assert counted["epochs_web/store"] == 1500 / ((tokens[0] - 1) // 16)
    assert sorted(module.named.split(" and ")) == sorted([f"{a} (75%)", f"{b} (25%)"])
    documents = set_up(TokenDataModule(a, 16, 100, packing="per_document"), at())
    assert documents.summary(3) == f"{a}: 60 documents an epoch, {300 / 60:.2f} epochs in 3 steps"
    few = TokenStore.open(a, "validation").documents
    assert few < 30  # too few for a comparison
    assert documents.warnings[0].startswith(f"{a} has {few} validation documents, too few for a comparison: ")


def test_a_mixture_draws_its_shares(stores: tuple[Path, Path]) -> None:
    a, b = map(str, stores)
    module = set_up(TokenDataModule({a: 0.7, b: 0.3}, 16, 100, seed=3), at(max_steps=25))
    streams = [TokenStore.open(path).read(0, TokenStore.open(path).tokens) for path in (a, b)]
    windows = [{ids[16 * n : 16 * n + 16].tobytes() for n in range((len(ids) - 1) // 16)} for ids in streams]
    rows = [row.numpy().tobytes() for batch in module.train_dataloader() for row in batch["input_ids"]]
    of_first = np.array([row in windows[0] for row in rows])
    assert all((row in windows[1]) != first for row, first in zip(rows, of_first, strict=True))
    counts = np.convolve(of_first, np.ones(1000, int), "valid")
    assert set(counts) == {700}


def test_batches_are_made_ahead_in_their_order_and_their_errors_come_when_asked_for() -> None:
    class Numbers(Dataset):
        asked: ClassVar[list[int]] = []

        def __getitem__(self, index: int) -> int:
            self.asked.append(index)
            if index == module.AHEAD + 4:
                raise RuntimeError("damaged")
            return index

    ahead = module.AHEAD
    numbers = Numbers()
    source = iter(module.Prefetcher(DataLoader(numbers, batch_size=None, sampler=range(100))))
    assert next(source) == 0
    deadline = time.monotonic() + 60
    while len(numbers.asked) <= ahead and time.monotonic() < deadline:
        time.sleep(0.001)
    assert numbers.asked == list(range(ahead + 1))  # as many more than were asked for, and no more
    assert [next(source) for _ in range(ahead + 3)] == list(range(1, ahead + 4))
    with pytest.raises(RuntimeError, match="damaged"):
        next(source)
    assert list(source) == []
    for count in (0, 3, ahead, ahead + 1, 50):
        whole = module.Prefetcher(DataLoader(list(range(count)), batch_size=None, sampler=range(count)))
        assert len(whole) == count and list(whole) == list(range(count)) == list(whole)


def test_nobody_waits_for_a_read_that_stalls_for_as_long_as_what_was_read_ahead() -> None:
    """The reader hangs at the 30th batch; all before it are there, of which `AHEAD` have not been used."""

    class Stalling(Dataset):
        goes_on, stalls = threading.Event(), threading.Event()

        def __getitem__(self, index: int) -> int:
            if index == 30:
                self.stalls.set()
                assert self.goes_on.wait(60)
            return index

    source = iter(module.Prefetcher(DataLoader(Stalling(), batch_size=None, sampler=range(40))))
    used = [next(source) for _ in range(31 - module.AHEAD)]  # the 30th is asked for as the last of these is taken
    assert Stalling.stalls.wait(60)
    used += [next(source) for _ in range(module.AHEAD - 1)]
    assert used == list(range(30)) and not Stalling.goes_on.is_set()
    Stalling.goes_on.set()
    assert list(source) == list(range(30, 40))


def test_a_loader_that_is_left_reads_no_more(stores: tuple[Path, Path]) -> None:
    before = threading.active_count()
    source = iter(set_up(TokenDataModule(str(stores[0]), 16, 8), at(max_steps=1000)).train_dataloader())
    next(source)
    assert threading.active_count() == before + 1
    source.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
