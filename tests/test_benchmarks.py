"""BENCHMARKS.md is what its results say, and every result has its command, device and commit."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.__main__ import HERE, PAGE, PLACE, page
from benchmarks.tables import seconds, spread, table

RESULTS = sorted((HERE / "results").glob("*.json"))


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text() == page(), "run python -m benchmarks"
    shown = {name for _, name, _ in PLACE.findall((HERE / "template.md").read_text())}
    assert shown == {path.stem for path in RESULTS}, "a result is not shown, or a table has none"
    assert "{{" not in page()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    result = json.loads(path.read_text())
    assert re.match(r"(OMP_NUM_THREADS=1 )?python -m (llm|small\.\w+) bench", result["command"])
    assert result["device"] and result["git_commit"] and result["versions"]["torch"]
    assert "/tmp" not in result["command"]


def test_medians_on_the_page_are_those_of_the_results() -> None:
    """One by hand: rates of the contenders of one file."""
    text = page()
    for path in RESULTS:
        result = json.loads(path.read_text())
        if "seconds_to_first_step" in result:
            for name, rates in result["tokens_per_second"].items():
                assert f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) |" in text


def test_numbers_and_tables() -> None:
    assert [seconds(each) for each in (2.5, 0.0123, 4.56e-5, 7e-9)] == ["2.5 s", "12.3 ms", "45.6 us", "7 ns"]
    assert spread([1.0, 3.0, 2.0]) == "2 (1 to 3)" and spread([1234.0]) == "1,234"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
