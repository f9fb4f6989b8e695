"""`python -m llm batch`: the text of a step, held against the store itself and the run's own record of its data."""

import re
import shutil
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from llm.cli import main
from llm.data.module import TokenDataModule
from llm.data.order import WindowOrder
from llm.data.rows import DIGESTS, TrainingBatches
from llm.data.store import TokenStore

from ..train.runs import fit, metrics

Config = Callable[..., Path]
Shown = Callable[..., tuple[str, dict[int, tuple[str, str, list[int]]]]]
ROW = re.compile(r"row (\d+): (.*)\n  (.*)\n  ([\d ]+)\n")


@pytest.fixture
def second_store(story_store: Path, tmp_path: Path) -> Path:
    """Other stories, tokenized as those of `story_store`."""
    words = ["prepare", "stories:7", "--documents", "100", "--tokenizer", str(story_store / "tokenizer")]
    assert main([*words, "--workers", "1", "--out", str(tmp_path / "other")]) == 0
    return tmp_path / "other"


@pytest.fixture
def shown(capsys: pytest.CaptureFixture) -> Shown:
    """The digest that `batch` prints for a step, and of each row where it is from, its text and its ids."""

    def show(run: Path, step: int, *words: str) -> tuple[str, dict[int, tuple[str, str, list[int]]]]:
        capsys.readouterr()
        assert main(["batch", str(run), "--step", str(step), "--ids", *words]) == 0
        text = capsys.readouterr().out
        rows = {int(row): (where, said, list(map(int, ids.split()))) for row, where, said, ids in ROW.findall(text)}
        digest = re.search(r"digest of these rows is ([0-9a-f]{16})\b", text)
        assert digest is not None
        return digest[1], rows

    return show


def recorded(run: Path, step: int) -> str:
    """What the run's rows of metrics.csv added to data_digest at a step."""
    sums = {int(row["step"]): int(row["data_digest"], 16) for row in metrics(run) if row["data_digest"]}
    return f"{(sums[step] - ({0: 0} | sums)[step - 1]) % DIGESTS:016x}"


@pytest.mark.parametrize("kind", ["windows", "documents"])
def test_text_and_ids_are_those_of_the_step(
    tiny_config: Config, story_store: Path, tmp_path: Path, shown: Shown, kind: str
) -> None:
    run = tmp_path / "run"
    assert fit(tiny_config(data__rows=kind, data__micro_batch_size=2, trainer__max_steps=5)) == 0
    store = TokenStore.open(story_store)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer" / "tokenizer.json"))
    order = WindowOrder((store.tokens - 1) // 32 if kind == "windows" else store.documents, 8, 3)
    stream = store.read(0, store.tokens)
    starts = [0, *np.flatnonzero(stream == store.end_of_document) + 1]
    for step in (1, 4):
        digest, rows = shown(run, step, "--characters", "0")
        assert digest == recorded(run, step)
        assert list(rows) == list(range(8))
        for row, (where, text, ids) in rows.items():
            item = order.item(step - 1, row)
            begin = 32 * item if kind == "windows" else starts[item]
            end = begin + 33 if kind == "windows" else min(begin + 33, starts[item + 1])
            assert ids == stream[begin:end].tolist()
            assert literal_eval(text) == tokenizer.decode(ids, skip_special_tokens=False)
            assert where.startswith(f"{kind[:-1]} {item:,}, tokens {begin:,} to {end - 1:,}")
            assert where.endswith("from stories:0, train 0 to 400")
            assert ("of 2 documents" in where) == (kind == "windows" and 0 in ids[:-1])


def test_a_mixture_names_the_store_of_each_row(
    tiny_config: Config, story_store: Path, second_store: Path, tmp_path: Path, shown: Shown
) -> None:
    run, stores = tmp_path / "run", [story_store, second_store]
    weights = {str(second_store): 0.4, str(story_store): 0.6}
    assert fit(tiny_config(data__store=weights, data__mask_documents=True, trainer__max_steps=6)) == 0
    streams = {str(path): TokenStore.open(path) for path in stores}
    named = set()
    for step in (1, 6):
        digest, rows = shown(run, step, "--characters", "0")
        assert digest == recorded(run, step)
        for where, _, ids in rows.values():
            found = re.search(r"tokens ([\d,]+) to ([\d,]+).* of (\S+); from stories:([07]),", where)
            assert found is not None
            begin, end = (int(number.replace(",", "")) for number in found.groups()[:2])
            assert ids == streams[found[3]].read(begin, end - begin + 1).tolist()
            assert (found[4] == "7") == (found[3] == str(second_store))
            named.add(found[3])
        # The same step as two ranks with two micro-batches each would train on it.
        module = TokenDataModule(weights, 32, 8, mask_documents=True, seed=3)
        module.open()
        parts = [TrainingBatches(module.training, module.order, 2, rank, 2) for rank in (0, 1)]
        total = sum(part[2 * (step - 1) + which]["data_digest"] for part in parts for which in (0, 1))
        assert digest == f"{total % DIGESTS:016x}"
    assert named == set(streams)


def test_steps_that_were_skipped_keep_their_number(
    tiny_config: Config, tmp_path: Path, shown: Shown, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert fit(tiny_config(model__schedule={"shape": "constant"}, model__optimizer={"lr": 1e30})) == 2
    skipped = [int(row["step"]) for row in metrics(run) if row["train_loss"] == "nan"]
    assert len(skipped) > 1
    for step in skipped:
        assert shown(run, step)[0] == recorded(run, step)
    main(["batch", str(run), "--step", str(skipped[0]), "--rows", "0", "0"])
    assert "at this step: skipped step: loss 6" in capsys.readouterr().out
    main(["batch", str(run), "--step", "1", "--rows", "0", "0"])
    assert "at this step" not in capsys.readouterr().out


def test_rows_and_characters_choose_what_is_shown_of_one_batch(
    tiny_config: Config, tmp_path: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert fit(tiny_config(trainer__max_steps=3)) == 0
    whole = shown(run, 2, "--characters", "0")
    read, counted = TokenStore.read, []

    def counting(store: TokenStore, start: int, count: int) -> np.ndarray:
        counted.append(count)
        return read(store, start, count)

    monkeypatch.setattr(TokenStore, "read", counting)
    digest, rows = shown(run, 2, "--characters", "10", "--rows", "3", "4")
    assert sum(counted) == 8 * 33
    assert digest == whole[0]
    assert list(rows) == [3, 4]
    for row, (where, text, ids) in rows.items():
        complete = literal_eval(whole[1][row][1])
        assert (where, ids) == (whole[1][row][0], whole[1][row][2])
        assert text == f"{complete[:10]!r} and {len(complete) - 10} characters more"


def test_what_cannot_be_shown_is_one_sentence(
    tiny_config: Config, story_store: Path, second_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert fit(tiny_config(trainer__max_steps=3)) == 0
    moved = tmp_path / "moved"
    shutil.copytree(story_store, moved)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    away, edited, broken = (shutil.copytree(run, tmp_path / name) for name in ("away", "edited", "broken"))
    (away / "config.yaml").write_text(yaml.safe_dump(settings | {"data": settings["data"] | {"store": "not/here"}}))
    (edited / "config.yaml").write_text(yaml.safe_dump(settings | {"data": settings["data"] | {"batch_size": 4}}))
    (broken / "config.yaml").write_text("data: {store")
    assert main(["batch", str(away), "--step", "1", "--store", str(moved)]) == 0
    cases: list[tuple[Path, list[str], str]] = [
        (run, ["--step", "0"], "steps count from 1"),
        (run, ["--step", "4"], "ends at step 3"),
        (run, ["--step", "1", "--rows", "5", "8"], "rows 0 to 7"),
        (run, ["--step", "1", "--store", str(second_store)], "store_fingerprint"),
        (run, ["--step", "1", "--store", str(moved), str(second_store)], "draws on 1 store(s)"),
        (run, ["--step", "1", "--store", str(tmp_path / "none")], "none"),
        (away, ["--step", "1"], "folder where the run was started"),
        (edited, ["--step", "1"], "batch_size (8 in run.json, 4 here)"),
        (broken, ["--step", "1"], "config.yaml cannot be read"),
        (tmp_path, ["--step", "1"], "is not a run folder"),
    ]
    for folder, words, part in cases:
        capsys.readouterr()
        assert main(["batch", str(folder), *words]) == 2, part
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert message.startswith("error: ") and part in message, message
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    assert main(["batch", str(run), "--step", "1"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
