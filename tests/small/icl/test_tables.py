"""Tables and t-tests against scipy on numbers put in by hand, and the paper's own t from its own table."""

import math

import numpy as np
import pytest
from scipy import stats

from small.icl.runs import Snapshot
from small.icl.tables import PAPER, compare, first_above, format_tables, verdict
from small.icl.task import KINDS


def curve(variant: str, seed: int, accuracies: list[float]) -> list[Snapshot]:
    return [
        Snapshot(n, 500 * n, variant, seed, dict.fromkeys(KINDS, accuracy), dict.fromkeys(KINDS, 1.0))
        for n, accuracy in enumerate(accuracies)
    ]


def passing(variant: str, firsts: list[int | None], length: int = 80) -> list[Snapshot]:
    """Runs whose accuracy passes all thresholds at a snapshot each."""
    rows = []
    for seed, first in enumerate(firsts):
        rows += curve(variant, seed, [0.97 if first is not None and n >= first else 0.1 for n in range(length)])
    return rows


def test_first_above_is_the_first_snapshot_beyond_the_threshold() -> None:
    rows = curve("values", 3, [0.1, 0.95, 0.96, 0.2, 0.99]) + curve("values", 4, [0.1] * 5)
    assert first_above(rows, "ic", 0.95) == {"values": {3: 2, 4: None}}  # 0.95 does not exceed 0.95
    assert first_above(rows[::-1], "ic", 0.9)["values"][3] == 1


def test_tests_equal_their_formulas() -> None:
    a, b = {0: 50, 1: 49, 2: 47, 3: 52}, {0: 64, 1: 60, 2: 71, 3: 63}
    found = compare(a, b, ("values", "classic"))
    x, y = np.array(list(a.values()), float), np.array(list(b.values()), float)
    pooled = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 4)
    t = (x.mean() - y.mean()) / pooled
    assert found.t == pytest.approx(t)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 6))
    within = x - y
    half = stats.t.ppf(0.975, 3) * within.std(ddof=1) / 2
    assert (found.low, found.high) == pytest.approx((within.mean() - half, within.mean() + half))
    assert found.paired_p == pytest.approx(2 * stats.t.sf(abs(within.mean() / (within.std(ddof=1) / 2)), 3))


def test_the_papers_t_follows_from_its_table() -> None:
    """t = -2.33, p = 0.06 for values against queries on IC: its deviations are the population's, its t Student's."""
    (m1, s1), (m2, s2) = PAPER[0.95, "ic"]["values"], PAPER[0.95, "ic"]["queries"]
    sample = math.sqrt(4 / 3)
    found = stats.ttest_ind_from_stats(m1, s1 * sample, 4, m2, s2 * sample, 4)
    assert round(found.statistic, 2) == pytest.approx(-2.33, abs=0.011)
    assert round(found.pvalue, 2) == 0.06


def test_the_table_has_means_deviations_and_the_papers_row() -> None:
    rows = passing("classic", [64, 60, 71, 63]) + passing("values", [50, 49, 47, None])
    text = format_tables(rows)
    assert f"{np.mean([64, 60, 71, 63]):.2f} ± {np.std([64, 60, 71, 63]):.2f}" in text
    assert "48.67 ± 1.25 (3 of 4)" in text
    assert "64.5 ± 5.12" in text and "49 ± 2.12" in text
    assert text.count("Table") == 3


def test_the_verdict_follows_the_interval() -> None:
    apart = verdict(passing("classic", [64, 60, 71, 63]) + passing("values", [50, 47, 56, 50]))
    assert apart.startswith("values is earlier than classic on IC: -13.75 snapshots (-21%)")
    alike = verdict(passing("classic", [64, 60, 71, 63]) + passing("keys", [60, 64, 70, 66]))
    assert alike.startswith("keys is not shown to differ from classic")
    assert verdict(passing("values", [50, 49])) == ""


def test_equal_differences_in_few_seeds_are_no_certainty() -> None:
    found = compare({0: 40, 1: 50}, {0: 44, 1: 54}, ("values", "classic"))
    assert (found.difference, found.low, found.high) == (-4, -math.inf, math.inf)
    assert "not shown to differ from" in verdict(passing("classic", [44, 54]) + passing("values", [40, 50]))
    assert compare({0: 40}, {0: 44}, ("a", "b")) is None


def test_variants_with_a_run_that_never_passed_are_not_judged() -> None:
    """Left out, their slow runs would make them look faster than they are."""
    rows = passing("classic", [60, 62, 64, 66]) + passing("values", [58, 60, None, None])
    assert verdict(rows) == "values: nothing is said of it (2 of 4 values and 4 of 4 classic passed)."
    assert "2 of 4 and 4 of 4 passed" in format_tables(rows)


def test_a_table_says_how_far_it_has_looked() -> None:
    assert format_tables(curve("values", 0, [0.1, 0.2])).count("not by 1") == 6


def test_ic_and_ic2_have_rows_and_tests_of_their_own() -> None:
    rows = []
    for variant, (ic, ic2) in {"classic": (10, 12), "values": (5, 8)}.items():
        for seed in range(3):
            passed = {"ic": ic + seed % 2, "ic2": ic2 + seed}
            for n in range(20):
                accuracy = {kind: 0.99 if n >= passed.get(kind, 99) else 0.1 for kind in KINDS}
                rows.append(Snapshot(n, 500 * n, variant, seed, accuracy, dict.fromkeys(KINDS, 1.0)))
    lines = {line.split("  ")[0]: line for line in format_tables(rows).splitlines()}
    assert "10.33" in lines["IC"] and "5.33" in lines["IC"]
    assert "13.00" in lines["IC2"] and "9.00" in lines["IC2"]
    assert "-5.00" in lines["IC: values - classic"] and "-4.00" in lines["IC2: values - classic"]
