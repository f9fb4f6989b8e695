"""Validation loss document by document: what a paired comparison draws its bootstrap samples from.

store, export -> checked -> a sample of the split's documents -> batches of like length -> nats of each -> EXPORT/evals

A document is read as training with `data.packing: per_document` reads it (`llm.data.rows`): its ids, end-of-document id
included, cut at the model's context + 1; the first id is input only. Where the store has no begin-of-document id, the
end-of-document id is put in front, which is what precedes a document in a window: its first token is predicted too.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evals import exports as models
from evals.exports import ROUNDING, Export, LoadedModel, called, check_numbers, facts, load_model
from evals.harness.results import alike, locked
from evals.probes.heads import evaluating
from llm.common.devices import resolve_device, versions
from llm.common.errors import UserError
from llm.common.exported import text_config, trained_context
from llm.common.files import first_line, write_json
from llm.common.processes import progress_bar
from llm.common.tables import text_table
from llm.data import store as stores
from llm.data.stories import Split
from llm.data.tokenizer import load_tokenizer

LOGITS_AT_ONCE = 1 << 28  # of a forward pass: 1 GiB in fp32; a row of 2,048 tokens and 131,072 ids is as many
LOGITS_IN_FP32 = 1 << 26  # of a softmax: 256 MiB
# What two measurements must share to be one and the same, beside the weights.
PROTOCOL = (
    "store_fingerprint", "split", "limit", "sample", "context", "batch_size", "dtype", "device", "versions",
    "grouped_by",
)  # fmt: skip
HASHED_AT_ONCE = 1 << 22  # documents: 32 MiB of hashes


class DocumentLosses(NamedTuple):
    """One value a document, in store order: [N] each."""

    indices: np.ndarray  # which document of the split, int64
    tokens: np.ndarray  # predicted, int64
    nats: np.ndarray  # sum of -log p over them, float64
    groups: np.ndarray | None = None  # the number of what each is a part of, int64; None where the store has no groups


# ---- Losses ----------------------------------------------------------------------------------------------------------


def sampled_documents(count: int, documents: int) -> np.ndarray:
    """Draw `count` of a split's documents: those whose numbers have the smallest hashes, in ascending order [N].

    Every document is as likely, wherever its source stands in the store, and all models get the same ones. A larger
    sample contains the smaller. The hash is SplitMix64 (Steele, Lea and Flood 2014, Figure 16).
    """
    kept = np.empty(0, dtype=np.uint64)
    hashes = np.empty(0, dtype=np.uint64)
    for first in range(0, documents, HASHED_AT_ONCE):
        numbers = np.arange(first, min(first + HASHED_AT_ONCE, documents), dtype=np.uint64)
        z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps at 64 bits, as it should
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        kept, hashes = np.concatenate([kept, numbers]), np.concatenate([hashes, z ^ (z >> np.uint64(31))])
        if len(kept) > count:
            smallest = np.argpartition(hashes, count - 1)[:count]
            kept, hashes = kept[smallest], hashes[smallest]
    return np.sort(kept).astype(np.int64)


def document_losses(
    loaded: LoadedModel, store: stores.TokenStore, documents: int, batch_size: int, context: int | None = None
) -> DocumentLosses:
    """Loss of each of `documents` documents of the split, less those without a token to predict (see the module).

    Batches hold documents of like length, the longest first. They depend on the store, the context and `batch_size`
    alone, never on the model: both models of a pair see the same ones. `context`: where to cut; the model's, if None.
    """
    context = context or model_context(loaded.export, loaded.model.config)
    front = [] if store.begin_of_document is not None else [store.end_of_document]
    sample = sampled_documents(documents, store.documents)
    count = len(sample)
    spans = [store.document(int(index)) for index in sample]
    lengths = np.array([min(len(front) + end - start, context + 1) for start, end in spans], dtype=np.int64)
    nats = np.zeros(count)
    order = np.argsort(-lengths, kind="stable")
    with evaluating(loaded.model), progress_bar(count, 0, loaded.export.name, "document", leave=False, delay=1) as bar:
        for first in range(0, count, batch_size):
            batch = order[first : first + batch_size]
            ids = np.full((len(batch), int(lengths[batch[0]])), store.end_of_document, dtype=np.int64)  # padded right
            for row, index in enumerate(batch):
                tokens = store.read(spans[index][0], int(lengths[index]) - len(front))
                ids[row, : lengths[index]] = [*front, *tokens]
            losses = token_losses(loaded.model, torch.from_numpy(ids)).double().numpy()  # (B, T)
            nats[batch] = [losses[row, : lengths[index] - 1].sum() for row, index in enumerate(batch)]
            bar.update(len(batch))
    kept = np.flatnonzero(lengths > 1)
    groups = None
    if store.groups is not None:
        groups = np.unique(store.document_groups(sample[kept]), return_inverse=True)[1]
    return DocumentLosses(sample[kept], lengths[kept] - 1, nats[kept], groups)


@torch.inference_mode()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """-log p of each token of (B, T + 1) ids but the first of a row, in nats: (B, T) float32 on the CPU.

    The softmax is taken in fp32 whatever the model's dtype. Rows are padded on the right, which a causal model does not
    see. A batch whose logits would take more than `LOGITS_AT_ONCE` is passed through in parts.
    UserError: not enough memory, or losses that are no numbers.
    """
    ids = ids.to(model.device)
    rows = max(1, LOGITS_AT_ONCE // (ids.shape[1] * text_config(model.config).vocab_size))
    try:
        losses = torch.cat([_row_losses(model, part) for part in ids.split(rows)])
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU has too little memory for this ({first_line(error)}); lower --batch-size") from error
    losses = losses.cpu()
    check_numbers(-losses, f"log-likelihoods of {called(model)}", most=ROUNDING)
    return losses


def _row_losses(model: Any, ids: Tensor) -> Tensor:
    """`token_losses` of rows that pass at once: (B, T + 1) -> (B, T) on the model's device."""
    targets = ids[:, 1:, None]  # (B, T, 1)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (B, T, V)
    slices = []
    some = max(1, LOGITS_IN_FP32 // (logits.shape[0] * logits.shape[2]))  # positions
    for first in range(0, logits.shape[1], some):
        part = logits[:, first : first + some].float()
        right = part.gather(2, targets[:, first : first + some])[..., 0]
        slices.append(part.logsumexp(dim=2) - right)
    return torch.cat(slices, dim=1)


# ---- One export and one store ----------------------------------------------------------------------------------------


def measure_losses(
    export: Export,
    store: Path,
    documents: int = 1000,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    split: Split = "validation",
    again: bool = False,
    context: int | None = None,
) -> dict[str, Any]:
    """Losses of one export on a store, kept in EXPORT/evals/losses.json, one result for each (store, split).

    What is kept there is returned at once where it was measured alike: the same `PROTOCOL` and the same weights;
    `again` measures anew. Lists are in store order, `standard_error` is that of `loss` over documents.
    UserError: an unfinished store, one of another tokenizer, no documents, a context beyond the model's.
    """
    opened, config = open_store(export, store, split)
    if not opened.documents:
        raise UserError(f"{store} holds no {split} documents; give --split or prepare a store with some")
    length = model_context(export, config, context)
    asked = {
        "store_fingerprint": opened.fingerprint,
        "split": split,
        "limit": documents,
        "sample": "hash",
        "context": length,
        "batch_size": batch_size,
        "dtype": str(config.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        "device": str(resolve_device(device)),
        "versions": versions(),
        "grouped_by": opened.groups,
    }
    results = export.result("losses", [])
    weights = export.weights_sha256()
    for result in results:
        if not again and _alike(result, asked) and _weights_of(result) == (weights, _card(export.info)):
            return dict(result)
    for result in results if not again else ():
        alike = _alike(result, asked | {"limit": result.get("limit")}) and _weights_of(result)[0] == weights
        if alike and result["n"] > documents:
            raise UserError(
                f"{export.folder} keeps the losses of {result['n']} documents, and {documents} would replace them; ask "
                f"for as many, or measure again with `python -m evals losses ... --documents {documents} --overwrite`"
            )
    loaded = load_model(export, device, dtype)
    losses = document_losses(loaded, opened, documents, batch_size, length)
    result = {"store": str(opened.path), **asked, **facts(loaded), **_summary(losses)}
    with locked(export.results / ".losses.lock"):
        kept = export.result("losses", [])  # another process may have added to it meanwhile
        others = [r for r in kept if (r["store_fingerprint"], r["split"]) != (opened.fingerprint, split)]
        write_json(export.results / "losses.json", [*others, result])
    return result


def _alike(result: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a result was measured as is asked now."""
    return all(alike(key, result.get(key), asked[key]) for key in PROTOCOL)


def _weights_of(result: dict[str, Any]) -> tuple[str | None, tuple[Any, ...]]:
    """The weights that a result is of, and what it says of their origin."""
    return result.get("weights_sha256"), _card(result.get("model", {}))


def _card(facts: dict[str, Any]) -> tuple[Any, ...]:
    """Of hippoformer.json: a result tells it on, so that another card is another result."""
    return facts.get("checkpoint_sha256"), facts.get("dtype")


def _summary(losses: DocumentLosses) -> dict[str, Any]:
    loss, error = mean_loss(losses)
    return {
        "n": len(losses.indices),
        "loss": loss,
        "standard_error": error,
        "documents": losses.indices.tolist(),
        "tokens": losses.tokens.tolist(),
        "nats": losses.nats.tolist(),
        **({} if losses.groups is None else {"groups": losses.groups.tolist()}),
    }


def mean_loss(losses: DocumentLosses) -> tuple[float, float | None]:
    """Nats per token, and its standard error over documents, or over their groups; None for a single one.

    Both numerator and denominator vary from document to document, so the error is that of a ratio, linearised
    (Cochran 1977, Sampling Techniques, chapter 6, infinite population).
    """
    loss, tokens = losses.nats.sum() / losses.tokens.sum(), losses.tokens.sum()
    residuals = losses.nats - loss * losses.tokens
    if losses.groups is not None:
        residuals = np.bincount(losses.groups, residuals)
    n = len(residuals)
    if n < 2:
        return float(loss), None
    return float(loss), float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / tokens)


def format_results(names: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    """A table: nats per token with standard error over documents, or their groups, and perplexity."""
    rows = []
    for name, result in zip(names, results, strict=True):
        error = "" if result["standard_error"] is None else f" ± {result['standard_error']:.4f}"
        loss, tokens = f"{result['loss']:.4f}{error}", f"{sum(result['tokens']):,}"
        counted = f"{result['n']:,}"
        if "groups" in result:
            counted += f" in {len(set(result['groups'])):,} groups"
        rows.append([name, counted, tokens, loss, f"{np.exp(result['loss']):.2f}"])
    return text_table(["model", "documents", "tokens", "loss (nats per token)", "perplexity"], rows)


# ---- What every measurement on a store needs -------------------------------------------------------------------------


def open_store(export: Export, path: Path, split: Split) -> tuple[stores.TokenStore, Any]:
    """The split of a store, read only, and the export's config; no weight is read.

    UserError: no finished store there, or one made with another tokenizer than the export's.
    """
    from llm.pretrained import vocabulary

    if split not in ("train", "validation"):
        raise UserError(f"a store has no split {split}; give train or validation")
    opened = stores.TokenStore.open(path, split)
    models.check_tokenizer(export)
    config = export.config()
    try:
        stores.check_tokenizer(opened, tokenizer_of(export))
        stores.check_vocabulary(opened, vocabulary(config))
    except UserError as error:
        raise UserError(f"{export.folder} cannot be measured there: {error}") from error
    return opened, config


def tokenizer_of(export: Export) -> Any:
    """The export's tokenizer as preparation loads one, which decides its fingerprint: by way of a folder of its own."""
    with TemporaryDirectory() as folder:
        export.tokenizer().save_pretrained(folder)
        return load_tokenizer(folder)


def model_context(export: Export, config: Any, asked: int | None = None) -> int:
    """How many tokens the model reads at once: `asked`, else what it was trained with (`trained_context`).

    UserError: more than its positions, or neither is known.
    """
    positions = trained_context(config, {})
    if asked and positions is not None and asked > positions:
        raise UserError(f"{export.folder} has {positions} positions; give --context {positions} or less")
    context = asked or trained_context(config, export.info)
    if context is None:
        raise UserError(f"{export.folder}/config.json names no max_position_embeddings; give --context")
    return context


def labels(exports: Sequence[Export]) -> list[str]:
    """A name for each export: its run's; with the folder's where that is not enough, else the whole path."""
    names = [export.name for export in exports]
    for longer in (lambda e: f"{e.name} ({e.folder.resolve().name})", lambda e: str(e.folder)):
        names = [longer(export) if names.count(name) > 1 else name for export, name in zip(exports, names, strict=True)]
    return names
