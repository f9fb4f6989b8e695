"""docs/scaling.md, its picture and its numbers are what python -m benchmarks.ladder makes, and hold what they must."""

import csv
import io

import pytest
from PIL import Image

from benchmarks import ladder
from evals.verdict.ladder_simulation import DESIGNS, EFFECTS, TRUTHS
from llm.common.errors import UserError

ROWS = ladder.read_rows()
LADDERS = 2000
NOISE = 3 * (0.05 * 0.95 / LADDERS) ** 0.5  # three standard errors of a share near 95%


def test_page_shows_the_numbers():
    assert ladder.page(ROWS) == ladder.PAGE.read_text(), "run python -m benchmarks.ladder"


def test_numbers_are_of_every_truth_and_design():
    shown = {(row["truth"], row["sizes"], row["seeds"]) for row in ROWS}
    every = {(t.name, str(d.sizes), str(d.seeds)) for t in (*TRUTHS, *EFFECTS) for d in DESIGNS}
    assert shown == every


@pytest.mark.parametrize("row", [0, 14], ids=lambda n: f"{ROWS[n]['truth']}-{ROWS[n]['sizes']}x{ROWS[n]['seeds']}")
def test_command_gives_the_numbers_again(row):
    """As far as other processors round alike: a few ladders may fall on the other side."""
    expected, designs = ROWS[row], len(DESIGNS) + 1
    again = ladder.as_row(TRUTHS[row // designs], (*DESIGNS, ladder.BRANCHES)[row % designs], LADDERS, 0)
    for key in ("size_least", "mean", "slope", "largest", "shown_mean", "misfit"):
        assert float(again[key]) == pytest.approx(float(expected[key]), abs=0.003), key


def test_picture_is_small_and_of_these_truths():
    assert ladder.PICTURE.stat().st_size < 200_000
    with Image.open(ladder.PICTURE) as there, Image.open(io.BytesIO(ladder.draw(ROWS))) as made:
        assert there.size == made.size


@pytest.mark.parametrize("kind", ["line", "shape"])
def test_intervals_that_must_hold_do(kind):
    keys = ["size_least", "size_most", "mean", *(["slope", "largest", "held_out"] if kind == "line" else [])]
    for row in ROWS:
        if row["kind"] == kind:
            for key in filter(row.get, keys):
                assert 0.93 - NOISE <= float(row[key]) <= 0.97 + NOISE, (row["truth"], row["sizes"], row["seeds"], key)


def test_false_verdicts_are_as_many_as_they_say():
    for row in ROWS:
        if row["truth"] == "no effect":
            for name in ("mean", "slope"):
                assert 0.04 - NOISE <= float(row[f"shown_{name}"]) <= 0.06 + NOISE
                assert float(row[f"firm_{name}"]) < float(row[f"shown_{name}"])


def test_tables_are_made_of_rows():
    row = dict.fromkeys(ROWS[0], "0.95") | {"truth": "t", "kind": "line", "sizes": "4", "seeds": "2"}
    worse = row | {"mean": "0.901", "slope": ""}
    table = ladder.coverage_table([row, worse]).splitlines()
    assert table[0].startswith("| truth | each size | mean | slope |")
    assert table[2].startswith("| t | 95 | **90**-95 | 95 |")
    assert ladder.verdict_table([row, worse | {"refused": "0.012"}]).splitlines()[2].endswith("| 1.2-95 |")
    assert list(csv.DictReader(io.StringIO(ladder.as_csv([row, worse])))) == [row, worse]


def test_nothing_is_simulated_without_ladders(capsys):
    assert ladder.main(["--ladders", "0"]) == 2
    assert "pass 1 or more" in capsys.readouterr().err


def test_page_without_its_marks_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(ladder, "PAGE", tmp_path / "scaling.md")
    ladder.PAGE.write_text("nothing")
    with pytest.raises(UserError, match="lacks the marks <!-- coverage -->"):
        ladder.page(ROWS)
