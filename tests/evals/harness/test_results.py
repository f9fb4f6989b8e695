"""What is kept beside a model: not made again without need, not lost to a neighbour, refused where damaged."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from evals.__main__ import main
from evals.exports import open_export
from evals.harness import results
from evals.harness import run as harness
from llm.common import lock
from llm.common.errors import UserError

from ..rows import arc_rows, rows_of, write_rows

Run = Callable[..., list[tuple[str, int]]]


@pytest.fixture
def run(data: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`python -m evals run` on PIQA and ARC-Easy at 0 and 1 shots; returns what was evaluated, not kept from before."""
    made: list[tuple[str, int]] = []
    evaluate = harness.evaluate_task

    def record(loaded, manager, task, shots, protocol):
        made.append((task, shots))
        return evaluate(loaded, manager, task, shots, protocol)

    monkeypatch.setattr(harness, "evaluate_task", record)

    def go(*words: object, tasks: tuple[str, ...] = ("piqa", "arc_easy"), shots: tuple[int, ...] = (0, 1)):
        made.clear()
        command = ["run", *map(str, words), "--data", str(data), "--tasks", *tasks, "--shots", *map(str, shots)]
        assert main([*command, "--device", "cpu"]) == 0
        return list(made)

    return go


ALL = [("piqa", 0), ("piqa", 1), ("arc_easy", 0), ("arc_easy", 1)]


def test_what_is_kept_is_not_made_again(make_export, run, capsys, monkeypatch):
    folder = make_export()
    assert run(folder, tasks=("piqa",)) == ALL[:2]
    assert run(folder) == ALL[2:]
    table = capsys.readouterr().out
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("a model was loaded with nothing to do"))
    before = (folder / "evals/lm_eval.json").read_bytes()
    assert run(folder) == []
    captured = capsys.readouterr()
    assert captured.out in table and len(captured.out.splitlines()) == 2 + len(ALL)  # the whole table again
    assert "4 of 4 results are kept from before; --overwrite reruns them" in captured.err
    assert (folder / "evals/lm_eval.json").read_bytes() == before


def test_again_makes_all_of_it(make_export, run):
    folder = make_export()
    assert run(folder, shots=(0,)) == run(folder, "--overwrite", shots=(0,)) == [("piqa", 0), ("arc_easy", 0)]


@pytest.fixture(scope="module")
def evaluated() -> list[Path]:
    """An exported folder with results, once there is one."""
    return []


def change_weights(folder: Path, data: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][7, 7] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_card(folder: Path, data: Path) -> None:
    (folder / "hippoformer.json").write_text(json.dumps({"run": "model", "checkpoint_sha256": "other"}))


def change_item(folder: Path, data: Path) -> None:
    rows = rows_of(data / "piqa/validation.jsonl")
    write_rows(data / "piqa", "validation", [rows[0] | {"sol1": "another way"}, *rows[1:]])


def lose_samples(folder: Path, data: Path) -> None:
    (folder / "evals/samples/piqa-0shot.jsonl").unlink()


def tear_samples(folder: Path, data: Path) -> None:
    file = folder / "evals/samples/piqa-0shot.jsonl"
    file.write_bytes(file.read_bytes()[:-30])


def change_example(folder: Path, data: Path) -> None:
    rows = rows_of(data / "piqa/train.jsonl")
    write_rows(data / "piqa", "train", [*rows[:-1], rows[-1] | {"goal": "another goal"}])


def older_library(folder: Path, data: Path) -> None:
    file = folder / "evals/lm_eval.json"
    file.write_text(file.read_text().replace('"torch": "', '"torch": "1.'))


def change_tokenizer(folder: Path, data: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": None}, indent=1))


def reformat(folder: Path, data: Path) -> None:
    """The same rows, written otherwise."""
    file = data / "piqa/validation.jsonl"
    file.write_text("".join(json.dumps(dict(reversed(row.items())), indent=None) + "\n" for row in rows_of(file)))


@pytest.mark.parametrize(
    ("change", "words", "made"),
    [
        (None, [], []),
        (reformat, [], []),
        (change_weights, [], [0, 1]),
        (change_card, [], [0, 1]),
        (change_item, [], [0, 1]),
        (change_example, [], [1]),  # without examples, the training split is not looked at
        (lose_samples, [], [0]),
        (tear_samples, [], [0]),
        (older_library, [], [0, 1]),
        (change_tokenizer, [], [0, 1]),
        (None, ["--limit", "5", "--overwrite"], [0, 1]),
        (None, ["--batch-size", "4"], [0, 1]),
        (None, ["--dtype", "bfloat16"], [0, 1]),
        (None, ["--dtype", "float32"], []),  # what `auto` was
    ],
)
def test_what_a_result_rests_on(evaluated, make_export, run, data, monkeypatch, change, words, made):
    folder = data.parent / "copy"
    if not evaluated:
        evaluated.append(make_export())
        assert run(evaluated[0], tasks=("piqa",)) == [("piqa", 0), ("piqa", 1)]
    shutil.copytree(evaluated[0], folder)
    again = harness.evaluate_task  # it records; what it finds is not the point here
    monkeypatch.setattr(harness, "evaluate_task", lambda *args: again(*args[:4], harness.Protocol(("piqa",), limit=1)))
    if change is not None:
        change(folder, data)
    assert run(folder, *words, tasks=("piqa",)) == [("piqa", shots) for shots in made]


def test_a_trial_does_not_replace_a_larger_result(make_export, data, capsys):
    words = ["run", str(make_export()), "--tasks", "piqa", "--data", str(data), "--device", "cpu"]
    assert main(words) == 0 and main([*words, "--limit", "2"]) == 2
    assert "keeps piqa, 0-shot, of 6 items, and --limit 2 would replace it; give --overwrite" in capsys.readouterr().err
    assert main([*words, "--limit", "2", "--overwrite"]) == 0


def test_the_fingerprint_of_a_model(make_export):
    folder = make_export()
    first = results.fingerprint(open_export(folder))
    assert first == results.fingerprint(open_export(folder))
    (folder / "README.md").write_text("a model")
    (folder / "evals").mkdir()
    os.utime(folder / "model.safetensors", (0, 0))
    assert results.fingerprint(open_export(folder)) == first
    for file, change in (("tokenizer.json", b" "), ("config.json", b" "), ("model.safetensors", b"\0")):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole + change)
        changed = results.fingerprint(open_export(folder))
        assert changed["weights" if file == "model.safetensors" else "files"] not in first.values()
        (folder / file).write_bytes(whole)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    for place in (0, len(weights) // 3, len(weights) - 1):
        weights[place] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        assert results.fingerprint(open_export(folder))["weights"] != first["weights"]
        weights[place] ^= 1
    other = results.fingerprint(open_export(make_export("other", seed=1)))
    assert other["weights"] != first["weights"] and other["files"] == first["files"]


# ---- Killed, and two at once -----------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_was(make_export, run, data, tmp_path):
    folder = make_export()
    write_rows(data / "arc_easy", "test", arc_rows("item", 200))  # long enough to be killed in
    words = ["run", folder, "--data", data, "--tasks", "piqa", "arc_easy", "--shots", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "evals", *map(str, words)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not (folder / "evals/lm_eval.json").is_file():
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [results.key_of(result) for result in rows_in(folder)] == [("piqa", 0)]
    finished = folder / "evals/samples/piqa-0shot.jsonl"
    written = finished.stat()
    assert run(folder, shots=(0,)) == [("arc_easy", 0)]
    assert finished.stat().st_mtime_ns == written.st_mtime_ns and finished.stat().st_ino == written.st_ino
    assert [results.key_of(result) for result in rows_in(folder)] == [("arc_easy", 0), ("piqa", 0)]
    assert len(rows_of(folder / "evals/samples/arc_easy-0shot.jsonl")) == 200


def rows_in(folder: Path) -> list[dict]:
    return json.loads((folder / "evals/lm_eval.json").read_text())


def save_many(folder: str, task: str, ready: "multiprocessing.Barrier") -> None:
    ready.wait()
    for shots in range(25):
        results.save(open_export(folder), results.Evaluation({"task": task, "shots": shots}, [{"doc_id": 0}]))


def test_two_processes_lose_nothing_of_each_other(make_export):
    folder = make_export()
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(3)
    processes = [fork.Process(target=save_many, args=(str(folder), task, ready)) for task in ("piqa", "arc_easy", "x")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    keys = [results.key_of(result) for result in rows_in(folder)]
    assert keys == [(task, shots) for task in ("arc_easy", "piqa", "x") for shots in range(25)]
    assert not list(folder.rglob("*.part"))


# ---- Damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["", "[", '{"task": "piqa"}', "[1]", '[{"task": "piqa"}]', "3", '[{"task": [], "shots": 0}]']
)
def test_a_damaged_file_is_refused_in_one_sentence(make_export, data, capsys, monkeypatch, content):
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("a model was loaded before the refusal"))
    folder = make_export()
    (folder / "evals").mkdir()
    (folder / "evals/lm_eval.json").write_text(content)
    capsys.readouterr()
    assert main(["run", str(folder), "--data", str(data), "--tasks", "piqa"]) == 2
    error = capsys.readouterr().err
    assert "lm_eval.json is damaged; delete it" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "papers"], "there is no suite papers; the suites are paper, base, minimal-pairs, perplexity"),
        (["--suite", "paper", "--tasks", "poetry"], "there is no task poetry: lm-eval has no task"),
        (["--out", "figures"], "--out and --metric are for the figures of --checkpoints"),
        (["--checkpoints"], "is an exported folder, no run; leave --checkpoints out"),
    ],
)
def test_arguments_that_do_not_go_together(make_export, capsys, words, message):
    folder = make_export()
    capsys.readouterr()
    assert main(["run", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("doc", "shares"),
    [
        ({"passage": "One text.", "question": "a"}, {"passage": "One text.", "question": "b"}),
        ({"source_id": "video~1", "ctx": "a"}, {"source_id": "video~1", "ctx": "b"}),
        ({"context": "One text.", "id": 1}, {"context": "One text.", "id": 2}),
    ],
)
def test_items_of_one_passage_are_known_by_it(doc, shares) -> None:
    assert results.passage_of(doc) == results.passage_of(shares) is not None
    assert results.passage_of({**doc, next(iter(doc)): "Another."}) not in (results.passage_of(doc), None)
    assert results.passage_of({"goal": "a", "context": ["a list"]}) is None


# ---- Where the file system has no locks ------------------------------------------------------------------------------


def refusing(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_without_locks_a_heartbeat_keeps_a_neighbour_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    beating = tmp_path / "evals/.lm_eval.heartbeat"
    with results.locked(tmp_path / "evals/.lm_eval.lock"):
        assert lock.Heartbeat.take(beating) is None  # what another process would meet
    assert not beating.exists() and lock.Heartbeat.take(beating) is not None
    assert "is on a file system without locks" in capsys.readouterr().err


def test_without_locks_it_waits_for_a_neighbour_and_takes_over_from_one_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    monkeypatch.setattr(lock, "RETRY", 0.01)
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    beating = tmp_path / ".lm_eval.heartbeat"
    beating.write_text(json.dumps({"host": "another", "process": 1, "time": ""}))
    inside = threading.Event()

    def enter() -> None:
        with results.locked(tmp_path / ".lm_eval.lock"):
            inside.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not inside.wait(0.3)
    os.utime(beating, (time.time() - 2 * lock.LEASE,) * 2)
    waiting.join(60)
    assert inside.is_set()


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(UserError, match="cannot be locked"), results.locked(tmp_path / ".lm_eval.lock"):
        pass
