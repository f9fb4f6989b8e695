"""Figures: what is drawn are the numbers that they are of; statistics against scipy's exact ones."""

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from small.grid import figures, place_figures
from small.grid.model import Variant
from small.grid.place_figures import spearman
from small.grid.runs import Errors, GridRun, Row, grouped, names
from small.grid.settings import GridSettings, GridSizes
from small.spaces import space

GRAPH = space("3x3")


def made(act: str, seed: int, reference: float, graph=GRAPH, **settings) -> GridRun:
    familiar = Errors(0.01, reference, reference + 0.1, 9, 9, 9)
    row = Row(5, 1.0, {"familiar": familiar, "novel": Errors(0.02, 0.9, 0.9, 9, 9, 9)})
    folder, asked = Path(f"{act}-{seed}-{settings}"), GridSettings(seed=seed, **settings)
    return GridRun(graph, GridSizes(), Variant(act), asked, label=folder.name, folder=folder, rows=[row])


def points(axes) -> dict[str, list[tuple[float, float, float]]]:
    """Curve -> (x, mean, deviation) of an axes with error bars."""
    found = {}
    for bars in axes.containers:
        line, _, (segments,) = bars.lines
        spans = [abs(part[1][1] - part[0][1]) / 2 for part in segments.get_segments()]
        found[bars.get_label()] = [(x, y, span) for x, y, span in zip(*line.get_data(), spans, strict=True)]
    return found


def test_an_error_against_alpha_is_mean_and_deviation_of_what_differs_in_seeds_alone() -> None:
    runs = [
        made(f"nmda:{alpha}", seed, base + 0.1 * seed, lr=lr)
        for lr, shift in ((1e-3, 0.0), (1e-4, 0.3))
        for alpha, base in ((10, 0.2 + shift), (0, 0.5 + shift))
        for seed in range(3)
    ]
    axes = figures.against_alpha(runs).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "10"]
    found = points(axes)
    assert set(found) == {"N = 32, lr 0.001", "N = 32, lr 0.0001"}
    deviation = np.std([0.0, 0.1, 0.2])
    np.testing.assert_allclose(found["N = 32, lr 0.001"], [(0, 0.6, deviation), (1, 0.3, deviation)])
    np.testing.assert_allclose(found["N = 32, lr 0.0001"], [(0, 0.9, deviation), (1, 0.6, deviation)])
    first = points(figures.against_alpha(runs, "first").axes[0])
    np.testing.assert_allclose([y for _, y, _ in first["N = 32, lr 0.001"]], [0.7, 0.4])
    rates = points(figures.against_rate(runs).axes[0])
    np.testing.assert_allclose([y for _, y, _ in rates["NMDA α = 10, N = 32"]], [0.6, 0.3])


def test_every_curve_is_drawn_however_many() -> None:
    runs = [made(f"nmda:{alpha}", 0, 0.5, lr=lr) for alpha in range(9) for lr in (1e-3, 1e-4)]
    assert len(points(figures.against_rate(runs).axes[0])) == 9
    assert len(figures.over_trials(runs).axes[1].get_legend().get_texts()) == 18 + 1  # chance


def test_groups_differ_in_more_than_seeds_and_are_called_by_it() -> None:
    runs = [made("nmda:1", seed, 0.5, graph) for graph in (GRAPH, space("4x4")) for seed in range(2)]
    groups = grouped(runs)
    assert [len(group) for group in groups] == [2, 2]
    assert names(groups) == [f"NMDA α = 1, N = 32, space {n} cells, 5 actions" for n in (9, 16)]
    assert names(grouped(runs[:2])) == ["NMDA α = 1, N = 32"]


@pytest.mark.parametrize("ties", [False, True])
def test_mann_whitney_is_that_of_all_orders(ties: bool) -> None:
    values = {"nmda:0": [0.8, 0.9, 0.7], "nmda:10": [0.3, 0.8 if ties else 0.4, 0.5]}
    runs = [made(act, seed, value) for act, each in values.items() for seed, value in enumerate(each)]
    image = figures.mann_whitney(runs).axes[0].images[0].get_array()
    pooled = np.concatenate(list(values.values()))
    below = [stats.rankdata(pooled)[list(order)][:3].sum() for order in permutations(range(6))]
    middle = np.mean(below)
    expected = np.mean([abs(each - middle) >= abs(below[0] - middle) - 1e-9 for each in below])
    assert 10 ** image[0, 1] == pytest.approx(expected) and 10 ** image[1, 0] == pytest.approx(expected)
    assert expected >= 0.1


def test_spearman_is_exact_for_few_and_bounded_for_many() -> None:
    assert spearman([1, 2, 3], [3, 2, 1]) == "Spearman's r = −1.00, p = 0.33, n = 3 groups"
    left, right = [1.0, 2, 3, 4, 5], [2.0, 1, 3, 5, 4]
    rhos = [stats.spearmanr(left, order).statistic for order in permutations(right)]
    p = np.mean(np.abs(rhos) >= abs(stats.spearmanr(left, right).statistic) - 1e-9)
    assert spearman(left, right) == f"Spearman's r = 0.80, p = {p:.2g}, n = 5 groups"
    assert f"p = {2 / math.factorial(9):.2g}" in spearman(list(range(9)), list(range(9)))
    for few in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, math.nan, 3])):
        assert spearman(*few) == "too few groups for a correlation"


@pytest.mark.parametrize("text", ["3x4", "hex:3x3", "2x2x3", "line:6"])
def test_maps_of_any_space_have_a_square_a_cell_in_its_colour(text: str) -> None:
    from matplotlib.figure import Figure

    axes, graph = Figure().subplots(), space(text)
    rates = np.arange(len(graph.cells)) / 7
    place_figures.draw_map(axes, rates, graph)
    (patches,) = axes.collections
    np.testing.assert_allclose(patches.get_array(), rates)
    corners = np.array([path.vertices[0] for path in patches.get_paths()])
    assert len(np.unique(corners.round(6), axis=0)) == len(graph.cells)
