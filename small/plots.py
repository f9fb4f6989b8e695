"""What the figures of the small experiments have in common."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from llm.common.files import write_files
from llm.common.plots import COLOURS, INK, in_every_form

from .experiment.groups import half_interval
from .spaces import Graph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable under every common colour blindness. Brown replaces their yellow, which is
# hard to see on white.
PALETTE = (*COLOURS, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B4513", INK)


class Picture(NamedTuple):
    """A figure of an experiment: the name of its files without the suffix, its caption, and what draws it."""

    name: str
    caption: str
    draw: Callable[[], "Figure"]


def write(picture: Picture, folder: Path) -> Path:
    """Draw a picture and write it to the folder as PNG, SVG and PDF; returns the path of the PNG."""
    files = in_every_form(picture.draw(), picture.name, picture.caption)
    write_files({folder / name: content for name, content in files.items()})
    return folder / f"{picture.name}.png"


def draw_curves(
    axes: Any, curves: Sequence[Mapping[Any, float]], colour: Any, label: str, interval: bool = False
) -> None:
    """Curves {x: y} of the seeds of a group, light, and dark their mean where all have a value, with its interval."""
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.3, linewidth=0.8)
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[x] for x in shared] for curve in curves])  # (seeds, places)
    mean = values.mean(0)
    if interval and len(curves) > 1:
        half = half_interval(values)
        axes.fill_between(shared, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
    marker = "o" if len(shared) == 1 else None  # a line of one point is not seen
    axes.plot(shared, mean, color=colour, linewidth=1.8, marker=marker, label=label)


def colours(count: int) -> list[Any]:
    """As many: the palette, or, where that has too few, a map from dark to light."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0, 0.9, count)]


def layout(graph: Graph) -> tuple[np.ndarray, float]:
    """Return where cells are drawn (S, 2), y downwards, and the side of their squares.

    The layers of a space of three dimensions lie side by side; cells without a place, on a circle in their order.
    """
    at = graph.places
    if at is None:
        angles = np.linspace(0, 2 * np.pi, len(graph.cells), endpoint=False)
        at = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if at.shape[1] == 3:
        at = np.stack([at[:, 0] + (np.ptp(at[:, 0]) + 2) * at[:, 2], at[:, 1]], axis=1)
    distances = np.linalg.norm(at[:, None] - at[None], axis=-1)
    return at, float(distances[distances > 0].min())


def draw_map(axes: Any, rates: np.ndarray, graph: Graph, top: float | None = None) -> Any:
    """A square for every cell, where the cell is, coloured from the least rate to the greatest, or from 0 to `top`.

    Returns the squares, for a colour bar.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    at, side = layout(graph)
    squares = [Rectangle((x - side / 2, -y - side / 2), side, side) for x, y in at]
    patches = PatchCollection(squares, array=rates, cmap="viridis", linewidths=0)
    if top is not None:
        patches.set_clim(0, top)
    axes.add_collection(patches)
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.autoscale_view()
    for spine in axes.spines.values():
        spine.set_visible(False)
    return patches


def draw_squares(part: Any, maps: Tensor, correlograms: Tensor, scores: Sequence[float]) -> None:
    """Rate maps (R, H, W) of a square space in a row, each with its score, and their autocorrelograms below."""
    for row in zip(part.subplots(2, len(maps), squeeze=False).T, maps, correlograms, scores, strict=True):
        (above, below), rates, correlogram, score = row
        above.imshow(rates, cmap="viridis")
        below.imshow(correlogram, cmap="coolwarm", vmin=-1, vmax=1)
        above.set_title(f"{score:.2f}", fontsize=7, pad=2)
        for axes in (above, below):
            axes.set(xticks=[], yticks=[])
