"""One rank of a job, started by srun: `rank.py MARK fit ...` is `python -m llm fit ...` with three differences.

1. A fit that stopped on a signal after saving exits with 0 instead of 75, and creates the file MARK. At 75, srun would
   kill the ranks that are still closing their files and return their status instead.
2. SIGUSR1 and SIGTERM are ignored while Python starts and exits.
3. Its log begins with a line that says which attempt, rank and node this is; `llm/runs/failure.py` reads on from there.
"""

import os
import platform
import runpy
import signal
import sys
import time
from pathlib import Path

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
attempt, rank = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "SLURM_PROCID"))
node = os.environ.get("SLURMD_NODENAME", platform.node())
print(f"{time.strftime('%F %T')} attempt {attempt}, rank {rank} on {node}", file=sys.stderr)
sys.path[0] = str(Path.cwd())  # as with -m
mark = Path(sys.argv.pop(1))
try:
    runpy.run_module("llm", run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code != os.EX_TEMPFAIL:
        raise
    mark.touch()
