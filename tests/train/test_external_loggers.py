"""W&B by name and Lightning's loggers by class: what they get, and that none ends a run or loses a row unreported."""

import csv
import importlib.util
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger

from llm.train import external_loggers
from llm.train.external_loggers import BackgroundLogger

from .runs import Config, events, fit, losses

CSV = "lightning.pytorch.loggers.CSVLogger"


def test_a_class_of_lightning_gets_every_row_and_the_config(tiny_config: Config, tmp_path: Path) -> None:
    """The same numbers as metrics.csv; config.yaml holds the entry, and starts the same run."""
    entry = {"class_path": CSV, "init_args": {"save_dir": str(tmp_path), "name": "theirs", "version": "first"}}
    assert fit(tiny_config(trainer__max_steps=3, run__loggers=["csv", entry])) == 0
    theirs = list(csv.DictReader((tmp_path / "theirs/first/metrics.csv").open()))
    trained = {int(row["step"]): float(row["train_loss"]) for row in theirs if row["train_loss"]}
    assert trained == numbers(tmp_path / "run")
    assert yaml.safe_load((tmp_path / "theirs/first/hparams.yaml").read_text())["seed_everything"] == 3
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["run"]["loggers"][1]["class_path"] == CSV


class Passing(CSVLogger):
    """As CometLogger: what it does not know goes to its service."""

    def __init__(self, save_dir: str, **kwargs: Any) -> None:
        super().__init__(save_dir)
        self.for_service = dict(kwargs)


def test_arguments_that_a_class_passes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.Passing", Passing, raising=False)
    entry = {"class_path": "lightning.pytorch.loggers.Passing", "init_args": {"save_dir": str(tmp_path)}}
    entry["dict_kwargs"] = {"offline_directory": "here"}
    made = external_loggers.make_logger(entry)
    assert isinstance(made, Passing) and made.for_service == {"offline_directory": "here"}


def test_wandb_without_a_network(tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of an offline run of W&B holds each step once, and the config."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert fit(tiny_config(trainer__max_steps=3, run__loggers=["csv", "wandb"])) == 0
    (path,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    records = [pb.Record.FromString(data) for data in wandb_records(path.read_bytes())]
    settings = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records
        for item in [*record.run.config.update, *record.config.update]
    }
    rows: list[dict[str, Any]] = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
    ]
    trained = [(row["trainer/global_step"], row["train_loss"]) for row in rows if "train_loss" in row]
    assert trained == list(numbers(tmp_path / "run").items())
    assert settings["decoder"]["hidden_size"] == 32 and settings["seed_everything"] == 3
    assert not (tmp_path / "run/events.jsonl").exists()


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: 32 KiB blocks, the first 7 bytes W&B's own (crc 4, length 2, kind 1, data)."""
    place, parts = 7, []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


def numbers(run: Path) -> dict[int, float]:
    return {step: float(loss) for step, loss in losses(run).items()}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"class_path": "stranger.Mine"}, "pass --allow-class-path"),
        ({"class_path": CSV, "init_args": {"save_dir": {"class_path": "stranger.Mine"}}}, CSV),
        ({"class_path": "lightning.pytorch.callbacks.LambdaCallback"}, "not correspond to a subclass of Logger"),
        ({"class_path": "lightning.pytorch.loggers.Papyrus"}, "has no attribute 'Papyrus'"),
        ({"class_path": CSV, "init_args": {"save_dir": "a", "colour": "red"}}, "colour"),
        ({"class_path": CSV}, "save_dir"),
        ({"path": CSV}, "give a name, or class_path and init_args"),
        ({"class_path": "lightning.pytorch.loggers.MLFlowLogger"}, "a package that is not installed"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_the_run(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture, entry: dict[str, Any], said: str
) -> None:
    if "MLFlow" in str(entry) and importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    assert fit(tiny_config(run__loggers=["csv", entry])) == 2
    printed = capsys.readouterr().err
    assert said in printed and "run.loggers" in printed and printed.count("error: ") == 1
    assert not (tmp_path / "run").exists()


class Flaky(Logger):
    """Fails as often as asked, and keeps what it takes."""

    name, version = "flaky", ""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.broken: set[int] = set()
        self.seen = threading.Semaphore(0)
        self.ends: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        try:
            if step in self.broken:
                raise ConnectionError("no server")
            self.steps.append(step)
        finally:
            self.seen.release()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.ends.append(status)


@pytest.fixture
def reported() -> list[dict[str, Any]]:
    return []


def background(inner: Logger, reported: list[dict[str, Any]]) -> BackgroundLogger:
    def tell(what: str, step: int, **facts: Any) -> None:
        reported.append({"event": what, "step": step, **facts})

    return BackgroundLogger("flaky", lambda: inner, {"a": 1}, tell)


def test_rows_wait_for_a_server_and_none_is_lost(reported: list[dict[str, Any]]) -> None:
    inner = Flaky()
    inner.broken = {2, 3, 4}
    log = background(inner, reported)
    for step in (1, 2, 3, 4):
        log.log_metrics({"train_loss": 1.0}, step)
    assert all(inner.seen.acquire(timeout=60) for _ in range(2))  # the first row, and the failure of the second
    inner.broken = set()
    log.finalize("success")
    log.finalize("failed")
    assert sorted(inner.steps) == [1, 2, 3, 4] and inner.ends == ["success"]
    assert [(each["event"], each["why"]) for each in reported] == [("logger failed", "no server")]


def test_a_row_that_is_rejected_does_not_hold_up_the_others(reported: list, capsys: pytest.CaptureFixture) -> None:
    inner = Flaky()
    inner.broken = {2}
    log = background(inner, reported)
    for step in (1, 2, 3, 4):
        log.log_metrics({"train_loss": 1.0}, step)
    log.finalize("success")
    assert sorted(inner.steps) == [1, 3, 4]
    assert [each["event"] for each in reported] == ["logger failed", "logger lost rows"] and reported[1]["rows"] == 1
    assert "the logger flaky lost 1 rows (no server)" in capsys.readouterr().err


def test_a_logger_that_never_answers_does_not_hold_up_the_end(
    reported: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_loggers, "PATIENCE", 0.2)
    free = threading.Event()
    inner = Flaky()
    monkeypatch.setattr(inner, "log_metrics", lambda *_: free.wait())
    log = background(inner, reported)
    for step in (1, 2, 3):
        log.log_metrics({"train_loss": 1.0}, step)
    log.finalize("success")
    free.set()
    assert reported == [
        {"event": "logger lost rows", "step": 1, "logger": "flaky", "rows": 3, "why": reported[0]["why"]}
    ]
    assert "did not answer" in reported[0]["why"]


def test_rows_beyond_the_most_that_wait_are_counted(reported: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_loggers, "MOST_WAITING", 5)
    inner = Flaky()
    inner.broken = set(range(100))
    log = background(inner, reported)
    for step in range(20):
        log.log_metrics({"train_loss": 1.0}, step)
    log.finalize("failed")
    assert reported[-1]["rows"] == 20 and inner.steps == []


def test_a_logger_whose_every_call_raises_ends_no_run(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no server")

    for method in ("log_metrics", "log_hyperparams", "finalize"):
        monkeypatch.setattr(CSVLogger, method, broken)
    entry = {"class_path": CSV, "init_args": {"save_dir": str(tmp_path)}}
    assert fit(tiny_config(trainer__max_steps=3, run__loggers=[entry, "csv"])) == 0
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("the logger CSVLogger fails (no server)") == 1 and "the logger CSVLogger lost" in said
    assert [event["event"] for event in events(tmp_path / "run") if event["event"].startswith("logger")] == [
        "logger failed",
        "logger lost rows",
    ]
