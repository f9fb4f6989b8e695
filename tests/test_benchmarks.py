"""BENCHMARKS.md and the pages in benchmarks/ show what the results say; every result names its command and device."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.__main__ import main, outdated
from benchmarks.pages import HERE, RESULTS, ROOT, SUMMARY, TEMPLATES, load, pages, places
from benchmarks.picture import PICTURE, drawn_from, ratios
from benchmarks.tables import Result, fastest_transformers, origin, seconds, spread, table, value
from llm.common.errors import UserError

FILES = sorted(RESULTS.glob("*.json"))
STEPS = [path for path in FILES if "seconds_to_first_step" in load(path.stem)]  # of llm bench
SHORT = {SUMMARY, TEMPLATES / "LOG.md"}  # pages that take single figures from the results of others
LONG = {template: [place.name for place in places(template)] for template in set(TEMPLATES.glob("*.md")) - SHORT}


def page_of(name: str) -> str:
    """The text of the long page that shows a result."""
    (template,) = [template for template, names in LONG.items() if name in names]
    return (HERE / template.name).read_text()


def test_pages_and_picture_are_made_of_the_results() -> None:
    assert outdated() == [], "run python -m benchmarks"
    assert drawn_from(PICTURE) == ratios() and PICTURE.stat().st_size < 200_000
    assert all("{{" not in text for text in pages().values())


def test_the_summary_is_short() -> None:
    assert len((ROOT / "BENCHMARKS.md").read_text().splitlines()) <= 100


def test_every_result_is_shown_once_on_a_long_page() -> None:
    shown = [name for names in LONG.values() for name in names]
    assert sorted(set(shown)) == [path.stem for path in FILES], (
        "a result is not shown, or is shown twice, or is missing"
    )


def test_every_comparison_with_transformers_is_a_row_of_the_summary() -> None:
    rows = {place.name for place in places(SUMMARY) if place.kind == "row"}
    compared = {path.stem for path in STEPS if "transformers" in load(path.stem)["tokens_per_second"]}
    assert rows == compared
    assert len(ratios()) == len(rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    result = json.loads(path.read_text())
    assert re.match(r"(OMP_NUM_THREADS=1 )?python -m ((llm|small\.\w+) bench|benchmarks\.)", result["command"])
    assert result["device"] and result["git_commit"] and result["versions"]["torch"]
    assert "/tmp" not in result["command"] and ".." not in result["command"]
    page = page_of(path.stem)
    assert origin(result) in page
    assert result["command"] in re.sub(r" \\\n +", " ", page)  # as one line, it is the command that was given


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_medians_on_the_page_are_those_of_the_result(path: Path) -> None:
    """By hand: the rates of the contenders, and the row of the summary."""
    result = json.loads(path.read_text())
    for name, rates in result["tokens_per_second"].items():
        cell = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        assert f"| {name} | {cell} |" in page_of(path.stem)
    if "transformers" in result["tokens_per_second"]:
        best = max(statistics.median(v) for k, v in result["tokens_per_second"].items() if k.startswith("transformers"))
        theirs = fastest_transformers(result)
        assert statistics.median(result["tokens_per_second"][theirs]) == best
        rate, ratio = statistics.median(result["tokens_per_second"]["classic"]), result[f"classic_to_{theirs}"]
        assert f"| {rate:,.0f} | {ratio['median']:.3f} (" in (ROOT / "BENCHMARKS.md").read_text()


def test_the_nominal_share_is_of_the_data_sheet_and_only_where_it_is_known() -> None:
    rows = [line.split(" | ") for line in (ROOT / "BENCHMARKS.md").read_text().splitlines() if line.startswith("| [")]
    gpu = load("1b_gpu_bf16")
    share = statistics.median(gpu["tokens_per_second"]["classic"]) * gpu["model_flops_per_token"] / 989e12
    assert {row[6] for row in rows if row[1] == "NVIDIA H200"} == {f"{share:.1%}"}
    assert {row[6] for row in rows if row[1].startswith("CPU")} == {""}


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--check"]) == 0
    monkeypatch.setattr("benchmarks.__main__.outdated", lambda: ["BENCHMARKS.md"])
    assert main(["--check"]) == 1
    capsys.readouterr()
    assert main(["--chekc"]) == 2
    assert capsys.readouterr().err == "error: unknown argument --chekc: pass --check, --help or nothing\n"
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "python -m benchmarks --check" in capsys.readouterr().out


def test_a_page_that_differs_or_has_no_template_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pages()
    made[ROOT / "BENCHMARKS.md"] += "\n"
    del made[HERE / "tem.md"]
    monkeypatch.setattr("benchmarks.__main__.pages", lambda: made)
    monkeypatch.setattr("benchmarks.__main__.ratios", lambda: [])
    assert outdated() == ["BENCHMARKS.md", "benchmarks/ratios.png", "benchmarks/tem.md"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{speed nothing}}", "benchmarks/results/nothing.json is missing"),
        ("{{speeds tem_cpu}}", "unknown kind speeds"),
        ("{{value tem_cpu: steps, nothing}}", "cannot fill {{value tem_cpu: steps, nothing}}"),
    ],
)
def test_a_place_that_cannot_be_filled_is_named(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.pages.Path.read_text", lambda self, **_: text if self == SUMMARY else "{}")
    with pytest.raises(UserError, match=re.escape(said)):
        pages()


def test_numbers_and_tables() -> None:
    assert [seconds(each) for each in (2.5, 0.0123, 4.56e-5, 7e-9)] == ["2.5 s", "12.3 ms", "45.6 us", "7 ns"]
    assert spread([1.0, 3.0, 2.0]) == "2 (1 to 3)" and spread([1234.0]) == "1,234"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_figure_for_a_sentence() -> None:
    ratio = {"median": 0.9876, "least": 0.9, "greatest": 1.1, "interval": [0.95, 1.05]}
    result: Result = {"a": {"b": ratio, "c": [3.0, 1.0, 2.0]}, "d": {"median": 2, "least": 2, "greatest": 2}}
    assert value(result, "a", "b") == "0.988 (0.950 to 1.050)"
    assert value(result, "a", "b", "median") == "0.988"
    assert value(result, "a", "c") == "2" and value(result, "d") == "2"
