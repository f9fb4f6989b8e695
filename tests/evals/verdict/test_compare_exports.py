"""Which export stands for which run, and which token stores count: what is taken, and what is refused."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.__main__ import main
from evals.exports import Export, open_export
from llm.cli import main as llm
from llm.data.store import TokenStore

from ..made_up import MEASURED, document_lengths, make_export, make_run

SIDES: dict[str, list[str]] = {"classic": [], "values": ["values"]}
STEP = "exports/step-00000040"
Refused = Callable[..., str]


def losses(side: int, documents: int = 30) -> np.ndarray:
    """Nats of each document; the second side has 0.5 a token less."""
    numbers = np.random.default_rng(side)
    return document_lengths(documents) * (2.0 - 0.5 * side + 0.01 * numbers.standard_normal(documents))


def make_pair(root: Path, seed: int = 1, out: Path | None = None, **facts: Any) -> list[Path]:
    """Two runs whose checkpoints, and exports, have weights of their own; `facts` of both runs."""
    runs = []
    for side, (name, stream) in enumerate(SIDES.items()):
        weights = f"w-{name}-{seed}"
        run = make_run(root / f"{name}-seed{seed}", stream, seed=seed, weights=weights, **facts)
        store, place = facts.get("store", "f1"), out and out / f"{name}-seed{seed}"
        make_export(run, losses(side), seed=seed, store=store, weights=weights, out=place)
        runs.append(run)
    return runs


def compare(runs: list[Path], out: Path, *more: object, documents: int = 0) -> int:
    return main(["compare", *map(str, runs), "--out", str(out), "--documents", str(documents), *map(str, more)])


def results(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text()))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Compare into a folder, and find one sentence with all of `messages` and nothing written."""

    def check(runs: list[Path], *more: object, messages: list[str], documents: int = 0) -> str:
        capsys.readouterr()
        assert compare(runs, tmp_path / "refused", *more, documents=documents) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert all(message in error for message in messages), error
        assert not (tmp_path / "refused").exists()
        return error

    return check


# ---- Exports ---------------------------------------------------------------------------------------------------------


def test_weights_that_were_replaced_under_a_sound_card(tmp_path, refused):
    """Not the card says which weights are there: neither a damaged copy nor a result on other weights is compared."""
    runs = make_pair(tmp_path)
    for number, run in enumerate(runs):
        folder = run / STEP
        (folder / "model.safetensors").write_bytes(bytes(100 + number))
        mine = open_export(folder).weights_sha256()
        edit(folder / "hippoformer.json", weights_sha256=mine)
        kept = json.loads((folder / "evals/losses.json").read_text())
        (folder / "evals/losses.json").write_text(json.dumps([kept[0] | {"weights_sha256": mine}]))
    assert compare(runs, tmp_path / "out") == 0
    weights = runs[1] / STEP / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"1" + whole[1:])  # of the same size
    refused(runs, messages=[f"{runs[1] / STEP} is not of {runs[1]}", "weights_sha256"])
    weights.write_bytes(whole)
    assert compare(runs, tmp_path / "out") == 0
    losses_file = runs[1] / STEP / "evals/losses.json"
    (kept,) = json.loads(losses_file.read_text())
    losses_file.write_text(json.dumps([kept | {"weights_sha256": "of a card"}]))
    refused(runs, messages=["was measured on other weights"])


def test_swapped_exports(tmp_path, refused):
    """Of two runs, then of two seeds of runs that have one name: each folder says whose it is."""
    runs = make_pair(tmp_path)
    swap(runs[0], runs[1])
    refused(runs, messages=[f"{runs[0] / STEP} is not of {runs[0]}", "run values-seed1 and not classic-seed1"])
    swap(runs[0], runs[1])
    assert compare(runs, tmp_path / "out") == 0
    more = make_pair(tmp_path / "more", seed=1, record={"name": "run"})
    more += make_pair(tmp_path / "more", seed=2, record={"name": "run"})
    swap(more[0], more[2])
    refused(more, messages=["seed 2 and not 1"])


def swap(one: Path, other: Path) -> None:
    (one / "exports").rename(one / "aside")
    (other / "exports").rename(one / "exports")
    (one / "aside").rename(other / "exports")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "another"}, "run another and not values-seed1"),
        ({"seed": 7}, "seed 7 and not 1"),
        ({"step": 20}, "step 20 and not 40"),
        ({"checkpoint_sha256": "w9"}, "checkpoint_sha256 w9 and not w-values-1"),
        ({"store_fingerprint": "f9"}, "store_fingerprint f9 and not f1"),
    ],
)
def test_an_export_of_something_else(tmp_path, refused, changes, message):
    """In the run's folder or given: of another run, seed, step, store, or of weights that are not the checkpoint's."""
    runs = make_pair(tmp_path)
    exports = [run / STEP for run in runs]
    assert compare(runs, tmp_path / "in", "--exports", *exports) == 0
    edit(exports[1] / "hippoformer.json", **changes)
    refused(runs, messages=[f"{exports[1]} is not of {runs[1]}", message])
    refused(runs, "--exports", *exports, messages=[f"no export of {runs[1]}, seed 1, step 40 is given"])


def test_what_a_card_does_not_say_is_not_held_against_it(tmp_path):
    """Exports of older versions name no store, and a run may have removed its checkpoints."""
    runs = make_pair(tmp_path)
    edit(runs[0] / STEP / "hippoformer.json", store_fingerprint=None, checkpoint_sha256=None)
    shutil.rmtree(runs[1] / "checkpoints")
    assert compare(runs, tmp_path / "out") == 0


def test_given_exports_find_their_runs_in_any_order(tmp_path, refused):
    runs = make_pair(tmp_path, out=tmp_path / "kept", seed=1) + make_pair(tmp_path, out=tmp_path / "kept", seed=2)
    exports = [tmp_path / "kept" / run.name for run in runs]
    assert compare(runs, tmp_path / "out", "--exports", *reversed(exports)) == 0
    assert results(tmp_path / "out")["findings"][0]["difference"] == pytest.approx(-0.5, abs=0.01)
    assert [run["export"] for run in results(tmp_path / "out")["runs"]] == list(map(str, exports))
    refused(runs, "--exports", *exports[:3], messages=[f"no export of {runs[3]}, seed 2, step 40 is given"])


def test_two_runs_of_one_name_are_told_apart_by_their_weights(tmp_path, refused):
    runs = make_pair(tmp_path, out=tmp_path / "kept", record={"name": "run"})
    exports = [tmp_path / "kept" / run.name for run in runs]
    for given in (exports, exports[::-1]):
        assert compare(runs, tmp_path / "out", "--exports", *given) == 0
        assert results(tmp_path / "out")["findings"][0]["difference"] == pytest.approx(-0.5, abs=0.01)
    for run in runs:
        shutil.rmtree(run / "checkpoints")
    refused(runs, "--exports", *exports, messages=[f"{exports[0]} would stand for two runs", "each run's own export"])


def test_one_folder_by_two_paths_is_one_export(tmp_path, refused):
    runs = make_pair(tmp_path, record={"name": "run"})
    for run in runs:
        shutil.rmtree(run / "checkpoints")
    shutil.rmtree(runs[1] / "exports")
    (runs[1] / "exports").symlink_to(runs[0] / "exports")
    assert "would stand for two runs" in refused(runs, messages=[])


def test_exports_of_different_dtypes(tmp_path, refused):
    runs = make_pair(tmp_path)
    edit(runs[1] / STEP / "hippoformer.json", dtype="bfloat16")
    error = refused(runs, messages=["export all alike"])
    assert f"{runs[0] / STEP} (float32), {runs[1] / STEP} (bfloat16)" in error


def test_losses_of_weights_that_an_export_no_longer_holds(tmp_path, refused):
    runs = make_pair(tmp_path)
    [result] = json.loads((runs[1] / STEP / "evals/losses.json").read_text())
    (runs[1] / STEP / "evals/losses.json").write_text(json.dumps([result | {"weights_sha256": "w9"}]))
    assert f"of {runs[1] / STEP} was measured on other weights" in refused(runs, messages=[])


# ---- Stores ----------------------------------------------------------------------------------------------------------


def test_each_document_counts_once_and_only_the_run_s_store(tmp_path):
    """Losses on training documents and on other stores are kept beside those that count, before and behind them."""
    runs = make_pair(tmp_path)
    for side, run in enumerate(runs):
        path = run / STEP / "evals/losses.json"
        [mine] = json.loads(path.read_text())
        apart = mine | {"nats": (np.array(mine["nats"]) * (1 + side)).tolist()}
        train, other = apart | {"split": "train"}, apart | {"store_fingerprint": "f2"}
        path.write_text(json.dumps([train, other, mine, other | {"split": "train"}]))
    assert compare(runs, tmp_path / "out") == 0
    finding = results(tmp_path / "out")["findings"][0]
    tokens = document_lengths(30).sum()
    assert finding["items"] == 30 and finding["means"] == pytest.approx([losses(n).sum() / tokens for n in (0, 1)])
    for run in runs:
        path = run / STEP / "evals/losses.json"
        path.write_text(json.dumps([each for each in json.loads(path.read_text()) if each["split"] == "train"]))
    assert compare(runs, tmp_path / "none") == 0
    assert (
        results(tmp_path / "none")["verdict"].startswith("There is no verdict")
        and not results(tmp_path / "none")["findings"]
    )


@pytest.fixture(scope="module")
def stores(story_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two stores of one tokenizer."""
    other = tmp_path_factory.mktemp("others") / "store"
    words = ["prepare", "stories:7", "--documents", "200", "--workers", "1", "--tokenizer"]
    assert llm([*words, str(story_store / "tokenizer"), "--out", str(other)]) == 0
    return [story_store, other]


def fingerprint(store: Path) -> str:
    return TokenStore.open(store, "validation").fingerprint


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, tuple[Any, ...]]]:
    """What was asked to be measured: export, store, the rest; instead of measuring, losses are made up and kept.

    The second side has 0.5 nats a token less on a store of 200 documents, and 0.1 less on another.
    """
    asked: list[tuple[str, Path, tuple[Any, ...]]] = []

    def measure(export: Export, store: Path, *more: Any) -> None:
        asked.append((export.name, store, more))
        count = more[0]
        gain = (0.5 if TokenStore.open(store, "train").documents < 300 else 0.1) * (export.name.startswith("values"))
        nats = document_lengths(count) * (2 - gain + 0.01 * np.sin(np.arange(count) + gain))
        line = {"store_fingerprint": fingerprint(store), "split": "validation", "limit": count, "n": count, **MEASURED}
        line |= {"documents": list(range(count)), "tokens": document_lengths(count).tolist(), "nats": nats.tolist()}
        kept = [each for each in export.result("losses", []) if each["store_fingerprint"] != line["store_fingerprint"]]
        (export.results / "losses.json").write_text(json.dumps([*kept, line]))

    monkeypatch.setattr("evals.probes.losses.measure_losses", measure)
    monkeypatch.setattr("evals.probes.continuations.measure_continuations", lambda *_: {})  # no model is here to write
    return asked


def test_the_store_is_the_one_that_the_run_names_or_the_same_elsewhere(tmp_path, stores, measured, refused):
    mine, other = stores
    runs = make_pair(tmp_path, config={"data.store": str(mine)}, store=fingerprint(mine))
    assert compare(runs, tmp_path / "out", "--batch-size", 3, "--device", "cpu", documents=12) == 0
    assert measured == [(run.name, mine, (12, 3, "cpu", "auto")) for run in runs]
    del measured[:]
    moved = tmp_path / "moved"
    moved.symlink_to(mine)
    assert compare(runs, tmp_path / "out", "--store", moved, documents=12) == 0
    assert [store for _, store, _ in measured] == [moved, moved]
    assert results(tmp_path / "out")["findings"][0]["items"] == 12
    del measured[:]
    no_store = f"{other} is not the store that {runs[0]} was trained on (fingerprint {fingerprint(other)[:12]}, not"
    refused(runs, "--store", other, messages=[no_store], documents=12)
    refused(runs, "--store", mine, mine, messages=["1 store(s); give as many with --store"], documents=12)
    refused(runs, "--store", mine, other, messages=["1 store(s); give as many with --store"], documents=12)
    assert measured == []


@pytest.mark.parametrize("weights", [(3, 1), (1, 3)])
def test_of_a_mixture_each_store_counts_by_its_share(tmp_path, stores, measured, refused, weights):
    """Documents are allotted by share; and so are weights, however long the stores' documents are."""
    ordered = sorted(zip(map(fingerprint, stores), weights, strict=True))
    mixed = sha256("".join(f"{250 * weight} {each}\n" for each, weight in ordered).encode()).hexdigest()
    paths = [tmp_path / "a", tmp_path / "b"]  # as config.yaml has them
    for path, store in zip(paths, stores, strict=True):
        path.symlink_to(store)
    of_store = dict(zip(map(str, paths), weights, strict=True))
    runs = make_pair(tmp_path, config={"data.store": of_store}, store=mixed)
    assert compare(runs, tmp_path / "out", documents=16) == 0
    asked = {(name, store): rest[0] for name, store, rest in measured}
    assert asked == {(run.name, path): 4 * of_store[str(path)] for run in runs for path in paths}
    finding = results(tmp_path / "out")["findings"][0]
    assert finding["items"] == 16
    share = weights[0] / 4
    assert finding["difference"] == pytest.approx(-0.1 * share - 0.5 * (1 - share), abs=0.02)
    exact = [sum(of_mixture(run, path) * weight / 4 for path, weight in of_store.items()) for run in runs]
    assert finding["means"] == pytest.approx(exact)
    del measured[:]
    assert compare(runs, tmp_path / "kept") == 0 and measured == []  # --documents 0 takes them as they are
    assert results(tmp_path / "kept")["findings"] == results(tmp_path / "out")["findings"]
    assert compare(runs, tmp_path / "out", "--store", *stores, documents=16) == 0
    assert {store for _, store, _ in measured} == set(stores)
    del measured[:]
    refused(runs, "--store", *stores[::-1], messages=["is not the store that"], documents=16)
    refused(runs, "--store", stores[0], stores[0], messages=["is given twice with --store"], documents=16)
    refused(runs, "--store", stores[0], messages=["2 store(s); give as many with --store"], documents=16)
    assert measured == []


def of_mixture(run: Path, store: Path) -> float:
    """Nats per token of a run's documents of one store, as they are kept."""
    kept = json.loads((run / STEP / "evals/losses.json").read_text())
    [mine] = [each for each in kept if each["store_fingerprint"] == fingerprint(store)]
    return sum(mine["nats"]) / sum(mine["tokens"])
