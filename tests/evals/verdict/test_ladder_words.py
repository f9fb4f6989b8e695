"""What a verdict on a ladder says, which is never more than its intervals do."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.verdict import ladder_words as words
from evals.verdict.ladder import Claim, judge
from evals.verdict.ladder_simulation import TRUTHS, Design
from evals.verdict.statistics import Interval

from .test_ladder import CONSTANT, FADING, HALVING, NOTHING, ladder_of


def test_sentence_of_a_gain():
    sentence = words.sentence(judge(ladder_of(CONSTANT)), "values")
    assert sentence.startswith("values needs 23% less compute than classic (95% interval 2")
    assert "over 16M to 625M parameters; that the gain grows or shrinks with size is not shown (slope" in sentence
    assert sentence.endswith("; the null arm shows nothing.")


def test_sentence_of_nothing():
    sentence = words.sentence(judge(ladder_of(NOTHING, seed=2, null=False)), "values")
    assert sentence.startswith("no difference in compute between values and classic is shown over 16M to 625M")
    assert "needs" not in sentence and "firm" not in sentence
    assert sentence.endswith("there is no null arm, so what differs without a change is not known.")


def test_sentence_of_a_difference_in_nats_alone():
    """Each size is tested by its difference; how much compute that is may still be unknown."""
    verdict = judge(ladder_of(NOTHING, seed=2))
    found = verdict.arms["values"]
    lower = found.sizes[1]._replace(difference=Interval(-0.3, -0.4, -0.2, 0.0004), adjusted=0.002)
    sizes = (found.sizes[0], lower, *found.sizes[2:])
    changed = replace(verdict, arms={**verdict.arms, "values": replace(found, sizes=sizes)})
    assert (lower.differs, lower.shown, found.sizes[1].differs) == (True, False, False)
    sentence = words.sentence(changed, "values")
    assert "; in nats per token, a difference is shown: -0.3000 (-0.4000 to -0.2000) at " in sentence
    assert sentence.replace(sentence[sentence.index("; in nats") : sentence.index("; that the")], "") == words.sentence(
        verdict, "values"
    )


def test_sentence_of_a_fading_gain():
    assert "; the gain shrinks with size (slope of ln m over ln C -0.04" in words.sentence(
        judge(ladder_of(FADING)), "values"
    )


def test_sentence_of_a_null_arm_that_differs():
    ladder = ladder_of(CONSTANT)
    losses = {key: tuple(loss + 0.1 * (key[0] == "null") for loss in values) for key, values in ladder.losses.items()}
    sentence = words.sentence(judge(replace(ladder, losses=losses)), "values")
    assert "the null arm, which carries no change, shows a difference too: +0.1" in sentence


def test_words_of_predictions():
    verdict = judge(ladder_of(CONSTANT))
    found = verdict.arms["values"]
    assert words.extrapolation(verdict, "values").startswith("Extrapolated: if ln m stays on its line, values needs 2")
    assert f"(95% prediction interval {words.bounds(found.beyond)}, for 3 seeds)." in words.extrapolation(
        verdict, "values"
    )
    assert words.held_out(verdict, "values").startswith("Held out, size s4 is as the smaller sizes predict it")
    moved = {
        key: tuple(loss - 0.2 * (key[:2] == ("values", "s4")) for loss in values)
        for key, values in verdict.ladder.losses.items()
    }
    verdict = judge(replace(verdict.ladder, losses=moved))
    assert "s4 is not as the smaller sizes predict it" in words.held_out(verdict, "values")
    assert words.extrapolation(verdict, "values") == ""
    assert words.held_out(judge(ladder_of(CONSTANT, Design(3, 3))), "values") == ""


@pytest.mark.parametrize("truth", [CONSTANT, NOTHING, FADING, HALVING, *TRUTHS], ids=lambda truth: truth.name)
def test_no_sentence_says_more_than_its_intervals(truth):
    for seed in range(6):
        verdict = judge(ladder_of(truth, Design(4, 2), seed))
        for arm in ("values", "null"):
            found, sentence = verdict.arms[arm], words.sentence(verdict, arm)
            if found.mean is None:
                assert "compute than" not in sentence
                continue
            if found.line:
                assert ("compute than classic" in sentence) == bool(found.mean.by_seeds.shown)
                assert ("is not shown (slope" in sentence) == (not found.slope.by_seeds.shown)
                unfirm = sum(claim.shown != 0 and not claim.firm for claim in (found.mean, found.slope))
                assert sentence.count("by seeds alone") == unfirm
            else:
                assert "slope" not in sentence and "compute than" not in sentence


def test_where_compute_is_unknown_no_slope_and_no_extrapolation_are_given():
    verdict = judge(ladder_of(CONSTANT, Design(4, 3), 1))
    found, unknown = verdict.arms["values"], Interval(0.2, -5.0, 5.0, 0.9)
    assert "slope" in words.sentence(verdict, "values") and words.extrapolation(verdict, "values")
    open_ = replace(found, mean=Claim(unknown, None), beyond=unknown)
    verdict = replace(verdict, arms=verdict.arms | {"values": open_})
    assert "slope" not in words.sentence(verdict, "values") and not words.extrapolation(verdict, "values")


@pytest.mark.parametrize(
    ("log_multiplier", "expected"),
    [
        *((math.log(1.25), "20% less"), (-math.log(1.1), "10% more"), (math.log(1.04), "3.8% less")),
        *((-1.2, "3.3 times"), (-math.log(99), "99.0 times")),
        *((-math.log(101), "over 100 times"), (math.log(101), "over 99% less")),
    ],
)
def test_multipliers_as_compute(log_multiplier, expected):
    assert words.in_compute(log_multiplier) == expected


def test_intervals_of_multipliers_beyond_what_was_trained():
    assert words.bounds(Interval(2.0, 1.0, 300.0, 0.0)) == "63 to over 99%"
    assert words.bounds(Interval(2.0, -300.0, 300.0, 0.5)) == "over 100 times to over 99% less"


@given(st.floats(-0.5, 0.5), st.floats(0.001, 0.3), st.floats(0.8, 1.3), st.floats(0.001, 0.2), st.floats(0.001, 0.2))
def test_cost_adjustment_of_symmetric_and_skewed_intervals(y, half, ratio, below, above):
    cost = Interval(ratio, ratio * math.exp(-below), ratio * math.exp(above), 0.5)
    found = words.adjusted_for_cost(Interval(y, y - half, y + half, 0.5), cost)
    assert found.value == pytest.approx(y - math.log(ratio))
    assert found.value - found.low == pytest.approx(math.hypot(half, above))
    assert found.high - found.value == pytest.approx(math.hypot(half, below))
    assert (found.p_value < 0.05) == bool(found.shown) or math.isclose(found.p_value, 0.05, abs_tol=1e-9)


def test_cost_of_one_changes_nothing():
    interval = Interval(0.2, 0.1, 0.3, 0.01)
    assert words.adjusted_for_cost(interval, Interval(1.0, 1.0, 1.0, 1.0))[:3] == pytest.approx(interval[:3])


def test_words_at_equal_cost():
    verdict = judge(ladder_of(CONSTANT))
    cheap = words.at_equal_cost(verdict, "values", Interval(1.02, 1.01, 1.03, 0.0))
    assert cheap.startswith("At the measured cost (a step takes 1.02 times as long, 1.01 to 1.03), values needs 2")
    assert "% less time than classic (95% interval " in cheap
    dear = words.at_equal_cost(verdict, "values", Interval(1.5, 1.45, 1.55, 0.0))
    assert "values needs 1" in dear and "% more time than classic" in dear
    assert "no difference in time" in words.at_equal_cost(verdict, "values", Interval(1.3, 1.2, 1.4, 0.0))
