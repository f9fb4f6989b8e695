"""Memories of what was seen where: TEM's Hebbian matrix, the same as sums over memories, and attention.

Whittington et al. 2022, Sections 4 and 5. At every time a sensory vector x and a place g are bound and kept,

    p = flatten(x^T g),    M <- decay M + rate p^T p                                                     (Eq. 4, 5)

and a place alone asks for what was there: q = flatten(1^T g), q <- act(keep q + q M) for some steps     (Eq. 6)

M has (X G)^2 numbers. As q M = sum_s c_s (q . p_s) p_s with c_s = rate decay^(t - s), it need not be made: a step is a
sum over the t memories of X G numbers each (Eq. 8, 9). One step without act, summed over places (Eq. 7), needs no
conjunction either:

    x = sum_s c_s (1 . x_s) (g . g_s) (1 . g_s) x_s                                                      (Eq. 10)

which without the two weights is linear attention (Eq. 11). All times of a walk are asked at once: query s asks for the
cell after memory s, and finds memories 0 to s. The memory of TEM's reference code, which stores what it could not
retrieve yet, is in `correcting`.

Dimension letters: B environments, S memories and queries, X sensory components, G of places.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llm.common.limits import at_least
from llm.model.attention import eager_attention

from ..experiment.options import option, problems, raise_problems

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda p: p,
    "relu": torch.relu,
    "clipped": lambda p: nn.functional.leaky_relu(p.clamp(-1, 1), 0.01),  # the authors' code: nothing grows beyond 1
}
FORMS = ("sums", "matrix", "factored")
POWER = 3  # of the polynomial; odd, so that what is unlike counts against


@dataclass(frozen=True)
class Rule:
    """How TEM remembers and recalls; the defaults are the paper's, with one step of the attractor.

    Args:
        decay: of the whole memory with every new one.
        rate: of a new one.
        keep: of what was retrieved, added to the next step.
        steps: of the attractor.
        act: "relu" in the paper, "clipped" in its code, or "identity".
        form: "sums" over memories, the "matrix" of the paper, or, of one step without act, "factored" (Eq. 10); they
            are equal, and differ in time alone. If the memory corrects, they differ in when M is clipped.
        corrects: M <- clip(decay M + rate (p + p^)^T (p - p^)), where p^ is what p's place retrieved: see `correcting`.
        decay_rise, rate_rise: gradient steps over which decay and rate rise to these values; 0 is at once.
    """

    decay: float = 1.0
    rate: float = option(1.0, limit=at_least(0))
    keep: float = option(0.0, limit=at_least(0))
    steps: int = option(1, limit=at_least(1))
    act: str = option("relu", choices=tuple(ACTS))
    form: str = option("sums", choices=FORMS)
    corrects: bool = False
    decay_rise: int = option(0, limit=at_least(0))
    rate_rise: int = option(0, limit=at_least(0))

    def __post_init__(self) -> None:
        found = problems(self)
        if self.corrects and self.form == "factored":
            found.append("the factored form is of a memory that does not correct: give the form sums")
        if not 0 < self.decay <= 1:
            found.append(f"decay {self.decay} must be above 0 and at most 1")
        if self.form == "factored" and (self.steps, self.act) != (1, "identity"):
            found.append("the factored form is of one step with act identity: give the form sums")
        raise_problems(found)

    def at(self, update: int) -> "Rule":
        """Return the rule after so many gradient steps: what rises has its value of then."""
        decay = self.decay * min(1.0, (update + 1) / self.decay_rise) if self.decay_rise else self.decay
        rate = self.rate * min(1.0, (update + 1) / self.rate_rise) if self.rate_rise else self.rate
        return replace(self, decay=decay, rate=rate, decay_rise=0, rate_rise=0)


RULES = {
    "paper": Rule(),
    # The generative memory of TEM's reference code (github.com/djcrw/generalising-structural-knowledge).
    "code": Rule(
        decay=0.9999, rate=0.5, keep=0.8, steps=5, act="clipped", corrects=True, decay_rise=200, rate_rise=16_000
    ),
    "linear": Rule(act="identity", form="factored"),  # Section 5: TEM as attention
}


def recall(sensory: Tensor, places: Tensor, queries: Tensor, rule: Rule, before: Tensor | None = None) -> Tensor:
    """What places ask for, summed over places (Eq. 6, 7), in the form that the rule says; it does not correct.

    Args:
        sensory: x (B, S, X).
        places: g where it was seen (B, S, G).
        queries: g that is asked for (B, S, G).
        before: M of what was stored before (B, X G, X G); None is nothing.

    Returns:
        Sensory parts (B, S, X).
    """
    if rule.form == "factored" and before is None:
        return recall_factored(sensory, places, queries, rule)
    form = retrieve_by_matrix if rule.form == "matrix" else retrieve
    return deconjunction(form(sensory, places, queries, rule, before))


def retrieve(sensory: Tensor, places: Tensor, queries: Tensor, rule: Rule, before: Tensor | None = None) -> Tensor:
    """Retrieved conjunctions (B, S, X, G), as sums over memories: O(S) for each number of a conjunction."""
    stored = conjunction(sensory, places).flatten(2)  # (B, S, X G)
    shares = _shares(rule, stored)
    found = _asked(sensory, queries).flatten(2)
    if before is not None:
        left = rule.decay ** torch.arange(1, stored.shape[1] + 1, device=stored.device, dtype=stored.dtype)[:, None]
    for _ in range(rule.steps):
        onward = (found @ stored.mT * shares) @ stored
        if before is not None:
            onward = onward + left * (found @ before)
        found = ACTS[rule.act](rule.keep * found + onward)
    return found.unflatten(-1, (sensory.shape[-1], places.shape[-1]))


def memory_after(sensory: Tensor, places: Tensor, rule: Rule, before: Tensor) -> Tensor:
    """Return M (B, X G, X G) after the memories of x (B, S, X) and g (B, S, G), from M before them."""
    stored = conjunction(sensory, places).flatten(2)
    shares = _shares(rule, stored)[-1]  # (S,)
    return rule.decay ** stored.shape[1] * before + (stored * shares[:, None]).mT @ stored


def retrieve_by_matrix(
    sensory: Tensor, places: Tensor, queries: Tensor, rule: Rule, before: Tensor | None = None
) -> Tensor:
    """`retrieve` as the paper writes it, with the memory matrix M of (X G)^2 numbers, one time after the other."""
    stored, asked = conjunction(sensory, places).flatten(2), _asked(sensory, queries).flatten(2)
    memory = stored.new_zeros(len(stored), stored.shape[-1], stored.shape[-1]) if before is None else before
    rows = []
    for time in range(stored.shape[1]):
        p, found = stored[:, time, None], asked[:, time, None]  # (B, 1, X G)
        memory = rule.decay * memory + rule.rate * p.mT @ p
        for _ in range(rule.steps):
            found = ACTS[rule.act](rule.keep * found + found @ memory)
        rows.append(found)
    return torch.cat(rows, dim=1).unflatten(-1, (sensory.shape[-1], places.shape[-1]))


def recall_factored(sensory: Tensor, places: Tensor, queries: Tensor, rule: Rule) -> Tensor:
    """The sensory part of one step without act by Equation 10, (B, S, X): no conjunction is made.

    What the rule keeps of the query itself is the query's own sum, in every sensory component.
    """
    weights = queries @ places.mT * _shares(rule, places)  # (B, S, S)
    found = (weights * (sensory.sum(-1) * places.sum(-1))[:, None]) @ sensory
    return found + rule.keep * queries.sum(-1, keepdim=True)


def conjunction(sensory: Tensor, places: Tensor) -> Tensor:
    """x (..., X) and g (..., G) -> x^T g, (..., X, G)."""
    return sensory[..., :, None] * places[..., None, :]


def deconjunction(conjunctions: Tensor) -> Tensor:
    """(..., X, G) -> the sensory part, (..., X): summed over places (Eq. 7)."""
    return conjunctions.sum(-1)


def _asked(sensory: Tensor, queries: Tensor) -> Tensor:
    """A place with every sensory component, (B, S, X, G)."""
    return conjunction(torch.ones_like(sensory), queries)


def _shares(rule: Rule, like: Tensor) -> Tensor:
    """c of memory s (a column) for query t (a row), 0 for later memories: (S, S)."""
    times = torch.arange(like.shape[1], device=like.device)
    age = times[:, None] - times
    return torch.where(age >= 0, rule.rate * rule.decay ** age.clamp(min=0), 0.0).to(like.dtype)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, separation: str, times: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to memories by a rule that separates them.

    With scores q k / sqrt(K): softmax, by the language models' function; or, as sums that are not normalised, the
    scores themselves ("linear", Eq. 11), their exponential (Demircigil et al. 2017), or their third power (Krotov and
    Hopfield 2016).

    Args:
        query: of times 0 to T - 1, (B, T, K).
        key, value: of memories, (B, S, K), (B, S, V).
        times: from which on each memory is there, (B, S); None is one memory a time, in order.

    Returns:
        What was found (B, T, V), and the weights (B, T, S).
    """
    if times is None:
        times = torch.arange(key.shape[1], device=key.device)[None]
    later = times[:, None] > torch.arange(query.shape[1], device=query.device)[:, None]  # (B or 1, T, S)
    scaling = query.shape[-1] ** -0.5
    if separation == "softmax":
        mask = torch.zeros(later.shape, device=query.device, dtype=query.dtype).masked_fill(later, -torch.inf)
        found, weights = eager_attention(module, query[:, None], key[:, None], value[:, None], mask[:, None], scaling)
        return found[:, :, 0], weights[:, 0]
    scores = query @ key.mT * scaling
    separated = {"linear": scores, "exponential": scores.exp(), "polynomial": scores**POWER}[separation]
    weights = separated.masked_fill(later, 0.0)
    return weights @ value, weights
