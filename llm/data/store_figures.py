"""What one split of a token store holds: figures, lengths of documents, windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from ..common.errors import UserError
from ..common.processes import progress_bar
from .lost_text import LostText
from .shard import Manifest, boundary_tokens
from .store import REMAKE, TokenStore

SHORT = 1 << 20  # lengths below it are counted in an array; 84 billion tokens have room for 80,000 longer documents
BAR, ROWS = 24, 24  # of a histogram: characters, lines
SECONDS = 2  # a bar appears where something takes longer


class Lengths:
    """How often each document length occurs: exact, in 8 MB for documents of any number."""

    def __init__(self) -> None:
        self._short = np.zeros(SHORT, dtype=np.int64)
        self._long: Counter[int] = Counter()

    def add(self, lengths: np.ndarray) -> None:
        """Count documents of these lengths, [documents] int64."""
        counts = np.bincount(lengths[lengths < SHORT])
        self._short[: len(counts)] += counts
        self._long.update(lengths[lengths >= SHORT].tolist())

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """The lengths that occur, ascending, and how many documents have each: two int64 arrays of one size."""
        short, long = np.flatnonzero(self._short), sorted(self._long)
        counts = [self._short[short], np.array([self._long[length] for length in long], dtype=np.int64)]
        return np.append(short, np.array(long, dtype=np.int64)), np.concatenate(counts)


@dataclass
class Figures:
    """What one split holds and what it was made of. A length counts the ids that begin and end a document."""

    store: TokenStore
    lengths: np.ndarray  # [distinct] ascending
    counts: np.ndarray  # [distinct] documents of each length
    bytes_in: int = 0  # of text
    documents_in: int = 0  # those left out among them
    left_out: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)  # tokens of each
    lost: LostText = field(default_factory=LostText)

    @property
    def mean(self) -> float:
        return self.store.tokens / self.store.documents

    @property
    def bytes_per_token(self) -> float:
        """Of text, without the ids that begin and end documents."""
        marks = boundary_tokens(self.store.begin_of_document)
        return self.bytes_in / max(1, self.store.tokens - marks * self.store.documents)

    def percentile(self, percent: int) -> int:
        """The least length that at least so many per cent of the documents do not exceed."""
        rank = -(-percent * self.store.documents // 100)
        return int(self.lengths[np.searchsorted(np.cumsum(self.counts), rank)])

    def shares(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the documents and of the tokens whose document's length lies in [edges[i], edges[i + 1])."""
        documents, _ = np.histogram(self.lengths, edges, weights=self.counts)
        tokens, _ = np.histogram(self.lengths, edges, weights=self.counts * self.lengths)
        return documents / self.store.documents, tokens / self.store.tokens


def figures_of(store: TokenStore) -> Figures:
    """Read the manifests and document ends of a split. Raises UserError where one is missing or damaged."""
    lengths = Lengths()
    with _bar(store, store.documents, "documents") as bar:
        for some in store.document_lengths():
            lengths.add(some)
            bar.update(len(some))
    figures = Figures(store, *lengths.distinct())
    shards = store.shards()
    for shard in _bar(store, len(shards), "manifests", shards):
        manifest = Manifest.read(shard.folder, shard.name)
        if manifest is None:
            raise UserError(f"{shard.folder / shard.name}.json is missing or no manifest; {REMAKE}")
        figures.bytes_in += manifest.bytes_in
        figures.documents_in += manifest.documents_in
        figures.left_out.update(manifest.left_out)
        figures.bad += manifest.bad
        figures.lost.add(LostText(**manifest.lost))
        figures.sources[str(manifest.source.get("location"))] += manifest.tokens
    return figures


def _bar(store: TokenStore, total: int, what: str, items: Iterable[Any] | None = None) -> tqdm:
    """A bar that appears where something takes a while."""
    return progress_bar(total, 0, f"{store.split}, {what}", "", iterable=items, unit_scale=True, delay=SECONDS)


def length_edges(figures: Figures, bins: int) -> np.ndarray:
    """Whole numbers that cut the lengths into so many bins a doubling; fewer where there are none between."""
    shortest, longest = int(figures.lengths[0]), int(figures.lengths[-1])
    powers = np.arange(np.floor(bins * np.log2(shortest)), np.floor(bins * np.log2(longest)) + 2)
    edges = np.unique(np.ceil(2 ** (powers / bins)).astype(np.int64))
    return np.append(edges, longest + 1) if edges[-1] <= longest else edges


def histogram(figures: Figures) -> Iterator[str]:
    """Shares of documents and of tokens by length, as bars: one, two or four rows a doubling of the length."""
    edges = next(edges for bins in (4, 2, 1) if len(edges := length_edges(figures, bins)) <= ROWS or bins == 1)
    shares = figures.shares(edges)
    scale = BAR / max(share.max() for share in shares)
    yield f"{figures.store.split}: tokens in a document, share of documents, share of tokens"
    for low, high, documents, tokens in zip(edges, edges[1:] - 1, *shares, strict=False):
        label = f"{low:,} to {high:,}" if high > low else f"{low}"
        bars = [f"{share:>8.1%} {'█' * round(share * scale):{BAR}}" for share in (documents, tokens)]
        yield f"{label:>24}{bars[0]}{bars[1]}".rstrip()


def windows(store: TokenStore, starts: Sequence[int], tokens: int) -> Iterator[str]:
    """The text from each of these positions on."""
    file = store.path / "tokenizer" / "tokenizer.json"
    try:
        # What the store was made with. transformers would decode the same, two seconds later.
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(
            f"{file} cannot be read ({error}); put the store's tokenizer there or give --windows 0"
        ) from error
    for start in starts:
        ids = store.read(start, max(0, min(tokens, store.tokens - start)))
        yield f"{store.split} from token {start:,}: {tokenizer.decode(ids.tolist(), skip_special_tokens=False)!r}"
