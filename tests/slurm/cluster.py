"""A Slurm cluster of two nodes, n1 and n2, on this machine: for the tests of the sbatch scripts.

    python -m tests.slurm.cluster       # starts one, prints how to talk to it, ends it on Ctrl-C

Stages: packages -> hosts file -> configuration in a folder of its own -> munged, slurmctld, two slurmd -> both nodes
idle. Nothing of the machine's own Slurm or munge is read or written, but for the names n1 and n2 in the hosts file.

The nodes claim more than the machine has (128 CPUs, 8 GPUs, 1 TB each), so that the scripts are accepted as they
stand; nothing is bound or limited, so a job gets the CPUs that there are and no GPU at all.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = Path(tempfile.gettempdir()) / f"hippoformer-slurm-{os.getuid()}"
HOSTS = Path("/etc/hosts")
NODES = ("n1", "n2")
PORT = 26817  # slurmctld's, the slurmds' follow; Lightning takes 15000 to 24999 for its master
PROGRAMS = {"munge": "munged", "slurm-wlm": "slurmctld"}  # package -> one program of it
DAEMONS: list[subprocess.Popen[bytes]] = []  # those that this process has started

# cred_expire: a requeued job waits that long and a second before it may start. urgent pre-empts main.
CONF = """\
ClusterName=hippoformer
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=10
KillWait=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
NODE = "NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=128 RealMemory=1000000 Gres=gpu:8"


class Unavailable(Exception):
    """No cluster can be had here; the message is one sentence that says why."""


def run(*words: str, check: bool = True, timeout: float = 60) -> str:
    """The standard output of a Slurm command, given to this cluster."""
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def environment() -> dict[str, str]:
    """This process's variables without those of a job that it may itself be in."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    return ours | {"SLURM_CONF": str(FOLDER / "slurm.conf")}


@contextmanager
def cluster() -> Iterator[None]:
    """A running cluster; at the end nothing of it is left, neither processes nor files.

    A cluster that was left over by a killed test run is ended first; one that is in use is waited for.

    Raises:
        Unavailable: Slurm is not here and cannot be installed.
        RuntimeError: it is here, and the cluster does not come up.
    """
    install()
    name_nodes()
    with (FOLDER.with_suffix(".lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            stop()
            start()
            yield
        finally:
            stop()


# ---- What the machine needs ------------------------------------------------------------------------------------------


def install() -> None:
    """Install Slurm and munge with apt-get where they are missing."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where Debian has the daemons, and users' PATH often not
    missing = [package for package, program in PROGRAMS.items() if shutil.which(program) is None]
    if not missing:
        return
    what = " and ".join(missing)
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{what} missing, and no apt-get to install it")
    quiet = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-oAcquire::http::Timeout=20")
    for words in (("update",), ("install", "--yes", "--no-install-recommends", *missing)):
        done = as_root(*quiet, *words)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(f"{what} missing, and apt-get {words[0]} failed: {reason}")


def name_nodes() -> None:
    """The ranks look for the first of them under the name of its node."""
    try:
        if all(socket.gethostbyname(name) == "127.0.0.1" for name in NODES):
            return
    except OSError:
        pass
    line = f"127.0.0.1 {' '.join(NODES)}"
    done = as_root("sh", "-c", f"echo '{line}' >> {HOSTS}")
    if done.returncode != 0:
        raise Unavailable(f"{HOSTS} cannot be written: add the line {line}")


def as_root(*words: str) -> subprocess.CompletedProcess[str]:
    """Run as root, or with a sudo that asks for no password."""
    prefix: tuple[str, ...] = ()
    if os.getuid() != 0:
        if shutil.which("sudo") is None:
            raise Unavailable("Slurm cannot be set up here: not root, and no sudo")
        prefix = ("sudo", "--non-interactive")
    return subprocess.run([*prefix, *words], capture_output=True, text=True)


# ---- The cluster's processes -----------------------------------------------------------------------------------------


def start() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for folder in (FOLDER, FOLDER / "state", *(FOLDER / name for name in NODES)):
        folder.mkdir(mode=0o755)
    host = socket.gethostname().split(".")[0]
    ports = {name: PORT + number for number, name in enumerate(NODES, start=1)}
    nodes = "\n".join(NODE.format(name=name, host=host, port=port) for name, port in ports.items())
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    conf = CONF.format(host=host, port=PORT, user=user, folder=FOLDER, nodes=nodes)
    (FOLDER / "slurm.conf").write_text(conf)
    (FOLDER / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={FOLDER}/gpu[0-7]\n")
    for number in range(8):
        (FOLDER / f"gpu{number}").touch()
    key = FOLDER / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))

    files = {"socket": "munge.socket", "key-file": key.name, "seed-file": "munge.seed", "pid-file": "munged.pid"}
    daemon("munged", "--foreground", *(f"--{name}={FOLDER / file}" for name, file in files.items()))
    wait_for(lambda: bool(run("munge", "-n", "-S", f"{FOLDER}/munge.socket", check=False)), "munged")
    daemon("slurmctld", "-D", "-i")
    for name in NODES:
        daemon("slurmd", "-D", "-N", name)
    wait_for(
        lambda: run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split() == ["idle"] * 2, "the nodes"
    )


def daemon(*words: str) -> None:
    with (FOLDER / f"{words[0]}.out").open("a") as out:
        process = subprocess.Popen(
            words, env=environment(), stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=FOLDER
        )
    DAEMONS.append(process)


def wait_for(ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = sorted([*FOLDER.glob("*.log"), *FOLDER.glob("*.out")])
            said = [f"{log.name}: {line}" for log in logs for line in log.read_text().splitlines()[-3:]]
            raise RuntimeError(f"{what} did not come up in {seconds:.0f} s; " + " | ".join(said))
        time.sleep(0.2)


def stop() -> None:
    """End every process of the cluster and of its jobs, the daemons first, and remove its folder."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        for pid in processes():
            kill(pid, number)
        while processes() and time.monotonic() < deadline:
            time.sleep(0.1)
    while DAEMONS:
        DAEMONS.pop().wait()  # else they stay in the list of processes as long as this one does
    shutil.rmtree(FOLDER, ignore_errors=True)


def processes() -> list[int]:
    """The cluster's processes: the daemons, Slurm's step managers and what runs in jobs all have its SLURM_CONF.

    A dead child of ours has no environment any more, and neither do processes of other users for us.
    """
    mark = f"SLURM_CONF={FOLDER / 'slurm.conf'}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain kill ends the cluster as well
    with suppress(KeyboardInterrupt), cluster():
        print(f"export SLURM_CONF={FOLDER / 'slurm.conf'}\nCtrl-C ends the cluster", flush=True)
        signal.pause()
