"""Why an attempt of a Slurm job failed, from logs as ranks and srun leave them."""

import json
from pathlib import Path

import pytest

from llm.runs.failure import explain, last_attempt, new_checkpoint, read_ranks, run_folder
from llm.runs.reading import NEEDED

BAR = "\rtrain:   0%|     | 19/100 [00:01<, 19step/s]\rtrain:   0%|     | 20/100 [00:01<, 20step/s, loss=6.1]"
BEGIN = "2026-11-30 12:00:00 attempt {}, rank {} on n{}\n"
# Of torch 2.13's ProcessGroupNCCL.cpp, with the prefix that it gives each line of a rank.
WATCHDOG = (
    "\n[rank{0}]:[E1130 12:00:09 ProcessGroupNCCL.cpp:685] [Rank {0}] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 60005 milliseconds before timing out.\n"
)
LOST = "error: rank {} lost contact to the other ranks at step 20: one has died, or hangs for longer than 5 s ({})\n"
TIMED_OUT = LOST.format("{0}", "unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete")
WOKEN = TIMED_OUT.replace("at step 20", "at step 20, after SIGTERM")
CLOSED = LOST.format("{0}", "pair.cc:553] Connection closed by peer [127.0.0.1]:46310")
NO_GPU = "error: rank {} on n2 sees 0 of the 8 GPUs that trainer.devices needs (driver too old)\n"
TRACEBACK = "\n[rank{0}]: Traceback (most recent call last):\n[rank{0}]: torch.OutOfMemoryError: CUDA out of memory.\n"


def logs(folder: Path, texts: dict[int, str], attempt: int = 1) -> str:
    """Logs of ranks, each on a node of its own, with an earlier attempt in them."""
    for rank, text in texts.items():
        begins = [BEGIN.format(number, rank, rank + 1) for number in (attempt - 1, attempt)]
        (folder / f"job-12-rank{rank}.log").write_text(f"{begins[0]}error: an old one\n{BAR}{begins[1]}{BAR}{text}")
    return str(folder / "job-12")


@pytest.mark.parametrize(
    ("said", "theirs"),
    [(WATCHDOG, ""), (TIMED_OUT, ""), (TIMED_OUT, CLOSED), (TIMED_OUT, WOKEN), (CLOSED, "")],
    ids=str,
)
def test_the_rank_that_the_others_waited_for_is_named(said: str, theirs: str, tmp_path: Path) -> None:
    """One that was stopped may go on for a moment: it finds that the others have gone, or that it waited as long."""
    ranks = read_ranks(logs(tmp_path, {0: said.format(0), 1: theirs.format(1), 2: said.format(2)}), "1")
    first, reason, *_, last = explain(ranks, "srun: error: n1: task 0: Aborted (core dumped)\n").sentences
    assert first == "srun: n1: task 0: Aborted (core dumped)"
    assert reason.startswith("rank 0 on n1 (and 1 more ranks): ") and reason.endswith(said.strip()[-40:])
    assert last == "the others waited for rank 1 on n2: hung or killed"


def test_what_many_ranks_say_alike_is_said_once(tmp_path: Path) -> None:
    ranks = read_ranks(logs(tmp_path, {rank: NO_GPU.format(rank) for rank in range(11)}), "1")
    assert [rank.number for rank in ranks] == list(range(11))
    assert explain(ranks, "").sentences == [f"rank 0 on n1 (and 10 more ranks): {NO_GPU.format(0).strip()}"]


def test_a_traceback_is_told_by_its_last_line(tmp_path: Path) -> None:
    failure = explain(read_ranks(logs(tmp_path, {0: TRACEBACK.format(0)}), "1"), "")
    assert failure.sentences == ["rank 0 on n1: torch.OutOfMemoryError: CUDA out of memory."]


def test_a_job_that_started_no_rank_says_what_srun_said(tmp_path: Path) -> None:
    assert explain(read_ranks(str(tmp_path / "job-12"), "0"), "srun: error: no such node\n").sentences == [
        "srun: error: no such node"
    ]


@pytest.mark.parametrize(("said", "mends"), [(WATCHDOG, False), (CLOSED, False), (TRACEBACK, False), (NO_GPU, True)])
def test_a_job_whose_user_has_to_act_is_no_use_to_repeat(said: str, mends: bool, tmp_path: Path) -> None:
    assert explain(read_ranks(logs(tmp_path, {0: said.format(0)}), "1"), "").of_the_user == mends


def test_the_run_is_that_of_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run: {folder: runs/a}\ndata: {context: 8}\n")
    assert run_folder(["fit", "--config", str(config)]) == Path("runs/a")
    assert run_folder(["fit", f"--config={config}", "--run.folder", "b", "--run.folder=c", "--x"]) == Path("c")
    assert run_folder(["fit", "--config", str(tmp_path / "none.yaml")]) is None


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({name: {"bytes": 0, "sha256": ""} for name in NEEDED}))
    for name in NEEDED:
        (folder / name).touch()


def test_a_run_cannot_be_tried_for_ever(tmp_path: Path) -> None:
    """Each attempt has to leave a complete checkpoint beyond those that all before it left."""
    run = tmp_path / "run"
    assert last_attempt(run) == {}
    assert new_checkpoint(run, {"from_step": 0}) is None
    checkpoint(run, 10)
    assert new_checkpoint(run, {"from_step": 0}) == 10
    (run / "events.jsonl").write_text(json.dumps({"step": 12, "event": "attempt failed", "checkpoint": 10}) + "\n")
    assert new_checkpoint(run, {"from_step": 0}) is None  # a corrupt one would have the run start before it
    assert new_checkpoint(run, {"from_step": 10}) is None
    checkpoint(run, 20)
    assert new_checkpoint(run, {"from_step": 10}) == 20
    (run / "checkpoints" / "step-00000020" / NEEDED[0]).unlink()
    assert new_checkpoint(run, {"from_step": 10}) is None
