"""One rank of a job, started by srun: `rank.py MARK fit ...` is `python -m llm fit ...` but for two things.

A fit that was told to stop, and has saved, ends with 0 instead of 75 and leaves the file MARK: at 75 srun would end the
ranks that are still closing their files, and give back their status instead. And the signals that tell it to stop are
not deadly while Python is still loading, nor while it leaves.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
sys.path[0] = str(Path.cwd())  # as with -m
mark = Path(sys.argv.pop(1))
try:
    runpy.run_module("llm", run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code != os.EX_TEMPFAIL:
        raise
    mark.touch()
