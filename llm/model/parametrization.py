"""How initial weights, multipliers and learning rates follow a model's width and depth.

    standard     the same at every size
    completep    CompleteP with alpha 1 (Dey et al. 2025, Table 1), in width muP (Yang et al. 2022, Table 8): settings
                 tuned at a base size are those of all sizes. At the base size it is `standard`, bit for bit.

With m = hidden_size / base_hidden_size, l = num_hidden_layers / base_num_hidden_layers and K the width of a head:

    what is scaled                                       completep
    initial deviation of the blocks' matrices            m^-1/2
    initial deviation of embeddings and output head      1
    attention scores                                     K_base / K, where heads grow; K_base^-1/2 is in softmax_scale
    what attention and FFN add to the residual stream    1 / l
    what an accumulated attention stream adds            1 / l
    hidden states that enter the output head             1 / m
    learning rate of the blocks' matrices                1 / m under Adam, m^-1/2 under Muon scaled to Adam's size
    their weight decay                                   the inverse, so that rate times decay stays
    Adam's eps                                           1 / (m l) in the blocks, 1 / m elsewhere
    learning rate of all other parameters                1

The FFN's width and that of all heads together are taken to grow with hidden_size. With `scale_residual_init`, the
initial deviation of the projections that write to the residual stream has the base depth.
"""

from dataclasses import dataclass
from typing import Any

PARAMETRIZATIONS = ("standard", "completep")
BASES = {"base_hidden_size": "hidden_size", "base_num_hidden_layers": "num_hidden_layers", "base_head_dim": "head_dim"}


@dataclass(frozen=True)
class Scales:
    """Width, depth and width of a head relative to the base size: m, l and K / K_base; all 1 under `standard`."""

    width: float = 1.0
    depth: float = 1.0
    head: float = 1.0

    @property
    def block_deviation(self) -> float:
        """Factor of the initial deviation of the blocks' matrices: their fan-in grows by m."""
        return self.width**-0.5

    def rate(self, power: float) -> float:
        """Factor of the learning rate of the blocks' matrices, for an optimizer whose updates ask for m^-power."""
        return self.width**-power

    def eps(self, in_blocks: bool) -> float:
        """Factor of Adam's eps: gradients of single elements fall so (Dey et al. 2025, Equation 40)."""
        return 1 / (self.width * (self.depth if in_blocks else 1))


def scales(config: Any) -> Scales:
    """Return the scales of a config; those of `standard` if it has no parametrization, as transformers' own."""
    if getattr(config, "parametrization", "standard") == "standard":
        return Scales()
    return Scales(*(getattr(config, size) / getattr(config, base) for base, size in BASES.items()))


def parametrization_problems(config: Any) -> list[str]:
    """Return what cannot be among a config's values, a sentence each."""
    name = config.parametrization
    if name not in PARAMETRIZATIONS:
        return [f"parametrization {name!r} is unknown: give one of {', '.join(PARAMETRIZATIONS)}"]
    bad = [base for base in BASES if name == "completep" and not (getattr(config, base) or 0) >= 1]
    return [f"parametrization completep needs {', '.join(bad)}: set the size that was tuned"] if bad else []
