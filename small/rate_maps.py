"""What neurons say of places: rate maps, place-cell, grid and band scores, sparsity; thousands of neurons at once.

Kim et al. 2023, Section 3.2, Appendices A.1 and A.10. The data flow:

    activity along a walk -> rate maps -> place-cell score (Eq. S1, Algorithm 1)
                                       -> spatial information, sparsity, stability of two halves
                                       -> autocorrelogram -> grid score, for spaces that are a square
                                       -> plane waves     -> band score, for the same
    activity of a layer   -> Gini index (Eq. S13)

Dimension letters: R neurons, S cells of the space, N moments of a walk, H by W a square space.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .spaces import Graph

NORMALISATIONS = ("walk", "occupancy")
PERIODS = 1.5  # least number of a band in a space: fewer are one field, or a slope
TRANSFORMED = 2**22  # numbers of a spectrum at a time: 64 MB
NEURONS_AT_ONCE = 8192  # of 121 cells in float64: 8 MB; as fast in smaller parts on one core, slower on several


class RateMaps:
    """Activity added up by the cell in which it was measured.

    Args:
        cells: S.
        neurons: R.
        device: of the sums.
    """

    def __init__(self, cells: int, neurons: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(cells, neurons, dtype=torch.float64, device=device)
        self.visits = torch.zeros(cells, dtype=torch.float64, device=device)

    def add(self, cells: Tensor, activity: Tensor) -> None:
        """cells (N,), activity (N, R)."""
        self.sums.index_add_(0, cells, activity.double())
        self.visits.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))

    def rates(self, normalisation: str = "walk") -> Tensor:
        """(R, S): the sums divided by all recorded moments of the "walk" (the paper's text, which divides by its steps,
        one constant more), or by those in the cell, its "occupancy" (the authors' code). A cell that was never visited
        has the rate 0.

        Raises:
            ValueError: another normalisation.
        """
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation {normalisation!r} is unknown: give {' or '.join(NORMALISATIONS)}")
        moments = self.visits[:, None] if normalisation == "occupancy" else self.visits.sum()
        return (self.sums / moments.clamp(min=1)).T.contiguous()


def place_cell_scores(rates: Tensor, graph: Graph) -> Tensor:
    """Place-cell score of every neuron, Eq. S1 and Algorithm 1: rates (R, S) -> (R,) in float64.

    From the cell with the greatest rate, V is every cell that can be reached by going from a greater to a smaller rate;
    V* is V without that cell and without the leaves, from which nothing lower can be reached. The score is
    (1 - |V*| / S) times V's share of all rates: 1 where one cell fires alone.

    Where the paper is silent: between equal rates there is no edge; of several greatest ones the cell with the least
    number is the peak; a neuron with one rate everywhere has no peak, and the score 0 (Algorithm 1 would say 1 / S, its
    text says 0). A rate below 0, which most activations allow, counts as 0: with signs that cancel, V's share would be
    no share.
    """
    neighbours = _neighbours(graph).to(rates.device)  # (S, degree), a cell itself where it has fewer
    return torch.cat([_scores(part, neighbours) for part in rates.split(NEURONS_AT_ONCE)])


def _scores(rates: Tensor, neighbours: Tensor) -> Tensor:
    # Neurons lie along rows from here: to look at a neighbour is then to copy a row.
    rho = rates.double().clamp(min=0).T.contiguous()  # (S, R)
    leaf, higher = torch.ones_like(rho, dtype=torch.bool), []
    for one in neighbours.T:
        beside = rho[one]
        higher.append(beside > rho)  # the neighbour than the cell
        leaf &= beside >= rho
    peak = torch.zeros_like(leaf).scatter_(0, rho.argmax(0, keepdim=True), True)
    reached, count = peak.clone(), -1
    while (found := int(reached.sum())) != count:
        count = found
        for one, above in zip(neighbours.T, higher, strict=True):
            reached |= reached[one] & above
    inner = (reached & ~peak & ~leaf).sum(0).double()
    share = (rho * reached).sum(0) / rho.sum(0)
    peaked = rho.amax(0) > rho.amin(0)
    return torch.where(peaked, (1 - inner / len(rho)) * share, 0.0)


def _neighbours(graph: Graph) -> Tensor:
    """(S, greatest degree) cells; a cell with fewer neighbours stands in for those it lacks."""
    rows = [np.flatnonzero(row) for row in graph.adjacency]
    most = max(map(len, rows))
    return torch.tensor([[*row, *[cell] * (most - len(row))] for cell, row in enumerate(rows)])


def trusted_rates(rates: Tensor, visits: Tensor, least_visits: int) -> Tensor:
    """Rates (R, S) as they are scored and drawn: negative ones are 0, and so are cells with fewer visits (S,)."""
    return rates.clamp(min=0) * (visits >= least_visits)


def firing(occupancy_rates: Tensor, least_rate: float) -> Tensor:
    """(R, S) -> (R,) bool: whether the greatest activity per visit is at least `least_rate`; other maps are noise."""
    return occupancy_rates.amax(1) >= least_rate


def spatial_information(occupancy_rates: Tensor, visits: Tensor) -> Tensor:
    """Bits that a neuron's activity carries of the place, per unit of activity: (R, S), (S,) -> (R,).

    sum_i p_i r_i / r log2(r_i / r), where p_i is the share of visits to cell i and r the mean rate (Skaggs et al.
    1993). 0 of a flat map, log2 S of one cell; NaN of a map of zeros.
    """
    rates, share, mean = _weighted(occupancy_rates, visits)
    ratio = rates / mean[:, None]
    return (share * torch.xlogy(ratio, ratio)).sum(1) / math.log(2)


def map_sparsity(occupancy_rates: Tensor, visits: Tensor) -> Tensor:
    """Share of the space in which a neuron is active: (R, S), (S,) -> (R,).

    The squared mean rate over the mean squared rate (Skaggs et al. 1996): 1 of a flat map, 1 / S of one cell; NaN of a
    map of zeros.
    """
    rates, share, mean = _weighted(occupancy_rates, visits)
    return mean.square() / (share * rates.square()).sum(1)


def _weighted(rates: Tensor, visits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rates from 0 on, the share of visits to each cell, and mean rates; in float64."""
    rates, share = rates.double().clamp(min=0), visits.double() / visits.sum()
    mean = (rates * share).sum(1)
    return rates, share, torch.where(mean > 0, mean, torch.nan)


def stability(first: Tensor, second: Tensor, known: Tensor) -> Tensor:
    """Pearson's correlation of two maps of each neuron, over the known cells: (R, S), (R, S), (S,) bool -> (R,)."""
    first, second = (
        part[:, known] - part[:, known].mean(1, keepdim=True) for part in (first.double(), second.double())
    )
    scale = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(scale > 0, (first * second).sum(1) / scale, torch.nan)


def gini(activity: Tensor) -> Tensor:
    """Gini index over the last dimension, Eq. S13: (..., K) -> (...).

    0 where all are equal, 1 - 1/K where one is alone. By the sorted values, sum_ij |x_i - x_j| is
    2 sum_i (2 i - K - 1) x_(i). NaN where the mean is 0.
    """
    count = activity.shape[-1]
    ordered = activity.double().sort(dim=-1).values
    weights = 2 * torch.arange(1, count + 1, device=activity.device, dtype=torch.float64) - count - 1
    return (ordered * weights).sum(-1) / (count * ordered.sum(-1))


# ---- Square spaces ---------------------------------------------------------------------------------------------------


def autocorrelogram(rates: Tensor) -> Tensor:
    """Pearson's correlation of each map with itself moved by every shift: (R, H, W) -> (R, 2 H - 1, 2 W - 1).

    Over the cells where both are (Sargolini et al. 2006, supplement); no shift is in the middle. NaN where fewer than
    two cells meet or a side of them is flat.
    """
    maps = rates.double()
    maps = maps - maps.mean((-2, -1), keepdim=True)  # no correlation changes, and less is lost by cancellation
    height, width = maps.shape[-2:]
    size = (2 * height - 1, 2 * width - 1)

    def correlate(left: Tensor, right: Tensor) -> Tensor:
        """sum_x left(x) right(x + shift) for every shift, by the convolution theorem."""
        spectra = torch.fft.rfft2(left, s=size).conj() * torch.fft.rfft2(right, s=size)
        return torch.fft.irfft2(spectra, s=size).roll((height - 1, width - 1), dims=(-2, -1))

    ones = torch.ones_like(maps[:1])
    count = correlate(ones, ones).round()
    own, moved = correlate(maps, ones), correlate(ones, maps)
    squares_own, squares_moved = correlate(maps.square(), ones), correlate(ones, maps.square())
    covariance = count * correlate(maps, maps) - own * moved
    spread = (count * squares_own - own.square()) * (count * squares_moved - moved.square())
    tiny = 1e-12 * (count * maps.square().sum((-2, -1), keepdim=True)).square()
    return torch.where((count > 1) & (spread > tiny), covariance / spread.clamp(min=0).sqrt(), torch.nan)


def grid_scores(rates: Tensor) -> Tensor:
    """Grid score of each map: (R, H, W) -> (R,).

    A ring of the autocorrelogram is correlated with itself, turned: the least correlation at 60 and 120 degrees minus
    the greatest at 30, 90 and 150. Of the rings from radius 1 on (the middle is 1 in any map) the one that makes this
    greatest counts (Sargolini et al. 2006; Banino et al. 2018). Turned by bilinear interpolation. NaN where no ring can
    be compared.
    """
    correlogram = autocorrelogram(rates)
    height, width = correlogram.shape[-2:]
    known = ~correlogram.isnan()
    image = correlogram.nan_to_num(0.0)
    y, x = (torch.arange(size, device=rates.device) - (size - 1) / 2 for size in (height, width))
    radius = torch.hypot(y[:, None], x[None, :])
    turned = {angle: _turned(image, known, angle) for angle in (30, 60, 90, 120, 150)}
    best = torch.full((len(rates),), -torch.inf, dtype=torch.float64, device=rates.device)
    for outer in range(2, int(min(height, width) / 2) + 1):
        ring = (radius >= 1) & (radius <= outer)
        at = {angle: _correlation(image, other, ring & known & seen) for angle, (other, seen) in turned.items()}
        score = torch.minimum(at[60], at[120]) - torch.stack([at[30], at[90], at[150]]).amax(0)
        best = torch.maximum(best, score.nan_to_num(-torch.inf))
    return torch.where(best.isinf(), torch.nan, best)


def band_scores(rates: Tensor) -> Tensor:
    """The greatest share of a map's variance that one plane wave explains: (R, H, W) -> (R,), 0 to 1.

    1 of a band, 1/2 of a square grid and 1/3 of a hexagonal one, whose power is in two or three waves: the spectrum by
    which Krupic et al. (2012) tell bands from grids. Waves have whole multiples of 1 / (4 H) and 1 / (4 W) cycles a
    cell and at least PERIODS in the space; phase and amplitude by least squares. NaN of a flat map.
    """
    height, width = rates.shape[-2:]
    size = (4 * height, 4 * width)
    maps = rates.double()
    maps = maps - maps.mean((-2, -1), keepdim=True)
    # The transform of a map, beyond which is nothing, has its sums with the cosine (real) and with the sine (imaginary)
    # of each wave; that of ones has those sums' own squares and products, at twice the wave.
    ones = torch.fft.fft2(torch.ones_like(maps[0]), s=size)
    twice = ones[torch.arange(size[0]) * 2 % size[0]][:, torch.arange(size[1]) * 2 % size[1]]
    cells = height * width
    cosines, sines = (cells + twice.real) / 2 - ones.real**2 / cells, (cells - twice.real) / 2 - ones.imag**2 / cells
    mixed = twice.imag / 2 - ones.real * ones.imag / cells
    determinant, trace = cosines * sines - mixed**2, cosines + sines
    both = determinant > 1e-9 * trace**2  # else the sine is 0 at every cell, or as good as the cosine
    down, right = (torch.fft.fftfreq(n, device=maps.device).abs() * n / 4 for n in size)  # periods in the space
    seen = torch.maximum(down[:, None], right) >= PERIODS
    best = []
    for part in maps.split(max(1, TRANSFORMED // math.prod(size))):
        along = torch.fft.fft2(part, s=size)
        explained = (
            sines * along.real**2 - 2 * mixed * along.real * along.imag + cosines * along.imag**2
        ) / determinant
        explained = torch.where(both, explained, along.abs().square() / trace)
        best.append(torch.where(seen, explained, 0.0).amax((-2, -1)))
    total = maps.square().sum((-2, -1))
    tiny = 1e-20 * rates.double().square().sum((-2, -1))
    return torch.where(total > tiny, torch.cat(best) / total, torch.nan)


def _turned(image: Tensor, known: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """The maps (R, H, W) turned about their middle, and where all that they are made of is known."""
    height, width = image.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # `affine_grid` counts from -1 to 1 on both sides; the turn is in cells.
    theta = image.new_tensor([[cos, -sin * (height - 1) / (width - 1), 0], [sin * (width - 1) / (height - 1), cos, 0]])
    grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=True).expand(len(image), -1, -1, -1)
    both = torch.stack([image, known.to(image.dtype)], dim=1)  # (R, 2, H, W)
    values, seen = F.grid_sample(both, grid, align_corners=True).unbind(1)
    return values, seen > 1 - 1e-9


def _correlation(left: Tensor, right: Tensor, where: Tensor) -> Tensor:
    """Pearson's correlation of two stacks of maps (R, H, W) over the cells of each that `where` has."""
    weights = where.to(left.dtype)
    count = weights.sum((-2, -1), keepdim=True)
    left, right = (
        weights * (values - (values * weights).sum((-2, -1), keepdim=True) / count) for values in (left, right)
    )
    scale = (left.square().sum((-2, -1)) * right.square().sum((-2, -1))).sqrt()
    return torch.where(count[..., 0, 0] > 2, (left * right).sum((-2, -1)) / scale, torch.nan)
