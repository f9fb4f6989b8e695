"""Two real processes that run commands of `python -m llm` together, one after the other, over gloo."""

import json
from dataclasses import dataclass
from pathlib import Path

from .preloaded import two_ranks

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
    """Run the commands as ranks 0 and 1; returns the exit statuses of both for each."""
    folder.mkdir()
    told = [[[*command.words, "--trainer.devices", "2"], command.before] for command in commands]
    (folder / "commands.json").write_text(json.dumps(told))
    processes = two_ranks(DRIVER, [str(folder)])
    try:
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join(process.communicate()[1][-3000:] for process in processes)
    ended = [[folder / f"status-{n}-{rank}" for rank in range(2)] for n in range(len(commands))]
    assert all(file.exists() for pair in ended for file in pair), logs
    return [(int(a.read_text()), int(b.read_text())) for a, b in ended]
