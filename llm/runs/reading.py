"""A run folder as it is read from outside: without torch, while its run may be writing to it.

A row, an event or a checkpoint may be half written, by a run that goes on or by one that was killed, and a run of an
older version lacks columns. What cannot be read is left out or named, never guessed.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import math
import os
import platform
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..common.errors import UserError
from ..common.files import with_attempts
from ..common.lock import HEARTBEAT, is_beating, owner

# struct flock of Linux on 64 bits: type, whence, start, length, process, each at its native alignment.
FLOCK = struct.Struct("@hhqqi4x")
NEEDED = ("config.json", "model", "optimizer", "state.json")  # each the beginning of some file's name


# The two changes that this project exists to compare. Compared runs differ in other keys only if the user says so.
DECLARED = (
    "decoder.stream",
    "decoder.stream_source",
    "decoder.stream_weight",
    "decoder.stream_arriving",
    "decoder.stream_own",
    "decoder.stream_layers",
    "decoder.value_embedding",
    "decoder.value_embedding_layers",
    "decoder.value_embedding_gate",
    "decoder.residual",
    "decoder.residual_expansion",
    "decoder.hidden_act",
)  # and the parameters of the runs' activations, decoder.ACTIVATION_NAME
# Where a run is kept, how it is watched and how fast it reads: none of it reaches a weight. `data.store` is a path, and
# what lies under it has a fingerprint. Micro-batches sum to the same gradient, up to rounding.
WITHOUT_EFFECT = (
    "run.",
    "evaluation.",
    "data.store",
    "data.workers",
    "data.validate_every",
    "data.micro_batch_size",
    "trainer.default_root_dir",
)

# Keys of a config by their names in earlier versions, which are still accepted.
RENAMED = {
    "model.plain": "disable_fast_paths",
    "model.keep_memory": "retain_freed_memory",
    "model.schedule.floor": "min_lr_ratio",
    "run.skip_limit": "max_consecutive_skips",
    "run.spike_deviations": "spike_threshold",
    "data.rows": "packing",
}
# Values by their names in earlier versions, under today's key.
RENAMED_VALUES = {"data.packing": {"windows": "packed", "documents": "per_document"}}


def new_name(key: str) -> str:
    """Today's name of a dotted key."""
    return ".".join([*key.split(".")[:-1], RENAMED[key]]) if key in RENAMED else key


def renamed(config: Any) -> Any:
    """A config with today's names of its keys and values, in place."""
    for old, new in RENAMED.items():
        *parents, name = old.split(".")
        place = config
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and name in place:
            value = place.pop(name)
            values = RENAMED_VALUES.get(new_name(old))
            place.setdefault(new, values.get(value, value) if values else value)
    return config


class Lock(NamedTuple):
    """Whether a process holds a run folder (None: that cannot be told here), and its id where it is of this machine."""

    held: bool | None
    process: int | None = None


def record(run: Path) -> dict[str, Any]:
    """The content of run.json. Raises UserError where `run` is not a run folder."""
    try:
        return with_attempts(dict(json.loads((run / "run.json").read_bytes())))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{run} is not a run folder (it has no run.json): give the run.folder of a training run"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run}/run.json cannot be read ({error}): give the run.folder of a training run") from error


def config(run: Path) -> dict[str, Any]:
    """The content of config.yaml. Raises UserError where it cannot be read."""
    try:
        return dict(renamed(yaml.safe_load((run / "config.yaml").read_bytes())))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(f"{run}/config.yaml cannot be read ({why}): put the config of the run there") from error


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without one that is not written to its end; none where there is no such file."""
    try:
        text = (run / "metrics.csv").read_bytes().decode(errors="replace")
    except OSError:
        return []
    lines = text.splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # "12" may be the beginning of step 1200
    return [row for row in csv.DictReader(whole, restval="") if (row.get("step") or "").isdigit()]


def number(row: dict[str, str], name: str) -> float | None:
    """A value of a row, None where it is empty, unreadable, or of a column that the run does not have."""
    try:
        return float(row[name])
    except (KeyError, ValueError):
        return None


BUSY = "busy_machine"  # the event of a run whose cores other processes used: its time is no measure of its cost


def events(run: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of events.jsonl in their order, and how many cannot be read."""
    try:
        lines = (run / "events.jsonl").read_bytes().splitlines()
    except OSError:
        return [], 0
    told, unreadable = [], 0
    for line in filter(None, lines):
        try:
            event = dict(json.loads(line))
            told.append({**event, "step": int(event["step"]), "event": str(event["event"])})
        except (ValueError, TypeError, KeyError):
            unreadable += 1
    return told, unreadable


def fact(value: Any) -> str:
    """A fact of an event in words: what is no number in JSON stands there as text ("nan")."""
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def summary(run: Path) -> dict[str, Any] | None:
    """The content of summary.json, which a finished run has."""
    try:
        return dict(json.loads((run / "summary.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def folders(folder: Path) -> list[Path]:
    """The folders step-N in `folder`, ascending, torn ones among them; none where there is no such folder."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def step_of(path: Path) -> int:
    """N of step-N."""
    return int(path.name.removeprefix("step-"))


def accuracies(export: Path) -> dict[str, float]:
    """What `python -m evals run` found of an exported step, "TASK, N-shot" -> accuracy; empty where it left nothing."""
    try:
        results = json.loads((export / "evals" / "lm_eval.json").read_bytes())
        return {f"{r['task']}, {r['shots']}-shot": float(r["acc"]) for r in results if "acc" in r}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def in_percent(accuracies: dict[str, float]) -> str:
    """Accuracies in one line."""
    return "; ".join(f"{name} {100 * accuracy:.1f}%" for name, accuracy in accuracies.items())


def lock(run: Path) -> Lock:
    """Who holds the folder. The lock is asked after, not taken, so that a run which starts just now is not refused.

    Not for a process that holds it: closing the file would end its own lock.
    """
    if not sys.platform.startswith("linux"):
        return Lock(None)
    try:
        with (run / ".lock").open("rb") as stream:
            answer = fcntl.fcntl(stream, fcntl.F_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except FileNotFoundError:  # a run from before it
        return Lock(False)
    except OSError:  # a file system without locks, or a file of someone else
        return _by_heartbeat(run / HEARTBEAT)
    kind, _, _, _, process = FLOCK.unpack(answer)
    return Lock(kind != fcntl.F_UNLCK, process if kind != fcntl.F_UNLCK and process > 0 else None)  # elsewhere: <= 0


def _by_heartbeat(file: Path) -> Lock:
    """Who holds a folder where there are no locks."""
    host, process = owner(file)
    if host is None:
        return Lock(None)
    return Lock(is_beating(file, time.time()), process if host == platform.node() else None)


def checkpoint_problems(checkpoint: Path, hashed: Callable[[int], object] | None = None) -> list[str]:
    """What is wrong with a checkpoint, a sentence for each file; none means that it is complete.

    Args:
        checkpoint: its folder.
        hashed: compare each file's sha256 too, and be told how many bytes were read; None compares sizes.
    """
    try:
        manifest = {
            str(name): (int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in json.loads((checkpoint / "manifest.json").read_bytes()).items()
        }
    except FileNotFoundError:
        return ["it has no manifest.json"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ["its manifest.json cannot be read"]
    problems = [
        f"its manifest.json names no {start}"
        for start in NEEDED
        if not any(name.startswith(start) for name in manifest)
    ]
    files = [(checkpoint / name, *facts) for name, facts in manifest.items()]
    with ThreadPoolExecutor(max(1, len(files))) as threads:  # hashing leaves Python's lock to the others
        for (path, size, _), problem in zip(files, threads.map(partial(_file_problem, hashed), files), strict=True):
            problems += [f"{path.name} {problem}"] if problem else []
            if hashed is not None:
                hashed(size)
    return problems


def _file_problem(hashed: object | None, file: tuple[Path, int, str]) -> str | None:
    path, size, sha256 = file
    try:
        if (found := path.stat().st_size) != size:
            return f"has {found:,} of {size:,} bytes"
        if hashed is not None:
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                    return "has not the sha256 of its manifest"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def hashes(checkpoint: Path, kind: str) -> dict[str, str]:
    """Names and sha256 of the files that hold a checkpoint's tensors of a kind ("model", "optimizer"), in order."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    files = sorted(name for name in manifest if name.startswith(kind) and name.endswith(".safetensors"))
    return {name: manifest[name]["sha256"] for name in files}


def weights_sha256(checkpoint: Path) -> str:
    """One digest of all weights: that of their files' digests, or the file's own where it is one."""
    each = list(hashes(checkpoint, "model").values())
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config as dotted keys and their values."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a config reaches the weights, by dotted key."""
    return {key: value for key, value in flat(config) if not key.startswith(WITHOUT_EFFECT)}


def allowed_differences(configs: Sequence[dict[str, Any]]) -> set[str]:
    """Return the dotted keys in which compared runs may differ: `DECLARED`, and their activations' parameters.

    Those are named after the activation, as decoder.nmda_alpha.
    """
    keys = [dict(flat(config)) for config in configs]
    prefixes = tuple(f"decoder.{key['decoder.hidden_act']}_" for key in keys if key.get("decoder.hidden_act"))
    return {*DECLARED, *(name for key in keys for name in key if name.startswith(prefixes))}


def finite(value: Any) -> Any:
    """`value` with text for each number that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
