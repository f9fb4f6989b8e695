"""`python -m llm batch RUN --step N`: the text of the batch that made step N of a run.

Stages: run.json and config.yaml -> the run's stores, held against its fingerprint -> the rows of global batch N - 1
(`data/mixture.py`) -> their tokens -> where they are from, and their text.

Nothing but this one batch is read. Its digest is what the run added to data_digest at this step (`data/rows.py`).
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..common.errors import UserError
from ..data.shard import Manifest
from . import reading

if TYPE_CHECKING:  # they import torch, which --help does without
    import numpy as np

    from ..data.mixture import Component, Item, MixtureOrder
    from ..data.rows import Rows
    from ..data.store import ListedShard, TokenStore

FEW = 3  # sources of one row that are named
FACTS = ("loss", "median", "gradient_norm")  # of an event


# ---- The batch -------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """The training data of a run: its stores, their rows, and the order of these."""

    components: list[Component]
    rows: Rows
    order: MixtureOrder

    def batch(self, step: int) -> Batch:
        """What the `step`-th optimizer step was made from; steps count from 1, as in metrics.csv and events.jsonl."""
        items = self.order.rows(step - 1, 0, self.order.batch_size)
        return Batch(step, items, self.rows.read(items))


@dataclass
class Batch:
    """The rows of a step's global batch: (store, window or document) of each, and its tokens, [at most T + 1]."""

    step: int
    items: list[Item]
    tokens: list[np.ndarray]

    @property
    def predicted(self) -> int:
        """Tokens predicted: all but the first of each row."""
        return sum(len(tokens) - 1 for tokens in self.tokens)

    @property
    def digest(self) -> int:
        """The sum of the rows' digests, by which two steps of any two runs can be compared."""
        from ..data.rows import DIGESTS, row_digest

        return sum(row_digest(self.step - 1, row, tokens) for row, tokens in enumerate(self.tokens)) % DIGESTS


def data_of(run: Path, stores: Sequence[Path] = ()) -> Data:
    """Open the training data of the run in the folder `run`.

    Args:
        run: the run folder.
        stores: where its stores are now, in the order of its config; none: where the config says.

    Raises:
        UserError: no run folder, a store that is not there, or one that does not hold the run's data.
    """
    from ..data.contradictions import of_weights
    from ..data.mixture import MixtureOrder, mixed_fingerprint, open_stores
    from ..data.rows import PACKING, Rows

    record, config = reading.record(run), reading.config(run)
    try:
        given, seed = config["data"], int(config["seed_everything"])
        store, context, batch_size = given["store"], int(given["context"]), int(given["batch_size"])
        packing, masked = given.get("packing", "packed"), bool(given.get("mask_documents"))
        kind = PACKING.get(packing, packing)
        weights = (
            {str(path): float(weight) for path, weight in store.items()}
            if isinstance(store, dict)
            else {str(store): 1.0}
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{run}/config.yaml lacks what makes a batch ({error!r}): put the run's config there"
        ) from error
    if problems := of_weights(weights):
        raise UserError("; ".join(problems))
    components = open_stores(_found(run, weights, stores))
    facts = {
        "store_fingerprint": mixed_fingerprint(components),
        "seed": seed,
        "batch_size": batch_size,
        "context": context,
        "rows": kind,
    }
    _check(run, record, facts)
    rows = Rows([component.train for component in components], context, kind, masked)
    order = MixtureOrder(rows.counts, [component.share for component in components], batch_size, seed)
    return Data(components, rows, order)


def _found(run: Path, weights: dict[str, float], stores: Sequence[Path]) -> dict[str, float]:
    """The weights by the paths where the stores are."""
    if stores and len(stores) != len(weights):
        raise UserError(
            f"{run} draws on {len(weights)} store(s), and --store names {len(stores)}: give one for each of "
            f"{', '.join(weights)}, in this order"
        )
    found = dict(zip(map(str, stores), weights.values(), strict=True)) if stores else weights
    for path in found:
        if not Path(path).exists():
            relative = not stores and not Path(path).is_absolute()
            go = "go to the folder where the run was started, from which its path counts, or " if relative else ""
            raise UserError(f"the store {path} of {run} is not here: {go}give --store with the place where it is now")
    return found


def _check(run: Path, record: dict[str, Any], facts: dict[str, Any]) -> None:
    """UserError where the data is not what run.json says that the run was made from."""
    known: dict[str, Any] = {name: record[name] for name in ("store_fingerprint", "seed") if name in record}
    known |= record.get("identity") or {}
    different = [
        f"{name} ({known[name]!s:.16} in run.json, {fact!s:.16} here)"
        for name, fact in facts.items()
        if known.get(name, fact) != fact
    ]
    if different:
        raise UserError(
            f"this is not the data that {run} was trained on, it differs in {', '.join(different)}: give --store with "
            "the run's own, and leave its config.yaml as it was"
        )


# ---- What is shown ---------------------------------------------------------------------------------------------------


class Origin:
    """Where the rows of one store are from. `name` is the store's, where a run draws on several."""

    def __init__(self, store: TokenStore, rows: Rows, name: str | None) -> None:
        self.store, self.rows, self.name = store, rows, name

    def describe(self, item: int, tokens: Sequence[int]) -> str:
        """A row in words: which window or document, at which positions of the store, from which sources."""
        if self.rows.kind == "windows":
            start = item * self.rows.context
            documents = 1 + tokens[:-1].count(self.store.end_of_document)
            note = f", of {documents} documents" if documents > 1 else ""
        else:
            start, end = self.store.document(item)
            note = f", the first {len(tokens):,} of {end - start:,}" if end - start > len(tokens) else ""
        what = f"{self.rows.kind.removesuffix('s')} {item:,}, tokens {start:,} to {start + len(tokens) - 1:,}{note}"
        of = f" of {self.name}" if self.name else ""
        sources = self.sources(start, start + len(tokens))
        more = f" and {len(sources) - FEW} more" if len(sources) > FEW else ""
        return f"{what}{of}" + (f"; from {'; '.join(sources[:FEW])}{more}" if sources else "")

    def sources(self, start: int, stop: int) -> list[str]:
        """The files that the tokens at positions start to stop - 1 are from; without those whose manifest is lost."""
        first, last = (bisect_right(self._ends, position) for position in (start, stop - 1))
        shards = [shard for shard in self._shards[first : last + 1] if shard.tokens]
        manifests = [Manifest.read(shard.folder, shard.name) for shard in shards]
        return [str(manifest.source.get("location")) for manifest in manifests if manifest]

    @cached_property
    def _shards(self) -> list[ListedShard]:
        return self.store.shards()

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.tokens for shard in self._shards))


def heading(run: Path, data: Data, batch: Batch) -> Iterator[str]:
    """The batch as a whole, and what events.jsonl has on its step."""
    rows = data.rows
    masked = ", documents masked" if rows.mask_documents else ""
    yield f"{run}, step {batch.step:,}: {len(batch.items):,} rows of {rows.context:,} tokens ({rows.kind}{masked})"
    yield f"{batch.predicted:,} tokens are predicted; the digest of these rows is {batch.digest:016x}"
    for event in reading.events(run)[0]:
        if event["step"] == batch.step:
            facts = [f"{name} {reading.fact(event[name])}" for name in FACTS if name in event]
            yield ": ".join([f"at this step: {event['event']}", *([", ".join(facts)] if facts else [])])


def lines(data: Data, batch: Batch, shown: range, tokenizer: Tokenizer, characters: int, ids: bool) -> Iterator[str]:
    """Rows of the batch: where each is from, its text, cut at so many characters (0: all of it), and its ids."""
    several = len(data.components) > 1
    origins = [Origin(part.train, data.rows, part.path if several else None) for part in data.components]
    for row in shown:
        (store, item), tokens = batch.items[row], batch.tokens[row].tolist()
        yield f"\nrow {row}: {origins[store].describe(item, tokens)}"
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        left = len(text) - characters if characters else 0
        yield f"  {text[: characters or None]!r}" + (f" and {left:,} characters more" if left > 0 else "")
        if ids:
            yield f"  {' '.join(map(str, tokens))}"


def tokenizer_of(run: Path) -> Tokenizer:
    """The run's own tokenizer. transformers would decode the same, two seconds later. Raises UserError."""
    file = run / "tokenizer" / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{file} cannot be read ({error}): put the tokenizer of the run's store there") from error


# ---- Command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm batch`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="as in metrics.csv and events.jsonl")
    parser.add_argument(
        "--rows", type=int, nargs=2, metavar=("FIRST", "LAST"), help="show these rows of the global batch, from 0 on"
    )
    parser.add_argument(
        "--characters", type=int, default=200, metavar="C", help="show so many of each row, 0 for all (default: 200)"
    )
    parser.add_argument("--ids", action="store_true", help="show the token ids of each row too")
    parser.add_argument(
        "--store",
        type=Path,
        nargs="+",
        default=[],
        help="where the run's store is now; of a mixture all of them, in the order of its config.yaml",
    )
    parser.epilog = "example: python -m llm batch runs/stories/values --step 1200 --rows 0 7"


def run(args: argparse.Namespace) -> None:
    """Print the batch.

    Raises:
        UserError: no run folder, no such step or row, or stores that are not there or not the run's.
    """
    if args.step < 1 or args.characters < 0:
        raise UserError("give --step >= 1 (steps count from 1) and --characters >= 0")
    reading.record(args.run)
    steps = (reading.config(args.run).get("trainer") or {}).get("max_steps") or 0
    if 0 < steps < args.step:
        raise UserError(f"{args.run} has no step {args.step}: its config.yaml ends at step {steps}")
    data, tokenizer = data_of(args.run, args.store), tokenizer_of(args.run)
    size = data.order.batch_size
    first, last = args.rows or (0, size - 1)
    if not 0 <= first <= last < size:
        raise UserError(f"--rows {first} {last} is no range of the rows 0 to {size - 1} of this batch")
    batch = data.batch(args.step)
    print(*heading(args.run, data, batch), sep="\n")
    for line in lines(data, batch, range(first, last + 1), tokenizer, args.characters, args.ids):
        print(line)
