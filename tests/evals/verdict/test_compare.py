"""The comparison of made-up pairs: what is measured, said, written and refused."""

import csv
import html
import json
import re
import shlex
import struct
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import pytest

from evals.__main__ import main
from tests.browser import check_page

from ..made_up import FLOPS, add_incontext, add_ioi, add_recall, add_task, document_lengths, make_export, make_run

DOCUMENTS = 300
TOKENS = document_lengths(DOCUMENTS)
COST = 1.25  # of the runs with the change
GENERATOR = 5


def make_pairs(root: Path, gain: float, seeds: tuple[int, ...] = (1,), spread: float = 0.0) -> list[str]:
    """Runs of both sides whose losses differ by `gain` nats a token, give or take `spread` a seed.

    A long document gains more than a short one, so that those who weigh all alike find less.
    """
    numbers = np.random.default_rng(GENERATOR)
    base = numbers.gamma(9, 0.25, DOCUMENTS)  # nats per token, the same documents for all
    arguments = []
    for seed in seeds:
        for side, stream in (("classic", []), ("values", ["values"])):
            shift = -gain + spread * numbers.standard_normal() if stream else 0.0
            name = f"{side}-seed{seed}" if len(seeds) > 1 else side
            cost = COST if stream else 1.0
            run = make_run(root / name, stream, loss=2.0 - gain * bool(stream), seed=seed, cost=cost)
            losses = base + shift * TOKENS * TOKENS.mean() / (TOKENS**2).mean()
            make_export(run, TOKENS * (losses + 0.1 * numbers.standard_normal(DOCUMENTS)), seed=seed)
            arguments.append(str(run))
    return arguments


def exports(runs: list[str]) -> list[Path]:
    return [Path(run) / "exports/step-00000040" for run in runs]


def nats(export: Path) -> np.ndarray:
    return np.array(json.loads((export / "evals/losses.json").read_text())[0]["nats"])


def compare(runs: list[str], out: Path, *more: str) -> int:
    """No model is behind these exports: what is kept is taken."""
    return main(["compare", *runs, "--out", str(out), "--documents", "0", *more])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


# ---- The sentence ----------------------------------------------------------------------------------------------------


def test_one_seed_says_which_of_these_two_is_lower_and_no_more(tmp_path, capsys):
    runs = make_pairs(tmp_path, gain=0.1)
    assert compare(runs, tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    finding = results(tmp_path / "out")["findings"][0]
    start = "One seed each: values (seed 1) has a lower validation loss per document than classic (seed 1): -0."
    assert said.startswith(start)
    per_token = [nats(export).sum() / TOKENS.sum() for export in exports(runs)]
    assert finding["means"] == pytest.approx(per_token) and finding["shown"] == "lower"
    assert finding["difference"] == pytest.approx(per_token[1] - per_token[0], abs=1e-12)
    assert finding["family"] == "primary" and finding["hierarchical_bootstrap"] is None
    assert f"{finding['low']:+.4f} to {finding['high']:+.4f} over 300 documents" in said
    assert finding["low"] < -0.1 < finding["high"] < 0
    assert "fewer tokens (read between validations 10,000 tokens apart, one pair); whether other seeds agree is" in said
    assert said.endswith("known of what other initial weights alone change, as there is no null arm.")
    assert "better" not in said and "helped" not in said


def test_several_seeds_may_be_called_better_or_worse(tmp_path, capsys):
    seeds = (1, 2, 3, 4)
    runs = make_pairs(tmp_path / "a", 0.1, seeds, spread=0.004)
    assert compare(runs, tmp_path / "better") == 0
    assert "values is better than classic: lower validation loss per document, -0." in capsys.readouterr().out
    finding = results(tmp_path / "better")["findings"][0]
    per_token = np.array([nats(export).sum() / TOKENS.sum() for export in exports(runs)]).reshape(4, 2)
    assert finding["difference"] == pytest.approx(np.subtract(*per_token.mean(axis=0)[::-1]), abs=1e-12)
    assert finding["seeds"] == 4 and finding["shown"] == "lower"
    assert compare(make_pairs(tmp_path / "b", -0.1, seeds, spread=0.004), tmp_path / "worse") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "values is worse than classic: higher validation loss per document, +0." in said and "better" not in said
    assert results(tmp_path / "worse")["findings"][0]["shown"] == "higher"
    ways = [line["reached"] for line in results(tmp_path / "worse")["to_loss"]]
    fewer = 100 * (1 - geometric_mean(first["tokens"] / second["tokens"] for first, second in ways))
    assert fewer > 10 and f"classic reaches values's final loss with {fewer:.0f}% fewer tokens" in said


@pytest.mark.parametrize(("seeds", "spread"), [((1,), 0.0), ((1, 2, 3), 0.05)])
def test_an_interval_that_holds_zero_is_never_called_better(tmp_path, capsys, seeds, spread):
    """The curves' final losses do differ here, and are no evidence."""
    runs = make_pairs(tmp_path, gain=0.001, seeds=seeds, spread=spread)
    assert compare(runs, tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    finding = results(tmp_path / "out")["findings"][0]
    assert finding["low"] < 0 < finding["high"] and finding["shown"] == "no difference shown"
    start = "No difference between values and classic"
    if seeds == (1,):
        start = "One seed each: no difference between values (seed 1) and classic (seed 1)"
    assert said.startswith(f"{start} is shown: validation loss per document")
    assert not any(word in said for word in ("better", "worse", "lower", "higher", "fewer tokens"))


def test_a_run_against_itself_differs_in_nothing(tmp_path, capsys):
    runs = make_pairs(tmp_path, gain=0.0)
    losses = (exports(runs)[0] / "evals/losses.json").read_text()
    (exports(runs)[1] / "evals/losses.json").write_text(losses)
    assert compare(runs, tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "validation loss per document 0.0000 nats per token, 95% interval 0.0000 to 0.0000" in said
    assert said.startswith("One seed each: no difference")


def test_without_losses_there_is_no_verdict(tmp_path, capsys):
    runs = make_pairs(tmp_path, gain=0.5)
    for export in exports(runs):
        (export / "evals/losses.json").unlink()
    assert compare(runs, tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("There is no verdict on values against classic")


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def test_the_tasks_share_the_error_rate(tmp_path, capsys):
    """Of ten tasks without a difference and one with a large one, the large one alone is shown.

    One of the ten would be shown if it were alone.
    """
    runs = make_pairs(tmp_path, gain=0.1)
    numbers = np.random.default_rng(1)
    for export, gain in zip(exports(runs), (0.0, 0.3), strict=True):
        for task in range(10):
            add_task(export, f"null{task}", 1, numbers.random(400) < 0.5)
        add_task(export, "real", 1, numbers.random(400) < 0.5 + gain)
    assert compare(runs, tmp_path / "out") == 0
    findings = {finding["measure"]: finding for finding in results(tmp_path / "out")["findings"]}
    shown = {name: finding["shown"] for name, finding in findings.items() if finding["shown"] != "no difference shown"}
    assert shown == {"validation loss per document": "lower", "real, 1-shot, acc_norm": "higher"}
    assert len(findings) == 13
    families = [finding["family"] for finding in findings.values()]
    assert families == ["primary", *["tasks"] * 11, "others"]
    chance = findings["null5, 1-shot, acc_norm"]
    assert not chance["low"] <= 0 <= chance["high"] and chance["p_value"] < 0.05 < chance["adjusted_p_value"]
    real = findings["real, 1-shot, acc_norm"]
    assert real["adjusted_p_value"] == pytest.approx(11 * real["p_value"])  # the smallest of eleven
    for alone in (findings["validation loss per document"], findings["mean of 11 tasks, 1-shot, acc_norm"]):
        assert alone["adjusted_p_value"] == alone["p_value"]
    table = capsys.readouterr().out
    assert re.search(r"real, 1-shot, acc_norm, % +\d\d\.\d\d +\d\d\.\d\d +\+\d\d\.\d\d +\+\d+\.\d+ to .*higher", table)


def test_all_that_was_measured_is_on_the_page(tmp_path, pdfs):
    """With everything at hand: every picture, in a real browser, in the light and the dark, wide and narrow."""
    runs = make_pairs(tmp_path, gain=0.1)
    numbers = np.random.default_rng(0)
    for export, gain in zip(exports(runs), (0.0, 0.1), strict=True):
        for task in ("arc_easy", "piqa", "hellaswag"):
            for shots in (0, 5):
                add_task(export, task, shots, numbers.random(400) < 0.5 + gain)
        add_ioi(export, 0.07 + gain, 0.05, numbers.standard_normal(256) + gain)
        add_incontext(export, numbers.standard_normal(50) - gain)
        add_recall(export, numbers.random(20) + gain)
    assert compare(runs, tmp_path / "out") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "report.html", "results.json", "table.csv", "table.tex", "loss.png", "pictures", "tables",
    }  # fmt: skip
    pictures = sorted(file.name for file in (tmp_path / "out/pictures").iterdir())
    assert len(pictures) == 28 and pictures[:2] == [
        f"01-training-and-validation-loss-over-tokens.{form}" for form in ("pdf", "svg")
    ]
    assert all((tmp_path / "out/pictures" / name).read_bytes().startswith((b"%PDF-1", b"<svg")) for name in pictures)
    check_page(tmp_path / "out/report.html", pictures=14)
    tables = sorted(file.name for file in (tmp_path / "out/tables").iterdir())
    assert tables[:2] == ["01-what-was-measured.csv", "01-what-was-measured.tex"] and len(tables) % 2 == 0
    with (tmp_path / "out/tables" / tables[0]).open(newline="") as file:
        shown = list(csv.reader(file))
    assert {len(row) for row in shown} == {len(shown[0])}
    assert f">{html.escape(shown[1][0])}</th>" in (tmp_path / "out/report.html").read_text()
    with (tmp_path / "out/table.csv").open(newline="") as file:
        table = {row["measure"]: row for row in csv.DictReader(file)}
    for name in ("IOI correct name, 4 sentences, %", "IOI correct name, 4 sentences, as published, %"):
        assert float(table[name]["difference"]) == pytest.approx(10, abs=0.01)
    assert {"key-value pairs recalled, %", "second copy of random tokens, nats per token"} < table.keys()
    percent = {name: float(line["difference"].rstrip("%")) for name, line in table.items() if "%" in line["difference"]}
    of_cost = {"parameters": COST, "FLOPs per token": COST**2, "peak memory, GB": COST**4}
    assert percent == pytest.approx({name: 100 * (ratio - 1) for name, ratio in of_cost.items()}, abs=0.06)
    costs = {cost["name"]: cost["ratios"] for cost in results(tmp_path / "out")["costs"]}
    assert list(costs.values()) == [pytest.approx([of_cost[name]], rel=1e-4) for name in list(table) if name in of_cost]
    latex = (tmp_path / "out/table.tex").read_text().splitlines()
    assert latex[0] == r"\begin{tabular}{lrrrrrr}" and len(latex) == len(table) + 6
    assert any(line.startswith(r"IOI correct name, 4 sentences, \% & 7.00 & 17.00 & +10.00 &") for line in latex)
    png = (tmp_path / "out/loss.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG\r\n") and width >= 1000 and height >= 500


def test_what_one_model_lacks_is_left_out_and_said(tmp_path, capsys):
    runs = make_pairs(tmp_path, gain=0.1)
    add_task(exports(runs)[0], "piqa", 0, np.ones(10, dtype=bool))
    assert compare(runs, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "piqa, 0-shot is left out: it was not measured for" in out and "piqa, 0-shot, acc" not in out


# ---- Groups of documents ---------------------------------------------------------------------------------------------


def test_the_loss_is_compared_by_group_where_documents_have_one(tmp_path, capsys):
    """Neighbours that differ alike are warned of as long as no groups are named."""
    runs = make_pairs(tmp_path, gain=0.03)
    books = np.repeat(np.arange(50), 6)
    paths = [export / "evals/losses.json" for export in exports(runs)]
    kept = json.loads(paths[1].read_text())
    of_books = 0.1 * np.random.default_rng(8).standard_normal(50)
    kept[0]["nats"] = (nats(exports(runs)[1]) + TOKENS * of_books[books]).tolist()
    paths[1].write_text(json.dumps(kept))
    assert compare(runs, tmp_path / "alone") == 0
    told = capsys.readouterr().out
    assert "Warning: neighbouring documents differ alike in validation loss per document (correlation 0." in told
    assert "`python -m llm prepare --group-by`" in told
    for path in paths:
        one = json.loads(path.read_text())
        one[0] |= {"groups": books.tolist(), "grouped_by": "book"}
        path.write_text(json.dumps(one))
    assert compare(runs, tmp_path / "out") == 0
    told = capsys.readouterr().out
    alone, found = (results(tmp_path / name)["findings"][0] for name in ("alone", "out"))
    assert found["groups"] == 50 and found["difference"] == pytest.approx(alone["difference"])
    assert found["high"] - found["low"] > 1.3 * (alone["high"] - alone["low"])
    assert f"over 300 documents of 50 groups (worth {found['effective']:,.0f} independent ones)" in told
    assert "Warning: neighbouring" not in told
    one = json.loads(paths[0].read_text())
    del one[0]["groups"], one[0]["grouped_by"]
    paths[0].write_text(json.dumps(one))
    assert compare(runs, tmp_path / "other") == 2
    refused(capsys, tmp_path / "other", "was measured with different grouped_by (None and book)")


def test_questions_on_one_passage_are_one_group(tmp_path):
    runs = make_pairs(tmp_path, gain=0.1)
    numbers = np.random.default_rng(2)
    for export in exports(runs):
        add_task(export, "boolq", 0, numbers.random(120) < 0.5)
        add_task(export, "piqa", 0, numbers.random(120) < 0.5)
        path = export / "evals/samples/boolq-0shot.jsonl"
        rows = [json.loads(line) | {"passage": f"{n // 3:x}"} for n, line in enumerate(path.read_text().splitlines())]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(runs, tmp_path / "out") == 0
    found = {finding["measure"]: finding["groups"] for finding in results(tmp_path / "out")["findings"]}
    assert found["boolq, 0-shot, acc_norm"] == 40 and found["piqa, 0-shot, acc_norm"] is None
    assert found["mean of 2 tasks, 0-shot, acc_norm"] == 160  # each other item is a group of its own


# ---- Until a loss is reached -----------------------------------------------------------------------------------------


def test_tokens_to_the_other_s_final_loss(tmp_path, capsys):
    """Validation at 10, 20, 30, 40 thousand tokens; the way to a loss lies on the line between two of them."""
    runs = make_pairs(tmp_path, gain=0.1)
    for run, losses in zip(runs, ((4.0, 3.0, 2.5, 2.0), (3.9, 2.5, 1.5, 1.4)), strict=True):
        rows = (Path(run) / "metrics.csv").read_text().splitlines()
        header = rows[0].split(",")
        lines = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:]]
        for line in lines:
            at = int(line["step"])
            line["validation_loss"] = str(losses[at // 10 - 1]) if at % 10 == 0 else ""
        text = "\n".join([rows[0], *(",".join(line.values()) for line in lines)])
        (Path(run) / "metrics.csv").write_text(text + "\n")
    assert compare(runs, tmp_path / "out", "--target-loss", "3.5", "1.0") == 0
    to_loss = results(tmp_path / "out")["to_loss"]
    assert to_loss[0]["target"] == 2.0
    assert [reached["tokens"] for reached in to_loss[0]["reached"]] == [40_000, 25_000]  # half way from 2.5 to 1.5
    assert [reached["steps"] for reached in to_loss[0]["reached"]] == [40, 25]
    assert to_loss[0]["ratio_of_tokens"] == 25 / 40
    assert [reached["tokens"] for reached in to_loss[1]["reached"]] == [
        15_000,
        pytest.approx(10_000 + 10_000 * 0.4 / 1.4),
    ]
    assert [reached["tokens"] for reached in to_loss[2]["reached"]] == [None, None]
    assert [reached["flops"] for reached in to_loss[0]["reached"]] == [40_000 * FLOPS, 25_000 * FLOPS * COST**2]
    assert "values reaches classic's final loss with 38% fewer tokens" in capsys.readouterr().out


# ---- Refusals --------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], out: Path, *messages: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(message in error for message in messages), error
    assert not out.is_dir()


def test_runs_that_are_no_pair(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", ["values"], config={"model.optimizer.lr": 0.5})]
    assert compare([str(run) for run in runs], tmp_path / "out") == 2
    refused(capsys, tmp_path / "out", "model.optimizer.lr (0.001 and 0.5)", "--allow-difference")


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"batch_size": 4}, {"device": "cuda:0"}, {"limit": 7}])
def test_results_measured_differently(tmp_path, capsys, changes):
    runs = make_pairs(tmp_path, gain=0.1)
    for export, how in zip(exports(runs), ({}, changes), strict=True):
        add_task(export, "piqa", 1, np.ones(20, dtype=bool), **how)
    assert compare(runs, tmp_path / "out") == 2
    refused(capsys, tmp_path / "out", "piqa, 1-shot was measured with different", next(iter(changes)))


def test_results_of_other_items(tmp_path, capsys):
    runs = make_pairs(tmp_path, gain=0.1)
    for export in exports(runs):
        add_task(export, "piqa", 1, np.ones(20, dtype=bool))
    samples = exports(runs)[1] / "evals/samples/piqa-1shot.jsonl"
    samples.write_text(samples.read_text().replace('"p3"', '"q3"'))
    assert compare(runs, tmp_path / "out") == 2
    refused(capsys, tmp_path / "out", "piqa, 1-shot was measured on different items (prompt_hash)")
    samples.write_text("{}\n")
    assert compare(runs, tmp_path / "out") == 2
    refused(capsys, tmp_path / "out", "piqa-1shot.jsonl cannot be read", "--overwrite")


def test_losses_of_other_documents(tmp_path, capsys):
    runs = make_pairs(tmp_path, gain=0.1)
    path = exports(runs)[1] / "evals/losses.json"
    path.write_text(path.read_text().replace("[0, 1, 2,", "[0, 1, 7,"))
    assert compare(runs, tmp_path / "out") == 2
    refused(capsys, tmp_path / "out", "different items (documents)")


def test_arguments_that_cannot_be_used(tmp_path, capsys):
    runs = make_pairs(tmp_path, gain=0.1)
    (tmp_path / "out").write_text("")
    assert compare(runs, tmp_path / "out") == 2
    refused(capsys, tmp_path / "out", "out is a file")
    assert main(["compare", *runs]) == 2
    refused(capsys, tmp_path / "out", "give --out DIR")
    assert compare(runs[:1], tmp_path / "other") == 2
    refused(capsys, tmp_path / "other", "one run is no pair")


def test_the_command_is_told_whole(tmp_path, capsys):
    """As it was typed, every option of it, in the file and on the page."""
    runs = make_pairs(tmp_path, gain=0.1)
    out = tmp_path / "the <page>"  # to be quoted for a shell, and for HTML
    options = [
        "--allow-difference",
        "model.optimizer.lr",
        "--target-loss",
        "2.5",
        "3",
        "--level",
        "0.9",
        "--metric",
        "acc",
    ]
    options += ["--batch-size", "4", "--device", "cpu", "--dtype", "float32"]
    assert compare(runs, out, *options) == 0
    made_by = results(out)["made_by"]
    words = ["python", "-m", "evals", "compare", *runs, "--out", str(out), "--documents", "0", *options]
    assert shlex.split(made_by) == words
    made = re.search(r'<p class="made">(.*?), \d{4}-', (out / "report.html").read_text(), re.DOTALL)
    assert made and html.unescape(made[1]) == made_by
    findings = results(out)["findings"]
    assert findings[0]["level"] == 0.9 and "90% interval" in capsys.readouterr().out
    assert [line["target"] for line in results(out)["to_loss"]] == [2.0, 2.5, 3.0]


def test_reading_changes_no_file(tmp_path):
    runs = make_pairs(tmp_path, gain=0.1)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert compare(runs, tmp_path / "out") == 0
    assert all(file.read_bytes() == content for file, content in before.items())
