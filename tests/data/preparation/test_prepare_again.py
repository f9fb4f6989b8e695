"""The same store however it comes about: by any number of workers or tasks, in several runs, killed at any moment."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llm.data.preparation.encode
from llm.cli import main
from llm.common.errors import UserError
from llm.data.preparation.prepare import Share, Summary, prepare
from llm.data.store import TokenStore

from ..conftest import TEXT
from ..stores import children, is_running, tree, write_lines


def test_the_number_of_workers_changes_nothing(corpus, bpe_folder, tmp_path):
    for workers in (1, 2, 5):
        settings = {"tokenizer": bpe_folder, "validation_fraction": 0.2, "workers": workers}
        prepare([str(corpus)], tmp_path / f"by {workers}", **settings)
    assert tree(tmp_path / "by 1") == tree(tmp_path / "by 2") == tree(tmp_path / "by 5")


def test_the_same_command_makes_only_what_is_missing_or_damaged(corpus, bpe_folder, tmp_path, monkeypatch):
    out, made = tmp_path / "out", []
    encode = llm.data.preparation.encode._encode
    monkeypatch.setattr(
        llm.data.preparation.encode, "_encode", lambda source, *rest: made.append(source.name) or encode(source, *rest)
    )

    def again():
        made.clear()
        prepare([str(corpus / "*")], out, tokenizer=bpe_folder, validation_fraction=0.2, workers=1)
        return made

    assert len(again()) == 6
    whole = tree(out)
    assert again() == []
    tokens = out / "train" / "00001-1.tokens"
    tokens.write_bytes(b"\xff" + tokens.read_bytes()[1:])
    (out / "validation" / "00002-2.json").unlink()
    (out / "train" / "00004-4.ends").write_bytes(b"")
    (out / "train" / "00005-5.json").write_text("{}")
    assert again() == ["00001-1", "00002-2", "00004-4", "00005-5"]
    assert tree(out) == whole


@pytest.mark.parametrize("tasks", [2, 5, 8])
def test_the_number_of_tasks_changes_nothing(tasks, corpus, bpe_folder, tmp_path):
    """In any order; the last to end finishes the store. Of eight tasks two have nothing to do."""
    settings = {"tokenizer": bpe_folder, "validation_fraction": 0.2, "workers": 1, "deduplicate": True}
    prepare([str(corpus)], tmp_path / "whole", **settings)
    order = list(range(1, tasks + 1))
    random.Random(tasks).shuffle(order)
    for number, task in enumerate(order, 1):
        done = prepare([str(corpus)], tmp_path / "out", task=(task, tasks), **settings)
        assert isinstance(done, Summary if all(t > 6 for t in order[number:]) else Share)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_task_says_what_is_missing(corpus, bpe_folder, tmp_path, capsys):
    words = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", str(bpe_folder), "--workers", "1"]
    assert main([*words, "--task", "2/4"]) == 0
    assert "task 2/4 has done its 2 sources in" in (told := capsys.readouterr().out)
    assert "4 sources of other tasks are missing" in told
    with pytest.raises(UserError, match="prepare"):
        TokenStore.open(tmp_path / "out")
    for wrong in ("5/4", "0/4"):
        assert main([*words, "--task", wrong]) == 2
        assert f"--task {wrong} must be one of 1/4 to 4/4" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([*words, "--task", "two"])
    assert end.value.code == 2
    assert "give I/N, as 3/100" in capsys.readouterr().err


def test_another_task_with_other_settings_is_refused(corpus, bpe_folder, tmp_path):
    prepare([str(corpus)], tmp_path / "out", tokenizer=bpe_folder, workers=1, task=(1, 2))
    with pytest.raises(UserError, match="was begun with bad documents skipped in a source: 0, not 3; name another"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=bpe_folder, workers=1, task=(2, 2), skip_bad=3)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_told_and_what_is_done_is_kept(workers, corpus, bpe_folder, tmp_path):
    """A limit on the size of a file stands for the disk: the operating system refuses to write on."""
    write_lines(corpus / "3.jsonl", [f"{TEXT * 100} {i}" for i in range(200)])
    command = [sys.executable, "-m", "llm", "prepare", corpus, "--tokenizer", bpe_folder, "--out", tmp_path / "out"]
    command += ["--workers", workers]
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 100; exec "$@"', "limited", *command]
    stopped = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2
    assert f"error: {tmp_path / 'out'}: File too large; fix that (free some space, say)" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not list((tmp_path / "out").rglob("00003-3.*"))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert TokenStore.open(tmp_path / "out").verify() == []


# ---- Several at once, killed -----------------------------------------------------------------------------------------

# Imports once what takes seconds, then forks a process for each command of a line and says their numbers. A command
# that begins with a number is killed after so many renames.
LAUNCHER = """
import json, os, pathlib, signal, sys
import transformers.models.auto.tokenization_auto
import llm.data.preparation.prepare
from llm.cli import main
def kill_at_rename(number):
    replace, left = pathlib.Path.replace, [number]
    def counted(self, target):
        result, left[0] = replace(self, target), left[0] - 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    pathlib.Path.replace = counted
for line in sys.stdin:
    processes = []
    for words in json.loads(line):
        if process := os.fork():
            processes.append(process)
            continue
        sys.stdin.close()
        if words[0].isdigit():
            kill_at_rename(int(words.pop(0)))
        os._exit(main(words))
    print(json.dumps(processes), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]), flush=True)
"""


class Launcher:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, commands):
        self.process.stdin.write(json.dumps(commands) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        """The next list: process numbers, then exit statuses. What the commands themselves print is passed over."""
        for line in self.process.stdout:
            if line.startswith("["):
                return json.loads(line)
        raise AssertionError("the launcher ended")

    def run(self, commands):
        self.start(commands)
        return self.answer()


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.process.kill()
    launcher.process.wait()


@pytest.fixture
def large(tmp_path):
    """Ten files with repeated and broken documents, some seconds of work."""
    for number in range(10):
        texts = [f"{TEXT * 60} {number // 2} {i}" for i in range(80)]
        write_lines(tmp_path / "in" / f"{number}.jsonl", texts)
        with (tmp_path / "in" / f"{number}.jsonl").open("a") as file:
            file.write("{broken\n")
    return tmp_path / "in"


def command(sources, out, bpe_folder):
    words = ["prepare", str(sources), "--validation-fraction", "0.2", "--tokenizer", str(bpe_folder), "--out", str(out)]
    return [*words, "--deduplicate", "--max-bad-documents", "1", "--subset-tokens", "600000"]


def test_tasks_at_once_make_the_store_of_one(launcher, large, bpe_folder, tmp_path):
    """Every task twice, as a scheduler may do that takes a node for lost."""
    assert launcher.run([[*command(large, tmp_path / "whole", bpe_folder), "--workers", "1"]]) == [0]
    words = [*command(large, tmp_path / "out", bpe_folder), "--workers", "1"]
    tasks = [[*words, "--task", f"{task}/3"] for task in (1, 2, 3)]
    assert launcher.run(tasks + tasks) == [0] * 6
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    store = TokenStore.open(tmp_path / "out")
    assert store.verify() == []
    tokens = store.tokens + TokenStore.open(tmp_path / "out", "validation").tokens
    assert tokens == pytest.approx(300_000, rel=0.01)  # every text is there twice


@pytest.mark.slow
@pytest.mark.parametrize("how", ["workers", "tasks"])
def test_killed_at_ten_moments_it_is_the_store_of_an_undisturbed_run(how, launcher, large, bpe_folder, tmp_path):
    began = time.monotonic()
    assert launcher.run([[*command(large, tmp_path / "whole", bpe_folder), "--workers", "1"]]) == [0]
    whole, seconds = tree(tmp_path / "whole"), time.monotonic() - began
    words, out = command(large, tmp_path / "out", bpe_folder), tmp_path / "out"
    ways = {
        "workers": [[[*words, "--workers", number]] for number in ("1", "2", "5")],
        "tasks": [
            [[*words, "--workers", "1", "--task", f"{task}/{tasks}"] for task in range(1, tasks + 1)]
            for tasks in (2, 5)
        ],
    }[how]
    moments, unfinished = random.Random(how), 0
    for kill, commands in zip(range(10), itertools.cycle(ways), strict=False):
        processes = launcher.start(commands)
        time.sleep(moments.uniform(0, 0.5 * seconds))
        workers = [child for process in processes for child in children(process)]
        for process in processes:
            os.kill(process, signal.SIGKILL) if is_running(process) else None
        launcher.answer()
        unfinished += not (out / "store.json").exists()
        deadline = time.monotonic() + 10  # workers end with their run
        while any(is_running(worker) for worker in workers):
            assert time.monotonic() < deadline, f"a worker went on without its parent after kill {kill}"
            time.sleep(0.01)
        if (out / "store.json").exists():  # begin anew: there shall be something to kill
            shutil.rmtree(out)
    assert unfinished
    assert launcher.run(ways[-1]) == [0] * len(ways[-1])
    assert tree(out) == whole


def test_killed_after_any_rename_it_is_finished_by_the_task_itself(launcher, bpe_folder, tmp_path):
    """The task that ends last drops the duplicates of all shards, and may be killed within another task's shard."""
    for number in range(3):
        write_lines(tmp_path / "in" / f"{number}.jsonl", [f"{TEXT} {i}" for i in range(2 * number, 2 * number + 6)])
    words = ["prepare", str(tmp_path / "in"), "--tokenizer", str(bpe_folder), "--workers", "1", "--deduplicate"]
    words += ["--validation-fraction", "0.3"]
    assert launcher.run([[*words, "--out", str(tmp_path / "whole")]]) == [0]
    whole = tree(tmp_path / "whole")
    for renames in itertools.count(1):
        out = str(tmp_path / f"out {renames}")
        assert launcher.run([[*words, "--out", out, "--task", "1/2"]]) == [0]
        [status] = launcher.run([[str(renames), *words, "--out", out, "--task", "2/2"]])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert launcher.run([[*words, "--out", out, "--task", "2/2"]]) == [0]
        assert tree(Path(out)) == whole, renames
    assert renames > 15


def test_what_another_task_left_damaged_is_made_anew(corpus, bpe_folder, tmp_path):
    settings = {"tokenizer": bpe_folder, "validation_fraction": 0.2, "workers": 1}
    prepare([str(corpus)], tmp_path / "whole", **settings)
    for number, (kind, content) in enumerate((("json", b""), ("json", b"{}"), ("tokens", b"cut"), ("ends", None))):
        out = tmp_path / f"out {number}"
        assert isinstance(prepare([str(corpus)], out, task=(1, 2), **settings), Share)
        path = out / "train" / f"00002-2.{kind}"
        path.unlink() if content is None else path.write_bytes(content)
        assert isinstance(prepare([str(corpus)], out, task=(2, 2), **settings), Summary)
        assert tree(out) == tree(tmp_path / "whole")
