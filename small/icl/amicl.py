"""AMICL: in-context learning by one step of an associative memory, batched over trials.

Burns et al. 2025, Section 2.2. The tokens x_1, ..., x_s of a trial end with an object x_{s-1} and a blank
x_s. The memory is universal (Millidge et al., 2022), PROJECTION(SEPARATION(SIMILARITY(K, Q)), V), with fixed

    k_i = q_i = (a x_{i-1} + x_i) / (a + 1), x_0 = x_s;    k_s = 0;    v_i = x_i

and what the last query q_s retrieves is read as the label whose vector it is most like. With dot product and softmax
it is the language models' attention function at scale 1.

The paper and the authors' notebook (github.com/tfburns/AMICL-and-residual-attention-streams) differ in the task, in the
last key and in what is right; `amicl_trials` has both conventions.

Dimension letters: N trials, S tokens, E components, A values of a, L labels.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.common.errors import UserError
from llm.common.tables import text_table

from .amicl_trials import CLASSES, CONVENTIONS, Convention, Trials, pearsons_plateau

ELEMENTS = 2_000_000  # token components worked on at a time: 8 MB, about what a core's cache holds


# ---- Similarity, separation, projection ------------------------------------------------------------------------------


def dot(query: Tensor, key: Tensor) -> Tensor:
    """Dot product."""
    return query @ key.mT


def pearson(query: Tensor, key: Tensor) -> Tensor:
    """Pearson's correlation over the components; 0 where a vector does not vary."""
    query, key = (part - part.mean(-1, keepdim=True) for part in (query, key))
    return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT


def manhattan(query: Tensor, key: Tensor) -> Tensor:
    """Minus the Manhattan distance."""
    return -torch.cdist(query, key, p=1)


def euclidean(query: Tensor, key: Tensor) -> Tensor:
    """Minus the Euclidean distance."""
    return -torch.cdist(query, key, p=2)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (N, Q, E), (N, S, E) -> (N, Q, S), more is more alike
    "dot": dot,
    "pearson": pearson,
    "manhattan": manhattan,
    "euclidean": euclidean,
}
SEPARATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # scores (N, Q, S) -> weights (N, Q, S)
    "identity": lambda scores: scores,
    "softmax": lambda scores: scores.softmax(-1),
    "argmax": lambda scores: F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype),  # the first of equals
}
PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # tokens (N, S, E) -> values (N, S, E)
    "identity": lambda tokens: tokens,  # auto-association, the paper's
    "next": lambda tokens: tokens.roll(-1, 1),  # hetero-association: what came after
}


def queries_and_keys(tokens: Tensor, a: float, last_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Queries and keys of tokens (N, S, E), both (N, S, E); `last_key` (N, E) takes the place of k_s = 0."""
    queries = (a * tokens.roll(1, 1) + tokens) / (a + 1)
    keys = queries.clone()
    keys[:, -1] = 0 if last_key is None else last_key
    return queries, keys


def attention(
    tokens: Tensor, a: float, similarity: str, separation: str, last_key: Tensor | None = None, last: bool = False
) -> Tensor:
    """Weights of each token's query, or of the last one's alone, on all keys: (N, S or 1, S)."""
    queries, keys = queries_and_keys(tokens, a, last_key)
    return SEPARATIONS[separation](SIMILARITIES[similarity](queries[:, -1:] if last else queries, keys))


# ---- Accuracy --------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A memory: which functions, and the weight of the previous token."""

    similarity: str = "dot"
    separation: str = "argmax"
    projection: str = "identity"
    a: float = 2.0


class Outcome(NamedTuple):
    """What became of N trials."""

    right: Tensor  # (rules, N) bool
    first: Tensor  # (N,) bool, whether the trial's first object is of the class that is asked for


def outcomes(
    rules: Sequence[Rule], convention: Convention, length: int = 20, width: int = 100, trials: int = 1000,
    seed: int = 0, device: str = "cpu", classes: int = CLASSES["sweep"],
) -> Outcome:  # fmt: skip
    """Every rule on every trial, so that rules are compared on equal terms.

    Args:
        rules: the memories.
        convention: of trials.
        length, width: S and E.
        trials: N.
        seed: of classes and trials.
        device: where it is computed.
        classes: of the notebook's trials; the paper's have 512.

    Raises:
        UserError: a length, width or number of trials that cannot be.
    """
    if trials < 1:
        raise UserError(f"trials {trials} must be at least 1")
    at_once = max(1, ELEMENTS // (length * width))
    parts = []
    for part, start in enumerate(range(0, trials, at_once)):
        drawn = convention.draw(length, width, seed, part, min(at_once, trials - start), device, classes)
        parts.append(Outcome(_right(rules, drawn, convention.exactly), drawn.first))
    return Outcome(*(torch.cat(found, -1).cpu() for found in zip(*parts, strict=True)))


def accuracies(rules: Sequence[Rule], convention: Convention, **settings: Any) -> list[float]:
    """Share of right answers of each rule; the settings are those of `outcomes`."""
    return outcomes(rules, convention, **settings).right.double().mean(-1).tolist()


def _right(rules: Sequence[Rule], drawn: Trials, exactly: bool) -> Tensor:
    """Which trials each rule answers rightly, (rules, N)."""
    tokens, found = drawn.tokens, []
    linear = Linear(tokens, drawn.last_key)
    for rule in rules:
        if rule.similarity in linear.similarities:
            weights = SEPARATIONS[rule.separation](linear.scores(rule.similarity, rule.a))
        else:
            weights = attention(tokens, rule.a, rule.similarity, rule.separation, drawn.last_key, last=True)
        retrieved = (weights @ PROJECTIONS[rule.projection](tokens)).squeeze(1)  # (N, E)
        found.append(drawn.right(retrieved, exactly and rule.separation == "argmax"))
    return torch.stack(found)


class Linear:
    """Scores of the last query for any `a` from what does not depend on it.

    Queries and keys are sums of two tokens, so their dot products, and what Pearson's correlation divides by, are
    sums of products of tokens: O(S E) once, then O(S) for each a.
    """

    similarities = ("dot", "pearson")

    def __init__(self, tokens: Tensor, last_key: Tensor | None) -> None:
        self.tokens, self.last_key = tokens, last_key
        self._products: dict[str, tuple[Tensor, ...]] = {}

    def scores(self, similarity: str, a: float) -> Tensor:
        """(N, 1, S): what `SIMILARITIES[similarity]` gives for the last query."""
        if similarity not in self._products:
            self._products[similarity] = self._measure(centred=similarity == "pearson")
        own, before, square, neighbours, last = self._products[similarity]
        # q_s = (a x_{s-1} + x_s) / (a + 1) with x_s = 0, so that q_s . x_i is a / (a + 1) times x_{s-1} . x_i.
        scores = a * (a * before + own) / (a + 1) ** 2
        scores[:, -1] = a / (a + 1) * last[0]
        if similarity == "pearson":
            squared = (a * a * square.roll(1, 1) + 2 * a * neighbours + square) / (a + 1) ** 2
            squared[:, -1] = last[1]
            query = a / (a + 1) * square[:, -2:-1].sqrt()
            scores = scores / (squared.sqrt() * query).clamp(min=1e-12)
        return scores[:, None]

    def _measure(self, centred: bool) -> tuple[Tensor, ...]:
        tokens = self.tokens - self.tokens.mean(-1, keepdim=True) if centred else self.tokens
        cue = tokens[:, -2]  # (N, E)
        own = torch.einsum("nse,ne->ns", tokens, cue)
        last = torch.zeros(2, len(tokens), device=tokens.device)
        if self.last_key is not None:
            key = self.last_key - self.last_key.mean(-1, keepdim=True) if centred else self.last_key
            last = torch.stack([(key * cue).sum(-1), key.square().sum(-1)])
        square = neighbours = own
        if centred:
            square = torch.einsum("nse,nse->ns", tokens, tokens)
            neighbours = torch.einsum("nse,nse->ns", tokens, tokens.roll(1, 1))
        return own, own.roll(1, 1), square, neighbours, last


# ---- Figures 7 and 8 and the table of all memories -------------------------------------------------------------------

A_VALUES = tuple(step / 20 for step in range(41))  # 0 to 2
LENGTHS = (10, 20, 40, 100, 200, 500, 1000)
WIDTHS = (10, 20, 30, 40, 50, 70, 100, 200, 500, 1000)
SHOWN = ("dot", "pearson")  # in Figures 7 and 8


def experiment(trials: int, seed: int, device: str, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """The numbers of Figures 7 and 8 under both conventions, and the accuracy of all 24 memories at a = 2.

    `progress` is called after each of `EXPERIMENT_PARTS` parts.
    """
    found: dict[str, Any] = {"trials": trials, "seed": seed}
    for convention in CONVENTIONS.values():
        settings: dict[str, Any] = {"trials": trials, "seed": seed, "device": device}
        curves = outcomes([Rule(similarity, a=a) for similarity in SHOWN for a in A_VALUES], convention, **settings)
        rows = curves.right.double().mean(-1).view(len(SHOWN), len(A_VALUES)).tolist()
        last = curves.right[-1]  # Pearson at the largest a
        progress()
        sweeps = {}
        for name, values in (("length", LENGTHS), ("width", WIDTHS)):
            points = []
            for value in values:
                points.append(
                    accuracies([Rule(similarity) for similarity in SHOWN], convention, **settings, **{name: value})
                )
                progress()
            sweeps[name] = {name: list(values)} | dict(zip(SHOWN, map(list, zip(*points, strict=True)), strict=True))
        rules = [Rule(*names) for names in product(SIMILARITIES, SEPARATIONS, PROJECTIONS)]
        found[convention.name] = {
            "a": {"a": list(A_VALUES)} | dict(zip(SHOWN, rows, strict=True)),
            **sweeps,
            "memories": [
                rule._asdict() | {"accuracy": accuracy}
                for rule, accuracy in zip(
                    rules, accuracies(rules, convention, **settings, classes=CLASSES["single"]), strict=True
                )
            ],
            "first_is_asked_for": curves.first.double().mean().item(),
            "pearson_where_first_is_another": last[~curves.first].double().mean().item(),
            "pearson_where_first_is_asked_for": last[curves.first].double().mean().item(),
        }
        progress()
    return found


EXPERIMENT_PARTS = len(CONVENTIONS) * (2 + len(LENGTHS) + len(WIDTHS))


def format_amicl(found: dict[str, Any]) -> str:
    """The numbers of an experiment as text, and why Pearson's correlation stays below."""
    parts = []
    for name in CONVENTIONS:
        part = found[name]
        best = {similarity: _first_above(part["a"]["a"], part["a"][similarity], 0.99) for similarity in SHOWN}
        rows = [
            [f"{similarity} against {sweep}", *(f"{accuracy:.3f}" for accuracy in part[sweep][similarity])]
            for sweep in ("length", "width")
            for similarity in SHOWN
        ]
        heads = {sweep: [f"{sweep} of", *(str(value) for value in part[sweep][sweep])] for sweep in ("length", "width")}
        parts.append(
            f"As in the {name} ({found['trials']:,} trials a point, argmax): dot product is above 0.99 from "
            f"a = {best['dot']} on, Pearson's correlation ends at {part['a']['pearson'][-1]:.3f}"
        )
        parts += [text_table(heads[sweep], [row for row in rows if row[0].endswith(sweep)]) for sweep in heads]
        memories = {(m["similarity"], m["separation"], m["projection"]): m["accuracy"] for m in part["memories"]}
        table = [
            [f"{similarity}, {projection}", *(f"{memories[similarity, each, projection]:.3f}" for each in SEPARATIONS)]
            for projection, similarity in product(PROJECTIONS, SIMILARITIES)
        ]
        parts.append(text_table(["similarity, projection, at a = 2", *SEPARATIONS], table))
        parts.append(
            f"In {part['first_is_asked_for']:.1%} of the trials the first object is of the class that is asked for. "
            "The blank is before it, so its key is the object alone: Pearson's correlation, blind to length, takes it\n"
            "for more alike than object and label together. It answers "
            f"{part['pearson_where_first_is_asked_for']:.1%} of these trials rightly, and "
            f"{part['pearson_where_first_is_another']:.1%} of the others."
        )
    expected = ", ".join(
        f"{pearsons_plateau(length, classes):.3f} at {length} tokens and {classes} classes"
        for length, classes in ((10, 50), (20, 50), (40, 50), (20, 512))
    )
    parts.append(f"As in the code, this share is expected to leave Pearson's correlation {expected}.")
    return "\n\n".join(parts)


def _first_above(values: Sequence[float], accuracies: Sequence[float], threshold: float) -> float | None:
    """The first value from which on all accuracies are above a threshold."""
    found = None
    for value, accuracy in zip(reversed(values), reversed(accuracies), strict=True):
        if accuracy <= threshold:
            break
        found = value
    return found
