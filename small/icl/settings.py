"""What a training on the pair task is asked to be: task, sizes, variants, training; and presets. Imports no torch."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llm.common.errors import UserError
from llm.common.limits import BELOW_ONE, INSIDE, NOT_NEGATIVE, POSITIVE, SHARE, at_least

from ..experiment.options import option, problems, raise_problems

CLASSIC = "classic"
PRODUCTS = ("float32", "bfloat16")
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"variants": ("classic", "queries", "keys", "values"), "seeds": 4},
    "quick": {"variants": ("classic", "values"), "seeds": 2},
}


@dataclass(frozen=True)
class Task:
    """Rules of the pair task. The defaults are those of the two-layer transformer (Section 3).

    Args:
        pairs: in the context, before the query.
        copies: of each class in a bursty sequence: the burstiness B.
        classes, labels: how many; class c has the label c mod labels.
        bursty: share of the sequences of known classes that are bursty.
        novel: share of the sequences with redrawn classes.
        novel_classes: how many are redrawn for a batch.
        noise: epsilon, how far the objects of a class differ.
        content: E.
        positions: one-hot positions; 0 leaves them out.
        distinct_labels: no two classes of a bursty sequence have one label.
        blank: a token of zeros in the place of the missing label ends the sequence (AMICL).

    Raises:
        UserError: rules that contradict each other, all of them named.
    """

    classes: int = option(512, "number of known classes", at_least(1))
    labels: int = option(32, limit=at_least(1))
    pairs: int = option(8, "object-label pairs in the context", at_least(1))
    copies: int = option(2, "copies of each class in a bursty sequence", at_least(1))
    bursty: float = option(0.5, "fraction of the known-class sequences that are bursty", SHARE)
    novel: float = option(0.5, "fraction of sequences with novel classes", SHARE)
    novel_classes: int = option(128, limit=at_least(1))
    noise: float = option(0.1, "noise of the objects, epsilon", NOT_NEGATIVE)
    content: int = option(85, limit=at_least(1))
    positions: int = 65
    distinct_labels: bool = True
    blank: bool = False

    def __post_init__(self) -> None:
        raise_problems(problems(self))  # what follows divides by them
        found = [
            f"{name} {getattr(self, name)} must be a multiple of the {self.labels} labels, so that each has as many"
            for name in ("classes", "novel_classes")
            if getattr(self, name) % self.labels
        ]
        if self.distinct_labels and self.pairs % self.copies:
            found.append(f"pairs {self.pairs} must be a multiple of the copies {self.copies}")
        if self.distinct_labels and self.pairs // self.copies > self.labels:
            found.append(
                f"{self.pairs} pairs in {self.copies} copies need {self.pairs // self.copies} different labels of "
                f"{self.labels}: give fewer pairs, more copies or more labels"
            )
        if self.positions and self.positions < self.tokens:
            found.append(f"pairs {self.pairs} make {self.tokens} tokens, and positions {self.positions} are fewer")
        raise_problems(found)

    @property
    def tokens(self) -> int:
        """T."""
        return 2 * self.pairs + 1 + self.blank

    @property
    def width(self) -> int:
        """D, components of a token."""
        return self.positions + self.content


@dataclass(frozen=True)
class IclSizes:
    """Sizes of the transformer.

    Args:
        width: D, of a token; the values are as wide, as nothing projects them back (the paper's text has 128 for them
            too, which could not be added to tokens of 150).
        labels: L.
        key_width: K; 128 in the paper, 150 in the authors' code.
        neurons: F, in each of the three layers of the MLP; 128 in the paper, the token's width in its public code.
        layers: of attention.
    """

    width: int = option(150, limit=at_least(1))
    labels: int = option(32, limit=at_least(1))
    key_width: int = option(128, "width of queries and keys", at_least(1))
    neurons: int = option(128, "neurons per layer of the MLP", at_least(1))
    layers: int = option(2, "number of attention layers", at_least(1))

    def __post_init__(self) -> None:
        raise_problems(problems(self))


@dataclass(frozen=True)
class Variant:
    """What differs from the classic transformer."""

    name: str
    streams: tuple[str, ...] = ()
    source: str = "previous"
    learned: bool = False  # the stream's weight: one scalar a layer
    nmda: float | None = None  # alpha of NMDA in the MLP; None is ReLU

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """STREAMS[:OPTION...]: `classic`, `values`, `queries+values`, `values:accumulated:learned`, `classic:nmda10`.

        Raises:
            UserError: a part that is neither a stream nor an option.
        """
        from llm.model.streams import SINGLE, STREAMS  # imports torch, which --help does without

        first, *parts = name.split(":")
        streams = () if first == CLASSIC else tuple(first.split("+"))
        if unknown := [stream for stream in streams if stream not in STREAMS]:
            raise UserError(
                f"variant {name!r}: {unknown[0]!r} is not a stream; give {CLASSIC}, or any of {', '.join(STREAMS)} "
                "joined by +"
            )
        found: dict = {}
        for part in parts:
            kind, value = _option(part, SINGLE)
            if kind in found:
                raise UserError(f"variant {name!r}: {part!r} is a second {kind}; give one")
            if kind is not None:
                found[kind] = value
            else:
                raise UserError(
                    f"variant {name!r}: {part!r} is not an option; give {', '.join(SINGLE)}, learned or nmdaALPHA, as "
                    "in values:accumulated:nmda10"
                )
        if not streams and found.keys() & {"source", "learned"}:
            raise UserError(f"variant {name!r}: {CLASSIC} has no stream, so give it nmdaALPHA alone")
        return cls(name, tuple(stream for stream in STREAMS if stream in streams), **found)


def _option(text: str, sources: Collection[str]) -> tuple[str | None, Any]:
    """Return the field of a variant that an option sets, and its value; no field for no option."""
    if text in sources:
        return "source", text
    if text == "learned":
        return "learned", True
    try:
        alpha = float(text.removeprefix("nmda")) if text.startswith("nmda") else -1.0
    except ValueError:
        return None, None
    return ("nmda", alpha) if 0 <= alpha < float("inf") else (None, None)


@dataclass(frozen=True)
class IclSettings:
    """Training of the runs of all variants and seeds.

    Args:
        variants: names for `Variant.parse`.
        decay: each step multiplies the weights by 1 - decay.
        evaluation: sequences of each of Test, IC, IC2 and IW in a snapshot.
        until: stop when all runs have this accuracy, on IC and IC2, for good: above it in `patience` snapshots in a
            row. None (or 0) trains all steps.
        products: dtype of activations and matrix products, see `Transformers`.
    """

    variants: tuple[str, ...] = option(("classic", "queries", "keys", "values"), "variants to train")
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    steps: int = option(75_000, "maximum number of training steps", at_least(1))
    batch: int = option(128, "sequences per step", at_least(1))
    lr: float = option(0.01, "learning rate of plain SGD", POSITIVE)
    decay: float = option(1e-6, limit=BELOW_ONE)
    snapshot_every: int = option(500, "steps between snapshots", at_least(1), name="evaluate-every")
    evaluation: int = option(10_000, "sequences in each of the evaluation sets Test, IC, IC2 and IW", at_least(1))
    until: float | None = option(
        0.95, "accuracy on IC and IC2 that ends the training; 0 trains all --steps", INSIDE, name="stop-accuracy"
    )
    patience: int = option(5, limit=at_least(1))
    products: str = option(
        "float32",
        "dtype of activations and matrix products; weights, softmax and loss stay float32",
        choices=PRODUCTS,
        name="dtype",
    )

    def __post_init__(self) -> None:
        if self.until == 0:
            object.__setattr__(self, "until", None)
        found = problems(self)
        if self.snapshot_every > 0 and self.steps % self.snapshot_every:
            found.append(f"steps {self.steps} must be a multiple of evaluate-every {self.snapshot_every}")
        if len(set(self.variants)) < len(self.variants) or not self.variants:
            found.append("give at least one variant, and none twice")
        if not self.seeds or min(self.seeds) < 0:
            found.append("give at least one seed, and none below 0")
        for name in self.variants:
            try:
                Variant.parse(name)
            except UserError as error:
                found.append(str(error))
        raise_problems(found)
