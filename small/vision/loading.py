"""A trained Vision Transformer with test images and its activity on them: see `small.experiment.loaded`."""

from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from llm.common.errors import UserError
from llm.model.block import Block

from ..draws import seeds_of
from ..experiment.loaded import Loaded, Table
from ..experiment.runs import copy_into
from . import datasets
from .runs import read_asked
from .train import Run

IMAGES = 100  # of an episode


class LoadedVision(Loaded):
    """One transformer; its episodes are test images."""

    axes: ClassVar = {
        "number": ("image",), "pixels": ("image", "channel", "row", "column"), "label": ("image",),
        "logits": ("image", "class"), "ffn": ("image", "token", "layer", "neuron"),
    }  # fmt: skip

    def __init__(self, folder: Path, run: Run) -> None:
        super().__init__(folder, run.model, run.settings)
        self.run = run

    def episode(self, seed: int = 0, images: int = IMAGES) -> Table:
        """Return different test images, as many as there are at most."""
        pixels, labels = self.run.test_images
        random = np.random.default_rng(seeds_of(seed, "load"))
        numbers = random.permutation(len(labels))[:images]
        return {"number": numbers, "pixels": pixels[numbers].cpu().numpy(), "label": labels[numbers].cpu().numpy()}

    @torch.no_grad()
    def activations(self, episode: Table) -> Table:
        """Return logits, and feed-forward neurons after the activation; token 0 is the class token."""
        seen: dict[int, Tensor] = {}
        hooks = [
            cast(Block, block).feedforward.act.register_forward_hook(
                lambda _, __, out, index=index: seen.update({index: out})
            )
            for index, block in enumerate(self.run.model.blocks)
        ]
        try:
            logits = self.run._logits(torch.from_numpy(episode["pixels"]).to(self.run.device).float() / 255)
        finally:
            for hook in hooks:
                hook.remove()
        ffn = torch.stack([seen[index] for index in range(len(seen))], dim=2)
        return {"logits": logits.cpu().numpy(), "ffn": ffn.float().cpu().numpy()}


def load(folder: Path, device: str = "cpu", data: Path | str | None = None) -> LoadedVision:
    """Load a run and its images; see `small.experiment.loading.load`.

    Raises:
        UserError: `data` is missing, or has other images than the run was trained on.
    """
    spec = read_asked(folder)
    if data is None:
        raise UserError(f"{folder} needs its images: give data, the folder or archive of {spec.data['name']}")
    images = datasets.load(spec.data["name"], Path(data), quiet=True)
    if images.record != spec.data:
        raise UserError(f"{data} has other images than {folder} was trained on: give data of the same checksum")
    run = Run(images, spec, device)
    copy_into(run.tensors(), folder)
    return LoadedVision(folder, run)
