"""The table of null pairs is that of its CSV, and says what its regimes are drawn as."""

import csv

import numpy as np
import pytest

from benchmarks.null_pairs import PAGE, REGIMES, RESULT, Regime, draw, main, measured, page_with, table


@pytest.fixture(scope="module")
def rows():
    with RESULT.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_has_the_table_of_the_csv(rows):
    assert [row["regime"] for row in rows] == [regime.name for regime in REGIMES]
    assert page_with(table(rows)) == PAGE.read_text(encoding="utf-8")


def test_what_errs_is_told(rows):
    """Outside of 4 to 6%, give or take three standard errors of 1,000 pairs, most pairs come with a warning."""
    for row in rows:
        rate = float(row["false"])
        if not 4 - 2.1 <= rate <= 6 + 2.1:
            assert rate < 2 or float(row["warned"]) >= 50, row


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_pairs_are_drawn_without_a_difference(regime: Regime):
    numbers = np.random.default_rng(0)
    means, correlations = [], []
    for _ in range(30):
        measure, spread = draw(regime, numbers)
        differences = measure.second - measure.first
        assert differences.shape[0] == regime.seeds and abs(differences.shape[1] / regime.documents - 1) < 0.1
        assert (measure.groups is not None) == bool(regime.groups and regime.named)
        assert (spread is not None) == bool(regime.companions)
        means.append(differences.mean())
        if regime.groups == 50 and not regime.uneven and regime.seeds == 1:
            of_groups = differences.reshape(50, 20)
            within, between = of_groups.var(axis=1, ddof=1).mean(), of_groups.mean(axis=1).var(ddof=1)
            shared = between - within / 20  # analysis of variance
            correlations.append(shared / (shared + within))
    assert abs(np.mean(means)) < 4 * np.std(means, ddof=1) / np.sqrt(30)
    if correlations:
        assert np.mean(correlations) == pytest.approx(regime.correlation, abs=0.08)


def test_a_share_of_few_pairs():
    row = measured(Regime("made up", 40, 8, 0.3), 20, 0)
    assert (row["pairs"], row["alone"]) == ("20", "100.0") and 0 <= float(row["false"]) <= 40


def test_no_pairs_are_no_simulation(capsys):
    assert main(["--pairs", "0"]) == 2
    assert "pass 1 or more" in capsys.readouterr().err
