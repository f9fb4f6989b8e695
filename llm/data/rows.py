"""Rows of tokens as tensors: (store, item) -> tokens -> a micro-batch, and the datasets that a DataLoader reads.

Only torch, numpy and the store: a loading process imports neither Lightning nor transformers.

Dimension letters: B sequences of a micro-batch, T time (the context).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..common.errors import UserError
from .mixture import Item, MixtureOrder, Pattern
from .store import TokenStore

KINDS = ("windows", "documents")
PACKING = {"packed": "windows", "per_document": "documents"}  # data.packing -> kind of row
IGNORED = -100  # torch's ignore_index, and that of `llm.model.loss`, whose package would import transformers
DIGESTS = 1 << 63  # digests are added modulo this: they fit an int64, and its overflow does no harm


class Rows:
    """The rows of one split of one or several stores: (store, item) -> `context` inputs and as many labels.

    Args:
        stores: open token stores of one vocabulary.
        context: T.
        kind: "windows": the token stream cut every T tokens; positions 1 to count * T of the stream are each a label
            in exactly one row, position 0 and the last partial window in none. "documents": one document a row, cut
            at T, padding left out of the loss.
        mask_documents: of windows, give position_ids too.

    counts: rows of each store.
    """

    def __init__(
        self, stores: Sequence[TokenStore], context: int, kind: str = "windows", mask_documents: bool = False
    ) -> None:
        self.stores, self.context, self.kind, self.mask_documents = stores, context, kind, mask_documents
        self.counts = [(s.tokens - 1) // context if kind == "windows" else s.documents for s in stores]
        for store, count in zip(stores, self.counts, strict=True):
            if count < 1 or (kind == "documents" and store.tokens == store.documents):  # each has its end alone
                raise _too_small(store, context)

    def read(self, items: Iterable[Item]) -> list[np.ndarray]:
        """The tokens of each item, [at most T + 1] int64."""
        return [self._read(self.stores[store], item) for store, item in items]

    def _read(self, store: TokenStore, item: int) -> np.ndarray:
        start, end = self._span(store, item)
        tokens = store.read(start, end - start)
        if tokens.max() >= store.vocab_size:  # on a GPU the embedding would end in a device assert
            raise UserError(
                f"{store.path} ({store.split}) holds id {tokens.max()} beyond its vocabulary of "
                f"{store.vocab_size}: name the shard with llm inspect --verify and prepare it again"
            )
        return tokens

    def _span(self, store: TokenStore, item: int) -> tuple[int, int]:
        """The positions [start, end) of an item, at most T + 1."""
        if self.kind == "windows":
            return item * self.context, (item + 1) * self.context + 1
        start, end = store.document(item)
        return start, min(end, start + self.context + 1)

    def predicted(self, items: Iterable[Item]) -> int:
        """How many tokens are predicted in these items."""
        spans = (self._span(self.stores[store], item) for store, item in items)
        return sum(end - start - 1 for start, end in spans)

    def unread(self, store: int) -> int:
        """How many tokens at the end of a store are in no window."""
        return self.stores[store].tokens - self.counts[store] * self.context - 1

    def tensors(self, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Rows of tokens -> input_ids and shift_labels, and position_ids where documents are masked: (B, T) int64.

        Masking changes no label: the first token of a document is predicted from the end-of-document token before it,
        at the end of the other document, so that every token is still predicted once.
        """
        end_of_document = self.stores[0].end_of_document
        inputs = np.full((len(rows), self.context), end_of_document, dtype=np.int64)
        labels = np.full((len(rows), self.context), IGNORED, dtype=np.int64)
        for row, tokens in enumerate(rows):
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
        arrays = {"input_ids": inputs, "shift_labels": labels}
        if self.mask_documents:
            arrays["position_ids"] = positions(inputs, end_of_document)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def positions(ids: np.ndarray, end_of_document: int) -> np.ndarray:
    """(B, T) ids -> each one's place in its document, or in the part of it that the window holds: (B, T) int64."""
    begins = np.ones(ids.shape, dtype=bool)
    begins[:, 1:] = ids[:, :-1] == end_of_document
    starts = np.flatnonzero(begins)  # of all rows in one
    return (np.arange(ids.size) - np.repeat(starts, np.diff(starts, append=ids.size))).reshape(ids.shape)


def row_digest(step: int, row: int, tokens: np.ndarray) -> int:
    """8 bytes of blake2b over (step, row of the global batch, ids), all little-endian int64."""
    digest = hashlib.blake2b(struct.pack("<qq", step, row), digest_size=8)
    digest.update(tokens.astype("<i8", copy=False).data)
    return int.from_bytes(digest.digest(), "little")


def _too_small(store: TokenStore, context: int) -> UserError:
    if not store.tokens and store.split == "validation":
        return UserError(
            f"{store.path} holds no validation tokens: prepare it again with more text, or a larger "
            "--validation-fraction"
        )
    return UserError(
        f"{store.path} ({store.split}) holds {store.tokens} tokens, too few for one row of {context}: "
        "prepare more text or lower data.context"
    )


class TrainingBatches(Dataset):
    """Micro-batch index (step * micro-batches + which) -> this rank's share of the global batch.

    Beside the tensors a batch holds num_items_in_batch, the tokens predicted in the whole global batch, and
    data_digest, the sum of its rows' digests modulo `DIGESTS`: added up over micro-batches, ranks and steps it says
    which data a run has seen, however its rows were dealt out.
    """

    def __init__(self, rows: Rows, order: MixtureOrder, micro_batches: int, rank: int, ranks: int) -> None:
        self.rows, self.order = rows, order
        self.micro_batches, self.rank, self.ranks = micro_batches, rank, ranks
        self.micro_batch_size = order.batch_size // (micro_batches * ranks)
        self._counted = (-1, 0)  # the last step asked for and its predicted tokens

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, which = divmod(index, self.micro_batches)
        first = (which * self.ranks + self.rank) * self.micro_batch_size
        rows = self.rows.read(self.order.rows(step, first, first + self.micro_batch_size))
        digest = sum(row_digest(step, first + n, tokens) for n, tokens in enumerate(rows)) % DIGESTS
        return {**self.rows.tensors(rows), "num_items_in_batch": self._predicted(step), "data_digest": digest}

    def _predicted(self, step: int) -> int:
        """Tokens predicted in the global batch of a step."""
        if self.rows.kind == "windows":  # each as many, whichever they are
            return self.order.batch_size * self.rows.context
        if self._counted[0] != step:
            self._counted = (step, self.rows.predicted(self.order.rows(step, 0, self.order.batch_size)))
        return self._counted[1]


class ValidationBatches(Dataset):
    """The first `count` validation rows once each, dealt to the ranks in turn.

    A store's rows come in its own order; `pattern` says which store is next. Every rank has as many batches, since all
    take part in gathering the weights: where it has no row left, a row without labels.
    """

    def __init__(self, rows: Rows, pattern: Pattern, count: int, batch_size: int, rank: int, ranks: int) -> None:
        self.rows, self.pattern, self.batch_size = rows, pattern, batch_size
        self.numbers = range(rank, count, ranks)
        self.batches = -(-count // (ranks * batch_size))

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        numbers = self.numbers[index * self.batch_size : (index + 1) * self.batch_size]
        if not numbers:
            batch = self.rows.tensors(self.rows.read([self.pattern.place(0)]))
            return batch | {"shift_labels": torch.full_like(batch["shift_labels"], IGNORED)}
        return self.rows.tensors(self.rows.read(map(self.pattern.place, numbers)))
