"""One rank of a job, started by srun: `rank.py MARK fit ...` is `python -m llm fit ...` with two differences.

1. A fit that stopped on a signal after saving exits with 0 instead of 75, and creates the file MARK. At 75, srun would
   kill the ranks that are still closing their files and return their status instead.
2. SIGUSR1 and SIGTERM are ignored while Python starts and exits.
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
