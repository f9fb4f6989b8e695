"""What may be claimed of a ladder: pairs, refusals, Holm's correction, the sentence, the record."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from evals.verdict import ladder_words as words
from evals.verdict.ladder import Ladder, Run, Size, judge, judge_arm, make_ladder
from evals.verdict.ladder_simulation import SMALLEST, STEP, TRUTHS, Design, Seeds, Truth, simulate
from llm.common.errors import UserError

BY_NAME = {truth.name: truth for truth in TRUTHS}
QUIET = Seeds(deviation=0.005)
USUAL = Design(5, 3)


def sizes_of(design: Design) -> list[Size]:
    """The sizes of a simulated ladder."""
    found = []
    for n in range(design.sizes):
        parameters = SMALLEST * STEP**n
        tokens = tuple(20 * parameters * 2.0**k for k in range(design.branches))
        found.append(Size(f"s{n}", parameters, tokens, tuple(6 * parameters * t for t in tokens)))
    return found


def runs_of(truth: Truth, design: Design, seed: int = 0, null: bool = True) -> list[Run]:
    """Simulated runs of classic, values and null."""
    generator = np.random.default_rng(seed)
    losses = simulate(truth, design, 1, generator).losses
    nothing = simulate(replace(BY_NAME["no effect"], seeds=truth.seeds), design, 1, generator).losses
    runs = []
    for n, size in enumerate(sizes_of(design)):
        difference = nothing.arm[n] - nothing.base[n]
        arms = {"classic": losses.base[n], "values": losses.arm[n], "null": losses.base[n] + difference}
        for arm, values in arms.items():
            if arm != "null" or null:
                runs += [
                    Run(arm, size.name, 10 * n + s, size.tokens[k], float(values[0, s, k]))
                    for s in range(design.seeds)
                    for k in range(design.branches)
                ]
    return runs


def ladder_of(truth: Truth | str, design: Design = USUAL, seed: int = 0, null: bool = True) -> Ladder:
    truth = BY_NAME[truth] if isinstance(truth, str) else truth
    runs = runs_of(truth, design, seed, null)
    return make_ladder(runs, sizes_of(design), "classic", "null" if null else None)


CONSTANT = replace(BY_NAME["m = 1.3"], seeds=QUIET)
NOTHING = replace(BY_NAME["no effect"], seeds=Seeds(deviation=0.02))
FADING = replace(BY_NAME["ln m fades"], seeds=QUIET)
HALVING = replace(BY_NAME["ln m halves per decade"], seeds=QUIET)


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_a_ladder_does_not_depend_on_the_order_of_its_runs():
    design = Design(4, 3, 2)
    runs, sizes = runs_of(BY_NAME["m = 1.3"], design), sizes_of(design)
    one = judge(make_ladder(runs, sizes, "classic", "null"))
    other = judge(make_ladder(runs[::-1], sizes[::-1], "classic", "null"))
    for arm in ("values", "null"):
        assert one.arms[arm].mean.by_seeds == pytest.approx(other.arms[arm].mean.by_seeds, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: [*runs, runs[0]], "classic, size s0, seed 0, 3.2e+08 tokens is given twice"),
        (lambda runs: [*runs, Run("values", "huge", 0, 1.0, 1.0)], "values has a run of size huge, 1 tokens: declare"),
        (lambda runs: runs[1:], "classic, size s0, seed 0 lacks its run of 3.2e\\+08 tokens; train it"),
        (lambda runs: [run for run in runs if run.arm != "null"], "no run is of the arm null: give its runs"),
    ],
)
def test_runs_that_make_no_ladder_are_named(change, message):
    design = Design(3, 2, 2)
    with pytest.raises(UserError, match=message.replace("e+08 tokens is", "e\\+08 tokens is")):
        make_ladder(change(runs_of(CONSTANT, design)), sizes_of(design), "classic", "null")


def test_budgets_of_one_ratio():
    sizes = sizes_of(Design(3, 2, 2))
    sizes[1] = replace(sizes[1], tokens=(1e9, 3e9), flops=(1e17, 3e17))
    with pytest.raises(UserError, match="do not stand in one ratio: give every size the same multiples"):
        make_ladder([Run("classic", "s0", 0, t, 3.0) for t in sizes[0].tokens], sizes, "classic")


def test_a_pair_that_diverged_is_left_out_and_named():
    design = Design(5, 3)
    runs = [
        run._replace(loss=math.nan) if (run.arm, run.size, run.seed) == ("values", "s1", 12) else run
        for run in runs_of(CONSTANT, design)
        if (run.arm, run.size, run.seed) != ("values", "s3", 30)
    ]
    verdict = judge(make_ladder(runs, sizes_of(design), "classic", "null"))
    found = verdict.arms["values"]
    assert [at.seeds for at in found.sizes] == [3, 2, 3, 2, 3]
    assert "Size s1, seed 12: values diverged; the pair is left out" in found.notes[0]
    assert "Size s3, seed 30: values has no finished run" in found.notes[1]
    assert verdict.arms["null"].notes == ()
    assert found.mean.by_seeds.low < math.log(1.3) < found.mean.by_seeds.high
    assert verdict.joint is not None


def test_a_ladder_whose_runs_all_diverged_says_nothing():
    design = Design(4, 2)
    runs = [run._replace(loss=math.nan) for run in runs_of(CONSTANT, design)]
    verdict = judge(make_ladder(runs, sizes_of(design), "classic", "null"))
    assert verdict.joint is None
    assert "size s0 has 0 finished pairs of values and classic" in words.sentence(verdict, "values")


def test_seeds_that_repeat_over_sizes_are_noted():
    design = Design(4, 2)
    runs = [run._replace(seed=run.seed % 10) for run in runs_of(CONSTANT, design)]
    (note,) = judge_arm(make_ladder(runs, sizes_of(design), "classic"), "values").notes
    assert note.startswith("Several sizes have seeds in common (0, 1), which may share their luck")


# ---- Refusals --------------------------------------------------------------------------------------------------------


def codes(ladder: Ladder, arm: str = "values") -> list[str]:
    return [refusal.code for refusal in judge_arm(ladder, arm).refusals]


def test_a_size_with_one_seed_is_refused():
    design = Design(4, 2)
    runs = [run for run in runs_of(CONSTANT, design) if (run.size, run.seed) != ("s2", 21)]
    verdict = judge(make_ladder(runs, sizes_of(design), "classic", "null"))
    assert [refusal.code for refusal in verdict.arms["values"].refusals] == ["one_seed"]
    assert words.sentence(verdict, "values") == (
        "There is no verdict on values against classic: size s2 has 1 finished pair of values and classic, and an "
        "interval needs two seeds: train another seed there."
    )


@pytest.mark.parametrize("sizes", [1, 2])
def test_two_sizes_say_nats_only(sizes):
    found = judge_arm(ladder_of(CONSTANT, Design(sizes, 3)), "values")
    assert [refusal.code for refusal in found.refusals] == ["few_sizes"]
    assert found.mean is None and found.slope is None and len(found.sizes) == sizes
    assert all(at.difference.high < 0 and at.log_multiplier is None for at in found.sizes)


def test_one_size_is_the_paired_t_test():
    ladder = ladder_of(CONSTANT, Design(1, 5))
    pairs = np.array([[ladder.losses[arm, "s0", seed][0] for seed in range(5)] for arm in ("values", "classic")])
    expected = stats.ttest_rel(*pairs)
    found = judge_arm(ladder, "values").sizes[0].difference
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_three_sizes_are_never_firm_and_hold_nothing_out():
    found = judge_arm(ladder_of(CONSTANT, Design(3, 3)), "values")
    assert found.refusals[0].code == "three_sizes"
    assert found.mean.shown == 1 and not found.mean.firm and found.held_out is None
    assert "by seeds alone (three sizes are too few to be a sample)" in words.sentence(
        judge(ladder_of(CONSTANT, Design(3, 3))), "values"
    )


def test_a_baseline_that_hardly_falls_is_refused():
    flat = replace(CONSTANT, seeds=Seeds(deviation=1.0, fall=0.0))
    assert codes(ladder_of(flat, Design(3, 2), seed=3)) == ["flat_baseline"]


def test_a_baseline_off_every_curve_is_refused():
    design = Design(5, 3)
    runs = [run._replace(loss=run.loss + 0.3 * (run.size == "s2")) for run in runs_of(CONSTANT, design)]
    ladder = make_ladder(runs, sizes_of(design), "classic", "null")
    assert codes(ladder) == ["curve_misfit"]
    sentence = words.sentence(judge(ladder), "values")
    assert "nats per token" in sentence and "no compute multiplier" in sentence and "% less" not in sentence


def test_a_difference_beyond_the_curve_is_refused():
    design = Design(5, 3)
    runs = [run._replace(loss=run.loss - 1.5 * (run.arm == "values")) for run in runs_of(CONSTANT, design)]
    assert codes(make_ladder(runs, sizes_of(design), "classic", "null")) == ["beyond_curve"]


def test_a_line_that_misfits_gives_no_slope_and_no_extrapolation():
    design = Design(5, 3)
    runs = [
        run._replace(loss=run.loss - 0.1 * (run.arm == "values" and run.size == "s2"))
        for run in runs_of(CONSTANT, design)
    ]
    verdict = judge(make_ladder(runs, sizes_of(design), "classic", "null"))
    found = verdict.arms["values"]
    assert [refusal.code for refusal in found.refusals] == ["line_misfit"]
    assert found.mean is not None and (found.slope, found.largest, found.beyond) == (None, None, None)
    sentence = words.sentence(verdict, "values")
    assert "slope" not in sentence and "size by size" in sentence and sentence.count("% less compute") == 5


# ---- Claims ----------------------------------------------------------------------------------------------------------


def test_a_constant_gain_is_firm_and_predicts_its_largest_size():
    verdict = judge(ladder_of(CONSTANT))
    found = verdict.arms["values"]
    assert found.mean.firm and found.mean.by_seeds.low < math.log(1.3) < found.mean.by_seeds.high
    assert found.held_out.predicted and not verdict.null.shown
    assert found.beyond.low < math.log(1.3) < found.beyond.high
    assert found.beyond_compute == pytest.approx(10 * verdict.ladder.sizes[-1].flops[0])
    assert all(at.shown and at.difference.value < 0 < at.log_multiplier.value for at in found.sizes)


def test_holm_runs_over_sizes_and_arms():
    design = Design(4, 3)
    runs = runs_of(replace(CONSTANT, seeds=Seeds(deviation=0.05)), design)
    runs += [run._replace(arm="keys", loss=run.loss - 0.01) for run in runs if run.arm == "null"]
    verdict = judge(make_ladder(runs, sizes_of(design), "classic", "null"))
    sizes = [at for arm in ("values", "keys") for at in verdict.arms[arm].sizes]
    expected = multipletests([at.difference.p_value for at in sizes], method="holm")[1]
    np.testing.assert_allclose([at.adjusted for at in sizes], expected)
    null = [at.difference.p_value for at in verdict.null.sizes]
    np.testing.assert_allclose([at.adjusted for at in verdict.null.sizes], multipletests(null, method="holm")[1])


def test_level_of_the_intervals():
    ladder = ladder_of(CONSTANT)
    narrow, wide = (judge(ladder, level).arms["values"].mean.by_seeds for level in (0.9, 0.99))
    assert wide.low < narrow.low < narrow.value == wide.value < narrow.high < wide.high


def test_an_arm_that_is_the_baseline_shows_nothing():
    design = Design(5, 3)
    runs = [run for run in runs_of(CONSTANT, design) if run.arm == "classic"]
    runs += [run._replace(arm="same") for run in runs]
    verdict = judge(make_ladder(runs, sizes_of(design), "classic"))
    found = verdict.arms["same"]
    assert found.mean.by_seeds.value == pytest.approx(0, abs=1e-9) and not found.shown and not found.mean.firm
    assert words.sentence(verdict, "same").startswith("no difference in compute between same and classic is shown")


@settings(max_examples=20)
@given(st.floats(1e-6, 1e6), st.integers(0, 20))
def test_unit_of_compute_is_of_no_account(unit, seed):
    design = Design(4, 2)
    ladder = ladder_of("m = 1.3", design, seed, null=False)
    sizes = tuple(replace(size, flops=tuple(unit * flops for flops in size.flops)) for size in ladder.sizes)
    one, other = (judge_arm(each, "values") for each in (ladder, replace(ladder, sizes=sizes)))
    assert [refusal.code for refusal in one.refusals] == [refusal.code for refusal in other.refusals]
    for name in ("mean", "slope", "largest"):
        claims = getattr(one, name), getattr(other, name)
        assert (claims[0] is None) == (claims[1] is None)
        if claims[0] is not None:
            assert claims[0].by_seeds == pytest.approx(claims[1].by_seeds, rel=1e-6)


def test_record_is_json_with_every_number():
    verdict = judge(ladder_of(CONSTANT, Design(4, 2, 2)))
    record = json.loads(json.dumps(words.record(verdict), allow_nan=False))
    assert record["arms"]["values"]["mean"]["by_seeds"]["value"] == verdict.arms["values"].mean.by_seeds.value
    assert record["arms"]["values"]["sizes"][1]["size"]["name"] == "s1"
    assert record["ladder"]["losses"]["classic s0 0"] == list(verdict.ladder.losses["classic", "s0", 0])
    assert len(record["joint"]["residuals"]) == 3 * 4 * 2 * 2
