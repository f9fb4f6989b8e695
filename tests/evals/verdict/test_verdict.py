"""What may be said of measured differences: corrected, in words that no interval with zero in it bears out."""

import json
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from evals.verdict.efficiency import Reached, Saving
from evals.verdict.measurements import Measure
from evals.verdict.statistics import Effect, Spread, hierarchical_bootstrap, paired_effect
from evals.verdict.verdict import Finding, digits, find, headline, interval, key_numbers, record, row, sentence

LOSS = "validation loss per document"
NAMES = ("classic", "values")
DRAWS = 999  # of the bootstrap, where it is called by the hundred: its quantiles are those of 9,999 but for chance


def loss(first: Any, second: Any, **facts: Any) -> Measure:
    return Measure(LOSS, "nats per token", -1, np.atleast_2d(first), np.atleast_2d(second), family="primary", **facts)


def task(first: Any, second: Any, name: str = "piqa", family: str = "tasks") -> Measure:
    sides = (np.atleast_2d(side).astype(float) for side in (first, second))
    return Measure(name, "points", 1, *sides, binary=True, family=family)


def finding(
    low: float, high: float, adjusted: float = 0.01, seeds: int = 3, measure: Measure | None = None, level: float = 0.95
) -> Finding:
    """One of a known interval, whose values play no part."""
    effect = Effect((low + high) / 2, low, high, adjusted, level, seeds, 300)
    return Finding(measure or loss(np.zeros((seeds, 2)), np.zeros((seeds, 2))), effect, adjusted, [])


def answers(random: np.random.Generator, count: int, discordance: float) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong of two models, equally good, that disagree on a share of the items."""
    kind = random.choice(4, count, p=[0.3, 0.7 - discordance, discordance / 2, discordance / 2])
    return np.isin(kind, (0, 2)), np.isin(kind, (0, 3))


def flipped(worse: int, better: int, items: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Answers of which the second side has `worse` wrong that the first had right, and `better` the other way."""
    first = np.arange(items) < items // 2
    second = first.copy()
    second[:worse] = False
    second[items - better :] = True
    return first, second


# ---- Many tests ------------------------------------------------------------------------------------------------------


def test_each_family_shares_an_error_rate_of_its_own():
    """Holm's correction as statsmodels has it, of the tasks and of the others; the primary quantity stands alone."""
    random = np.random.default_rng(0)
    base = random.normal(2, 0.5, 200)
    gains = (0.07, 0.02, 0.0, 0.03, 0.01)
    tasks = [task(*flipped(20, 20 + n), name=f"task {n}") for n in (0, 14, 5, 17, 20)]
    others = [
        Measure(f"other {n}", "nats", 1, base[None], (base + gain + random.normal(0, 0.3, 200))[None])
        for n, gain in enumerate(gains)
    ]
    noise = random.normal(0, 0.3, 200)
    primary = loss(base, base + noise - noise.mean() + 2.2 * noise.std() / np.sqrt(200))  # p = 0.03
    mixed = [others[0], tasks[0], primary, *(m for pair in zip(tasks[1:], others[1:], strict=True) for m in pair)]
    findings = find(mixed)
    assert [found.measure for found in findings] == mixed
    by_family: dict[str, list[Finding]] = {}
    for found in findings:
        by_family.setdefault(found.measure.family, []).append(found)
    assert {name: len(of) for name, of in by_family.items()} == {"primary": 1, "tasks": 5, "others": 5}
    for of_family in by_family.values():
        expected = multipletests([found.effect.p_value for found in of_family], method="holm")[1]
        assert [found.adjusted for found in of_family] == pytest.approx(list(expected))
        assert [found.primary for found in of_family] == [of_family is by_family["primary"]] * len(of_family)
    [first] = by_family["primary"]
    assert 0.01 < first.adjusted == first.effect.p_value < 0.05 and first.differs  # times 2 it would not be


def test_one_small_p_value_among_many_tasks_is_no_difference():
    low = task(*flipped(12, 29))
    nulls = [task(*flipped(20, 20), name=f"null {n}") for n in range(20)]
    [alone] = find([low])
    assert 0.0025 < alone.adjusted < 0.05 and alone.effect.low > 0 and alone.differs and alone.word == "higher"
    among = find([low, *nulls])[0]
    assert among.effect == alone.effect and among.adjusted == pytest.approx(21 * alone.adjusted)
    assert not among.differs and among.better == 0 and among.word == "no difference shown"
    assert row(among)[-1] == record(among)["shown"] == "no difference shown"
    apart = find([low, *(null._replace(family="others") for null in nulls)])[0]
    assert apart.adjusted == alone.adjusted and apart.differs


def test_an_interval_that_holds_zero_is_no_difference_whatever_the_p_value():
    for low, high in ((-0.1, 0.2), (0.0, 0.2), (-0.2, 0.0)):
        found = finding(low, high, adjusted=1e-6)
        assert not found.differs and found.word == "no difference shown" and found.better == 0
    assert finding(0.1, 0.2, 1e-6).differs and finding(-0.2, -0.1, 1e-6).differs


def test_the_p_value_is_held_against_the_level_of_the_interval():
    assert finding(0.1, 0.2, 0.07, level=0.9).differs
    assert not finding(0.1, 0.2, 0.07, level=0.95).differs
    assert not finding(0.1, 0.2, 0.02, level=0.99).differs
    random = np.random.default_rng(1)
    first, second = random.normal(2, 1, (2, 100))
    [narrow], [wide] = (find([loss(first, second)], level) for level in (0.8, 0.99))
    assert wide.effect.low < narrow.effect.low < narrow.effect.high < wide.effect.high
    for found, level in ((narrow, 80), (wide, 99)):
        assert f"{level}% interval" in sentence(NAMES, [1], [found], ways((None, None)))


def test_p_values_are_the_effect_s_and_mcnemar_stands_beside_them_by_seed():
    random = np.random.default_rng(2)
    first, second = random.random((2, 3, 100)) < 0.5
    [found] = find([task(first, second)])
    assert found.adjusted == found.effect.p_value
    assert [(table.only_first, table.only_second) for table in found.mcnemar] == [
        (int((one > two).sum()), int((two > one).sum())) for one, two in zip(first.astype(int), second, strict=True)
    ]
    assert all(table.p_value != found.adjusted for table in found.mcnemar)
    assert found.resampled == hierarchical_bootstrap(first.astype(float), second.astype(float))
    kept = json.loads(json.dumps(record(found)))
    assert len(kept["mcnemar"]) == 3 and kept["hierarchical_bootstrap"] == list(found.resampled)
    assert kept["means"] == pytest.approx([first.mean(), second.mean()]) and kept["family"] == "tasks"
    assert (kept["low"], kept["high"], kept["p_value"]) == found.effect[1:4]
    [single] = find([loss(first[0].astype(float), second[0].astype(float))])
    assert single.mcnemar == [] and single.resampled is None


# ---- How often it errs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "discordance"), [(400, 0.15), (1000, 0.3)])
def test_one_null_pair_in_twenty_is_called_different(monkeypatch, items, discordance):
    """500 pairs: 2 points either way of 5% are two standard errors of their share."""
    monkeypatch.setattr("evals.verdict.verdict.paired_effect", partial(paired_effect, resamples=DRAWS))
    random = np.random.default_rng(0)
    found = [find([task(*answers(random, items, discordance))])[0] for _ in range(500)]
    assert 0.03 <= np.mean([each.differs for each in found]) <= 0.07
    for each in found:
        assert (each.word == "no difference shown") == (each.effect.low <= 0 <= each.effect.high)
        assert each.word in ("no difference shown", "lower" if each.effect.difference < 0 else "higher")


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3], ids="spread {}".format)
def test_one_null_pair_of_three_seeds_in_twenty_is_called_different(monkeypatch, spread):
    """Documents whose differences vary by seed (`spread`, the seeds' own), by document in all seeds, and by both."""
    # no verdict rests on it
    monkeypatch.setattr("evals.verdict.verdict.hierarchical_bootstrap", lambda *_, **__: (0.0, 0.0))
    random = np.random.default_rng(0)
    words = []
    for _ in range(500):
        tokens = random.lognormal(5.3, 0.5, 200).round()
        of_seeds, of_items = spread * random.standard_normal((3, 1)), 0.1 * random.standard_t(5, 200)
        base = random.normal(2, 0.5, (3, 200))
        differences = of_seeds + of_items + 0.1 * random.standard_normal((3, 200))
        words.append(find([loss(base, base + differences, weights=tokens)])[0].word)
    assert 0.03 <= np.mean([word != "no difference shown" for word in words]) <= 0.07


# ---- Words -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(5, 60),
    st.floats(-1, 1),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_no_more_is_said_than_the_interval_bears_out(seed, seeds, items, gain, spread):
    random = np.random.default_rng(seed)
    first = random.normal(2, 1, (seeds, items))
    second = first - gain + spread * random.standard_normal((seeds, 1)) + 0.3 * random.standard_normal((seeds, items))
    measures = [
        loss(first, second),
        task(first > 2, second > 2),
        Measure("in-context score", "nats per token", -1, first, second),
    ]
    found = find(measures)
    savings = [Saving(2.0, Reached(4, 4000, None), Reached(3, 3000, None))] * seeds
    said = sentence(NAMES, list(range(seeds)), found, savings)
    for each in found:
        word = record(each)["shown"]
        mean = (each.measure.second - each.measure.first).mean()
        if each.effect.low <= 0 <= each.effect.high:
            assert word == row(each)[-1] == "no difference shown"
        assert word in ("no difference shown", "lower" if mean < 0 else "higher")
    effect = found[0].effect
    limits = ["one seed each"] * (seeds == 1) + [f"on these {items} documents alone"] * (items < 30)
    if limits:
        start = f"{', '.join(limits)}: "
        assert said.startswith(start[0].upper() + start[1:])
        said = said[len(start) :]
    how = "lower" if effect.high < 0 else "higher"
    if effect.low <= 0 <= effect.high:
        assert said.startswith(f"{'no' if limits else 'No'} difference between values")
        assert not re.search("better|worse|lower|higher|fewer", said)
    elif seeds == 1:
        assert said.startswith(f"values (seed 0) has a {how} {LOSS} than classic (seed 0): ")
        assert not re.search("better|worse|o difference", said)
    else:
        verdict = "better" if effect.high < 0 else "worse"
        assert said.startswith(f"values is {verdict} than classic: {how} {LOSS}, ") and "o difference" not in said
    assert ("whether other seeds agree is not known" in said) == (seeds == 1)
    assert said.endswith("30 are needed to say anything of other documents.") == (items < 30)


def test_a_null_pair_of_one_seed():
    random = np.random.default_rng(0)
    base = random.normal(2, 0.5, 300)
    [found] = find([loss(base, base + random.normal(0, 0.1, 300))])
    assert found.effect.low < 0 < found.effect.high
    assert sentence(NAMES, [7], [found], []) == (
        f"One seed each: no difference between values (seed 7) and classic (seed 7) is shown: {LOSS} "
        f"{found.effect.difference:+.4f} nats per token, 95% interval {found.effect.low:+.4f} to "
        f"{found.effect.high:+.4f} over 300 documents; whether other seeds agree is not known; nothing is known of "
        "what other initial weights alone change, as there is no null arm."
    )
    assert row(found)[-1] == record(found)["shown"] == "no difference shown"


def test_the_verdict_is_about_the_loss_alone():
    """Wherever it stands, and whatever the tasks show."""
    shown = finding(0.1, 0.2, measure=task([[0, 1]] * 3, [[0, 1]] * 3))
    assert shown.word == "higher" and shown.better == 1
    said = sentence(NAMES, [1, 2, 3], [shown, finding(-0.1, 0.2)], [])
    assert said.startswith("No difference between values and classic is shown: validation loss") and "3 seeds" in said
    assert sentence(NAMES, [1, 2, 3], [shown], []).startswith("There is no verdict on values against classic")


def test_the_headline_is_the_sentence_without_its_numbers():
    better, nothing = finding(-0.2, -0.1), finding(-0.1, 0.2)
    assert headline(NAMES, [better]) == f"values is better than classic: lower {LOSS}."
    assert headline(NAMES, [nothing]) == "No difference between values and classic is shown."
    one = finding(0.1, 0.2, seeds=1)
    assert headline(NAMES, [one]) == f"One seed each: values has a higher {LOSS} than classic."
    few = one._replace(effect=one.effect._replace(items=12, low=-0.1))
    assert headline(NAMES, [few]) == (
        "One seed each, on these 12 documents alone: no difference between values and classic is shown."
    )
    for found, seeds in ((better, [1, 2, 3]), (nothing, [1, 2, 3]), (one, [1]), (few, [1])):
        said = sentence(NAMES, seeds, [found], []).replace(" (seed 1)", "")
        assert said.startswith(headline(NAMES, [found]).removesuffix(".").split(f": lower {LOSS}")[0])
    assert headline(NAMES, []).startswith("There is no verdict on values against classic") and key_numbers([]) == []
    assert key_numbers([better], nothing) == [
        ("difference, nats per token", "-0.1500"),
        ("95% interval", "-0.2000 to -0.1000"),
        (LOSS, "lower"),
        ("measured on", "300 documents, 3 seeds"),
        ("null arm's difference", "+0.0500"),
    ]


def ways(*tokens: tuple[float | None, float | None], at_most: bool = False) -> list[Saving]:
    return [Saving(2.0, Reached(1, one, None), Reached(1, two, None, at_most)) for one, two in tokens]


@pytest.mark.parametrize(
    ("low", "savings", "expected"),
    [
        (
            -0.2,
            ways((40, 10)),
            "; values reaches classic's final loss with 75% fewer tokens (read between validations "
            "5,000 tokens apart, one pair).",
        ),
        (
            0.1,
            ways((10, 40)),
            "; classic reaches values's final loss with 75% fewer tokens (read between validations "
            "5,000 tokens apart, one pair).",
        ),
        # geometric means: of 0.5 and 0.125 that is 0.25
        (
            -0.2,
            ways((8, 4), (8, 1)),
            "values reaches classic's final loss with 75% fewer tokens (50%, 88% by seed: not "
            "shown, the 95% interval over seeds contains 0).",
        ),
        # logarithms of 2, 2.2, 1.8: mean 0.6897, standard error 0.0580, Student's quantile 4.3027
        (
            0.1,
            ways((10, 20), (10, 22), (10, 18)),
            "classic reaches values's final loss with 50% fewer tokens (95% "
            "interval 36 to 61%; 50%, 55%, 44% by seed).",
        ),
        (-0.2, ways((10, 40)), None),  # the loss by document and the run's own do not agree
        (0.1, ways((40, 10)), None),
        (-0.2, ways((40, 10), (None, 10)), None),
        (-0.2, ways((40, 10), at_most=True), None),
        (-0.05, ways((40, 10)), None),  # no difference is shown, so none is saved
    ],
)
def test_what_the_better_side_saves(low, savings, expected):
    said = sentence(NAMES, [1, 2], [finding(low, low + 0.1)], savings, spacing=5000)
    if expected:
        assert said.endswith(expected)
    else:
        assert "fewer" not in said and "reaches" not in said


# ---- Groups, few of them, and other runs -----------------------------------------------------------------------------


def test_groups_are_told_with_what_they_are_worth():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    base = random.normal(2, 0.5, 200)
    second = base - 0.2 + 0.1 * random.standard_normal(40)[groups] + 0.01 * random.standard_normal(200)
    [found] = find([loss(base, second, groups=groups)])
    worth = found.effect.effective
    assert found.effect.groups == 40 and 30 < worth < 60
    said = sentence(NAMES, [1], [found], [])
    assert f"over 200 documents of 40 groups (worth {worth:,.0f} independent ones); " in said
    assert said.startswith("One seed each: values (seed 1) has a lower") and "alone:" not in said
    [few] = find([loss(base, second, groups=groups // 8)])
    said = sentence(NAMES, [1], [few], [])
    assert few.effect.groups == 5 and not few.differs  # two to the minus fourth is above 5%
    assert said.startswith("One seed each, on these 200 documents of 5 groups alone: no difference between")
    assert said.endswith("; 30 are needed to say anything of other documents.")


def test_the_spread_of_other_runs_is_in_the_interval_and_told():
    random = np.random.default_rng(0)
    base = random.normal(2, 0.5, 300)
    measure = loss(base, base - 0.01 + 0.02 * random.standard_normal(300))
    [alone] = find([measure])
    assert alone.word == "lower"
    [beside] = find([measure], spreads={LOSS: Spread(0.01, 4), "something else": Spread(9.0, 2)})
    assert beside.word == "no difference shown" and beside.effect.spread == Spread(0.01, 4)
    said = sentence(NAMES, [7], [beside], [], null=alone._replace(effect=alone.effect._replace(difference=0.0123)))
    assert "the interval covers the spread of 4 runs of classic (0.0100 nats per token); classic with other" in said
    assert said.endswith("(null arm) differs by +0.0123 nats per token, no less than this.")
    assert "not known" not in said and "nothing is known" not in said
    kept = json.loads(json.dumps(record(beside)))
    assert kept["spread"] == [0.01, 4]
    three = loss(np.stack([base] * 3), np.stack([measure.second[0]] * 3))
    assert find([three], spreads={LOSS: Spread(9.0, 2)}) == find([three])  # several seeds have their own


# ---- Digits ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.floats(-9, 0), st.floats(0, 3), st.sampled_from([-1, 1]), st.booleans())
def test_a_bound_that_is_not_zero_does_not_look_like_it(power, wider, sign, points):
    """Down to a billionth, on either side of zero, in nats and in percent."""
    near, far = sign * 10**power, sign * 10 ** (power + wider) * 1.001
    measure = task(np.zeros((3, 2)), np.zeros((3, 2))) if points else None
    found = finding(*sorted((near, far)), measure=measure)
    shown = [float(bound) for bound in interval(found).split(" to ")]
    factor = 100 if points else 1
    for text, bound in zip(shown, sorted((near, far)), strict=True):
        assert text * sign > 0 and text == pytest.approx(factor * bound, rel=0.5)
    assert row(found)[4] == interval(found)
    assert digits(found) >= (2 if points else 4)
    if not points:
        assert f"interval {interval(found)} over" in sentence(NAMES, [1, 2, 3], [found], ways((None, 1)))


def test_an_interval_that_rounds_to_zero():
    assert interval(finding(0.00003, 0.0123)) == "+0.00003 to +0.01230"
    assert interval(finding(-0.0123, -0.00003)) == "-0.01230 to -0.00003"
    assert interval(finding(-0.0642, -0.0596)) == "-0.0642 to -0.0596"
    assert interval(finding(-0.00003, 0.0123)) == "0.0000 to +0.0123"  # it holds zero; and zero has no sign
    assert interval(finding(-0.0123, 0.00003)) == "-0.0123 to 0.0000"
    zero = finding(0.0, 0.0, adjusted=1.0)
    assert row(zero)[3:] == ["0.0000", "0.0000 to 0.0000", "1.000", "no difference shown"]


def test_a_row_of_a_task_is_in_percent():
    first, second = flipped(4, 24)  # of 400: 50% right, then 55%
    [found] = find([task(first, second)])
    low, high = 100 * found.effect.low, 100 * found.effect.high
    assert row(found) == ["piqa, %", "50.00", "55.00", "+5.00", f"{low:+.2f} to {high:+.2f}", "<0.001", "higher"]
    assert row(found._replace(adjusted=0.0123))[5] == "0.012"
