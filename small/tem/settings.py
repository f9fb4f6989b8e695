"""What TEM-t and TEM are asked to be: sizes, training, recording; and presets. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from llm.common.limits import INSIDE, POSITIVE, at_least

from ..experiment.options import option, problems, raise_problems

SYMBOLS = 45
TRANSITIONS = ("identity", "relu")
SEPARATIONS = ("softmax", "linear", "exponential", "polynomial")
STORES = ("all", "surprising", "new")
MODULES = tuple(3 * n for n in (10, 10, 8, 6, 6))  # of the reference code: 30, 30, 24, 18, 18, together 120
SQUARE = "15x15"  # larger than any room of training, so that several periods are seen
# Options that a preset sets unless the command line does. The paper's appendix is not available: modules, code width,
# batch, number of gradient steps, walks and back-propagations are those of github.com/jbakermans/torch_tem, whose rooms
# are 5 x 5; the rooms are the squares of the TensorFlow version.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"rule": "paper", "modules": False, "seeds": 3},
    "paper": {
        "spaces": ("8x8", "9x9", "10x10", "11x11"), "rule": "code", "modules": True, "code": 120, "steps": 20_000,
        "batch": 16, "walk_from": 5450, "walk_to": 1050, "walk_spread": 550, "backprop": 20, "test_every": 250,
        "seeds": 3,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of TEM-t; the paper gives none. `keys` and `values` are widths; `neurons` are those of the read-out's MLP.

    The store keeps all moments, or those that are "surprising" or "new", see `store`.
    """

    code: int = option(64, "width of a position code", at_least(1))
    keys: int = option(64, limit=at_least(1))
    values: int = option(64, limit=at_least(1))
    neurons: int = option(128, limit=at_least(1))
    transition: str = option("identity", "activation of the position codes", choices=TRANSITIONS)
    separation: str = option("softmax", "function that separates TEM-t's memories", choices=SEPARATIONS)
    store: str = option(
        "all",
        "moments that TEM-t's memory keeps: all, those with an unexpected symbol (surprising), or those with a key "
        "unlike all kept ones (new)",
        choices=STORES,
    )
    below: float = option(
        0.5,
        "limit of --store: a moment is kept if the symbol's probability (surprising) or the largest cosine of the keys "
        "(new) is below it",
        INSIDE,
    )

    def __post_init__(self) -> None:
        raise_problems(problems(self))


@dataclass(frozen=True)
class MachineSizes:
    """Sizes of TEM.

    Args:
        code: C, width of a code.
        modules: widths of the frequency modules, which sum to C: a module's code moves on by itself. () is one module.
        places: G; with modules a third of each, as in the reference code, and not read.
        sensory: X.
        two_hot: sensory vectors are fixed: a symbol is two ones among X zeros (the reference code's compression), which
            has X (X - 1) / 2 symbols. Else W_x is learned.
        neurons: of the MLP.
        transition: activation of the codes.
    """

    code: int = option(64, "width of a position code", at_least(1))
    modules: tuple[int, ...] = ()
    places: int = option(20, limit=at_least(1))
    sensory: int = option(10, "number of TEM's sensory components", at_least(1))
    two_hot: bool = True
    neurons: int = option(128, limit=at_least(1))
    transition: str = option("identity", "activation of the position codes", choices=TRANSITIONS)

    def __post_init__(self) -> None:
        found = problems(self)
        if self.modules and (sum(self.modules) != self.code or any(n < 3 or n % 3 for n in self.modules)):
            found.append(f"modules {self.modules} must be multiples of 3 and sum to code {self.code}")
        raise_problems(found)


@dataclass(frozen=True)
class TemSettings:
    """Training of one model; the seed is that of environments, walks and initial weights."""

    seed: int = option(0, limit=at_least(0))
    spaces: tuple[str, ...] = option(
        ("5x5", "6x6", "7x7"), "spaces of one structure: 5x5, line:20, hex:5x5, family:4, 3x3x3, or files"
    )
    symbols: int = option(SYMBOLS, "number of different symbols", at_least(2))
    steps: int = option(1000, "number of gradient steps", at_least(1))
    batch: int = option(64, "environments per gradient step", at_least(1))
    walk_from: int = option(100, "steps of a walk that begins at the first gradient step", at_least(1))
    walk_to: int = option(100, "steps of a walk that begins at the last gradient step", at_least(1))
    walk_spread: int = option(
        0, "with --backprop, walks are up to so many steps shorter or longer", at_least(0)
    )  # fmt: skip
    backprop: int = option(
        0,
        "walking steps per gradient step; memory and codes are carried over, and each walk ends by itself (0: a whole "
        "walk)",
        at_least(0),
    )
    lr: float = option(1e-3, "learning rate of Adam", POSITIVE)
    clip: float = option(1.0, "maximum gradient norm", POSITIVE)
    test_every: int = option(50, "gradient steps between tests", at_least(1), name="evaluate-every")
    tested: int = option(96, "environments per test", at_least(1))
    tested_steps: int = option(200, "walking steps per environment of a test", at_least(1))

    def __post_init__(self) -> None:
        found = problems(self)
        if self.walk_spread and not self.backprop:
            found.append("walk-spread needs backprop: without it, the walks of a gradient step are equally long")
        if self.walk_spread >= min(self.walk_from, self.walk_to):
            found.append(f"walk-spread {self.walk_spread} must be below walk-from and walk-to")
        raise_problems(found)

    def walk(self, step: int) -> int:
        """Return the length of the walks of gradient step `step`, from 1; it changes evenly from first to last."""
        share = (min(step, self.steps) - 1) / max(1, self.steps - 1)
        return round(self.walk_from + share * (self.walk_to - self.walk_from))

    @property
    def longest(self) -> int:
        """Steps of the longest walk that is carried over, in whole back-propagations."""
        most = max(self.walk_from, self.walk_to) + self.walk_spread
        return -(-most // max(1, self.backprop)) * max(1, self.backprop)


@dataclass(frozen=True)
class RecordingSettings:
    """How units are recorded: codes in a room, and remapping between environments, in the largest room of training.

    Half of the probes of an environment make one map, half the other.
    """

    room: str | None = option(
        None,
        "room in which codes are recorded (default: 15x15 after squares, else the largest room of training)",
        kind=str,
    )
    walkers: int = option(512, "walkers in the room of the codes", at_least(21))
    steps: int = option(150, "recorded steps per walker, after 100 that are left out", at_least(1))
    shuffles: int = option(100, "shuffles per unit", at_least(20))
    environments: int = option(4, "environments for remapping", at_least(2))
    probes: int = option(64, "walkers per environment for remapping", at_least(2))

    def __post_init__(self) -> None:
        found = problems(self)
        if self.shuffles >= self.walkers:
            found.append(f"shuffles {self.shuffles} must be fewer than walkers {self.walkers}")
        raise_problems(found)
