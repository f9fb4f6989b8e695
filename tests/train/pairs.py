"""Two real processes that run commands of `python -m llm` together, one after the other, over gloo."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Started once for many commands: a process spends most of its time on imports.
DRIVER = """
import json, os, sys
from llm.cli import main
rank, folder = int(os.environ["LOCAL_RANK"]), sys.argv[1]
for n, (words, before) in enumerate(json.load(open(folder + "/commands.json"))):
    names = {"rank": rank}
    exec(before, names)
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    if "after" in names:
        names["after"]()
    with open(f"{folder}/status-{n}-{rank}", "w") as stream:
        stream.write(str(status))
"""


@dataclass
class Command:
    """Words of a command, and Python that both processes run before it, `rank` being 0 or 1.

    Where that defines `after`, it is called after the command.
    """

    words: list[str]
    before: str = ""


def together(folder: Path, commands: list[Command], timeout: float = 600) -> list[tuple[int, int]]:
    """Run the commands as ranks 0 and 1; returns the exit statuses of both for each. Their output is in `folder`."""
    folder.mkdir()
    told = [[[*command.words, "--trainer.devices", "2"], command.before] for command in commands]
    (folder / "commands.json").write_text(json.dumps(told))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = (folder / f"rank-{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(folder)],
                env={**os.environ, **place, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )
        )
    try:
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(2))
    ended = [[folder / f"status-{n}-{rank}" for rank in range(2)] for n in range(len(commands))]
    assert all(file.exists() for pair in ended for file in pair), logs
    return [(int(a.read_text()), int(b.read_text())) for a, b in ended]
