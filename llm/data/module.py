"""The data of a run, as Lightning asks for it.

Stages: (seed, step, row) -> store (`mixture.py`) -> item of the store (`order.py`) -> tokens (`store.py`) -> a
micro-batch of tensors (`rows.py`).

Nothing here has a state: the micro-batches of step n are a function of n, so a run resumes by naming its step, and
every number of ranks and workers sees the same global batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ..common.errors import UserError
from ..common.limits import config_problems
from ..common.processes import end_with_creator
from .contradictions import of_rows, of_weights
from .mixture import MixtureOrder, Pattern, mixed_fingerprint, open_stores, short_names
from .rows import KINDS, PACKING, Rows, TrainingBatches, ValidationBatches
from .store import FEW_DOCUMENTS

AHEAD = 16  # micro-batches, of 0.5 MB each at 1B: a file system may answer seconds late before a GPU waits for it


class Prefetcher:
    """The batches of a loader, made in a thread up to `AHEAD` before they are used."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self.loader), object()
        thread = ThreadPoolExecutor(1)
        try:
            made = deque(thread.submit(next, batches, end) for _ in range(AHEAD))
            while (batch := made.popleft().result()) is not end:
                made.append(thread.submit(next, batches, end))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


class TokenDataModule(pl.LightningDataModule):
    """Batches of a token store, or of a mixture of several.

    Of a mixture any 1,000 consecutive training rows hold exactly the shares of the stores. Its validation draws in the
    same proportion, each store's rows in their own order, until the first store has no more (or `validation_rows`).

    Args:
        store: the folder that `python -m llm prepare` wrote, or a mapping {folder: weight}; weights are made whole
            shares of 1,000 rows, by largest remainder.
        context: context length T, in tokens.
        batch_size: sequences per optimizer step, over all devices.
        micro_batch_size: at most so many sequences in one forward pass on one device; None is as many as fall on a
            device. The same config has the same batches on any number of devices.
        packing: "packed": sequences of T tokens across documents; "per_document": a document each.
        mask_documents: packed rows only: no token sees another document, and positions count from the start of each.
            The first token of a document is still predicted, from the end-of-document token before it. Validation is
            masked alike.
        seed: of the order.
        validate_every: optimizer steps between validations.
        validation_rows: the first n rows of the validation split only; None is all of it.
        workers: loading processes; 0 is fastest, since reading is far quicker than any model. Either way up to 16
            micro-batches are read ahead.

    Raises:
        UserError: no store, one too small, stores of different tokenizers, or a batch that does not divide (from
            `open` and `setup`).
    """

    def __init__(
        self,
        store: str | dict[str, float],
        context: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        packing: str = "packed",
        mask_documents: bool = False,
        seed: int = 0,
        validate_every: int = 1000,
        validation_rows: int | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.weights = {store: 1.0} if isinstance(store, str) else store
        self.context, self.mask_documents = context, mask_documents
        self.packing, self.kind = packing, PACKING.get(packing, packing)  # those of version 0.1 are the kinds
        self.batch_size, self.given_micro_batch_size = batch_size, micro_batch_size
        self.seed, self.workers = seed, workers
        self.validate_every, self.validation_rows = validate_every, validation_rows

    def problems(self) -> list[str]:
        """Settings that cannot be: each a sentence."""
        settings = vars(self) | {"micro_batch_size": self.given_micro_batch_size}
        problems = config_problems("data", settings.get)
        if self.kind not in KINDS:
            problems.append(f"data.packing {self.packing!r} is unknown: give one of {', '.join(PACKING)}")
        return [*problems, *of_rows(self.packing, self.mask_documents), *of_weights(self.weights)]

    def open(self) -> None:
        """Open the stores, once.

        Raises:
            UserError: no store, a torn one, too few tokens for a row, or stores of different tokenizers.
        """
        if hasattr(self, "components"):
            return
        components = open_stores(self.weights)
        self.training, self.validation = (
            Rows(stores, self.context, self.kind, self.mask_documents)
            for stores in (
                [component.train for component in components],
                [component.validation for component in components],
            )
        )
        self.order = MixtureOrder(self.training.counts, [s.share for s in components], self.batch_size, self.seed)
        self.components = components

    @property
    def files(self) -> int:
        """How many files the stores have."""
        return sum(store.files for component in self.components for store in (component.train, component.validation))

    def check_sizes(self) -> None:
        """Compare sizes and samples of all shards with the stores' indexes, before a run of days rather than within it.

        Raises:
            UserError: a shard is missing, truncated, or another one.
        """
        for component in self.components:
            component.train.check_sizes()
            component.validation.check_sizes()
            component.train.check_samples()
            component.validation.check_samples()

    @property
    def fingerprint(self) -> str:
        """Of the data: what a resumed run and the two runs of a pair compare."""
        return mixed_fingerprint(self.components)

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer that made every store of the run."""
        return self.components[0].train.path / "tokenizer"

    @property
    def named(self) -> str:
        """The stores in words, with their shares where there are several."""
        if len(self.components) == 1:
            return self.components[0].path
        return " and ".join(f"{component.path} ({component.share / 10:g}%)" for component in self.components)

    def summary(self, steps: int) -> str:
        """What a run of `steps` makes of each store: rows, tokens that it never sees, epochs."""
        parts = []
        for n, (component, epochs) in enumerate(zip(self.components, self.order.epochs(steps), strict=True)):
            unread = f", {self.training.unread(n):,} tokens of the end in none" if self.kind == "windows" else ""
            rows = f"{component.path}: {self.training.counts[n]:,} {self.kind} an epoch{unread}"
            parts.append(f"{rows}, {epochs:,.2f} epochs in {steps:,} steps")
        return "; ".join(parts)

    @property
    def warnings(self) -> list[str]:
        """Stores with so few validation documents, or groups of them, that no comparison on them holds for others."""
        found = []
        for component in self.components:
            store = component.validation
            counted, what = (
                (store.documents, "documents")
                if store.validation_groups is None
                else (store.validation_groups, "groups of documents")
            )
            if counted < FEW_DOCUMENTS:
                found.append(
                    f"{component.path} has {counted} validation {what}, too few for a comparison: prepare a store with "
                    f"{FEW_DOCUMENTS} or more (--validation-fraction)"
                )
        return found

    def epochs(self, steps: int) -> dict[str, float]:
        """How often `steps` steps go through each store: `epochs`, or `epochs_FOLDER` for each of a mixture."""
        counted = self.order.epochs(steps)
        if len(counted) == 1:
            return {"epochs": counted[0]}
        names = short_names(component.path for component in self.components)
        return {f"epochs_{name}": count for name, count in zip(names, counted, strict=True)}

    def setup(self, stage: str) -> None:
        """Open the stores and set the trainer's accumulation and validation interval from batch sizes in rows."""
        trainer = self._trainer
        self.open()
        trainer.accumulate_grad_batches = self.micro_batches(trainer.world_size)
        trainer.val_check_interval = self.validate_every * trainer.accumulate_grad_batches

    @property
    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("a TokenDataModule is set up by a Trainer")
        return self.trainer

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of one step on each of `ranks` devices: as few as `micro_batch_size` allows.

        Raises:
            UserError: the global batch does not divide; the message names the nearest that does.
        """
        rows, left = divmod(self.batch_size, ranks)
        if left or not rows:
            nearest = max(1, round(self.batch_size / ranks)) * ranks
            raise UserError(
                f"data.batch_size {self.batch_size} is not a multiple of {ranks} device(s): the nearest that is, is "
                f"{nearest}"
            )
        most = self.given_micro_batch_size or rows
        return next(count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= most)

    def division(self, ranks: int) -> str:
        """How a step is divided among `ranks` devices, in words."""
        count = self.micro_batches(ranks)
        return (
            f"{self.batch_size} rows a step = {ranks} device(s) x {count} micro-batch(es) x "
            f"{self.batch_size // (ranks * count)} rows"
        )

    def train_dataloader(self) -> Iterable:
        """From the trainer's step to its last: a resumed run asks for the rest."""
        trainer = self._trainer
        micro = trainer.accumulate_grad_batches
        batches = TrainingBatches(self.training, self.order, micro, trainer.global_rank, trainer.world_size)
        indices = range(trainer.global_step * micro, max(trainer.max_steps, trainer.global_step) * micro)
        loader = self._loader(batches, indices)
        return loader if self.workers else Prefetcher(loader)

    def val_dataloader(self) -> DataLoader:
        trainer = self._trainer
        pattern = Pattern.even([component.share for component in self.components])
        count = min(pattern.row(store, rows) for store, rows in enumerate(self.validation.counts))  # one runs out
        count = min(count, self.validation_rows or count)
        size = self.batch_size // (trainer.accumulate_grad_batches * trainer.world_size)
        rank, ranks = trainer.global_rank, trainer.world_size
        return self._loader(ValidationBatches(self.validation, pattern, count, size, rank, ranks), None)

    def _loader(self, batches: Dataset, indices: range | None) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,
            sampler=indices,
            num_workers=self.workers,
            prefetch_factor=max(2, AHEAD // self.workers) if self.workers else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            worker_init_fn=end_with_creator,
        )
