"""What the measured differences may be called: intervals, corrected p values, and one sentence.

measures of an arm -> a `Finding` each -> Holm's correction over arms, within tasks and within all others -> a sentence

The verdict is about one quantity that is fixed beforehand, the validation loss; the tasks share one error rate, and so
do the arms. No difference whose interval holds zero is called one. With one seed the interval speaks of the two models
that were trained and not of the change: another seed would have drawn two others. Where the spread of other runs of the
baseline is known, the interval covers that too. A measure is higher or lower; a model is better or worse, and only
several seeds say so.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evals.verdict.clusters import by_group, neighbour_note, skewness_note
from evals.verdict.efficiency import Cost, Saving, in_percent
from evals.verdict.measurements import Measure
from evals.verdict.statistics import (
    Effect,
    McNemar,
    Spread,
    hierarchical_bootstrap,
    holm,
    mcnemar,
    paired_effect,
    student_interval,
)

LEVEL = 0.95
FEWEST = 30  # independent documents, or groups of them: of fewer, the verdict is about these alone


class Finding(NamedTuple):
    """One quantity of both sides and the difference, second minus first, with its interval.

    adjusted: the effect's p value after Holm's correction within its family. mcnemar: of each seed, where every item is
    right or wrong. resampled: the hierarchical bootstrap's interval, where there are several seeds.
    """

    measure: Measure
    effect: Effect
    adjusted: float
    mcnemar: list[McNemar]
    resampled: tuple[float, float] | None = None

    @property
    def primary(self) -> bool:
        return self.measure.family == "primary"

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out zero and the corrected p value agrees."""
        return not self.effect.low <= 0 <= self.effect.high and self.adjusted < 1 - self.effect.level

    @property
    def better(self) -> int:
        """1 where the second side is better, -1 where it is worse, 0 where neither is shown."""
        return int(self.differs) * int(np.sign(self.effect.difference)) * self.measure.better

    @property
    def word(self) -> str:
        """What is shown of the measure: lower or higher, on the second side."""
        if not self.differs:
            return "no difference shown"
        return "lower" if self.effect.difference < 0 else "higher"


Spreads = Mapping[str, Spread]  # of the baseline's runs, by the measure's name


def find(
    measures: Sequence[Measure], level: float = LEVEL, seed: int = 0, spreads: Spreads | None = None
) -> list[Finding]:
    """`find_arms` of one arm."""
    return find_arms([measures], level, seed, spreads)[0]


def find_arms(
    arms: Sequence[Sequence[Measure]], level: float = LEVEL, seed: int = 0, spreads: Spreads | None = None
) -> list[list[Finding]]:
    """The difference of every quantity of each arm, its interval at `level`, and corrected p values.

    `spreads`: of quantities whose spread over other runs of the baseline is known; used where there is one seed.

    Tests of one family share one error rate, over all arms. The p values are those of the intervals: McNemar's exact
    test errs in 2 to 4% of null pairs where they err in 4 to 5, and stands beside them.
    """
    measures = {(arm, n): measure for arm, own in enumerate(arms) for n, measure in enumerate(own)}
    known = spreads or {}
    effects = {
        key: paired_effect(
            m.first, m.second, m.weights, level=level, seed=seed, groups=m.groups, spread=known.get(m.name)
        )
        for key, m in measures.items()
    }
    adjusted: dict[tuple[int, int], float] = {}
    for family in {measure.family for measure in measures.values()}:
        adjusted |= holm({key: effects[key].p_value for key, m in measures.items() if m.family == family})
    found: list[list[Finding]] = [[] for _ in arms]
    for key, m in measures.items():
        right = [(one > 0.5, other > 0.5) for one, other in zip(m.first, m.second, strict=True)] if m.binary else []
        resampled = None
        if len(m.first) > 1:
            resampled = hierarchical_bootstrap(m.first, m.second, m.weights, level, seed=seed, groups=m.groups)
        tables = [mcnemar(one, other) for one, other in right]
        found[key[0]].append(Finding(m, effects[key], adjusted[key], tables, resampled))
    return found


def warnings(measure: Measure) -> list[str]:
    """What makes the interval of a measure surer than it should be, a sentence each."""
    differences = measure.second - measure.first
    shares = np.ones(differences.shape[1]) if measure.weights is None else measure.weights
    notes = []
    if measure.groups is None:
        notes.append(neighbour_note(differences, measure.name))
    else:
        differences, shares = by_group(differences, shares, measure.groups)
    notes.append(skewness_note(differences, shares, measure.name))
    return [each for each in notes if each]


# ---- In words --------------------------------------------------------------------------------------------------------


def scaled(measure: Measure, value: float) -> float:
    """A value in the measure's unit: shares are shown in percent."""
    return 100 * value if measure.unit == "points" else value


def digits(finding: Finding) -> int:
    """As many as keep a bound that is not zero from looking like it."""
    measure, effect = finding.measure, finding.effect
    least = 2 if measure.unit == "points" else 4
    bounds = [abs(scaled(measure, bound)) for bound in (effect.low, effect.high)]
    if not finding.differs:
        return least
    return max(least, min(10, math.ceil(-math.log10(min(bounds)))))


def signed(finding: Finding, value: float) -> str:
    """A difference in the measure's unit; a zero has no sign."""
    places = digits(finding)
    rounded = round(scaled(finding.measure, value), places)
    return f"{rounded:+.{places}f}" if rounded else f"{0:.{places}f}"


def interval(finding: Finding) -> str:
    """The interval in the measure's unit: "-0.0642 to -0.0596"."""
    return f"{signed(finding, finding.effect.low)} to {signed(finding, finding.effect.high)}"


def sentence(
    names: Sequence[str],
    seeds: Sequence[int],
    findings: Sequence[Finding],
    savings: Sequence[Saving],
    null: Finding | None = None,
    spacing: float | None = None,
) -> str:
    """The verdict on the primary quantity, with its interval, and what it saves.

    It begins with what limits it: one seed, few documents. null: of the baseline with other initial weights; spacing:
    tokens between two validations, at most.
    """
    primary = next((finding for finding in findings if finding.primary), None)
    if primary is None:
        return (
            f"There is no verdict on {names[1]} against {names[0]}: the validation loss per document was not measured, "
            "and without it there is no interval."
        )
    effect = primary.effect
    models = [f"{name} (seed {seeds[0]})" for name in names] if len(seeds) == 1 else names
    parts = [_limited(_judgement(models, primary), effect)]
    if primary.better and (saved := _saved(names, savings, primary, spacing)):
        parts.append(saved)
    if effect.seeds == 1:
        parts += _luck(names[0], primary, null)
    if effect.independent < FEWEST:
        parts.append(f"{FEWEST} are needed to say anything of other documents")
    return "; ".join(parts) + "."


def headline(names: Sequence[str], findings: Sequence[Finding]) -> str:
    """The verdict without its numbers, for the head of a page."""
    primary = next((finding for finding in findings if finding.primary), None)
    if primary is None:
        return f"There is no verdict on {names[1]} against {names[0]}: the validation loss was not measured."
    claim = _claim(names, primary)
    if primary.better and primary.effect.seeds > 1:
        claim += f": {primary.word} {primary.measure.name}"
    return _limited(claim, primary.effect) + "."


def key_numbers(findings: Sequence[Finding], null: Finding | None = None) -> list[tuple[str, str]]:
    """What the headline rests on: difference, interval, what is shown, and the null arm's difference if known."""
    primary = next((finding for finding in findings if finding.primary), None)
    if primary is None:
        return []
    effect = primary.effect
    over = _independent(effect) + (f", {effect.seeds} seeds" if effect.seeds > 1 else "")
    numbers = [
        (f"difference, {primary.measure.unit}", signed(primary, effect.difference)),
        (f"{100 * effect.level:g}% interval", interval(primary)),
        (primary.measure.name, primary.word),
        ("measured on", over),
    ]
    return [*numbers, ("null arm's difference", signed(null, null.effect.difference))] if null else numbers


def _limited(judged: str, effect: Effect) -> str:
    """A verdict behind what limits it: one seed, few documents."""
    limits = ["one seed each"] * (effect.seeds == 1)
    limits += [f"on these {_independent(effect)} alone"] * (effect.independent < FEWEST)
    if not limits:
        return judged
    limit = ", ".join(limits)
    return f"{limit[0].upper()}{limit[1:]}: {judged.replace('No difference', 'no difference', 1)}"


def _independent(effect: Effect) -> str:
    """The documents that a verdict is about, in words."""
    return f"{effect.items:,} documents" + ("" if effect.groups is None else f" of {effect.groups:,} groups")


def _luck(baseline: str, primary: Finding, null: Finding | None) -> list[str]:
    """What other runs of the baseline say of one seed."""
    spread = primary.effect.spread
    if spread is None:
        return [
            "whether other seeds agree is not known",
            "nothing is known of what other initial weights alone change, as there is no null arm",
        ]
    unit = primary.measure.unit
    said = [f"the interval covers the spread of {spread.runs} runs of {baseline} ({spread.deviation:.4f} {unit})"]
    if null is not None:
        size = f"{signed(null, null.effect.difference)} {null.measure.unit}"
        at_least = abs(null.effect.difference) >= abs(primary.effect.difference)
        said.append(
            f"{baseline} with other initial weights (null arm) differs by {size}" + (", no less than this" * at_least)
        )
    return said


def null_note(name: str, baseline: str, null: Finding) -> str:
    """What the null arm shows, as a sentence of its own."""
    effect, unit = null.effect, null.measure.unit
    return (
        f"The null arm {name}, {baseline} with other initial weights, differs from {baseline} by "
        f"{signed(null, effect.difference)} {unit} ({100 * effect.level:g}% interval {interval(null)})."
    )


def _judgement(names: Sequence[str], finding: Finding) -> str:
    effect, measure = finding.effect, finding.measure
    over = _independent(effect)
    if effect.groups is not None and effect.effective is not None:
        over += f" (worth {effect.effective:,.0f} independent ones)"
    over += f" and {effect.seeds} seeds" if effect.seeds > 1 else ""
    numbers = (
        f"{signed(finding, effect.difference)} {measure.unit}, {100 * effect.level:g}% interval {interval(finding)} "
        f"over {over}"
    )
    claim = _claim(names, finding)
    if not finding.better:
        return f"{claim}: {measure.name} {numbers}"
    return f"{claim}: {numbers}" if effect.seeds == 1 else f"{claim}: {finding.word} {measure.name}, {numbers}"


def _claim(names: Sequence[str], finding: Finding) -> str:
    """What is shown of the two models, without a number; better and worse take several seeds."""
    if not finding.better:
        return f"No difference between {names[1]} and {names[0]} is shown"
    if finding.effect.seeds == 1:
        return f"{names[1]} has a {finding.word} {finding.measure.name} than {names[0]}"
    return f"{names[1]} is {'better' if finding.better > 0 else 'worse'} than {names[0]}"


def _saved(names: Sequence[str], savings: Sequence[Saving], primary: Finding, spacing: float | None) -> str:
    """How many tokens fewer the better side needs for the other's final loss: the geometric mean over the seeds.

    Several seeds give it Student's interval of their logarithms; a single one only the distance between validations, on
    the line between which it is read off.
    """
    ratios = [saving.ratio for saving in savings]
    if not ratios or any(ratio is None for ratio in ratios):
        return ""
    known = np.log(np.array(ratios, dtype=np.float64))
    winner, loser = names
    if primary.effect.difference < 0:
        winner, loser = loser, winner
    else:
        known = -known
    fewer = [100 * (1 - math.exp(each)) for each in (known.mean(), *known)]
    if fewer[0] <= 0:
        return ""
    text = f"{winner} reaches {loser}'s final loss with {fewer[0]:.0f}% fewer tokens"
    if len(known) == 1:
        return text + (f" (read between validations {spacing:,.0f} tokens apart, one pair)" if spacing else "")
    level = primary.effect.level
    error = float(known.std(ddof=1)) / math.sqrt(len(known))
    found = student_interval(float(known.mean()), error, len(known) - 1, level)
    by_seed = f"{', '.join(f'{each:.0f}%' for each in fewer[1:])} by seed"
    if found.high >= 0:
        return f"{text} ({by_seed}: not shown, the {100 * level:g}% interval over seeds contains 0)"
    low, high = (100 * (1 - math.exp(bound)) for bound in (found.high, found.low))
    return f"{text} ({100 * level:g}% interval {low:.0f} to {high:.0f}%; {by_seed})"


def cost_sentence(names: Sequence[str], costs: Sequence[Cost]) -> str:
    """What the second side needs more or less than the first, in percent: the geometric mean over the seeds."""
    said = []
    for cost in costs:
        if cost.name not in ("parameters", "FLOPs per token", "step time", "peak memory"):
            continue
        text = f"{cost.name} {in_percent(cost.percent)}" if abs(cost.percent) >= 0.05 else f"{cost.name} the same"
        said.append(text + (f" ({cost.interval})" if cost.interval else ""))
    return f"Cost of {names[1]} against {names[0]}: {', '.join(said)}." if said else ""


# ---- As rows ---------------------------------------------------------------------------------------------------------

HEADER = ("difference", "interval", "p (Holm)", "shown")


def row(finding: Finding) -> list[str]:
    """Name, both values, difference, interval, corrected p value and what is shown."""
    measure = finding.measure
    first, second = (f"{scaled(measure, value):.{digits(finding)}f}" for value in measure.means)
    unit = "%" if measure.unit == "points" else measure.unit
    p = "<0.001" if finding.adjusted < 0.001 else f"{finding.adjusted:.3f}"
    difference = signed(finding, finding.effect.difference)
    return [f"{measure.name}, {unit}", first, second, difference, interval(finding), p, finding.word]


def record(finding: Finding) -> dict[str, Any]:
    """A finding for the JSON file, in the arrays' own unit (shares, nats)."""
    return {
        "measure": finding.measure.name,
        "unit": finding.measure.unit,
        "family": finding.measure.family,
        "means": list(finding.measure.means),
        **finding.effect._asdict(),
        "adjusted_p_value": finding.adjusted,
        "hierarchical_bootstrap": finding.resampled,
        "mcnemar": [table._asdict() for table in finding.mcnemar],
        "shown": finding.word,
    }
