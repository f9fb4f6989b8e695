"""Training of one model on walks in environments of one structure; accuracy on fresh environments as it goes.

Whittington et al. 2022, Section 3 and Figure 4: in every gradient step all environments are new, and so are those it
is tested on; what may be learned is the structure. Stages:

    environments of a step, walks as long as the curriculum says -> cross-entropy of every next symbol -> Adam -> every
    so many steps: accuracy at cells seen before, and over zero-shot links -> checkpoint

All that is drawn is a function of (seed, step). A killed training goes on from its last test with the same command and,
on a CPU with as many threads, ends with the same weights. Seconds are those of training alone, over all lives.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from llm.common.errors import UserError

from ..checks import below, refuse
from ..draws import seed_number
from ..folder import TableFolder, read_rows
from ..spaces import Graph, space
from ..state import start_moments, training_state
from ..variants import enable_fast_parts
from .environments import SYMBOLS, Environments, Episode, accuracy
from .machine import Machine, MachineSizes
from .memory import Rule
from .model import Prediction, Sizes, TemTransformer

PROGRAM, ROWS = "small.tem", "accuracy.csv"
PARTS = ("model", "settings", "spaces")
SPACES = ("5x5", "6x6", "7x7")


@dataclass(frozen=True)
class Model:
    """What is trained: TEM-t of these sizes, or TEM with its rule.

    Args:
        sizes: of either.
        rule: of TEM; None is TEM-t.
    """

    sizes: Sizes | MachineSizes
    rule: Rule | None = None

    @property
    def name(self) -> str:
        """In a folder's name."""
        return "tem-t" if self.rule is None else "tem"

    def build(self, actions: int, symbols: int) -> nn.Module:
        """The model, whose weights torch's own generator draws."""
        if isinstance(self.sizes, MachineSizes):
            assert self.rule is not None
            return Machine(actions, symbols, self.sizes, self.rule)
        return TemTransformer(actions, symbols, self.sizes)

    def record(self) -> dict[str, Any]:
        """In terms of JSON; `from_record` makes it anew."""
        return {"name": self.name, "sizes": asdict(self.sizes), "rule": self.rule and asdict(self.rule)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Model":
        """The model of `record()`."""
        if record["rule"] is None:
            return cls(Sizes(**record["sizes"]))
        modules = tuple(record["sizes"]["modules"])
        return cls(MachineSizes(**record["sizes"] | {"modules": modules}), Rule(**record["rule"]))


@dataclass(frozen=True)
class Settings:
    """How it is trained.

    Args:
        seed: of environments, walks and first weights.
        spaces: what `small.grid` takes; of one structure.
        symbols: different ones.
        steps: gradient steps.
        batch: environments of a step.
        walk_from, walk_to: steps of a walk in the first and in the last gradient step; between them they change evenly.
        lr: of Adam.
        clip: greatest norm of a gradient.
        test_every: gradient steps.
        tested: environments of a test.
        tested_steps: of their walks.
    """

    seed: int = 0
    spaces: tuple[str, ...] = SPACES
    symbols: int = SYMBOLS
    steps: int = 1000
    batch: int = 64
    walk_from: int = 100
    walk_to: int = 100
    lr: float = 1e-3
    clip: float = 1.0
    test_every: int = 50
    tested: int = 96
    tested_steps: int = 200

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "walk_from", "walk_to", "test_every", "tested", "tested_steps")
        problems = below(self, dict.fromkeys(counts, 1) | {"seed": 0, "symbols": 2})
        problems += [
            f"{name} {getattr(self, name)} must be a finite number above 0"
            for name in ("lr", "clip")
            if not 0 < getattr(self, name) < math.inf
        ]
        refuse(problems)

    def largest(self) -> Graph:
        """The space with most cells."""
        return max(map(space, self.spaces), key=lambda one: len(one.cells))

    def walk(self, step: int) -> int:
        """Steps of the walks of gradient step `step`, numbered from 1."""
        share = (step - 1) / max(1, self.steps - 1)
        return round(self.walk_from + share * (self.walk_to - self.walk_from))


class Row(NamedTuple):
    """What is known after a test; step 0 is the untrained model."""

    step: int
    seconds: float  # of training
    loss: float  # nats, the mean since the last test; NaN at step 0
    visited: float  # accuracy at cells that were seen before
    zero_shot: float  # accuracy over new links to such cells
    memories: float  # at the end of a walk of the test, the mean of its environments


class Run:
    """One model with its environments and optimizer; UserError where spaces or sizes cannot be."""

    def __init__(self, model: Model, settings: Settings, device: str = "cpu") -> None:
        self.settings, self.device = settings, torch.device(device)
        self.environments = Environments(
            [space(text) for text in settings.spaces], settings.seed, settings.symbols, self.device
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_number(settings.seed, "weights"))
            built = model.build(self.environments.actions, settings.symbols)
        self.model = built.to(self.device)
        enable_fast_parts(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.lr, fused=True)
        start_moments(self.optimizer)
        self.seconds = torch.zeros((), dtype=torch.float64)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that the training goes on from."""
        yield from training_state(self.model, self.optimizer)
        yield "seconds", self.seconds

    def train(self, step: int) -> Tensor:
        """One gradient step, numbered from 1; returns its loss."""
        began = time.perf_counter()
        self.model.train()
        told, episode = self._predicted("train", step, self.settings.batch, self.settings.walk(step))
        loss = F.cross_entropy(told.logits.flatten(0, 1), episode.symbols[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - began
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, step: int) -> tuple[float, float, float]:
        """In fresh environments: accuracies at cells seen before and over zero-shot links, and the memories kept."""
        self.model.eval()
        told, episode = self._predicted("test", step, self.settings.tested, self.settings.tested_steps)
        right = told.logits.argmax(-1) == episode.symbols[:, 1:]
        kept = (told.times < self.settings.tested_steps).sum(1).double().mean().item()
        return accuracy(right, episode.visited[:, 1:]), accuracy(right, episode.zero_shot[:, 1:]), kept

    def _predicted(self, kind: str, step: int, environments: int, steps: int) -> tuple[Prediction, Episode]:
        episode = self.environments.episode(kind, step, environments, steps)
        return self.model(episode.actions, episode.symbols), episode


def folder_of(path: Path, model: Model, settings: Settings) -> TableFolder[Row]:
    """The folder of one run: accuracy.csv has a row for each evaluation."""
    asked = {"model": model.record(), "settings": asdict(settings), "spaces": digests(settings)}
    return TableFolder(path, PROGRAM, asked, ROWS, Row)


def digests(settings: Settings) -> dict[str, str]:
    """What each space is: a file's may change under its name."""
    return {text: digest(space(text)) for text in settings.spaces}


def digest(graph: Graph) -> str:
    """16 hex digits of all that a space is."""
    return hashlib.sha256(json.dumps(graph.record()).encode()).hexdigest()[:16]


def read_table(path: Path) -> list[Row]:
    """Every row of a run, in order; UserError where there is none yet, or the file is damaged."""
    return read_rows(path / ROWS, Row)


def train(
    path: Path, model: Model, settings: Settings, device: str = "cpu", command: str = "", quiet: bool = False
) -> Sequence[Row]:
    """Train one model in the folder `path`, or go on with it; returns every row. `quiet` has no progress bar.

    Raises:
        UserError: the folder holds another run, is in use, or what it holds is damaged; spaces or sizes cannot be; the
            loss is not finite.
    """
    run = Run(model, settings, device)  # says what cannot be before a folder is made
    with folder_of(path, model, settings) as folder:
        if folder.done() == settings.steps:
            return folder.read()
        done = folder.restore(run.tensors())
        folder.begin(done, {"command": command, "device": device})
        with tqdm(
            total=settings.steps, initial=done, desc=path.name, unit=" steps", dynamic_ncols=True, leave=False,
            disable=quiet,
        ) as bar:  # fmt: skip
            if not folder.rows:
                folder.keep(Row(0, 0.0, math.nan, *run.evaluate(0)), 0, run.tensors())
            losses = []
            for step in range(done + 1, settings.steps + 1):
                losses.append(run.train(step))
                bar.update()
                if step % settings.test_every == 0 or step == settings.steps:
                    row = Row(step, run.seconds.item(), _mean(losses, step, settings), *run.evaluate(step))
                    bar.set_postfix_str(f"visited {row.visited:.2f}, zero-shot {row.zero_shot:.2f}")
                    folder.keep(row, step, run.tensors())
                    losses = []
        return folder.rows


def _mean(losses: Sequence[Tensor], step: int, settings: Settings) -> float:
    loss = torch.stack(list(losses)).mean().item()
    if not math.isfinite(loss):
        raise UserError(
            f"the loss before step {step} is {loss}, so the training has diverged: give an lr below {settings.lr:g}, "
            "or a smaller clip"
        )
    return loss
