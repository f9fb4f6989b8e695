"""A generated set of the indirect-object task: what its sentences are, and how results on them are summed up.

names of one token -> pairs -> frames (template, place, object) -> four sentences a frame -> means -> table

The frames are those of Burns et al. 2025, Section 4.2, filled at random as Wang et al. (2023,
"Interpretability in the wild") did. Every frame and pair of names makes four sentences: either person is mentioned
first, and either gives. So each name is the right answer as often as the wrong one, and mentioned first as often as
second, in any number of quadruples and for each template alone. A model that always repeats the first name that it
saw has an accuracy of exactly 50%, one that repeats the last of 0%.
"""

import hashlib
import json
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm.common.errors import UserError
from llm.common.tables import text_table

# Common in children's stories as in other text, one token each for GPT-2, and none the start of another.
NAMES = (
    *"Alice Amy Anna Emily Emma Jane Kate Laura Lily Lisa Lucy Mary Mia Molly Sara Sue".split(),
    *"Adam Ben Bob Dan David Jack James Jim Joe John Leo Paul Peter Sam Tim Tom".split(),
)
PLACES = "beach farm garden lake library market park playground school shops woods zoo".split()
THINGS = "apple bag ball book box cake cookie cup drink flower hat orange pencil toy".split()
# Every name follows a space, so that it is the same token wherever it stands.
TEMPLATES = (
    "When {first} and {second} went to the {place}, {giver} gave the {thing} to",  # the four forms of the paper
    "When {first} and {second} went to the {place}, {giver} gave {a} {thing} to",
    "After {first} and {second} went to the {place}, {giver} gave the {thing} to",
    "After {first} and {second} went to the {place}, {giver} gave {a} {thing} to",
    "When {first} and {second} were at the {place}, {giver} passed the {thing} to",  # the verb of its introduction
    "While {first} and {second} were at the {place}, {giver} passed {a} {thing} to",
    "Then {first} and {second} went to the {place}. {giver} gave the {thing} to",
    "Then {first} and {second} were at the {place}, and {giver} gave {a} {thing} to",
)
LEAST_NAMES = 8  # of one token: 28 pairs; with fewer, names of several tokens are used too
COUNT = 1024
# What a model's result holds under `mean`, and the accuracies by order; True: a share, printed in percent.
MEASURES = {"accuracy": True, "logit_difference": False, "probability_correct": True, "probability_incorrect": True}
ORDERS = {1: "giver_first", 2: "giver_second"}

Items = Mapping[str, Sequence[Any]]


class Sentence(NamedTuple):
    """One prompt. The names carry the leading space that a completion has."""

    quadruple: int  # from 0: the four sentences of one pair and frame
    template: int  # from 1, in TEMPLATES
    giver: int  # 1: the giver was mentioned first; 2: second
    text: str
    correct: str
    incorrect: str


def generate(
    count: int = COUNT, seed: int = 0, names: Sequence[str] = NAMES, excluded: Collection[str] = ()
) -> list[Sentence]:
    """At least `count` different sentences, rounded up to whole quadruples; a pure function of its arguments.

    `names` have no leading space; `excluded` are prompts that shall not occur, as the paper's own. Names and templates
    occur equally often, as far as the count divides. UserError: more sentences than can be made with these names.
    """
    pairs = _pairs(_shuffled(names, seed, "names"))
    quadruples = math.ceil(count / 4)
    most = len(pairs) * (len(PLACES) * len(THINGS) - len(excluded))  # even if a pair meets one template only
    if quadruples > most:
        raise UserError(f"{len(names)} names make {4 * most:,} sentences, not {count:,}; give a smaller --sentences")
    frames: dict[Hashable, Iterator[list[Sentence]]] = {}
    sentences: list[Sentence] = []
    for number in range(quadruples):
        pair = pairs[number % len(pairs)]
        turn, place_in_turn = divmod(number, len(TEMPLATES))
        template = _shuffled(range(1, len(TEMPLATES) + 1), seed, turn)[place_in_turn]
        if (pair, template) not in frames:
            frames[pair, template] = _quadruples(pair, template, seed, frozenset(excluded))
        sentences += [sentence._replace(quadruple=number) for sentence in next(frames[pair, template])]
    return sentences


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs, as the rounds of a tournament: in each round every name plays once (but one, where they are odd)."""
    ring = [*names, *[""] * (len(names) % 2)]
    pairs = []
    for _ in ring[1:]:
        half = len(ring) // 2
        pairs += [(a, b) for a, b in zip(ring[:half], reversed(ring[half:]), strict=True) if a and b]
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return pairs


def _quadruples(pair: tuple[str, str], template: int, seed: int, excluded: Collection[str]) -> Iterator[list[Sentence]]:
    """The quadruples of a pair and a template, in an order of their own: each with another place or object."""
    for place, thing in _shuffled([(p, t) for p in PLACES for t in THINGS], seed, pair, template):
        quadruple = [
            Sentence(0, template, giver, _text(template, people, giver, place, thing), f" {right}", f" {wrong}")
            for people in (pair, pair[::-1])
            for giver, wrong, right in ((1, *people), (2, *people[::-1]))
        ]
        if not any(sentence.text in excluded for sentence in quadruple):
            yield quadruple


def _text(template: int, people: tuple[str, str], giver: int, place: str, thing: str) -> str:
    words = {"first": people[0], "second": people[1], "giver": people[giver - 1], "place": place, "thing": thing}
    return TEMPLATES[template - 1].format(**words, a="an" if thing[0] in "aeiou" else "a")


def _shuffled(things: Sequence[Any], *seed: Any) -> list[Any]:
    """In an order that `seed` decides. By hashes: unlike `random`'s shuffle, the same in every version of Python."""
    return sorted(things, key=lambda thing: hashlib.sha256(repr((seed, thing)).encode()).digest())


def fingerprint(sentences: Sequence[Sentence]) -> str:
    """The SHA-256 of prompts and answers in their order: two results with the same one are of the same set."""
    content = json.dumps([[s.text, s.correct, s.incorrect] for s in sentences])
    return hashlib.sha256(content.encode()).hexdigest()


def usable_names(several_tokens: Collection[str], names: Sequence[str] = NAMES) -> list[str]:
    """The names that are one token for every model of a call, where they are LEAST_NAMES or more; else all of them.

    `several_tokens`: those that are more than one for some model.
    """
    single = [name for name in names if name not in several_tokens]
    return single if len(single) >= LEAST_NAMES else list(names)


# ---- Results ---------------------------------------------------------------------------------------------------------


def collect(sentences: Sequence[Sentence], log_probabilities: np.ndarray) -> dict[str, list[Any]]:
    """The `items` of a result: a list per column, one entry a sentence. `log_probabilities` [n, 2]: correct, incorrect.

    The difference is of log-probabilities: for names of one token the difference of their logits (Wang et al., 2023),
    as the softmax's denominator is common to both; else that of the whole names' probabilities.
    """
    correct, incorrect = log_probabilities.astype(np.float64).T  # [n] each
    return {
        "prompt": [s.text for s in sentences],
        "correct": [s.correct for s in sentences],
        "incorrect": [s.incorrect for s in sentences],
        "template": [s.template for s in sentences],
        "giver": [s.giver for s in sentences],
        "quadruple": [s.quadruple for s in sentences],
        "probability_correct": np.exp(correct).tolist(),
        "probability_incorrect": np.exp(incorrect).tolist(),
        "logit_difference": (correct - incorrect).tolist(),
    }


def means(items: Items) -> dict[str, float]:
    """The mean over all sentences of each of MEASURES, in [0, 1] or nats. A tie between the names is not correct."""
    values = _by_quadruple(items)
    return {measure: float(values[measure].mean()) for measure in MEASURES}


def accuracy_by_order(items: Items) -> dict[str, float]:
    """The accuracy where the giver was mentioned first, and where second: a model that only repeats the first name of
    the prompt is always wrong in the one and always right in the other.
    """
    values = _by_quadruple(items)
    return {order: float(values[order].mean()) for order in ORDERS.values()}


def _by_quadruple(items: Items) -> dict[str, np.ndarray]:
    """Each quadruple's mean of each measure, and of the accuracy for either order: [quadruples] each."""
    difference, giver = np.array(items["logit_difference"]), np.array(items["giver"])
    values = {"accuracy": (difference > 0).astype(float), "logit_difference": difference}
    values |= {measure: np.array(items[measure]) for measure in MEASURES if measure not in values}
    by_order = {name: values["accuracy"][giver == order] for order, name in ORDERS.items()}  # two a quadruple
    quadruples = len(difference) // 4
    return {name: column.reshape(quadruples, -1).mean(axis=1) for name, column in (values | by_order).items()}


def summarise(groups: Mapping[str, Sequence[Items]]) -> list[dict[str, Any]]:
    """A row per group of models: `mean` and `spread` of every measure.

    `spread_over`: "models", the population's standard deviation over the models' means, as in Table 2; or, for a group
    of one model, "quadruples", the standard error of its mean over its quadruples, whose four sentences share all
    words but the order of the names and so are not four independent ones. None where there is one quadruple only.
    """
    rows = []
    for group, models in groups.items():
        values = [_by_quadruple(items) for items in models]
        mean = {name: [float(of_model[name].mean()) for of_model in values] for name in values[0]}
        spread: dict[str, float] | None = None
        if len(models) > 1:
            spread = {name: float(np.std(column)) for name, column in mean.items()}
        elif (quadruples := len(values[0]["accuracy"])) > 1:
            spread = {name: float(v.std(ddof=1)) / math.sqrt(quadruples) for name, v in values[0].items()}
        rows.append(
            {
                "group": group,
                "models": len(models),
                "mean": {name: float(np.mean(column)) for name, column in mean.items()},
                "spread": spread,
                "spread_over": "models" if len(models) > 1 else "quadruples",
            }
        )
    return rows


def format_generated(outcome: Mapping[str, Any]) -> str:
    """What `evals.probes.ioi.run` returns as `generated`, as text: the table, in percent, and what it was measured
    on."""
    results = [result for models in outcome["models"].values() for result in models]
    names = set(results[0]["items"]["correct"])
    lines = [
        f"{results[0]['sentences']:,} generated sentences of {len(names)} names (seed {results[0]['seed']}); "
        "accuracy: the correct name is the more probable one",
        _format_summary(outcome["table"]),
    ]
    spreads = {row["spread_over"] for row in outcome["table"] if row["spread"]}
    told = {
        "models": "over several models their standard deviation (of the population)",
        "quadruples": f"of one model the standard error over its {results[0]['sentences'] // 4:,} sets of four "
        "sentences",
    }
    if spreads:
        lines.append("±: " + "; ".join(text for over, text in told.items() if over in spreads) + ".")
    if several := {name for result in results for name in result["names_of_several_tokens"]}:
        lines.append(
            f"{len(several)} of {len(names)} names are several tokens for some model: their probability is the whole "
            "name's, and its logarithms stand in for the logits."
        )
    if ties := sum(result["ties"] for result in results):
        lines.append(f"{ties:,} ties, two names of one probability, count as wrong: --dtype float32 tells them apart.")
    return "\n".join(lines)


def _format_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "accuracy": "accuracy, %",
        "giver_first": "giver first, %",
        "giver_second": "giver second, %",
        "logit_difference": "logit difference",
        "probability_correct": "correct, %",
        "probability_incorrect": "incorrect, %",
    }

    def cell(row: Mapping[str, Any], name: str) -> str:
        scale = 100 if MEASURES.get(name, True) else 1
        mean = f"{scale * row['mean'][name]:.2f}"
        return mean if row["spread"] is None else f"{mean} ± {scale * row['spread'][name]:.2f}"

    header = ["group", "models", *columns.values()]
    return text_table(header, [[row["group"], str(row["models"]), *(cell(row, c) for c in columns)] for row in rows])
