"""Recall from the context: key-value pairs, repeated random tokens, and a needle in the store's own text.

seed, store -> sequences (the same for all models) -> one pass each -> a value a sequence -> EXPORT/evals/recall.json

- MQAR, multi-query associative recall (Arora et al. 2023, "Zoology", Section 3): P pairs of a key and a value, then
  each key once more among other tokens; the model is to tell its value. All ids are random, so that nothing but the
  context says which. Chance among the P values is 1 / P.
- Repeated random tokens (Olsson et al. 2022): only the first copy tells the second. Chance is ln V nats, V ids.
- Needle: a span of text is put into other text of the store, and its first half once more at the end. Measured is the
  loss of its second half there, against the same where another span was put in: chance is a gain of 0.

No model is trained for this, and nothing is downloaded. Dimension letters: N sequences, B of a batch, T tokens, P
pairs, D depths, V vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evals.exports import Export, LoadedModel, called, check_numbers, facts, load_model
from evals.probes.heads import evaluating, repeated
from evals.probes.incontext import window_batches, window_items
from evals.probes.losses import LOGITS_AT_ONCE, model_context, open_store, token_losses
from llm.common.devices import resolve_device
from llm.common.errors import UserError
from llm.common.exported import text_config
from llm.common.files import write_json
from llm.common.processes import progress_bar
from llm.common.tables import text_table
from llm.data.store import TokenStore
from llm.data.stories import Split

PAIRS = (2, 8, 32)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the needle, as a share of the text around it
SPAN = 16  # tokens of a needle, where it and its repetition are a third of the context at most
SHORTEST = 24  # tokens of context: a needle of four

Record = dict[str, Any]


class Queries(NamedTuple):
    """Sequences (N, T) int64, and in each the places of the P queries (N, P), whose next token is the value to tell."""

    ids: Tensor
    places: Tensor


class RecallSettings(NamedTuple):
    """What is generated: numbers of pairs, lengths in tokens (None: the context), sequences of each kind, seed."""

    pairs: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    sequences: int = 64
    seed: int = 0


# ---- Sequences -------------------------------------------------------------------------------------------------------


def mqar_sequences(
    vocabulary: int, pairs: int, length: int, sequences: int, seed: int, first_token: int | None = None
) -> Queries:
    """Draw sequences of `length` tokens with `pairs` key-value pairs, and each pair once more at a random place.

    After `first_token`, if there is one, come the pairs; then key and value again of each, in random order and with
    other tokens between. No two of the keys and values are equal, and the tokens between are none of them.
    UserError: too few tokens for 2 x 2 a pair, or too few ids.
    """
    begin = 0 if first_token is None else 1
    between = length - begin - 4 * pairs
    ids = vocabulary - (first_token is not None and 0 <= first_token < vocabulary)
    if pairs < 2 or between < 0 or ids < 2 * pairs + (between > 0):
        raise UserError(
            f"{pairs} pairs in {length} tokens of {ids:,} ids cannot be: it takes two pairs, {4 * pairs + begin} "
            f"tokens and {2 * pairs + (between > 0)} ids; give other --pairs or --lengths"
        )
    draw = np.random.default_rng([seed, pairs, length])
    rows, places = np.empty((sequences, length), dtype=np.int64), np.empty((sequences, pairs), dtype=np.int64)
    for row, place in zip(rows, places, strict=True):
        drawn = draw.permutation(vocabulary)
        drawn = drawn[drawn != first_token] if begin else drawn
        both, others = drawn[: 2 * pairs].reshape(pairs, 2), drawn[2 * pairs :]
        if first_token is not None:
            row[0] = first_token
        row[begin : begin + 2 * pairs] = both.ravel()
        parts = draw.permutation(np.repeat([1, 0], [pairs, between]))  # a pair, or a token between
        starts = begin + 2 * pairs + np.cumsum(1 + parts) - (1 + parts)
        row[starts[parts == 0]] = draw.choice(others, between) if between else []
        place[:] = starts[parts == 1]
        row[place], row[place + 1] = draw.permutation(both).T
    return Queries(torch.from_numpy(rows), torch.from_numpy(places))


class Needles(NamedTuple):
    """Texts with the needle and with another one in its place, (D, N, T + 1) int64; `predicted`: how many tokens at
    the end of each row are scored, half of the needle."""

    with_needle: Tensor
    without: Tensor
    predicted: int


def needle_sequences(store: TokenStore, windows: int, context: int, depths: Sequence[float] = DEPTHS) -> Needles:
    """Put spans of text into other text of a store. Half of the windows drawn are the text, half hold the spans.

    UserError: too short a context, or too little text for four windows.
    """
    if context < SHORTEST:
        raise UserError(f"a context of {context} is too short for a needle; give --context {SHORTEST} or more")
    span = min(SPAN, (context + 1) // 6 // 2 * 2)
    items = window_items(store, 2 * windows, context)
    if len(items) < 4:
        raise UserError(
            f"the {store.split} split of {store.path} holds {len(items)} windows of {context:,} tokens, and needles "
            "take four; give a smaller --context or another --split"
        )
    rows = torch.cat(list(window_batches(store, items[: len(items) // 2 * 2], context, len(items))))
    text, spans = rows[0::2, : context + 1 - 2 * span], rows[1::2, -span:]
    others = spans.roll(1, dims=0)
    made = []
    for put in (spans, others):
        cuts = [round(depth * text.shape[1]) for depth in depths]
        made.append(torch.stack([torch.cat([text[:, :cut], put, text[:, cut:], spans], dim=1) for cut in cuts]))
    return Needles(made[0], made[1], span // 2)


# ---- Scores ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def mqar_scores(model: Any, queries: Queries, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of the queries whose value has the highest logit of the P values, and nats of the values: (N,) each."""
    vocabulary = text_config(model.config).vocab_size
    rows = max(1, min(batch_size, LOGITS_AT_ONCE // (queries.ids.shape[1] * vocabulary)))
    right, nats = [], []
    with evaluating(model):
        for ids, places in zip(queries.ids.split(rows), queries.places.split(rows), strict=True):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits  # (B, T, V)
            at = logits[torch.arange(len(ids))[:, None], places].float().cpu()  # (B, P, V)
            values = ids.gather(1, places + 1)  # (B, P)
            among = at.gather(2, values[:, None, :].expand(-1, values.shape[1], -1))  # (B, P, P): of each value
            right.append((among.argmax(dim=2) == torch.arange(values.shape[1])).double().mean(dim=1))
            nats.append((at.logsumexp(dim=2) - at.gather(2, values[..., None])[..., 0]).double().mean(dim=1))
    losses = torch.cat(nats).numpy()
    check_numbers(-losses, f"log-likelihoods of {called(model)} on key-value pairs")
    return torch.cat(right).numpy(), losses


def copy_losses(model: Any, ids: Tensor, length: int, batch_size: int) -> np.ndarray:
    """Nats per token of the first and second copy, (N, 2), of (N, T) ids; of all tokens of a copy but its first."""
    losses = np.concatenate([token_losses(model, rows).double().numpy() for rows in ids.split(batch_size)])
    return np.stack([losses[:, -2 * length + 1 : -length].mean(1), losses[:, -length + 1 :].mean(1)], axis=1)


def needle_gains(model: Any, needles: Needles, batch_size: int) -> np.ndarray:
    """Nats per token by which the needle in the text lowers the loss of its second half: (D, N)."""

    def mean_loss(ids: Tensor) -> np.ndarray:
        flat = ids.flatten(0, 1)
        losses = torch.cat([token_losses(model, rows)[:, -needles.predicted :] for rows in flat.split(batch_size)])
        return losses.double().mean(dim=1).numpy().reshape(ids.shape[:2])

    return mean_loss(needles.without) - mean_loss(needles.with_needle)


# ---- One export ------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What one model is shown."""

    export: Export
    store: TokenStore
    context: int
    mqar: list[tuple[int, int]]  # pairs, length
    needles: Needles


def measure_recall(
    exports: Sequence[Export],
    store: Path,
    settings: RecallSettings,
    context: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    split: Split = "validation",
) -> list[Record]:
    """Measure every export and keep each result in EXPORT/evals/recall.json.

    All that can be refused without a model is refused before the first is loaded.
    """
    resolve_device(device)
    plans = []
    for export in exports:
        opened, config = open_store(export, store, split)
        length = model_context(export, config, context)
        needles = needle_sequences(opened, settings.sequences, length)
        plans.append(Plan(export, opened, length, chosen(settings, length, opened), needles))
    results = []
    for plan in plans:
        results.append(_measure(plan, settings, batch_size, device, dtype))
        write_json(plan.export.results / "recall.json", results[-1])
    return results


def chosen(settings: RecallSettings, context: int, store: TokenStore) -> list[tuple[int, int]]:
    """Numbers of pairs and lengths; those of the default that fit where none are given.

    UserError: one that is given does not fit the context or the vocabulary.
    """
    lengths = settings.lengths or (context,)
    if too_long := [length for length in lengths if length > context]:
        raise UserError(f"--lengths {too_long[0]} is more than the context of {context}; give at most that")
    first = _first_token(store)
    ids = store.vocab_size - 1
    wanted = [(pairs, length) for pairs in settings.pairs or PAIRS for length in lengths]
    if settings.pairs:
        for pairs, length in wanted:
            mqar_sequences(store.vocab_size, pairs, length, 1, 0, first)
        return wanted
    fitting = [(p, length) for p, length in wanted if 4 * p + 1 <= length and 2 * p + 1 <= ids]
    if not fitting:
        raise UserError(f"{PAIRS[0]} pairs take {4 * PAIRS[0] + 1} tokens; give longer --lengths, or --pairs")
    return fitting


def _first_token(store: TokenStore) -> int:
    return store.end_of_document if store.begin_of_document is None else store.begin_of_document


def _measure(plan: Plan, settings: RecallSettings, batch_size: int, device: str, dtype: str) -> Record:
    loaded = load_model(plan.export, device, dtype)
    needles = needle_gains(loaded.model, plan.needles, batch_size)
    return {
        "store": str(plan.store.path),
        "store_fingerprint": plan.store.fingerprint,
        "split": plan.store.split,
        "settings": [list(each) for each in plan.mqar],
        "sequences": settings.sequences,
        "seed": settings.seed,
        "context": plan.context,
        "batch_size": batch_size,
        **facts(loaded),
        "mqar": _mqar(loaded, plan, settings, batch_size),
        "induction": _induction(loaded, plan, settings, batch_size),
        "needle": [
            {"depth": depth, "chance": 0.0, **summary("gain", gains)}
            for depth, gains in zip(DEPTHS, needles, strict=True)
        ],
    }


def _mqar(loaded: LoadedModel, plan: Plan, settings: RecallSettings, batch_size: int) -> list[Record]:
    found = []
    first = _first_token(plan.store)
    what = f"{loaded.export.name}, key-value pairs"
    for pairs, length in progress_bar(len(plan.mqar), 0, what, "length", iterable=plan.mqar, leave=False, delay=1):
        queries = mqar_sequences(plan.store.vocab_size, pairs, length, settings.sequences, settings.seed, first)
        right, losses = mqar_scores(loaded.model, queries, batch_size)
        scores = {**summary("accuracy", right), "loss": float(losses.mean())}
        found.append({"pairs": pairs, "length": length, "chance": 1 / pairs, **scores})
    return found


def _induction(loaded: LoadedModel, plan: Plan, settings: RecallSettings, batch_size: int) -> Record:
    """Loss of the second copy of random tokens that fill the context, next to the first copy's and chance."""
    known, first = plan.store.vocab_size, _first_token(plan.store)
    length = min((plan.context - 1) // 2, known - 1)
    ids = repeated(known, settings.sequences, length, settings.seed, first)
    losses = copy_losses(loaded.model, ids, length, batch_size)
    chance = {"copy": length, "chance": math.log(known), "loss_first": float(losses[:, 0].mean())}
    return {**chance, **summary("loss_second", losses[:, 1])}


def summary(name: str, values: np.ndarray) -> Record:
    """Mean of (N,) values under `name`, its standard error, and the values themselves."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: float(values.mean()), "standard_error": error, "values": values.tolist()}


def format_results(names: Sequence[str], results: Sequence[Record]) -> str:
    """A table: a line for each model and measure, with standard error and chance level."""
    lines = []
    for name, result in zip(names, results, strict=True):
        for each in result["mqar"]:
            what = f"{each['pairs']} pairs in {each['length']:,} tokens, right %"
            lines.append([name, what, _cell(each, "accuracy", 100), f"{100 * each['chance']:.2f}"])
        copies = result["induction"]
        what = f"second copy of {copies['copy']:,} random tokens, nats per token"
        lines.append([name, what, _cell(copies, "loss_second"), f"{copies['chance']:.2f}"])
        for each in result["needle"]:
            what = f"needle at {100 * each['depth']:.0f}% of the text, gain in nats per token"
            lines.append([name, what, _cell(each, "gain"), "0.00"])
    return text_table(["model", "measure", "value", "chance"], lines)


def _cell(result: Record, name: str, scale: int = 1) -> str:
    error = result["standard_error"]
    return f"{scale * result[name]:.2f}" + ("" if error is None else f" ± {scale * error:.2f}")
