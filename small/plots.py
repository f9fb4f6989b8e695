"""What the figures of the small experiments have in common."""

from pathlib import Path
from typing import TYPE_CHECKING

from evals.models import write_file
from evals.plots import as_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart under every common colour-blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def write(figure: "Figure", path: Path) -> Path:
    """Write a PNG; returns the path."""
    write_file(path, as_png(figure))
    return path
