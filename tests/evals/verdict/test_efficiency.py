"""When a loss is reached, what that saves, and what the change costs: on curves and runs of known numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gmean, ttest_1samp

from evals.exported_steps import Curve, ExportedRun
from evals.exports import Export
from evals.verdict.efficiency import (
    Cost,
    Reached,
    Saving,
    busy_runs,
    costs,
    first_at,
    flops_per_token,
    reached,
    read_step_time,
    saving,
    time_note,
    validation_spacing,
)  # fmt: skip
from evals.verdict.pair import Pair, Pairs
from evals.verdict.record import Comparison, record, rows, saving_rows
from evals.verdict.verdict import cost_sentence
from llm.common.errors import UserError

FLOPS = 3e6  # a token
NAMES = ("classic", "values")


def made_run(losses: Sequence[float], name: str = "run", rates: Sequence[Any] = (5000,), **facts: Any) -> ExportedRun:
    """A validation loss every tenth step of 1,000 tokens; `facts` go to run.json or, where it has them, the summary."""
    metrics = [
        {"step": str(10 * n), "tokens": str(10_000 * n), "validation_loss": str(loss)}
        for n, loss in enumerate(losses, start=1)
    ]
    metrics += [{"step": "5", "tokens": "5000", "validation_loss": "", "tokens_per_second": str(r)} for r in rates]
    summary = {"parameters": 1000, "seconds": 60.0, "peak_memory_bytes": 2_000_000_000}
    info = {"name": name, "seed": 1, "store_fingerprint": "f1", "flops_per_token": FLOPS}
    info |= {key: value for key, value in facts.items() if key not in summary}
    summary |= {key: value for key, value in facts.items() if key in summary}
    return ExportedRun(Path(name), info, {}, metrics, summary)


def comparison(pairs: Sequence[Pair], **parts: Any) -> Comparison:
    """One that holds what the rows take and no more."""
    empty: dict[str, Any] = {"findings": [], "savings": [], "targets": {}, "costs": [], "table_2": None, "notes": []}
    empty |= {"metric": "acc_norm", "measured": {}, "sentence": ""}
    exports = [(Export(Path("a"), {}), Export(Path("b"), {})) for _ in pairs]
    return Comparison(Pairs(list(pairs), NAMES, {}, []), exports, **{**empty, **parts})


# ---- Until a loss is reached -----------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.floats(1, 9).map(lambda value: round(value, 2)), min_size=1, max_size=8),
    st.floats(0.5, 9.5).map(lambda value: round(value, 2)),
)
def test_where_a_curve_first_comes_down_to_a_loss(values, target):
    """Also of curves that rise again: all before is above, and there the line that joins the points has this value."""
    tokens = [1000.0 * n**2 for n in range(1, len(values) + 1)]
    at = first_at(Curve(tokens, values), target)
    if min(values) > target:
        assert at is None
    elif values[0] <= target:
        assert at == tokens[0]
    else:
        assert tokens[0] < at <= tokens[-1]
        assert np.interp(at, tokens, values) == pytest.approx(target)
        grid = np.linspace(tokens[0], at, 200, endpoint=False)
        assert (np.interp(grid, tokens, values) > target - 1e-9).all()


def test_steps_tokens_and_flops_until_a_loss():
    run = made_run([4.0, 3.0, 2.5, 2.0])
    assert reached(run, 2.75) == Reached(25, 25_000, 25_000 * FLOPS, False)  # half way from 3.0 to 2.5
    assert reached(run, 2.0) == Reached(40, 40_000, 40_000 * FLOPS, False)


def test_a_loss_below_all_measurements_is_never_reached():
    assert reached(made_run([4.0, 3.0]), 2.99) == Reached(None, None, None, False)


def test_a_loss_above_all_measurements_was_reached_then_or_before():
    assert reached(made_run([4.0, 3.0]), 4.5) == Reached(10, 10_000, 10_000 * FLOPS, True)
    assert reached(made_run([4.0, 3.0]), 4.0) == Reached(10, 10_000, 10_000 * FLOPS, False)  # just then


def test_a_run_that_does_not_say_its_flops():
    run = made_run([4.0, 3.0], flops_per_token=None)
    assert flops_per_token(run) is None and reached(run, 3.0) == Reached(20, 20_000, None, False)


def test_what_a_pair_saves_is_told_at_the_higher_of_the_final_losses():
    slow, fast = made_run([4.0, 3.0, 2.5, 2.0]), made_run([3.5, 2.0, 1.5, 1.0])
    assert saving(Pair(slow, fast)) == Saving(2.0, reached(slow, 2.0), reached(fast, 2.0))
    assert saving(Pair(slow, fast)).ratio == 0.5  # 20,000 tokens over 40,000
    assert saving(Pair(fast, slow)).target == 2.0 and saving(Pair(fast, slow)).ratio == 2
    assert saving(Pair(slow, slow)).ratio == 1
    assert saving(Pair(slow, fast), 3.0).ratio == pytest.approx((10 + 10 / 3) / 20)


@pytest.mark.parametrize("target", [0.5, 1.5, 3.75, 9.0])
def test_no_ratio_where_either_is_not_known_exactly(target):
    """Below all of both, of the first, above the first of one, of both."""
    slow, fast = made_run([4.0, 3.0, 2.5, 2.0]), made_run([3.5, 2.0, 1.5, 1.0])
    assert saving(Pair(slow, fast), target).ratio is None
    assert saving(Pair(fast, slow), target).ratio is None


def test_the_rows_of_what_is_saved():
    """A line a side, a seed and a target: never, at most, and what an older run does not say."""
    one = Pair(made_run([4.0, 3.0, 2.5, 2.0], seed=1), made_run([3.5, 2.0, 1.5, 1.0], seed=1))
    two = Pair(made_run([4.0, 3.0, 2.5, 2.0], seed=2), made_run([3.5, 2.0, 1.5, 1.0], seed=2, flops_per_token=None))
    pairs = [one, two]
    targets = {target: [saving(pair, target) for pair in pairs] for target in (1.5, 3.75)}
    found = comparison(pairs, savings=[saving(pair) for pair in pairs], targets=targets)
    assert saving_rows(found) == [
        ["2.0000", "1", "classic", "40", "40,000", "1.2e+11"],
        ["2.0000", "1", "values", "20", "20,000", "6e+10"],
        ["2.0000", "2", "classic", "40", "40,000", "1.2e+11"],
        ["2.0000", "2", "values", "20", "20,000", "–"],
        ["1.5000", "1", "classic", "never", "never", "never"],
        ["1.5000", "1", "values", "30", "30,000", "9e+10"],
        ["1.5000", "2", "classic", "never", "never", "never"],
        ["1.5000", "2", "values", "30", "30,000", "–"],
        ["3.7500", "1", "classic", "12", "12,500", "3.75e+10"],
        ["3.7500", "1", "values", "≤ 10", "≤ 10,000", "≤ 3e+10"],
        ["3.7500", "2", "classic", "12", "12,500", "3.75e+10"],
        ["3.7500", "2", "values", "≤ 10", "≤ 10,000", "–"],
    ]


# ---- Cost ------------------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_second_over_the_first():
    cost = Cost("training time", "s", [10.0, 20.0, 40.0], [11.0, 30.0, 36.0])
    assert cost.ratios == pytest.approx([1.1, 1.5, 0.9])
    assert cost.means == pytest.approx((gmean([10, 20, 40]), gmean([11, 30, 36])))
    assert cost.percent == pytest.approx(100 * (gmean([1.1, 1.5, 0.9]) - 1))  # 14.1
    assert Cost("training time", "s", [40.0], [30.0]).percent == pytest.approx(-25)


def test_the_costs_of_two_sides():
    first = made_run([2.0], rates=[1000, 5000, 4000, "", 10], parameters=1000, seconds=60.0)
    second = made_run([2.0], rates=[2000], parameters=1200, seconds=90.0, peak_memory_bytes=3_000_000_000)
    found = {cost.name: cost for cost in costs([Pair(first, second), Pair(second, first)])}
    assert list(found) == ["parameters", "FLOPs per token", "peak memory"]  # two trainings are two moments
    assert (found["parameters"].first, found["parameters"].second) == ([1000, 1200], [1200, 1000])
    assert (found["peak memory"].first, found["peak memory"].second) == ([2, 3], [3, 2])  # GB
    assert found["FLOPs per token"].first == [FLOPS, FLOPS]


@pytest.mark.parametrize("lacking", ["first", "second"])
def test_what_one_run_does_not_say_is_left_out(lacking):
    whole, older = made_run([2.0]), made_run([2.0], rates=(), peak_memory_bytes=None, flops_per_token=None)
    pairs = [Pair(whole, whole), Pair(older, whole) if lacking == "first" else Pair(whole, older)]
    assert [cost.name for cost in costs(pairs)] == ["parameters"]


def test_how_busy_the_machine_was_is_told(tmp_path):
    quiet, busy = made_run([2.0], name=str(tmp_path / "quiet")), made_run([2.0], name=str(tmp_path / "busy"))
    for run in (quiet, busy):
        run.folder.mkdir()
        (run.folder / "events.jsonl").write_text('{"step": 3, "event": "loss spike"}\n')
    told = time_note([Pair(quiet, busy)])
    assert told.startswith("Training time is not compared") and "llm bench" in told and "other processes" not in told
    with (busy.folder / "events.jsonl").open("a") as file:
        file.write('{"step": 0, "event": "busy_machine", "why": "..."}\n')
    pairs = [Pair(quiet, quiet), Pair(quiet, busy)]
    assert busy_runs(pairs) == ([], [busy])
    assert f"other processes used the cores of {busy.folder} " in time_note(pairs)
    assert rows(comparison(pairs))[-1][:3] == ["runs on a busy machine", "0 of 2", "1 of 2"]


def test_the_time_of_a_step_is_that_of_rounds_side_by_side(tmp_path):
    rates = {"classic": [1000.0, 500.0, 800.0], "values": [900.0, 460.0, 700.0], "gpt2": [1.0, 1.0, 1.0]}
    (tmp_path / "bench.json").write_text(json.dumps({"tokens_per_second": rates}))
    pair = Pair(made_run([2.0], name="classic-seed1"), made_run([2.0], name="stories_values"))
    pairs = Pairs([pair], ("classic-seed1", "stories_values"), {}, [])
    found = read_step_time(tmp_path / "bench.json", pairs, 0.95)
    assert found.ratios == pytest.approx([1000 / 900, 500 / 460, 800 / 700])
    low, high = (100 * np.expm1(bound) for bound in ttest_1samp(np.log(found.ratios), 0.0).confidence_interval(0.95))
    assert found.interval == f"95% interval {low:+.1f}% to {high:+.1f}%"
    assert rows(comparison([pair], costs=costs([pair], found)))[-2] == [
        "step time, s per million tokens", "1.36e+03", "1.51e+03", f"{found.percent:+.1f}%", found.interval, "", "",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no two rounds of keys: run .*it has classic, values, gpt2"):
        read_step_time(tmp_path / "bench.json", Pairs([pair], ("classic", "keys"), {}, []), 0.95)
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(UserError, match="is not of llm bench"):
        read_step_time(tmp_path / "bench.json", pairs, 0.95)


def test_how_far_validations_are_apart():
    pair = Pair(made_run([4.0, 3.0]), made_run([4.0, 3.0, 2.0]))
    assert validation_spacing([pair]) == 10_000
    once = made_run([4.0])
    assert validation_spacing([Pair(once, once)]) is None


def test_the_rows_and_the_sentence_of_the_costs():
    first = made_run([2.0], parameters=20_000)
    second = made_run([2.0], parameters=20_000, peak_memory_bytes=1_500_000_000)
    third = made_run([2.0], parameters=20_000, peak_memory_bytes=2_500_000_000)
    one = [Pair(first, second)]
    assert rows(comparison(one, costs=costs(one))) == [
        ["parameters", "20,000", "20,000", "+0.0%", "", "", ""],
        ["FLOPs per token", "3e+06", "3e+06", "+0.0%", "", "", ""],
        ["peak memory, GB", "2.00", "1.50", "-25.0%", "", "", ""],
        ["runs on a busy machine", "0 of 1", "0 of 1", "", "", "", ""],
    ]
    said = "Cost of values against classic: parameters the same, FLOPs per token the same, peak memory -25.0%."
    assert cost_sentence(NAMES, costs(one)) == said
    several = [Pair(first, second), Pair(first, third)]  # 0.75 and 1.25 of the memory
    by_name = {line[0]: line for line in rows(comparison(several, costs=costs(several)))}
    assert by_name["peak memory, GB"][1:5] == ["2.00", "1.94", "-3.2%", "-25.0% to +25.0% by seed"]
    assert by_name["parameters"][3:5] == ["+0.0%", "+0.0% in every seed"]
    timed = costs(one, Cost("step time", "s per million tokens", [1.0], [1.25], "95% interval +20.0% to +30.0%"))
    assert cost_sentence(NAMES, timed).endswith("step time +25.0% (95% interval +20.0% to +30.0%).")
    assert cost_sentence(NAMES, []) == ""


def test_a_seed_of_a_study_is_shown_with_its_place():
    """Derived seeds are long numbers; seeds that count themselves, and a single one, stay as they are."""
    pairs = [Pair(made_run([3.0, 2.0], seed=seed), made_run([3.0, 1.0], seed=seed)) for seed in (9682852, 77)]
    found = comparison(pairs, savings=[saving(pair) for pair in pairs])
    assert [line[1] for line in saving_rows(found)] == ["1 of 2 (9682852)"] * 2 + ["2 of 2 (77)"] * 2
    assert comparison(pairs[:1]).pairs.seed_label(0) == "9682852"


def test_the_numbers_that_are_kept():
    """In full, with every ratio, and what was never reached as none."""
    pair = Pair(made_run([4.0, 3.0]), made_run([3.5, 2.0], parameters=1300))
    found = comparison([pair], savings=[saving(pair)], targets={1.0: [saving(pair, 1.0)]}, costs=costs([pair]))
    kept = record(found, "test")
    halfway = pytest.approx(10_000 + 10_000 / 3)
    assert [line["target"] for line in kept["to_loss"]] == [3.0, 1.0]
    assert [side["tokens"] for side in kept["to_loss"][0]["reached"]] == [20_000, halfway]
    assert kept["to_loss"][0]["ratio_of_tokens"] == pytest.approx(2 / 3)
    never = dict.fromkeys(("steps", "tokens", "flops"))
    assert kept["to_loss"][1]["reached"] == [{**never, "at_most": False}] * 2
    assert kept["to_loss"][1]["ratio_of_tokens"] is None
    size = next(cost for cost in kept["costs"] if cost["name"] == "parameters")
    assert (size["first"], size["second"], size["ratios"]) == ([1000], [1300], [1.3])
