"""The folder of a run: whose it is, what is found in it, what stays whole, and what becomes of damage."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm.common.errors import UserError
from llm.data.store import TokenStore
from llm.train import checkpoint as checkpoints
from llm.train import run_folder
from llm.train.loggers import GrowingFile, MetricsFile, TensorBoardFile
from llm.train.run_folder import RunFolder, RunSettings

from .runs import Config, events, fit, losses, metrics, weights


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- Whose it is -----------------------------------------------------------------------------------------------------


def test_where_a_run_starts_is_decided_after_the_lock(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an attempt waits for the lock another one trains on and rotates the checkpoints that were there."""
    config, run = tiny_config(run__keep_checkpoints=1), tmp_path / "run"
    assert fit(config, "--trainer.max_steps", "10") == 0
    acquire = run_folder.acquire_lock

    def waits(folder: Path) -> Any:
        monkeypatch.setattr(run_folder, "acquire_lock", acquire)
        assert fit(config, "--resume", "auto", "--trainer.max_steps", "15") == 0
        assert not (run / "checkpoints" / "step-00000010").exists()
        return acquire(folder)

    monkeypatch.setattr(run_folder, "acquire_lock", waits)
    assert fit(config, "--resume", "auto") == 0
    assert list(losses(run)) == list(range(1, 21))
    record = json.loads((run / "run.json").read_text())
    assert [attempt["from_step"] for attempt in record["attempts"]] == [0, 10, 15]
    assert record["first_checkpoint"] == 5
    assert not list((run / "checkpoints").glob("superseded-*"))


def test_a_folder_of_locks_alone_is_an_empty_one(tiny_config: Config, tmp_path: Path) -> None:
    """As a kill leaves it between the lock and run.json."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    for resume in (None, "auto"):
        folder = RunFolder(RunSettings(folder=str(run)))
        assert folder.acquire(resume) == [] and folder.resumed is None
        folder.release()
    assert [path.name for path in run.iterdir()] == [".lock"]  # a folder that was there stays


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    folder = RunFolder(RunSettings(folder=str(tmp_path / "run")))
    with pytest.raises(UserError, match="nowhere"):
        folder.acquire(str(tmp_path / "nowhere"))
    folder.release()
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is a file: give another --run\.folder"):
        RunFolder(RunSettings(folder=str(tmp_path / "file"))).acquire("auto")
    with pytest.raises(UserError, match="cannot be made"):
        RunFolder(RunSettings(folder=str(tmp_path / "file" / "below"))).acquire("auto")


def test_what_a_refusal_advises_works(tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Another batch size, from a run in a folder of its own and in the run's own folder."""
    run, new = str(tmp_path / "run"), str(tmp_path / "new")
    assert fit(tiny_config(trainer__max_steps=2)) == 0
    other = tiny_config(trainer__max_steps=2, data__batch_size=16)
    assert fit(other, "--resume", run, "--run.folder", new) == 2
    said = capsys.readouterr().err
    assert "give the same settings, or leave --resume out to start from step 0" in said
    assert not (tmp_path / "new").exists()
    assert fit(other, "--run.folder", new) == 0
    assert fit(other, "--resume", "auto") == 2
    assert "give the same settings, or another --run.folder" in capsys.readouterr().err
    assert fit(other, "--resume", "auto", "--run.folder", str(tmp_path / "third")) == 0
    assert fit(tiny_config(trainer__max_steps=3), "--resume", run, "--run.folder", str(tmp_path / "fourth")) == 0


# ---- What cannot be made again ---------------------------------------------------------------------------------------


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Finished, or begun: and both ways out of the refusal work."""
    run = tmp_path / "run"
    assert fit(tiny_config(trainer__max_steps=10)) == 0
    shutil.move(run / "checkpoints", tmp_path / "kept")
    before = files_of(run)
    for left in ("summary.json and the rows of a run with checkpoints from step 5 on", "the rows of a run"):
        assert fit(tiny_config(), "--resume", "auto") == 2
        assert f"{run} holds {left}" in capsys.readouterr().err
        assert files_of(run) == before
        (run / "summary.json").unlink(missing_ok=True)
        before.pop("summary.json", None)
    assert fit(tiny_config(trainer__max_steps=2, run__folder=str(tmp_path / "new")), "--resume", "auto") == 0
    shutil.move(tmp_path / "kept", run / "checkpoints")
    assert fit(tiny_config(trainer__max_steps=12), "--resume", "auto") == 0
    assert list(losses(run)) == list(range(1, 13))


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"attempts": 3}', b"\x00\xff", None])
def test_a_damaged_record_and_config_are_written_again(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes | None
) -> None:
    run = tmp_path / "run"
    config = tiny_config(trainer__max_steps=5)
    assert fit(config) == 0
    whole = json.loads((run / "run.json").read_text())
    for name in ("run.json", "config.yaml"):
        (run / name).unlink() if content is None else (run / name).write_bytes(content)
    assert fit(config, "--resume", "auto", "--trainer.max_steps", "6") == 0
    assert "Traceback" not in capsys.readouterr().err
    record = json.loads((run / "run.json").read_text())
    assert record["identity"] == whole["identity"]
    assert [attempt["from_step"] for attempt in record["attempts"]] == [5]
    assert fit(run / "config.yaml", "--resume", "auto", "--trainer.max_steps", "7") == 0
    assert list(losses(run)) == list(range(1, 8))


@pytest.mark.parametrize("damage", ["no optimizer", "no identity", "state of text"])
def test_a_checkpoint_that_lacks_a_part_is_passed_over(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    """Also where its manifest agrees: resumed without its moments it would go on silently as another run."""
    config, run = tiny_config(trainer__max_steps=10), tmp_path / "run"
    assert fit(config) == 0
    newest = checkpoints.find(run).path
    manifest = json.loads((newest / "manifest.json").read_text())
    if damage == "no optimizer":
        del manifest["optimizer.safetensors"]
    else:
        (newest / "state.json").write_text('{"step": 10}' if damage == "no identity" else '"text"')
        manifest["state.json"] = checkpoints._describe(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert fit(config, "--resume", "auto") == 0
    assert f"passed over: {newest} is not a complete checkpoint" in capsys.readouterr().err
    assert [attempt["from_step"] for attempt in json.loads((run / "run.json").read_text())["attempts"]] == [0, 5]


def test_a_replacement_that_fails_leaves_the_checkpoint_before(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(tiny_config(trainer__max_steps=5)) == 0
    folder = tmp_path / "run" / "checkpoints"
    checkpoint = checkpoints.find(tmp_path / "run")
    snapshot = checkpoints.Snapshot(
        weights(tmp_path / "run", 5), dict(checkpoint.optimizer_state()), checkpoint.config(), checkpoint.state
    )
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial") and ".replaced" not in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    before = files_of(folder)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(checkpoints.FullDiskError):
        checkpoints.write(folder, snapshot, 2)
    assert files_of(folder) == before
    monkeypatch.setattr(Path, "rename", rename)
    (folder / "step-00000005").rename(folder / "step-00000005.replaced.partial")  # killed between the two renames
    checkpoints.recover_replaced(folder)
    assert files_of(folder) == before


def test_the_umask_decides_who_reads_a_checkpoint(tiny_config: Config, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert fit(tiny_config(trainer__max_steps=2)) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_step_that_was_always_skipped_has_an_optimizer_file(tiny_config: Config, tmp_path: Path) -> None:
    assert fit(tiny_config(trainer__max_steps=5)) == 0
    checkpoint = checkpoints.find(tmp_path / "run")
    snapshot = checkpoints.Snapshot(weights(tmp_path / "run", 5), {}, checkpoint.config(), checkpoint.state)
    path = checkpoints.write(tmp_path / "other", snapshot, None)
    assert dict(checkpoints.read(path).optimizer_state()) == {}


# ---- A read-only store -----------------------------------------------------------------------------------------------


def test_a_run_on_a_read_only_store_has_files_of_its_own(
    tiny_config: Config, tmp_path: Path, story_store: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(story_store, store)
    for path in [store, *store.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        assert fit(tiny_config(data__store=str(store), trainer__max_steps=2)) == 0
        for path in (tmp_path / "run").rglob("*"):
            assert path.stat().st_mode & 0o200, path
    finally:
        for path in [store, *store.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o700)


def test_another_shard_of_the_same_size_is_refused(
    tiny_config: Config, tmp_path: Path, story_store: Path, capsys: pytest.CaptureFixture
) -> None:
    store = tmp_path / "store"
    shutil.copytree(story_store, store)
    path = next((store / "train").glob("*.tokens"))
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(reversed(content)))
    assert fit(tiny_config(data__store=str(store), trainer__max_steps=2)) == 2
    assert (
        f"{path.with_suffix('')}: not the shard that store.json lists; run the same prepare" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    index = json.loads((store / "store.json").read_text())
    for split in index["splits"].values():
        del split["sampled"]  # a store of an older version
    (store / "store.json").write_text(json.dumps(index))
    TokenStore.open(store).check_samples()


# ---- Loggers ---------------------------------------------------------------------------------------------------------


class Disk:
    """Stands for a disk that is full while `full`: half of what is written arrives, then the error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        open_path = Path.open

        def opened(path: Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
            stream = open_path(path, mode, *arguments, **settings)
            if self.full and mode == "ab":
                content = stream

                class Half:
                    def __enter__(self) -> "Half":
                        return self

                    def __exit__(self, *_: object) -> None:
                        content.close()

                    def write(self, data: bytes) -> None:
                        content.write(data[: len(data) // 2])
                        content.flush()
                        raise OSError(28, "No space left on device")

                return Half()
            if self.full and mode == "wb":
                stream.close()
                raise OSError(28, "No space left on device")
            return stream

        monkeypatch.setattr(Path, "open", opened)


def test_rows_wait_for_room_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a column is new meanwhile, and for TensorBoard; the event of it waits as well."""
    disk = Disk(monkeypatch)
    told = GrowingFile(tmp_path / "events.jsonl")

    def tell(what: str, step: int, **facts: Any) -> None:
        told.add(json.dumps({"step": step, "event": what, **facts}).encode() + b"\n")

    log = MetricsFile(tmp_path / "metrics.csv", 0, tell=tell)
    board = TensorBoardFile(tmp_path / "tensorboard", 0, tell)
    for step in range(1, 31):
        disk.full = 10 <= step < 20 or step >= 28
        row = {"train_loss": float(step)} | ({"new": 1.0} if step >= 15 else {})
        log.log_metrics(row, step)
        board.log_metrics(row, step)
        if disk.full:
            assert [int(row["step"]) for row in metrics(tmp_path)] == list(range(1, 10 if step < 20 else 28))
    disk.full = False
    log.finalize("success")
    board.finalize("success")
    rows = metrics(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    assert [row["new"] for row in rows] == [""] * 14 + ["1.0"] * 16
    scalars = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload().Scalars("train_loss")
    assert [(event.step, event.value) for event in scalars] == [(step, step) for step in range(1, 31)]
    of_rows = [(e["event"], e["step"]) for e in events(tmp_path) if e["file"] == "metrics.csv"]
    assert of_rows[:2] == [("lines wait in memory", 10), ("waiting lines written", 20)]
    assert of_rows[2] == ("lines wait in memory", 28) and len(of_rows) == 4


def test_what_never_found_room_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    disk = Disk(monkeypatch)
    file = GrowingFile(tmp_path / "a")
    disk.full = True
    for _ in range(3):
        file.add(b"line\n")
    file.close()
    said = capsys.readouterr().err
    assert said.count("lines wait in memory (") == 1 and "the last 3 lines are lost" in said


def test_many_threads_lose_no_line(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "a")
    threads = [
        threading.Thread(target=lambda: [file.add(b"%d\n" % n) for n in range(50)], daemon=True) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((tmp_path / "a").read_bytes().split()) == sorted(b"%d" % n for n in range(50) for _ in range(8))


def test_a_logger_that_raises_ends_no_run(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no server")

    monkeypatch.setattr(TensorBoardFile, "log_metrics", broken)
    assert fit(tiny_config(trainer__max_steps=3)) == 0
    assert capsys.readouterr().err.count("the logger tensorboard lost a row (no server)") == 1
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert [event["why"] for event in events(tmp_path / "run", "logger failed")] == ["no server"]


def test_tensorboard_has_each_step_of_a_run_that_is_begun_again_once(tmp_path: Path) -> None:
    """Killed before its first checkpoint, then begun again, then resumed from step 3."""
    for start, last in ((0, 9), (0, 5), (3, 7)):
        board = TensorBoardFile(tmp_path, start)
        for step in range(start + 1, last + 1):
            board.log_metrics({"train_loss": float(10 * start + step)}, step)
    scalars = EventAccumulator(str(tmp_path), {"scalars": 0}).Reload().Scalars("train_loss")
    assert [event.step for event in scalars] == list(range(1, 8))
    assert [event.value for event in scalars] == [1.0, 2.0, 3.0, 34.0, 35.0, 36.0, 37.0]
