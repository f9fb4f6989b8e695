"""Batches for training and validation.

Stages: (seed, step, row) -> item of the store (`order.py`) -> tokens (`store.py`) -> a micro-batch of tensors.

Nothing here has a state: the micro-batches of step n are a function of n, so a run resumes by naming its step, and
every number of ranks and workers sees the same global batches.

Dimension letters: B sequences of a micro-batch, T time (the context).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..model.loss import IGNORED
from .order import WindowOrder
from .store import TokenStore

ROWS = ("windows", "documents")


class Rows:
    """The rows of one split: item -> `context` inputs and as many labels.

    Args:
        store: an open token store.
        context: T.
        kind: "windows": the token stream cut every T tokens, each token predicted once, the last partial window left
            out; "documents": one document a row, cut at T, padding left out of the loss.
    """

    def __init__(self, store: TokenStore, context: int, kind: str) -> None:
        self.store, self.context, self.kind = store, context, kind
        self.count = (store.tokens - 1) // context if kind == "windows" else store.documents
        if self.count < 1:
            if not store.tokens and store.split == "validation":
                raise UserError(
                    f"{store.path} holds no validation tokens: prepare it anew with more text or a larger "
                    "--validation-fraction"
                )
            raise UserError(
                f"{store.path} ({store.split}) holds {store.tokens} tokens, too few for one row of {context}: "
                "prepare more text or lower data.context"
            )

    def tokens(self, item: int) -> np.ndarray:
        """The item's tokens, at most T + 1."""
        if self.kind == "windows":
            return self.store.read(item * self.context, self.context + 1)
        start, end = self.store.document(item)
        return self.store.read(start, min(end - start, self.context + 1))

    def predicted(self, items: list[int]) -> int:
        """How many tokens are predicted in these items."""
        if self.kind == "windows":
            return len(items) * self.context
        spans = (self.store.document(item) for item in items)
        return sum(min(end - start, self.context + 1) - 1 for start, end in spans)

    def tensors(self, items: list[int]) -> dict[str, Tensor]:
        """input_ids and shift_labels, (B, T) int64."""
        inputs = np.full((len(items), self.context), self.store.end_of_document, dtype=np.int64)
        labels = np.full((len(items), self.context), IGNORED, dtype=np.int64)
        for row, item in enumerate(items):
            tokens = self.tokens(item)
            if tokens.max() >= self.store.vocab_size:  # on a GPU the embedding would end in a device assert
                raise UserError(
                    f"{self.store.path} ({self.store.split}) holds id {tokens.max()} beyond its vocabulary of "
                    f"{self.store.vocab_size}: name the shard with llm inspect --verify and prepare it again"
                )
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
        return {"input_ids": torch.from_numpy(inputs), "shift_labels": torch.from_numpy(labels)}


class TrainingBatches(Dataset):
    """Micro-batch index (step * micro-batches + which) -> this rank's share of the global batch."""

    def __init__(self, rows: Rows, order: WindowOrder, micro_batches: int, rank: int, ranks: int) -> None:
        self.rows, self.order = rows, order
        self.micro_batches, self.rank, self.ranks = micro_batches, rank, ranks
        self.micro_batch_size = order.batch_size // (micro_batches * ranks)
        self._counted = (-1, 0)  # the last step asked for and its predicted tokens

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, which = divmod(index, self.micro_batches)
        first = (which * self.ranks + self.rank) * self.micro_batch_size
        batch: dict[str, Any] = self.rows.tensors(self.order.rows(step, first, first + self.micro_batch_size))
        if self._counted[0] != step:
            self._counted = (step, self.rows.predicted(self.order.rows(step, 0, self.order.batch_size)))
        batch["num_items_in_batch"] = self._counted[1]
        return batch


class ValidationBatches(Dataset):
    """Every validation row once, in the store's order, dealt to the ranks in turn."""

    def __init__(self, rows: Rows, count: int, batch_size: int, rank: int, ranks: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.items = range(rank, count, ranks)

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        return self.rows.tensors(list(self.items[index * self.batch_size : (index + 1) * self.batch_size]))


class TokenDataModule(pl.LightningDataModule):
    """Batches of a token store.

    Args:
        store: the folder that `python -m llm prepare` wrote.
        context: T, tokens of a row.
        batch_size: rows of one optimizer step over all devices.
        micro_batch_size: rows of one forward pass on one device; None is as many as fall on a device.
        rows: "windows" of the token stream, or "documents", one a row.
        seed: of the order.
        validate_every: optimizer steps between validations.
        validation_rows: the first n rows of the validation split only; None is all of it.
        workers: loading processes; 0 is fastest, reading is far quicker than any model.

    Raises:
        UserError: no store, one too small, or a batch that does not divide (from `open` and `setup`).
    """

    def __init__(
        self,
        store: str,
        context: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        rows: str = "windows",
        seed: int = 0,
        validate_every: int = 1000,
        validation_rows: int | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.store_path, self.context, self.kind = store, context, rows
        self.batch_size, self.given_micro_batch_size = batch_size, micro_batch_size
        self.seed, self.workers = seed, workers
        self.validate_every, self.validation_rows = validate_every, validation_rows

    def problems(self) -> list[str]:
        """Settings that cannot be: each a sentence."""
        at_least_one = {
            "batch_size": self.batch_size,
            "context": self.context,
            "micro_batch_size": self.given_micro_batch_size,
            "validate_every": self.validate_every,
            "validation_rows": self.validation_rows,
        }
        problems = [f"data.{k} {v} must be at least 1" for k, v in at_least_one.items() if v is not None and v < 1]
        if self.workers < 0:
            problems.append(f"data.workers {self.workers} must be 0 or more")
        if self.kind not in ROWS:
            problems.append(f"data.rows {self.kind!r} is unknown: give one of {', '.join(ROWS)}")
        return problems

    def open(self) -> None:
        """Open the store, once.

        Raises:
            UserError: no store, a torn one, or too few tokens for a row.
        """
        if hasattr(self, "store"):
            return
        self.store = TokenStore.open(self.store_path, "train")
        held_out = TokenStore.open(self.store_path, "validation")
        for split in (self.store, held_out):
            split.check_sizes()
        self.training = Rows(self.store, self.context, self.kind)
        self.validation = Rows(held_out, self.context, self.kind)
        self.order = WindowOrder(self.training.count, self.batch_size, self.seed)

    def setup(self, stage: str) -> None:
        """Open the store and set the trainer's accumulation and validation interval from batch sizes in rows."""
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
        """Micro-batches of one step on each of `ranks` devices.

        Raises:
            UserError: the global batch does not divide; the message names the nearest that does.
        """
        size = self.given_micro_batch_size or max(1, self.batch_size // ranks)
        if self.batch_size % (size * ranks):
            nearest = max(1, round(self.batch_size / (size * ranks))) * size * ranks
            raise UserError(
                f"data.batch_size {self.batch_size} is no multiple of {ranks} device(s) x data.micro_batch_size {size}:"
                f" the nearest that is, is {nearest}"
            )
        return self.batch_size // (size * ranks)

    def train_dataloader(self) -> DataLoader:
        """From the trainer's step to its last: a resumed run asks for the rest."""
        trainer = self._trainer
        micro = trainer.accumulate_grad_batches
        batches = TrainingBatches(self.training, self.order, micro, trainer.global_rank, trainer.world_size)
        indices = range(trainer.global_step * micro, max(trainer.max_steps, trainer.global_step) * micro)
        return self._loader(batches, indices)

    def val_dataloader(self) -> DataLoader:
        trainer = self._trainer
        count = min(self.validation.count, self.validation_rows or self.validation.count)
        size = self.batch_size // (trainer.accumulate_grad_batches * trainer.world_size)
        return self._loader(
            ValidationBatches(self.validation, count, size, trainer.global_rank, trainer.world_size), None
        )

    def _loader(self, batches: Dataset, indices: range | None) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,
            sampler=indices,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )
