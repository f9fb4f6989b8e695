"""Training of one navigator: a gradient step for every walking step, or for every segment; two errors after a trial.

Kim et al. 2023, Section 2.4 and Appendix A.4: 200 trials of 2,048 steps, 512 walkers, Adam whose learning rate falls
linearly from 1e-4 to 0; gradients clipped at 0.25. The rate falls at every segment, as in the authors' code
(github.com/kdkyum/transformer_memory_consolidation). Stages:

    trial of the world -> segments -> targets of each step, or of all steps at once -> Adam -> errors on familiar and
    novel maps -> checkpoint

Everything that is drawn in a trial is a function of (seed, trial), on one kind of device. A killed training resumes
from its last trial with the same command and, on a CPU with as many threads, ends with the same bits. A run whose
`trials` are raised is trained further: its rate then falls from where the longer schedule has it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.common.errors import UserError

from ..draws import seed_number
from ..experiment.runs import copy_into, start_moments, training_state
from ..variants import enable_fast_parts
from .model import Memory, Navigator
from .runs import MAPS, Errors, GridFolder, GridSpec, Row, read_asked
from .settings import check_segments
from .world import Walks, World


class Run:
    """One navigator with its world and optimizer.

    Args:
        spec: space, sizes, variant and settings.
        device: "cpu" or "cuda".
        compiled: the transformer goes through torch.compile, once for all times of a segment; None is on a GPU alone.

    Raises:
        UserError: the steps of a trial are not whole segments.
    """

    def __init__(self, spec: GridSpec, device: str = "cpu", compiled: bool | None = None) -> None:
        check_segments(spec.sizes, spec.settings)
        self.sizes, self.settings, self.device = spec.sizes, spec.settings, torch.device(device)
        settings = self.settings
        self.world = World(spec.space, settings.maps, settings.seed, settings.letters, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._number("weights"))
            model = Navigator(len(spec.space.actions), settings.letters, spec.sizes, spec.variant)
        self.model = model.to(self.device)
        enable_fast_parts(self.model)
        if self.device.type == "cuda" if compiled is None else compiled:
            self.model.read = torch.compile(self.model.read)  # type: ignore[method-assign]
        self.training_errors: Errors  # on the familiar maps of the last trial, in its training pass
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.lr, fused=True)
        start_moments(self.optimizer)

    def _number(self, purpose: str, index: int = 0) -> int:
        """Return a seed for torch."""
        return seed_number(self.settings.seed, purpose, index)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that the training resumes from."""
        return training_state(self.model, self.optimizer)

    def train(self, trial: int, bar: Any = None) -> float:
        """Train one trial, numbered from 1, and return the mean loss. Each segment advances `bar`.

        Raises:
            UserError: the loss is not finite.
        """
        length, settings = self.sizes.segment, self.settings
        segments = settings.steps // length
        walks = self.world.trial("train", trial, settings.batch, settings.steps)
        self.model.train()
        devices = [self.device] if self.device.type == "cuda" else []
        losses, wrong = [], []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._number("dropout", trial))
            code = self.first_code("train", trial, settings.batch)
            memory: Memory = ()
            for segment in range(segments):
                done = ((trial - 1) * segments + segment) / (settings.trials * segments)
                for group in self.optimizer.param_groups:
                    group["lr"] = settings.lr * (1 - done)
                found, last, code, memory = self._segment(walks, segment * length, code, memory)
                losses += found
                wrong.append(last)
                if bar is not None:
                    bar.update()
        self.training_errors = errors_of(torch.stack(wrong, dim=1), walks, length, self.sizes.window)
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of trial {trial} is {loss}, so the training has diverged: give an lr below "
                f"{settings.lr:g}, or a smaller clip"
            )
        return loss

    def _segment(
        self, walks: Walks, begin: int, code: Tensor, memory: Memory
    ) -> tuple[list[Tensor], Tensor, Tensor, Memory]:
        """The gradient steps of a segment: their losses, whether the last letter was predicted wrongly (B,), and the
        next segment's code and memory."""
        length = self.sizes.segment
        every = tuple(range(1, length + 1))
        losses = []
        for times in [every] if self.settings.objective == "parallel" else [(time,) for time in every]:
            now = slice(begin, begin + times[-1] + 1)
            with self._products():
                answer = self.model(code, walks.actions[:, now], walks.letters[:, now][:, :-1], memory, times)
            targets = walks.letters[:, begin + times[0] : begin + times[-1] + 1]
            loss = F.cross_entropy(answer.logits.float().flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        wrong = answer.logits[:, -1].detach().argmax(-1) != walks.letters[:, begin + length]
        return losses, wrong, answer.code.detach(), answer.memory

    @torch.no_grad()
    def evaluate(self, kind: str, trial: int) -> Errors:
        """The errors on "familiar" or "novel" maps at the last step of every segment, as in the authors' code."""
        length = self.sizes.segment
        walks = self.world.trial(kind, trial, self.settings.walkers, self.settings.steps)
        self.model.eval()
        code = self.first_code(kind, trial, self.settings.walkers)
        memory: Memory = ()
        wrong = []
        for begin in range(0, self.settings.steps, length):
            now = slice(begin, begin + length + 1)
            with self._products():
                answer = self.model(code, walks.actions[:, now], walks.letters[:, now][:, :-1], memory, (length,))
            code, memory = answer.code, answer.memory
            wrong.append(answer.logits[:, 0].argmax(-1) != walks.letters[:, begin + length])
        return errors_of(torch.stack(wrong, dim=1), walks, length, self.sizes.window)

    def first_code(self, kind: str, trial: int, walkers: int) -> Tensor:
        """e_1 of the walkers of a trial, (B, C)."""
        generator = torch.Generator(self.device).manual_seed(self._number(f"code {kind}", trial))
        return self.model.first_code(walkers, generator)

    def _products(self) -> Any:
        if self.settings.products == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def errors_of(wrong: Tensor, walks: Walks, segment: int, window: int) -> Errors:
    """wrong (B, segments): whether the letter after each segment was predicted wrongly."""
    after = slice(segment, None, segment)
    visited, new = walks.visited(window)[:, after], walks.first[:, after]

    def share(group: Tensor) -> float:
        return (wrong & group).sum().item() / group.sum().item() if group.any() else math.nan

    counts = (int(group.sum()) for group in (visited, ~visited, new))
    return Errors(share(visited), share(~visited), share(new), *counts)


def load(path: Path, device: str = "cpu") -> Run:
    """Load the run of a folder at its last checkpoint.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    run = Run(read_asked(path), device)
    copy_into(run.tensors(), path)
    return run


def train(
    path: Path,
    spec: GridSpec,
    device: str = "cpu",
    command: str = "",
    quiet: bool = False,
    compiled: bool | None = None,
) -> Sequence[Row]:
    """Train one navigator in the folder `path`, or resume it; returns every row.

    Args:
        path, spec: of the run.
        device, compiled: see `Run`.
        command: that is kept in run.json.
        quiet: without a progress bar.

    Raises:
        UserError: the folder holds another run, is in use, or what it holds is damaged.
    """
    settings, units = spec.settings, spec.settings.steps // spec.sizes.segment
    with GridFolder(path, spec) as folder:
        if folder.done() >= settings.trials:
            return folder.read()
        run = Run(spec, device, compiled)
        with folder.resumed(
            run.tensors(), command, device, settings.trials, "segments", quiet, units
        ) as (done, bar):  # fmt: skip
            if not folder.rows:
                folder.keep(_measured(run, 0, math.nan), 0, run.tensors())
            for trial in range(done + 1, settings.trials + 1):
                loss, row = run.train(trial, bar), None
                if trial % settings.evaluate_every == 0 or trial == settings.trials:
                    row = _measured(run, trial, loss)
                    bar.set_postfix_str(
                        ", ".join(f"{maps} {e.working:.2f} {e.reference:.2f}" for maps, e in row.errors.items())
                    )
                folder.keep(row, trial, run.tensors())
        return folder.rows


def _measured(run: Run, trial: int, loss: float) -> Row:
    errors = {kind: run.evaluate(kind, trial) for kind in MAPS}
    if run.settings.familiar == "training" and trial:
        errors["familiar"] = run.training_errors
    return Row(trial, loss, errors)


def one_step(spec: GridSpec, device: str, compiled: bool | None) -> Callable[[], object]:
    """Return a function that trains one segment of a run that is thrown away, to time it."""
    run = Run(spec, device, compiled)
    walks = run.world.trial("timing", 0, spec.settings.batch, spec.sizes.segment)
    run.model.train()
    return lambda: run._segment(walks, 0, run.first_code("timing", 0, spec.settings.batch), ())
