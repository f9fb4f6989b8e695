"""A trained navigator with walks of its task and its activity in them: see `small.experiment.loaded`."""

from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ..experiment.loaded import Loaded, Table
from .model import Answer, Layer, Memory
from .train import Run
from .train import load as load_run

_WALK = ("walker", "step")


class LoadedNavigator(Loaded):
    """A navigator; its episodes are walks on familiar maps, as in a trial of its training."""

    axes: ClassVar = {
        "seed": (), "map": ("walker",), "cell": _WALK, "action": _WALK, "letter": _WALK, "steps_since_visit": _WALK,
        "logits": (*_WALK, "letter"), "code": (*_WALK, "unit"), "ffn": (*_WALK, "layer", "neuron"),
        "attention": (*_WALK, "layer", "head", "steps_back"),
    }  # fmt: skip

    def __init__(self, folder: Path, run: Run) -> None:
        super().__init__(folder, run.model, run.settings)
        self.run = run

    def episode(self, seed: int = 0, walkers: int = 1) -> Table:
        """Return walks of a trial's length: step 0 is where a walker starts, its action is to stay.

        `steps_since_visit` is 0 where the cell is visited for the first time.
        """
        walks = self.run.world.trial("load", seed, walkers, self.settings.steps)
        names = ("map", "cell", "action", "letter", "steps_since_visit")
        return {name: part.cpu().numpy() for name, part in zip(names, walks, strict=True)} | {"seed": np.array(seed)}

    @torch.no_grad()
    def activations(self, episode: Table) -> Table:
        """Return the activity of each step's masked token, from step 1 on (index 0), and its code.

        `attention` is of the letter so many steps back, from 1 on, and at 0 of the masked token itself; NaN where the
        walk had not begun or the window ends.
        """
        run, length = self.run, self.run.sizes.segment
        actions, letters = (torch.from_numpy(episode[name]).to(run.device) for name in ("action", "letter"))
        times, acts = tuple(range(1, length + 1)), [cast(Layer, layer).ffn.act for layer in run.model.layers]
        seen: dict[int, Tensor] = {}
        hooks = [
            act.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out[:, -length:]}))
            for index, act in enumerate(acts)
        ]
        code, memory = run.first_code("load", int(episode["seed"]), len(letters)), cast(Memory, ())
        parts: dict[str, list[Tensor]] = {"logits": [], "code": [], "ffn": [], "attention": []}
        try:
            for begin in range(0, letters.shape[1] - 1, length):
                now = slice(begin, begin + length + 1)
                codes = run.model.codes(code, actions[:, now])
                answer = run.model(code, actions[:, now], letters[:, now][:, :-1], memory, times)
                parts["logits"].append(answer.logits)
                parts["code"].append(codes[:, 1:])
                parts["ffn"].append(torch.stack([seen[index] for index in range(len(acts))], dim=2))
                parts["attention"].append(_by_steps_back(answer, memory, length, run.sizes.window))
                code, memory = answer.code, answer.memory
        finally:
            for hook in hooks:
                hook.remove()
        return {name: torch.cat(each, dim=1).float().cpu().numpy() for name, each in parts.items()}


def _by_steps_back(answer: Answer, memory: Memory, length: int, window: int) -> Tensor:
    """Attention of a segment's queries (B, H, Q, S) of each layer -> (B, Q, layers, H, window + 1)."""
    remembered = memory[0].shape[1] if memory else 0
    weights = torch.stack(answer.weights, dim=1)  # (B, layers, H, Q, S)
    found = torch.full((*weights.shape[:4], window + 1), torch.nan, device=weights.device)
    for query in range(length):  # of time query + 1; a letter of time j is query + 1 - j steps back
        found[..., query, 0] = weights[..., query, remembered + length + query]
        back = torch.arange(1, min(window, remembered + query + 1) + 1, device=weights.device)
        found[..., query, back] = weights[..., query, remembered + query + 1 - back]
    return found.permute(0, 3, 1, 2, 4)


def load(folder: Path, device: str = "cpu") -> LoadedNavigator:
    """Load a run; see `small.experiment.loading.load`."""
    return LoadedNavigator(folder, load_run(folder, device))
