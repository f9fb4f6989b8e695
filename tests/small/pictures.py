"""Checks of the pictures that commands write."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def is_a_picture(path: Path) -> bool:
    found = pixels(path)
    return found.shape[0] > 200 and found.shape[1] > 400 and len(np.unique(found.reshape(-1, 3), axis=0)) > 50
