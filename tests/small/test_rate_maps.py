"""Scores of neurons against networkx, double sums, loops over shifts and scipy's rotation."""

import math

import hypothesis.strategies as st
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import ndimage, special

from small.rate_maps import (
    PERIODS,
    RateMaps,
    autocorrelogram,
    band_scores,
    firing,
    gini,
    grid_scores,
    map_sparsity,
    place_cell_scores,
    spatial_information,
    stability,
    trusted_rates,
)
from small.spaces import Graph, space

SQUARE = space("11x11")


def by_networkx(rates: list[float], graph: nx.Graph) -> float:
    """Algorithm 1 as it reads, for one neuron over a graph of cells 0 to S - 1; no rate is below 0."""
    rates = [max(rate, 0.0) for rate in rates]
    directed = nx.DiGraph()
    directed.add_nodes_from(graph)
    for one, other in graph.edges:
        for high, low in ((one, other), (other, one)):
            if rates[high] > rates[low]:
                directed.add_edge(high, low)
    if not directed.number_of_edges():
        return 0.0
    peak = max(range(len(rates)), key=lambda cell: (rates[cell], -cell))
    found = directed.subgraph({peak, *nx.dfs_preorder_nodes(directed, peak)})
    inner = [cell for cell in found if cell != peak and found.out_degree(cell) > 0]
    gamma = 1 - len(inner) / len(rates)
    return gamma * sum(rates[cell] for cell in found) / sum(rates)


def undirected(graph: Graph) -> nx.Graph:
    return graph.directed.to_undirected()


@pytest.mark.parametrize("text", ["11x11", "hex:6x6", "3x4x3", "line:30"])
@pytest.mark.parametrize("kind", ["uniform", "ties", "smooth", "signed"])
def test_place_cell_scores_are_algorithm_1(text: str, kind: str) -> None:
    graph, random = space(text), np.random.default_rng(7)
    rates = random.random((200, len(graph.cells)))
    if kind == "ties":
        rates = np.floor(4 * rates)
    if kind == "smooth":
        rates = rates @ np.linalg.matrix_power(graph.transition, 4)
    if kind == "signed":
        rates -= 0.3
    expected = [by_networkx(row.tolist(), undirected(graph)) for row in rates]
    found = place_cell_scores(torch.from_numpy(rates), graph)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12))
@settings(max_examples=200)
def test_any_map_of_few_rates_scores_as_algorithm_1_says(rates: list[int]) -> None:
    graph = space("3x4")
    found = place_cell_scores(torch.tensor([rates], dtype=torch.float64), graph).item()
    assert found == pytest.approx(by_networkx(rates, undirected(graph)), rel=1e-12)
    assert 0 <= found <= 1


def test_a_neuron_of_one_cell_scores_one_and_a_flat_one_none() -> None:
    alone = torch.zeros(121, 121).fill_diagonal_(2.5)
    assert torch.equal(place_cell_scores(alone, SQUARE), torch.ones(121, dtype=torch.float64))
    assert place_cell_scores(torch.full((3, 121), 0.7), SQUARE).tolist() == [0, 0, 0]
    assert place_cell_scores(torch.zeros(2, 121), SQUARE).tolist() == [0, 0]


def test_a_map_by_hand() -> None:
    """On a line, 0 5 3 1 2: from 5 down to 0 on the left and over 3 to 1 on the right, not up to 2."""
    rates = torch.tensor([[0.0, 5, 3, 1, 2]])
    assert place_cell_scores(rates, space("line:5")).item() == pytest.approx((1 - 1 / 5) * 9 / 11)


@pytest.mark.parametrize("side", [5, 11, 15])
def test_a_gaussian_field_scores_five_cells_of_all(side: int) -> None:
    """Equation S1 asks for few cells: of a field whatever its width, only its peak and the corners are not inner."""
    y, x = np.mgrid[:side, :side] - (side - 1) // 2
    fields = [np.exp(-(x**2 + y**2) / (2 * width**2)).ravel() for width in (0.7, 1.0, 1.5, 3.0)]
    scores = place_cell_scores(torch.from_numpy(np.stack(fields)), space(f"{side}x{side}"))
    np.testing.assert_allclose(scores.numpy(), 5 / side**2)


def test_information_sparsity_and_stability_are_their_definitions() -> None:
    random = np.random.default_rng(3)
    rates, visits = random.random((6, 20)) * (random.random((6, 20)) < 0.5), random.integers(0, 40, 20)
    rates[0], rates[1], rates[2] = 0.7, 0.0, np.eye(20)[4]
    visits[4] = 9
    share, where = visits / visits.sum(), visits > 0
    information, sparsity = (
        part(torch.from_numpy(rates), torch.from_numpy(visits)).numpy() for part in (spatial_information, map_sparsity)
    )
    for row, bits, size in zip(rates, information, sparsity, strict=True):
        mean = (share * row).sum()
        if not mean:
            assert np.isnan(bits) and np.isnan(size)
            continue
        on = (row > 0) & where
        # Skaggs' formula is the divergence of where activity is from where the animal is.
        activity = (share * row)[on] / mean
        assert bits == pytest.approx(special.rel_entr(activity, share[on]).sum() / math.log(2), abs=1e-12)
        assert size == pytest.approx(mean**2 / (share * row**2).sum())
    assert information[0] == pytest.approx(0, abs=1e-12) and sparsity[0] == pytest.approx(1)
    assert information[2] == pytest.approx(-np.log2(share[4])) and sparsity[2] == pytest.approx(share[4])
    other = random.random((6, 20))
    known = torch.from_numpy(where)
    found = stability(torch.from_numpy(rates), torch.from_numpy(other), known).numpy()
    assert np.isnan(found[:2]).all()
    for row, two, one in zip(rates[3:], other[3:], found[3:], strict=True):
        assert one == pytest.approx(np.corrcoef(row[where], two[where])[0, 1])


def test_rates_that_are_trusted_are_positive_and_seen_often() -> None:
    rates, visits = torch.tensor([[-0.2, 0.5, 0.004, 2.0], [0.0, 0.009, -1.0, 9.0]]), torch.tensor([9, 9, 9, 2])
    kept = trusted_rates(rates, visits, 5)
    assert kept.tolist() == [pytest.approx([0, 0.5, 0.004, 0]), pytest.approx([0, 0.009, 0, 0])]
    assert firing(kept, 0.01).tolist() == [True, False]


@given(st.integers(1, 20), st.integers(0, 99))
def test_gini_is_the_double_sum(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(1, 1, (3, count))
    differences = np.abs(values[:, :, None] - values[:, None, :]).sum((1, 2))
    expected = differences / (2 * count**2 * values.mean(1))
    np.testing.assert_allclose(gini(torch.from_numpy(values)).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_gini_of_equal_values_and_of_one_alone() -> None:
    assert gini(torch.full((2048,), 0.3)).item() == pytest.approx(0, abs=1e-12)
    assert gini(torch.eye(1, 2048)).item() == pytest.approx(1 - 1 / 2048)


def test_rate_maps_add_up_by_cell() -> None:
    random = np.random.default_rng(0)
    maps, sums, visits = RateMaps(6, 3), np.zeros((6, 3)), np.zeros(6)
    for _ in range(4):
        cells, activity = random.integers(5, size=50), random.normal(size=(50, 3))  # cell 5 is never visited
        maps.add(torch.from_numpy(cells), torch.from_numpy(activity))
        for cell, values in zip(cells, activity, strict=True):
            sums[cell] += values
            visits[cell] += 1
    np.testing.assert_allclose(maps.rates("walk").numpy(), sums.T / 200)
    np.testing.assert_allclose(maps.rates("occupancy").numpy(), (sums / np.maximum(visits, 1)[:, None]).T)
    with pytest.raises(ValueError, match="walk or occupancy"):
        maps.rates("time")


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (7, 5)])
def test_the_autocorrelogram_correlates_what_overlaps(shape: tuple[int, int]) -> None:
    height, width = shape
    rates = np.random.default_rng(2).random((3, *shape)) + 100
    found = autocorrelogram(torch.from_numpy(rates)).numpy()
    for row, down, right in np.ndindex(3, 2 * height - 1, 2 * width - 1):
        dy, dx = down - height + 1, right - width + 1
        fixed = rates[row, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)].ravel()
        moved = rates[row, max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)].ravel()
        if len(fixed) < 2:
            assert np.isnan(found[row, down, right])
        else:
            assert found[row, down, right] == pytest.approx(np.corrcoef(fixed, moved)[0, 1], abs=1e-6)


def hexagonal(size: int, period: float, turn: float, phase: tuple[float, float]) -> np.ndarray:
    """Three plane waves at 60 degrees, the usual model of a grid cell."""
    y, x = np.mgrid[:size, :size].astype(float)
    waves = [
        np.cos(4 * math.pi / (math.sqrt(3) * period) * (np.cos(a) * (x - phase[0]) + np.sin(a) * (y - phase[1])))
        for a in (turn, turn + math.pi / 3, turn + 2 * math.pi / 3)
    ]
    return sum(waves) + 1.5


def by_scipy(rates: np.ndarray) -> float:
    """The definition with `ndimage.rotate` and masks, one map."""
    image = autocorrelogram(torch.from_numpy(rates)[None])[0].numpy()
    known = ~np.isnan(image)
    image = np.nan_to_num(image)
    size = image.shape[0]
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius, scores = np.hypot(x, y), []
    for outer in range(2, size // 2 + 1):
        ring, at = (radius >= 1) & (radius <= outer), {}
        for angle in (30, 60, 90, 120, 150):
            turned = ndimage.rotate(image, angle, reshape=False, order=1)
            seen = ndimage.rotate(known.astype(float), angle, reshape=False, order=1) > 1 - 1e-9
            where = ring & known & seen
            at[angle] = np.corrcoef(image[where], turned[where])[0, 1]
        scores.append(min(at[60], at[120]) - max(at[30], at[90], at[150]))
    return max(scores)


def test_grid_scores_are_the_definition() -> None:
    random = np.random.default_rng(4)
    maps = [
        hexagonal(15, 6, 0.3, (2, 5)),
        random.random((15, 15)),
        ndimage.gaussian_filter(random.random((15, 15)), 1.5),
    ]
    found = grid_scores(torch.from_numpy(np.stack(maps)))
    np.testing.assert_allclose(found.numpy(), [by_scipy(each) for each in maps], atol=1e-6)


def test_grid_scores_of_hexagons_are_high_and_of_noise_and_squares_low() -> None:
    random = np.random.default_rng(5)
    grids = np.stack(
        [hexagonal(24, random.uniform(7, 10), random.uniform(0, 1), tuple(random.uniform(0, 8, 2))) for _ in range(30)]
    )
    assert grid_scores(torch.from_numpy(grids)).min() > 1
    noise = grid_scores(torch.from_numpy(random.random((500, 24, 24))))
    assert abs(noise.median().item()) < 0.3 and noise.quantile(0.95) < 0.7
    y, x = np.mgrid[:24, :24]
    squares = np.cos(2 * np.pi * x / 8) + np.cos(2 * np.pi * y / 8)
    assert grid_scores(torch.from_numpy(squares)[None]).item() < 0
    assert grid_scores(torch.ones(1, 24, 24)).isnan().all()


def by_least_squares(rates: np.ndarray) -> float:
    """The definition wave by wave: one less the residual's share, of a constant and a wave of any phase."""
    height, width = rates.shape
    y, x = np.mgrid[:height, :width]
    total, best = np.square(rates - rates.mean()).sum(), 0.0
    for down in range(2 * height + 1):
        for right in range(-2 * width, 2 * width + 1):
            if max(down, abs(right)) / 4 < PERIODS:
                continue
            phase = 2 * np.pi * (down * y / (4 * height) + right * x / (4 * width))
            design = np.stack([np.ones(rates.size), np.cos(phase).ravel(), np.sin(phase).ravel()], axis=1)
            fitted = design @ np.linalg.lstsq(design, rates.ravel(), rcond=1e-9)[0]
            best = max(best, 1 - np.square(rates.ravel() - fitted).sum() / total)
    return best


@pytest.mark.parametrize("shape", [(5, 7), (8, 8)])
def test_band_scores_are_the_definition(shape: tuple[int, int]) -> None:
    maps = np.random.default_rng(6).random((3, *shape)) + 10
    maps[2] = ndimage.gaussian_filter(maps[2], 1)
    found = band_scores(torch.from_numpy(maps)).numpy()
    np.testing.assert_allclose(found, [by_least_squares(each) for each in maps], rtol=1e-6)


def test_band_scores_of_bands_are_near_one_of_grids_a_third_and_of_noise_low() -> None:
    random = np.random.default_rng(8)
    y, x = np.mgrid[:24, :24].astype(float)
    bands = []
    for _ in range(30):
        period, turn, phase = random.uniform(4, 10), random.uniform(0, np.pi), random.uniform(0, 6)
        bands.append(np.cos(2 * np.pi / period * (np.cos(turn) * x + np.sin(turn) * y) + phase))
    assert band_scores(torch.from_numpy(np.stack(bands))).min() > 0.9  # between the waves that are tried
    grids = np.stack([hexagonal(24, random.uniform(5, 8), random.uniform(0, 1), (2, 5)) for _ in range(30)])
    assert 0.3 < band_scores(torch.from_numpy(grids)).median() < 0.42
    squares = np.cos(2 * np.pi * x / 6) + np.cos(2 * np.pi * y / 6)
    assert band_scores(torch.from_numpy(squares)[None]).item() == pytest.approx(0.5, abs=0.01)
    assert band_scores(torch.from_numpy(random.random((100, 24, 24)))).max() < 0.1
    assert band_scores(torch.full((1, 24, 24), 0.3)).isnan().all()
