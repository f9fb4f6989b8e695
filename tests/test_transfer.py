"""docs/scaling.md shows what python -m benchmarks.transfer measured, and completep keeps activations level."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import transfer
from benchmarks.ladder import PAGE, page_with
from benchmarks.transfer import BASE, KINDS, Size, Texts
from llm.data.store import TokenStore


@pytest.fixture(scope="module")
def texts(story_store) -> Texts:
    stores = [TokenStore.open(story_store, split) for split in ("train", "validation")]
    return Texts(*(torch.from_numpy(store.read(0, store.tokens)).long() for store in stores))


@pytest.mark.parametrize("kind", KINDS)
def test_page_and_picture_show_the_numbers(kind):
    rows = transfer.read_rows(kind)
    assert page_with({kind: KINDS[kind].table(rows)}) == PAGE.read_text(), f"run python -m benchmarks.transfer {kind}"
    assert KINDS[kind].picture.stat().st_size < 200_000
    with Image.open(KINDS[kind].picture) as there, Image.open(io.BytesIO(KINDS[kind].draw(rows))) as made:
        assert there.size == made.size and np.array(there.convert("L")).std() > 5


@pytest.mark.parametrize("large", [Size(128, 2), Size(32, 8)], ids=str)
def test_activations_stay_level_under_completep_and_grow_under_standard(texts, large):
    """Four times as wide, or as deep, after a few steps."""
    grown = {}
    for parametrization in transfer.PARAMETRIZATIONS:
        rows = [
            row
            for size in (BASE, large)
            for row in transfer.coordinates_of(texts, size, parametrization, "plain", steps=4)
        ]
        grown[parametrization] = {
            name: transfer.growth(rows, (BASE, large), name)
            for name in ("residual stream", "attention", "FFN", "values")
        }
    level = grown["completep"]
    assert all(0.4 < level[name] < 1.6 for name in level), level
    assert grown["standard"]["residual stream"] > 2
    if large.width > BASE.width:
        assert grown["standard"]["FFN"] > 3 and grown["standard"]["attention"] > 2


@pytest.mark.parametrize(("switch", "low", "high"), [("accumulated", 0.5, 1.5), (transfer.UNSCALED, 1.6, 4.0)])
def test_an_accumulated_stream_stays_level_because_its_sum_is_divided(texts, switch, low, high):
    """At the start the sum of independent terms grows with the root of the depth, by 2 from 2 to 8 layers."""
    rows = [
        row
        for size in (BASE, Size(32, 8))
        for row in transfer.coordinates_of(texts, size, "completep", switch, steps=1)
    ]
    assert low < transfer.growth(rows, (BASE, Size(32, 8)), "values", step=0) < high


def test_best_rate_is_the_minimum_of_the_parabola():
    """(ln rate - ln 0.01)^2, known at points around it."""
    rates = (0.002, 0.004, 0.009, 0.02, 0.05)
    rows = [
        {"parametrization": "standard", "width": "32", "depth": "2", "rate": str(rate)}
        | {"loss": str(math.log(rate / 0.01) ** 2)}
        for rate in rates
    ]
    even = [row | {"rate": str(0.008 * 1.5**n), "loss": str(math.log(0.8 * 1.5**n) ** 2)} for n, row in enumerate(rows)]
    assert transfer.optimum(even, BASE, "standard") == pytest.approx(0.01, rel=1e-6)
    edge = [row | {"rate": str(0.02 * 1.5**n), "loss": str(math.log(2 * 1.5**n) ** 2)} for n, row in enumerate(rows)]
    assert transfer.optimum(edge, BASE, "standard") == pytest.approx(0.02)


def test_the_best_rate_moves_less_under_completep():
    rows = transfer.read_rows("rates")
    for size in transfer.RATE_SIZES[1:]:
        moved = {
            name: abs(math.log(transfer.optimum(rows, size, name) / transfer.optimum(rows, BASE, name)))
            for name in transfer.PARAMETRIZATIONS
        }
        assert moved["completep"] < math.log(2) and moved["completep"] <= moved["standard"] + math.log(1.5)
