"""What a checkpoint holds, and how it is written, verified, found and restored.

    RUN/checkpoints/step-00000500/
        model.safetensors       parameters by name, fp32: the master weights where the model computes in bf16
        optimizer.safetensors   the optimizer's state by parameter name: "exp_avg/model.norm.weight", ...
        config.json             the DecoderConfig
        state.json              step, tokens seen, digest of the data, seconds, last validation loss, parameters, and
                                what a run must be to continue from here (identity)
        manifest.json           size and sha256 of each file above; written last

Large ones are in several files with an index, as transformers writes them: model-00001-of-00003.safetensors. Nothing
says on how many devices or how sharded the run was. A checkpoint is written to a temporary folder and renamed, so a
folder without `.partial` is complete; its manifest shows whether it still is. There is no random state in it: batches
and dropout are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.files import follow_umask
from ..model import DecoderConfig
from ..runs.reading import checkpoint_problems, folders, hashes, step_of, weights_sha256
from .state import State

PARTIAL, REPLACED = ".partial", ".replaced.partial"
SHARD_BYTES = 2**31
MIB = 2**20


class FullDiskError(UserError):
    """A checkpoint cannot be written where it should be; what was there before is as it was."""


class Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, read one at a time: a rank never holds what it does not keep."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class Checkpoint:
    """A verified checkpoint: `path`, its `step`, and the whole of state.json as `state`."""

    path: Path
    step: int
    state: dict[str, Any]

    def config(self) -> DecoderConfig:
        """The decoder's configuration."""
        return DecoderConfig.from_pretrained(self.path)

    def weights(self) -> Tensors:
        """Parameters by name, on the CPU."""
        return Tensors(self.path / name for name in hashes(self.path, "model"))

    def optimizer_state(self) -> Tensors:
        """Optimizer state, "STATE/PARAMETER" -> tensor, on the CPU."""
        return Tensors(self.path / name for name in hashes(self.path, "optimizer"))

    def weights_sha256(self) -> str:
        """One digest of all weights: that of their files' digests, or the file's own where it is one."""
        return weights_sha256(self.path)


@dataclass
class Snapshot:
    """What a checkpoint is written from, all of it in host memory: see `state.py` for the two mappings."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    config: DecoderConfig
    state: dict[str, Any]

    def bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensors in (self.weights, self.optimizer) for tensor in tensors.values())


def write(
    folder: Path,
    snapshot: Snapshot,
    keep: int | None,
    keep_every: int | None = None,
    pinned: Collection[int] = (),
) -> Path:
    """Write a checkpoint of `state["step"]` into `folder`, then `rotate`.

    An existing one of the same step is replaced. Returns the checkpoint's path.

    Raises:
        FullDiskError: it cannot be written (a full disk, say); what was there before is as it was.
    """
    path = folder / f"step-{snapshot.state['step']:08d}"
    partial, replaced = (path.with_name(path.name + suffix) for suffix in (PARTIAL, REPLACED))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover_replaced(folder)
        for stray in folder.glob(f"*{PARTIAL}"):  # of an attempt that was killed while it wrote
            shutil.rmtree(stray)
        _check_space(folder, snapshot.bytes() + MIB)
        _write_files(partial, snapshot)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        recover_replaced(folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise FullDiskError(
            f"checkpoint {path} cannot be written ({error}): free some space (superseded-* there may go), then "
            "continue from the one before it with --resume auto"
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)
    rotate(folder, keep, keep_every, pinned)
    return path


def recover_replaced(folder: Path) -> None:
    """Give a checkpoint its name back that was to be replaced, where its replacement did not arrive."""
    for replaced in folder.glob(f"*{REPLACED}"):
        path = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if not path.exists():
            with suppress(OSError):
                replaced.rename(path)


def rotate(folder: Path, keep: int | None, keep_every: int | None = None, pinned: Collection[int] = ()) -> None:
    """Remove all but the newest `keep`, those whose step is a multiple of `keep_every`, and those of `pinned` steps.

    All stay where `keep` is None.
    """
    for old in folders(folder)[: -keep if keep else 0]:
        if (not keep_every or step_of(old) % keep_every) and step_of(old) not in pinned:
            shutil.rmtree(old, ignore_errors=True)  # what is left of it is passed over and removed the next time


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it needs {needed / MIB:,.0f} MiB and {free / MIB:,.0f} MiB are free")


def _write_files(partial: Path, snapshot: Snapshot) -> None:
    partial.mkdir()
    for kind, tensors in (("model", snapshot.weights), ("optimizer", snapshot.optimizer)):
        pattern = kind + "{suffix}.safetensors"
        save_torch_state_dict(tensors, partial, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    if not snapshot.optimizer:  # every step was skipped: a file says so, where one that is missing is damage
        save_file({}, partial / "optimizer.safetensors")
    follow_umask(partial)
    snapshot.config.to_json_file(partial / "config.json", use_diff=False)
    (partial / "state.json").write_text(json.dumps(snapshot.state, indent=1))
    mode = (partial / "state.json").stat().st_mode
    for file in partial.glob("*.safetensors"):  # which safetensors writes for this user alone, whatever the umask
        file.chmod(mode)
    manifest = {file.name: _describe(file) for file in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in [*partial.iterdir(), partial]:
        _sync(file)


def archive_after(folder: Path, step: int) -> list[Path]:
    """Rename what is of steps beyond `step` to `superseded-...`: a run that continues from `step` leaves it.

    Returns their new paths. An earlier one of that name gives way.
    """
    aside = []
    for path in folders(folder):
        if step_of(path) > step:
            new = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(new, ignore_errors=True)
            aside.append(path.rename(new))
    return aside


def read(path: Path, hashed: bool = True) -> Checkpoint:
    """The checkpoint at `path`, every file's size and, unless `hashed` is off, sha256 checked.

    Raises:
        UserError: it is not there, or damaged; the message names the file and what is wrong.
    """
    if problems := checkpoint_problems(path, (lambda _: None) if hashed else None):
        raise UserError(
            f"{path} is not a complete checkpoint ({'; '.join(problems)}): use an older one or --resume auto"
        )
    try:
        state = json.loads((path / "state.json").read_bytes())
        return Checkpoint(path, int(state["step"]), state | {"identity": dict(state["identity"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint (its state.json cannot be read): use an older one or --resume auto"
        ) from error


def newest(folder: Path, before: int | None = None, hashed: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, and a sentence for each newer one that does not.

    Args:
        before: only steps below this one.
        hashed: read every byte; else only their number is compared.
    """
    skipped: list[str] = []
    for path in reversed(folders(folder)):
        if before is not None and step_of(path) >= before:
            continue
        try:
            return read(path, hashed), skipped
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def find(run: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `run` at `step`, or its newest that verifies.

    Raises:
        UserError: there is none.
    """
    if step is not None:
        return read(run / "checkpoints" / f"step-{step:08d}")
    checkpoint, skipped = newest(run / "checkpoints")
    if checkpoint is None:
        raise UserError(" ".join([*skipped, f"{run} holds no complete checkpoint: train it first with llm fit"]))
    return checkpoint


def restore(checkpoint: Checkpoint, model: nn.Module, state: State | None = None) -> None:
    """Load parameters in place; where a training state is given, into it, with the optimizer's.

    Raises:
        UserError: the checkpoint's parameters are not this model's.
    """
    own = dict(model.named_parameters())
    weights = checkpoint.weights()
    if different := sorted(own.keys() ^ weights.keys()):
        raise UserError(f"{checkpoint.path} is of another model: {different[0]} is only in one of the two")
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in own.items()}  # ZeRO 3: empty
    if wrong := [name for name, shape in shapes.items() if shape != weights[name].shape]:
        raise UserError(f"{checkpoint.path} is of another model: {wrong[0]} has another shape")
    if state is not None:
        optimizer = checkpoint.optimizer_state()
        if optimizer and (different := sorted(optimizer.keys() ^ state.state_keys())):
            raise UserError(
                f"{checkpoint.path} has the state of another optimizer ({different[0]} is only in one of the two): "
                "set model.optimizer.name as its run has it"
            )
        state.load(weights, optimizer)
        return
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
