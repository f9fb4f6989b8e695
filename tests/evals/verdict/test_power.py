"""Power against statsmodels, and against the very tests that a comparison runs, on simulated pairs."""

import argparse
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student
from statsmodels.stats.power import NormalIndPower, TTestPower

from evals.verdict import power, statistics
from evals.verdict.ladder_simulation import SMALLEST, STEP, Design, Law, Truth, measure_coverage
from llm.common.errors import UserError


def options(*arguments: str) -> argparse.Namespace:
    """As `compare --plan` reads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--level", type=float, default=0.95)
    power.add_arguments(parser)
    return parser.parse_args(arguments)


def columns(text: str, title: str) -> dict[str, list[str]]:
    """The table that follows the line with `title`: first cell of a row -> the others."""
    lines = text[text.index(title) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("---")) + 1
    rows = [line.split() for line in lines[start : lines.index("", start)]]
    return {first: rest for first, *rest in rows}


# ---- Against statsmodels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_seeds_alone_are_the_t_test(seeds, alpha):
    compared = 0
    for effect in (0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0):
        expected = TTestPower().power(effect, seeds, alpha, alternative="two-sided")
        if not math.isnan(expected):  # scipy's noncentral t fails where the far side is too small
            found = power.power_of_mean(0.014 * effect, seeds, 10**6, 0.014**2, 0.0, alpha)
            assert found == pytest.approx(expected, abs=2e-3)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("seeds", [3, 5])
def test_smallest_difference_of_seeds_alone(seeds):
    found = power.smallest_loss(seeds, 10**6, 0.014, 0.0, 0.95, 0.8)
    effect = found / 0.014  # noncentral t, simulated: a normal estimate over the root of a chi square
    random = np.random.default_rng(0)
    estimates = effect + random.normal(0, 1, (200_000, seeds))
    t = estimates.mean(axis=1) / estimates.std(axis=1, ddof=1) * math.sqrt(seeds)
    assert np.mean(t > student.isf(0.025, seeds - 1)) == pytest.approx(0.8, abs=0.005)


def test_one_seed_is_the_t_test_over_documents():
    for documents in (50, 1000):
        expected = 0.04 * TTestPower().solve_power(None, documents, 0.05, 0.8, alternative="two-sided")
        assert power.smallest_loss(1, documents, 0.014, 0.04, 0.95, 0.8) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seeds", [2, 5])
def test_documents_alone_are_the_normal_test(seeds):
    expected = 0.04 * NormalIndPower(ddof=0).solve_power(None, 10_000, 0.05, 0.8, ratio=0, alternative="two-sided")
    assert power.smallest_loss(seeds, 10_000, 0.0, 0.04, 0.95, 0.8) == pytest.approx(expected, rel=2e-3)
    assert power.smallest_loss(seeds, 10_000, 0.0, 0.0, 0.95, 0.8) == 0


def test_mcnemars_power_against_the_normal_approximation():
    """Connor (1987): z sqrt(q) + z' sqrt(q - d^2) = d sqrt(N)."""
    for items, discordance in ((2000, 0.2), (10_000, 0.1)):
        chosen = options("--discordance", str(discordance))
        found = power.smallest_accuracy(1, items, chosen, 0.95)
        wanted = norm.isf(0.025) * math.sqrt(discordance) + norm.isf(0.2) * math.sqrt(discordance - found**2)
        assert found * math.sqrt(items) == pytest.approx(wanted, rel=0.03)
        assert found * math.sqrt(items) > wanted  # the exact test asks for more


def test_mcnemars_power_by_enumeration():
    """Every outcome of 12 items, by its multinomial probability."""
    items, discordance, difference = 12, 0.7, 0.5
    better, worse = (discordance + difference) / 2, (discordance - difference) / 2
    expected = 0.0
    for gained in range(items + 1):
        for lost in range(items + 1 - gained):
            rest = items - gained - lost
            ways = math.comb(items, gained) * math.comb(items - gained, lost)
            second = [True] * gained + [False] * lost + [True] * rest
            first = [False] * gained + [True] * lost + [True] * rest
            if statistics.mcnemar(first, second).p_value < 0.05:
                expected += ways * better**gained * worse**lost * (1 - discordance) ** rest
    assert power.power_of_mcnemar(difference, discordance, items, 0.05) == pytest.approx(expected)


# ---- Against simulation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "of_seeds"), [(1, 0.014), (2, 0.014), (3, 0.014), (3, 0.001), (5, 0.004)])
def test_a_printed_loss_difference_is_shown_in_four_of_five_comparisons(seeds, of_seeds):
    random = np.random.default_rng(seeds)
    documents = 100
    text = power.pair_power(
        options("--seeds", str(seeds), "--documents", str(documents), "--seed-deviation", f"{of_seeds}")
    )
    least = float(columns(text, "Validation loss")[str(seeds)][0])
    shown = []
    for _ in range(400):
        differences = least + random.normal(0, of_seeds, (seeds, 1)) * (seeds > 1) + random.normal(0, 0.04, documents)
        found = statistics.paired_effect(np.zeros((seeds, documents)), differences, resamples=999)
        shown.append(found.low > 0)
    assert 0.74 <= np.mean(shown) <= 0.86


@pytest.mark.parametrize(("seeds", "deviation", "items"), [(1, 0, 400), (3, 0, 1172), (5, 2, 500)])
def test_a_printed_accuracy_difference_is_shown_in_four_of_five_comparisons(seeds, deviation, items):
    random = np.random.default_rng(0)
    chosen = options("--seeds", str(seeds), "--items", str(items), "--accuracy-deviation", str(deviation))
    (cell,) = columns(power.pair_power(chosen), "one task alone")[f"{items:,}"]
    least, shown = float(cell) / 100, []
    for _ in range(400):
        effects = np.clip(least + random.normal(0, deviation / 100, seeds), -0.15, 0.15)
        differences = np.stack(
            [random.choice([1.0, -1.0, 0.0], items, p=[(0.15 + e) / 2, (0.15 - e) / 2, 0.85]) for e in effects]
        )
        if seeds == 1:
            found = statistics.mcnemar(differences[0] < 0, differences[0] > 0)
            shown.append(found.p_value < 0.05 and found.only_second > found.only_first)
        else:
            shown.append(statistics.paired_effect(np.zeros(differences.shape), differences).low > 0)
    assert 0.73 <= np.mean(shown) <= 0.87


# ---- The report ------------------------------------------------------------------------------------------------------


def test_report():
    text = power.pair_power(options("--seeds", "1", "2", "5", "--items", "100", "1172", "--tests", "5"))
    losses = columns(text, "Validation loss")
    assert list(losses) == ["1", "2", "5"]
    alone, corrected = columns(text, "one task alone"), columns(text, "the one of 5 tests")
    assert list(alone) == list(corrected) == ["100", "1,172"]
    assert alone["100"][1] == "–"  # two seeds of so few items, against a t quantile of 12.7
    for column in (0, 2):
        assert float(alone["1,172"][column]) < float(corrected["1,172"][column])
        assert float(alone["1,172"][column]) < float(alone["100"][column])
    for said in ("80%", "calls 5% of", "--seed-deviation", "stories pair", "python -m llm fit", "evals compare"):
        assert said in text
    assert max(map(len, text.splitlines())) <= 100


def test_one_test_is_not_corrected():
    assert "Holm" not in power.pair_power(options("--tests", "1", "--items", "100"))


def test_more_is_better():
    for change in (["--documents", "4000"], ["--seed-deviation", "0.007"], ["--power", "0.5"], ["--level", "0.9"]):
        before, after = (columns(power.pair_power(options(*extra)), "Validation loss") for extra in ([], change))
        assert float(after["3"][0]) <= 1.01 * float(before["3"][0])  # levels are not exactly alike
        assert sum(float(cell) for (cell,) in after.values()) < sum(float(cell) for (cell,) in before.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], "--seeds of at least 1"),
        (["--documents", "0"], "--documents of at least 2"),
        (["--items", "1"], "--items of at least 2"),
        (["--power", "1"], "--power between 1 - level and 1"),
        (["--power", "0.01"], "--power between 1 - level and 1"),
        (["--seed-deviation", "-1"], "--seed-deviation of 0 or more"),
        (["--document-deviation", "inf"], "--document-deviation of 0 or more"),
        (["--discordance", "nan"], "--discordance between 0 and 1"),
        (["--tests", "0", "--accuracy-deviation", "-1"], "--tests of at least 1, --accuracy-deviation of 0 or more"),
    ],
)
def test_values_out_of_range(arguments, words):
    with pytest.raises(UserError, match=words):
        power.pair_power(options(*arguments))


def test_help_needs_no_scipy():
    script = "import sys; import evals.verdict.power; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# ---- A ladder of sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [Design(4, 3), Design(5, 2), Design(6, 3)], ids=str)
def test_smallest_multiplier_is_shown_as_often_as_asked(design):
    """On simulated ladders, whose estimator also has the curve to find and the fall of the scatter."""
    parameters = SMALLEST * STEP ** np.arange(design.sizes)
    law = Law()
    losses = [law(n, 20 * n) for n in (parameters * math.exp(-0.005), parameters * math.exp(0.005))]
    slopes = (losses[0] - losses[1]) / 0.02  # compute is the square of parameters
    deviations = 0.03 * (parameters / SMALLEST) ** -0.2  # 0.03 C^-0.1, and half of two variances
    plan = power.smallest_multiplier(2 * np.log(parameters), slopes, deviations, [design.seeds] * design.sizes)
    for which, multiplier in (("shown_mean", plan.shown), ("firm_mean", plan.firm)):
        truth = Truth("", lambda x, m=multiplier: np.full_like(x, math.log(m)))
        assert getattr(measure_coverage(truth, design, 1000), which) == pytest.approx(0.8, abs=0.07)
    assert 1 < plan.shown < plan.firm


def test_smallest_multiplier_of_three_sizes_is_never_firm():
    plan = power.smallest_multiplier([1.0, 3.0, 5.0], [0.3] * 3, [0.03] * 3, [2, 2, 3])
    assert plan.firm == math.inf and 1 < plan.shown < 1.5
    more = power.smallest_multiplier([1.0, 3.0, 5.0], [0.3] * 3, [0.03] * 3, [5, 5, 5])
    assert more.shown < plan.shown


@pytest.mark.parametrize(
    "arguments",
    [
        ([1, 3], [0.3] * 2, [0.1] * 2, [3] * 2),
        ([1, 3, 5], [0.3] * 3, [0.1] * 3, [3, 1, 3]),
        ([1, 3, 5], [0.3, 0.2, 0.0], [0.1] * 3, [3] * 3),
    ],
)
def test_ladders_that_show_nothing_are_refused(arguments):
    with pytest.raises(UserError, match="needs three sizes of two seeds, slopes and deviations above 0: add sizes"):
        power.smallest_multiplier(*arguments)
