"""What `fit` does with its data: mixtures, masked documents, digests."""

import hashlib
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm.cli import main
from llm.data.order import WindowOrder
from llm.data.store import TokenStore
from llm.model import DecoderForCausalLM
from llm.train.callbacks import Measurements
from llm.train.loggers import MetricsFile

from ..data.by_hand import write_store
from .runs import Config, fit, losses, metrics, weights


def digests(run: Path) -> dict[int, str]:
    return {int(row["step"]): row["data_digest"] for row in metrics(run) if row["train_loss"]}


def test_the_digest_is_of_the_data_alone(tiny_config: Config, story_store: Path, tmp_path: Path) -> None:
    """Worked out by hand; the same for micro-batches of any size, another model and another interval of logging."""
    store = TokenStore.open(story_store)
    order = WindowOrder((store.tokens - 1) // 32, 8, 3)
    total, expected = 0, {}
    for step in range(6):
        for row in range(8):
            window = store.read(32 * order.item(step, row), 33).tolist()
            told = struct.pack("<35q", step, row, *window)
            total += int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")
        expected[step + 1] = f"{total % 2**63:016x}"
    runs: dict[str, dict[str, Any]] = {
        "plain": {},
        "cut": {"data__micro_batch_size": 2, "data__workers": 1},
        "classic": {"decoder__stream": [], "trainer__log_every_n_steps": 3},
        "masked": {"data__mask_documents": True},
        "seed": {"seed_everything": 4},
        "documents": {"data__packing": "per_document"},
    }
    for name, settings in runs.items():
        assert fit(tiny_config(**settings, run__folder=str(tmp_path / name), trainer__max_steps=6)) == 0
    for name in ("plain", "cut", "masked"):
        assert digests(tmp_path / name) == expected
    assert digests(tmp_path / "classic") == {step: expected[step] for step in (3, 6)}
    for name in ("seed", "documents"):
        assert not set(digests(tmp_path / name).values()) & set(expected.values())


def test_digests_add_up_over_ranks_and_lives() -> None:
    """An int64 sum over ranks may overflow; a run that began without digests has none."""

    def measurements(state: dict[str, Any] | None) -> Measurements:
        resumed = None if state is None else SimpleNamespace(state=state)
        found = Measurements(SimpleNamespace(resumed=resumed), None, None)  # type: ignore[arg-type]
        found.on_fit_start(trainer, None)
        return found

    others = 2**63 - 5
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda mine, reduce_op: mine + others))
    module = SimpleNamespace(device=torch.device("cpu"))
    new, resumed = measurements(None), measurements({"data_digest": f"{2**63 - 1:016x}"})
    new.digest_since = resumed.digest_since = 2**64 + 7
    assert new.data_digest(trainer, module) == f"{2:016x}"
    assert resumed.data_digest(trainer, module) == f"{1:016x}"
    assert resumed.digest_since == 0
    assert measurements({"tokens_seen": 5}).data_digest(trainer, module) is None


def test_a_mixture_from_config_to_validation(
    tiny_config: Config, tmp_path: Path, story_store: Path, second_store: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    weights = {str(story_store): 0.75, str(second_store): 0.25}
    config = tiny_config(data__store=weights, trainer__max_steps=10)
    assert fit(config) == 0
    said = capsys.readouterr().err
    counts = {path: (TokenStore.open(path).tokens - 1) // 32 for path in weights}
    for path, count in counts.items():
        assert f"{path}: {count:,} windows an epoch, " in said
    last = metrics(run)[-1]
    names = {path: "/".join(Path(path).parts[-2:]) for path in weights}
    epochs = {path: float(last[f"epochs_{name}"]) for path, name in names.items()}
    drawn = {path: round(epochs[path] * count) for path, count in counts.items()}
    assert sum(drawn.values()) == 80
    assert "epochs" not in last
    record = json.loads((run / "run.json").read_text())
    assert all(f"{path} ({share}%)" in record["store"] for path, share in zip(weights, (75, 25), strict=True))
    loss = json.loads((run / "summary.json").read_text())["validation_loss"]
    assert main(["validate", "--config", str(run / "config.yaml")]) == 0
    assert capsys.readouterr().out.strip() == f"validation loss {loss:.4f}"
    again = tmp_path / "again"
    swapped = dict(reversed(weights.items()))
    assert fit(tiny_config(data__store=swapped, trainer__max_steps=10, run__folder=str(again))) == 0
    assert losses(again) == losses(run)
    assert digests(again) == digests(run)
    other = dict.fromkeys(weights, 1.0)
    assert fit(tiny_config(data__store=other), "--resume", "auto") == 2
    assert "store_fingerprint" in capsys.readouterr().err
    alone = tmp_path / "alone"
    assert fit(config, "--data.store", str(story_store), "--run.folder", str(alone)) == 0
    assert float(metrics(alone)[-1]["epochs"]) == 80 / counts[str(story_store)]


def test_masked_documents_are_trained_and_validated_alone(
    tiny_config: Config, story_store: Path, tmp_path: Path
) -> None:
    """Loss of the first step and of the validation, worked out a document at a time."""
    runs = {}
    for name, masked in {"masked": True, "open": False}.items():
        runs[name] = tmp_path / name
        settings = {"data__mask_documents": masked, "data__context": 200, "data__micro_batch_size": 4}
        config = tiny_config(**settings, run__folder=str(runs[name]), run__checkpoint_every=1, trainer__max_steps=2)
        assert fit(config, "--run.keep_checkpoints", "9", "--decoder.max_position_embeddings", "200") == 0
    assert losses(runs["masked"])[1] != losses(runs["open"])[1]
    tokens = [[row["tokens"] for row in metrics(run)] for run in runs.values()]
    assert tokens[0] == tokens[1] == [str(8 * 200), str(16 * 200), str(16 * 200)]

    def alone(model: DecoderForCausalLM, store: TokenStore, windows: list[int]) -> float:
        total = count = 0.0
        for window in windows:
            ids = torch.from_numpy(store.read(200 * window, 201))
            ends = (ids[:-1] == store.end_of_document).nonzero()[:, 0] + 1
            for inputs, labels in zip(ids[:-1].tensor_split(ends), ids[1:].tensor_split(ends), strict=True):
                if len(inputs):
                    with torch.no_grad():
                        logits = model(inputs[None]).logits[0]
                    total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                    count += len(labels)
        assert count == 200 * len(windows)
        return total / count

    model = DecoderForCausalLM.from_pretrained(runs["masked"] / "checkpoints" / "step-00000002").eval()
    held_out = TokenStore.open(story_store, "validation")
    validation = list(range(min(16, (held_out.tokens - 1) // 200)))
    loss = json.loads((runs["masked"] / "summary.json").read_text())["validation_loss"]
    assert loss == pytest.approx(alone(model, held_out, validation), rel=1e-5)
    before = DecoderForCausalLM.from_pretrained(runs["masked"] / "checkpoints" / "step-00000001").eval()
    train = TokenStore.open(story_store, "train")
    order = WindowOrder((train.tokens - 1) // 200, 8, 3)
    assert float(losses(runs["masked"])[2]) == pytest.approx(alone(before, train, order.rows(1, 0, 8)), rel=1e-5)


def test_masked_and_open_runs_do_not_continue_each_other(tiny_config: Config, capsys: pytest.CaptureFixture) -> None:
    assert fit(tiny_config(trainer__max_steps=4)) == 0
    assert fit(tiny_config(data__mask_documents=True), "--resume", "auto") == 2
    assert "mask_documents" in capsys.readouterr().err


def test_metrics_of_an_earlier_life_keep_their_columns(tmp_path: Path) -> None:
    """A run from before there were digests and epochs, or one whose stores had other names."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,tokens,train_loss,epochs_old\n1,8,2.5,0.1\n2,16,2.4,0.2\n")
    MetricsFile(path, 1, ["epochs_new"]).log_metrics({"train_loss": 2.3, "epochs_new": 0.2, "data_digest": "ab"}, 2)
    first, second = metrics(tmp_path)
    assert (first["train_loss"], first["epochs_old"], first["epochs_new"], first["data_digest"]) == (
        "2.5",
        "0.1",
        "",
        "",
    )
    assert (second["train_loss"], second["epochs_new"], second["data_digest"]) == ("2.3", "0.2", "ab")


@pytest.mark.parametrize("disabled", [[], ["loss"]])
def test_a_step_without_targets_has_no_loss_and_ends_no_run(
    tiny_config: Config, tmp_path: Path, story_store: Path, disabled: list[str]
) -> None:
    """Documents of an end alone, in a store of an older version: nothing is predicted, and no number is NaN."""
    store = TokenStore.open(story_store)
    empty, full = [[]] * 6, [store.document_tokens(index)[:-1].tolist() for index in range(2)]
    tokenizer, by_hand = store.tokenizer(), tmp_path / "store"
    write_store(by_hand, [[*empty, *full]], store.vocab_size, tokenizer, [[[], *full]])
    settings = {
        "data__store": str(by_hand),
        "data__packing": "per_document",
        "data__batch_size": 1,
        "trainer__max_steps": 16,
    }
    assert fit(tiny_config(**settings, model__disable_fast_paths=disabled)) == 0
    rows = [row for row in metrics(tmp_path / "run") if row["gradient_norm"]]
    without = [row for row in rows if not row["train_loss"]]
    assert (len(rows), len(without)) == (16, 12)  # two epochs
    assert all(float(row["gradient_norm"]) == 0 for row in without) and rows[-1]["skipped_steps"] == "0"
    assert int(rows[-1]["tokens"]) == 2 * sum(min(len(document), 32) for document in full)
    assert "nan" not in (tmp_path / "run" / "metrics.csv").read_text()
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run", 16).values())


def test_a_store_of_documents_without_text_is_refused(
    tiny_config: Config, tmp_path: Path, story_store: Path, capsys: pytest.CaptureFixture
) -> None:
    store = TokenStore.open(story_store)
    write_store(tmp_path / "store", [[[]] * 9], store.vocab_size, store.tokenizer(), [[[]] * 9])
    settings = {"data__store": str(tmp_path / "store"), "data__packing": "per_document"}
    assert fit(tiny_config(**settings)) == 2
    assert "prepare more text" in capsys.readouterr().err
