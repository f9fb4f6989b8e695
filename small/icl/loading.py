"""One trained transformer of the pair task with sequences and its activity in them: see `small.experiment.loaded`."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from llm.common.errors import UserError

from ..experiment.loaded import Loaded, Table
from ..experiment.runs import copy_into
from .model import Transformers
from .runs import read_asked, weights
from .settings import Variant
from .task import World

SEQUENCES = 100  # of an episode


class LoadedTransformer(Loaded):
    """One run, a variant with a seed; its episodes are sequences as in training, of the classes of its seed."""

    axes: ClassVar = {
        "inputs": ("sequence", "token", "component"), "answer": ("sequence",), "class": ("sequence", "object"),
        "label": ("sequence", "pair"), "bursty": ("sequence",), "novel": ("sequence",), "offset": ("sequence",),
        "logits": ("sequence", "label"), "attention": ("sequence", "layer", "query", "key"),
        "neurons": ("sequence", "layer", "neuron"),
    }  # fmt: skip
    model: Transformers

    def __init__(self, folder: Path, model: Transformers, settings: object, world: World) -> None:
        super().__init__(folder, model, settings)
        self.world = world

    def episode(self, seed: int = 0, sequences: int = SEQUENCES, kind: str = "test") -> Table:
        """Return sequences of a kind: test, ic, ic2 or iw. The last `class` is that of the query."""
        found = self.world.evaluation(kind, 10**6 + seed, sequences)  # parts that no snapshot has
        names = ("inputs", "answer", "class", "label", "bursty", "novel", "offset")
        return {name: part.cpu().numpy() for name, part in zip(names, found, strict=True)}

    @torch.no_grad()
    def activations(self, episode: Table) -> Table:
        """Return logits, attention of each layer (the last one's of the last token alone: NaN elsewhere) and neurons.

        Neurons are those of the three layers of the MLP, after the activation.
        """
        attention: list[Tensor] = []
        neurons: list[Tensor] = []
        hook = self.model.acts[0].register_forward_hook(lambda _, __, out: neurons.append(out))
        inputs = torch.from_numpy(episode["inputs"]).to(self.model.device)[None]
        try:
            logits = self.model(inputs, attention)[0]
        finally:
            hook.remove()
        tokens = inputs.shape[2]
        full = torch.full((inputs.shape[1], len(attention), tokens, tokens), torch.nan)
        for layer, part in enumerate(attention):  # (B, queries, keys); the last layer has one query
            full[:, layer, tokens - part.shape[1] :] = part.float().cpu()
        parts = {"logits": logits, "attention": full, "neurons": torch.stack([each[0] for each in neurons], dim=1)}
        return {name: part.float().cpu().numpy() for name, part in parts.items()}


def load(folder: Path, device: str = "cpu", variant: str = "", seed: int | None = None) -> LoadedTransformer:
    """Load one run of a training, by default its first variant and seed; see `small.experiment.loading.load`."""
    spec = read_asked(folder)
    settings = spec.settings
    variant, seed = variant or settings.variants[0], settings.seeds[0] if seed is None else seed
    if variant not in settings.variants or seed not in settings.seeds:
        raise UserError(
            f"{folder} has no run of {variant} with seed {seed}: give one of {', '.join(settings.variants)} and one of "
            f"the seeds {', '.join(map(str, settings.seeds))}"
        )
    task = spec.task
    products = getattr(torch, settings.products)
    model = Transformers([Variant.parse(variant)], [seed], spec.sizes, task.tokens, task.content, products, device)
    copy_into(weights([model]), folder)
    return LoadedTransformer(folder, model, settings, World(task, seed, device))
