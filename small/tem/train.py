"""Training of one model on walks in environments of one structure; accuracy on fresh environments as it goes.

Whittington et al. 2022, Section 3 and Figure 4: in every gradient step all environments are new, and so are those it
is tested on; what may be learned is the structure. Stages:

    environments of a step, walks as long as the curriculum says -> cross-entropy of every next symbol -> Adam -> every
    so many steps: accuracy at cells seen before, and over zero-shot links -> checkpoint

With `backprop`, a gradient step is of that many steps of walks that go on: codes and memory are carried over, gradients
are not, as in TEM's reference code.

All that is drawn is a function of (seed, step). A killed training resumes from its last test with the same command and,
on a CPU with as many threads, ends with the same weights. Seconds are those of training alone, over all attempts.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.common.errors import UserError

from ..draws import seed_number
from ..experiment.runs import start_moments, training_state
from ..spaces import space
from ..variants import enable_fast_parts
from .environments import Environments, Episode, LongWalks, accuracy
from .model import Carry
from .runs import Row, TemSpec, folder_of
from .settings import TemSettings, TransformerSizes


class Run:
    """One model with its environments and optimizer; UserError where spaces or sizes cannot be."""

    def __init__(self, spec: TemSpec, device: str = "cpu") -> None:
        self.settings, self.device = spec.settings, torch.device(device)
        settings = self.settings
        self.environments = Environments(
            [space(text) for text in settings.spaces], settings.seed, settings.symbols, self.device
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_number(settings.seed, "weights"))
            built = spec.model.build(self.environments.actions, settings.symbols)
        self.model = built.to(self.device)
        enable_fast_parts(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.lr, fused=True)
        start_moments(self.optimizer)
        self.seconds = torch.zeros((), dtype=torch.float64)
        self.carry: Carry | None = None
        if settings.backprop:
            self.walks = LongWalks(self.environments, settings)
            if isinstance(spec.model.sizes, TransformerSizes) and spec.model.sizes.store != "all":
                raise UserError(f"--backprop carries all moments over: drop --store {spec.model.sizes.store}")
            self.carry = self.model.carry(settings.batch, settings.longest)  # type: ignore[operator]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that the training resumes from."""
        yield from training_state(self.model, self.optimizer)
        yield "seconds", self.seconds
        if self.carry is not None:
            yield "carry.code", self.carry.code
            yield from ((f"carry.{name}", tensor) for name, tensor in self.carry.memory.items())

    def at(self, updates: int) -> None:
        """Give the model the rule of its memory after so many gradient steps."""
        self.model.updates = updates  # type: ignore[assignment]

    def train(self, step: int) -> Tensor:
        """Make one gradient step, numbered from 1, and return its loss."""
        began = time.perf_counter()
        self.model.train()
        logits, symbols = self._of_training(step)
        loss = F.cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten())
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
        self.at(step)
        count, steps = self.settings.tested, self.settings.tested_steps
        episode = self.environments.episode("test", step, count, steps)
        if self.settings.backprop:
            logits, kept = self._in_parts(episode), float(steps)
        else:
            prediction = self.model(episode.actions, episode.symbols)
            logits, kept = prediction.logits, (prediction.times < steps).sum(1).double().mean().item()
        right = logits.argmax(-1) == episode.symbols[:, 1:]
        return accuracy(right, episode.visited[:, 1:]), accuracy(right, episode.zero_shot[:, 1:]), kept

    def _of_training(self, step: int) -> tuple[Tensor, Tensor]:
        """Logits (B, T - 1, symbols) of a gradient step, and its symbols (B, T)."""
        self.at(step - 1)
        if self.carry is None:
            episode = self.environments.episode("train", step, self.settings.batch, self.settings.walk(step))
            return self.model(episode.actions, episode.symbols).logits, episode.symbols
        actions, symbols, fresh = self.walks.part(step)
        self.carry.fresh.copy_(fresh)
        return self.model(actions, symbols, self.carry).logits, symbols

    def _in_parts(self, episode: Episode) -> Tensor:
        """Logits of whole walks (B, T - 1, symbols), in parts as in training."""
        (count, steps), of = episode.actions.shape, self.settings.backprop
        carry = self.model.carry(count, steps - 1)  # type: ignore[operator]
        parts = [slice(begin, min(begin + of + 1, steps)) for begin in range(0, steps - 1, of)]
        return torch.cat([self.model(episode.actions[:, p], episode.symbols[:, p], carry).logits for p in parts], 1)


def train(path: Path, spec: TemSpec, device: str = "cpu", command: str = "", quiet: bool = False) -> Sequence[Row]:
    """Train one model in the folder `path`, or resume it; returns every row. `quiet` has no progress bar.

    Raises:
        UserError: the folder holds another run, is in use, or what it holds is damaged; spaces or sizes cannot be; the
            loss is not finite.
    """
    run, settings = Run(spec, device), spec.settings  # says what cannot be before a folder is made
    with folder_of(path, spec) as folder:
        if folder.done() == settings.steps:
            return folder.read()
        with folder.resumed(run.tensors(), command, device, settings.steps, "steps", quiet) as (done, bar):
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


def _mean(losses: Sequence[Tensor], step: int, settings: TemSettings) -> float:
    loss = torch.stack(list(losses)).mean().item()
    if not math.isfinite(loss):
        raise UserError(
            f"the loss before step {step} is {loss}, so the training has diverged: give an lr below {settings.lr:g}, "
            "or a smaller clip"
        )
    return loss
