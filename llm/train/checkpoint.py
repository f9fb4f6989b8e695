"""What a checkpoint holds, and how it is written, verified, found and restored.

    RUN/checkpoints/step-00000500/
        model.safetensors       parameters by name, as trained (fp32)
        optimizer.safetensors   optimizer state by parameter name: "exp_avg/model.norm.weight", ...
        config.json             the DecoderConfig
        state.json              step, tokens seen, digest of the data, seconds, last validation loss, parameters, and
                                what a run must be to continue from here (identity)
        manifest.json           size and sha256 of each file above; written last

A checkpoint is written aside and renamed, so a folder without `.partial` is whole; its manifest shows whether it
still is. There is no random state in it: batches and dropout are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..model import DecoderConfig, DecoderForCausalLM

PARTIAL = ".partial"
FILES = ("model.safetensors", "optimizer.safetensors", "config.json", "state.json")


@dataclass
class Checkpoint:
    """A verified checkpoint: `path`, its `step`, and the whole of state.json as `state`."""

    path: Path
    step: int
    state: dict[str, Any]

    def config(self) -> DecoderConfig:
        """The decoder's configuration."""
        return DecoderConfig.from_pretrained(self.path)

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name, on the CPU."""
        return load_file(self.path / "model.safetensors")

    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state, "STATE/PARAMETER" -> tensor, on the CPU."""
        return load_file(self.path / "optimizer.safetensors")


def write(
    folder: Path, model: DecoderForCausalLM, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint of `state["step"]` into `folder`, then remove all but the newest `keep`.

    Returns the checkpoint's path. An existing one of the same step is replaced.

    Raises:
        UserError: it cannot be written (a full disk, say); what was there before is as it was.
    """
    path = folder / f"step-{state['step']:08d}"
    partial, replaced = (path.with_name(path.name + suffix) for suffix in (PARTIAL, ".replaced" + PARTIAL))
    folder.mkdir(parents=True, exist_ok=True)
    for stray in folder.glob(f"*{PARTIAL}"):  # of a life that was killed while it wrote
        shutil.rmtree(stray)
    try:
        _write_files(partial, model, optimizer, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {path} cannot be written ({error}): free some space, then continue from the one before it "
            "with --resume auto"
        ) from error
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    _sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def _write_files(
    partial: Path, model: DecoderForCausalLM, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    partial.mkdir()
    save_file(_parameters(model), partial / "model.safetensors")
    save_file(_optimizer_state(model, optimizer), partial / "optimizer.safetensors")
    model.config.to_json_file(partial / "config.json", use_diff=False)
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    manifest = {file.name: _describe(file) for file in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in [*partial.iterdir(), partial]:
        _sync(file)


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of steps beyond `step` to `superseded-...`: a run that continues from `step` leaves them.

    Returns their new paths. An earlier one of that name gives way.
    """
    aside = []
    for path in _folders(folder):
        if _step(path) > step:
            new = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(new, ignore_errors=True)
            aside.append(path.rename(new))
    return aside


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file's size and sha256 checked.

    Raises:
        UserError: it is not there, or torn; the message names the file and what is wrong.
    """
    manifest_file = path / "manifest.json"
    if not manifest_file.is_file():
        raise UserError(f"{path} is no complete checkpoint (it has no manifest.json): give another or --resume auto")
    try:
        manifest = dict(json.loads(manifest_file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{manifest_file} cannot be read: use an older checkpoint of the run") from error
    for name in FILES:
        file = path / name
        if not file.is_file() or _describe(file) != manifest.get(name):
            raise UserError(f"{file} is missing or does not match its manifest: use an older checkpoint of the run")
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, state["step"], state)


def newest(folder: Path, before: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, and a sentence for each newer one that does not.

    Args:
        before: only steps below this one.
    """
    passed_over: list[str] = []
    for path in reversed(_folders(folder)):
        if before is not None and _step(path) >= before:
            continue
        try:
            return read(path), passed_over
        except UserError as error:
            passed_over.append(str(error))
    return None, passed_over


def find(run: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `run` at `step`, or its newest that verifies.

    Raises:
        UserError: there is none.
    """
    if step is not None:
        return read(run / "checkpoints" / f"step-{step:08d}")
    checkpoint, passed_over = newest(run / "checkpoints")
    if checkpoint is None:
        raise UserError(" ".join([*passed_over, f"{run} holds no complete checkpoint: train it first with llm fit"]))
    return checkpoint


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load parameters and, where given, optimizer state in place.

    Raises:
        UserError: the checkpoint's parameters are not this model's.
    """
    own = dict(model.named_parameters())
    weights = checkpoint.weights()
    if different := sorted(own.keys() ^ weights.keys()):
        raise UserError(f"{checkpoint.path} is of another model: {different[0]} is only in one of the two")
    if wrong := [name for name, parameter in own.items() if parameter.shape != weights[name].shape]:
        raise UserError(f"{checkpoint.path} is of another model: {wrong[0]} has another shape")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    if optimizer is None:
        return
    for key, tensor in checkpoint.optimizer_state().items():
        kind, name = key.split("/", 1)
        optimizer.state[own[name]][kind] = tensor.to(own[name].device)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name; tied ones once, as `named_parameters` lists them."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": tensor.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
