"""What a checkpoint holds, and how it is written, verified, found and restored.

    RUN/checkpoints/step-00000500/
        model.safetensors       parameters by name, as trained (fp32)
        optimizer.safetensors   optimizer state by parameter name: "exp_avg/model.norm.weight", ...
        config.json             the DecoderConfig
        state.json              step, tokens seen, seconds, last validation loss, parameters, and what a run must be
                                to continue from here (identity)
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..model import DecoderConfig, DecoderForCausalLM

PARTIAL = ".partial"


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
    """
    path = folder / f"step-{state['step']:08d}"
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_parameters(model), partial / "model.safetensors")
    save_file(_optimizer_state(model, optimizer), partial / "optimizer.safetensors")
    model.config.to_json_file(partial / "config.json", use_diff=False)
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    manifest = {file.name: _describe(file) for file in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    _sync(folder)
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file's size and sha256 checked.

    Raises:
        UserError: it is not there, or torn; the message names the file and what is wrong.
    """
    manifest_file = path / "manifest.json"
    if not manifest_file.is_file():
        raise UserError(f"{path} is no complete checkpoint (it has no manifest.json): give another or --resume auto")
    for name, expected in json.loads(manifest_file.read_text()).items():
        file = path / name
        if not file.is_file() or _describe(file) != expected:
            raise UserError(f"{file} is missing or does not match its manifest: use an older checkpoint of the run")
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, state["step"], state)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, and a sentence for each newer one that does not."""
    passed_over: list[str] = []
    for path in reversed(_folders(folder)):
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
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(PARTIAL))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
