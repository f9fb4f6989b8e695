"""Training of one navigator: a gradient step for every walking step, or for every segment; two errors after a trial.

Kim et al. 2023, Section 2.4 and Appendix A.4: 200 trials of 2,048 steps, 512 walkers, Adam whose learning rate falls
linearly from 1e-4 to 0; gradients clipped at 0.25. The rate falls at every segment, as in the authors' code
(github.com/kdkyum/transformer_memory_consolidation). Stages:

    trial of the world -> segments -> targets of each step, or of all steps at once -> Adam -> errors on familiar and
    novel maps -> checkpoint

Everything that is drawn in a trial is a function of (seed, trial), on one kind of device. A killed training goes on
from its last trial with the same command and, on a CPU with as many threads, ends with the same bits.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llm.common.errors import UserError

from ..checks import below, refuse
from ..draws import seed_number
from ..folder import RECORD, TableFolder, as_csv, copy_into, read_record
from ..spaces import Graph
from ..state import start_moments, training_state
from ..variants import enable_fast_parts
from .model import Memory, Navigator, Sizes, Variant
from .world import Walks, World

PROGRAM, ROWS = "small.grid", "errors.csv"
PARTS = ("space", "sizes", "variant", "settings")
OBJECTIVES = ("steps", "parallel")
PRODUCTS = ("float32", "bfloat16")
MAPS = ("familiar", "novel")


@dataclass(frozen=True)
class Settings:
    """How one navigator is trained; the defaults are the paper's.

    Args:
        seed: of maps, walks, first weights and dropout.
        maps: N of training, and as many others.
        letters: different ones.
        trials: of training.
        steps: of a trial, a multiple of the segment.
        batch: walkers.
        lr: of Adam, at the start.
        clip: greatest norm of a gradient.
        objective: "steps", a gradient step for every walking step; or "parallel", one for every segment, whose loss is
            the mean over all of its targets.
        walkers: of an evaluation, on each kind of maps.
        evaluate_every: trials; the last one is always evaluated.
        products: "bfloat16" is autocast to it: weights, their updates, recurrent codes and softmax stay float32.
    """

    seed: int = 0
    maps: int = 32
    letters: int = 10
    trials: int = 200
    steps: int = 2048
    batch: int = 512
    lr: float = 1e-4
    clip: float = 0.25
    objective: str = "steps"
    walkers: int = 512
    evaluate_every: int = 1
    products: str = "float32"

    def __post_init__(self) -> None:
        counts = ("maps", "trials", "steps", "batch", "walkers", "evaluate_every")
        problems = below(self, dict.fromkeys(counts, 1) | {"seed": 0, "letters": 2})
        problems += [
            f"{name} {getattr(self, name)} must be a finite number above 0"
            for name in ("lr", "clip")
            if not 0 < getattr(self, name) < math.inf
        ]
        problems += [
            f"{name} {value!r} is unknown: give {' or '.join(known)}"
            for name, value, known in (
                ("objective", self.objective, OBJECTIVES),
                ("dtype", self.products, PRODUCTS),
            )
            if value not in known
        ]
        refuse(problems)


class Errors(NamedTuple):
    """Shares of wrong letters, and how many targets they are of; NaN of none."""

    working: float  # the cell was visited within the window
    reference: float  # it was not
    first: float  # it is visited for the first time in the trial
    visited: int
    unvisited: int
    new: int


class Row(NamedTuple):
    """What is known after a trial; trial 0 is the untrained navigator."""

    trial: int
    loss: float  # nats, the mean of the trial's training; NaN at trial 0
    errors: dict[str, Errors]  # of each of MAPS


class Run:
    """One navigator with its world and optimizer.

    Args:
        graph: the space.
        sizes, variant, settings: see there.
        device: "cpu" or "cuda".
        compiled: the transformer goes through torch.compile, once for all times of a segment; None is on a GPU alone.

    Raises:
        UserError: the steps of a trial are not whole segments.
    """

    def __init__(
        self,
        graph: Graph,
        sizes: Sizes,
        variant: Variant,
        settings: Settings,
        device: str = "cpu",
        compiled: bool | None = None,
    ) -> None:
        check_segments(sizes, settings)
        self.sizes, self.settings, self.device = sizes, settings, torch.device(device)
        self.world = World(graph, settings.maps, settings.seed, settings.letters, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._number("weights"))
            model = Navigator(len(graph.actions), settings.letters, sizes, variant)
        self.model = model.to(self.device)
        enable_fast_parts(self.model)
        if self.device.type == "cuda" if compiled is None else compiled:
            self.model.read = torch.compile(self.model.read)  # type: ignore[method-assign]
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.lr, fused=True)
        start_moments(self.optimizer)

    def _number(self, purpose: str, index: int = 0) -> int:
        """A seed for torch."""
        return seed_number(self.settings.seed, purpose, index)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that the training goes on from."""
        return training_state(self.model, self.optimizer)

    def train(self, trial: int, bar: Any = None) -> float:
        """One trial, numbered from 1; returns the mean loss. `bar` is told of every segment.

        Raises:
            UserError: the loss is not finite.
        """
        length, settings = self.sizes.segment, self.settings
        segments = settings.steps // length
        walks = self.world.trial("train", trial, settings.batch, settings.steps)
        self.model.train()
        devices = [self.device] if self.device.type == "cuda" else []
        losses = []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._number("dropout", trial))
            code = self.first_code("train", trial, settings.batch)
            memory: Memory = ()
            for segment in range(segments):
                done = ((trial - 1) * segments + segment) / (settings.trials * segments)
                for group in self.optimizer.param_groups:
                    group["lr"] = settings.lr * (1 - done)
                found, code, memory = self._segment(walks, segment * length, code, memory)
                losses += found
                if bar is not None:
                    bar.update()
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of trial {trial} is {loss}, so the training has diverged: give an lr below "
                f"{settings.lr:g}, or a smaller clip"
            )
        return loss

    def _segment(self, walks: Walks, begin: int, code: Tensor, memory: Memory) -> tuple[list[Tensor], Tensor, Memory]:
        """The gradient steps of a segment: their losses, and the next segment's code and memory."""
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
        return losses, answer.code.detach(), answer.memory

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


def check_segments(sizes: Sizes, settings: Settings) -> None:
    """UserError where the steps of a trial are not whole segments."""
    if settings.steps % sizes.segment:
        raise UserError(f"steps {settings.steps} must be a multiple of the segment {sizes.segment}")


def errors_of(wrong: Tensor, walks: Walks, segment: int, window: int) -> Errors:
    """wrong (B, segments): whether the letter after each segment was not told."""
    after = slice(segment, None, segment)
    visited, new = walks.visited(window)[:, after], walks.first[:, after]

    def share(group: Tensor) -> float:
        return (wrong & group).sum().item() / group.sum().item() if group.any() else math.nan

    counts = (int(group.sum()) for group in (visited, ~visited, new))
    return Errors(share(visited), share(~visited), share(new), *counts)


class Folder(TableFolder[Row]):
    """Of one run: errors.csv has a row for each trial that was evaluated."""

    COLUMNS: ClassVar = ("trial", "loss", *(f"{maps}_{name}" for maps in MAPS for name in Errors._fields))

    def __init__(self, path: Path, graph: Graph, sizes: Sizes, variant: Variant, settings: Settings) -> None:
        asked = {
            "space": graph.record(), "sizes": asdict(sizes), "variant": asdict(variant), "settings": asdict(settings)
        }  # fmt: skip
        super().__init__(path, PROGRAM, asked, ROWS, Row)

    def read(self) -> list[Row]:
        return read_rows(self.path)

    def as_text(self) -> str:
        values = ([row.trial, row.loss, *(v for maps in MAPS for v in row.errors[maps])] for row in self.rows)
        return as_csv(self.COLUMNS, values)


def read_rows(path: Path) -> list[Row]:
    """Every row of a run, in order; UserError where there is none yet, or the file is damaged."""
    try:
        with (path / ROWS).open(newline="") as file:
            found = [
                Row(int(row["trial"]), float(row["loss"]), {maps: _errors(row, maps) for maps in MAPS})
                for row in csv.DictReader(file)
            ]
        if not found:
            raise ValueError("it has no rows")
        return found
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path / ROWS} cannot be read ({error!r}): train again with another --out") from error


def _errors(row: dict[str, str], maps: str) -> Errors:
    kinds: dict[str, Any] = Errors.__annotations__
    return Errors(**{name: kind(row[f"{maps}_{name}"]) for name, kind in kinds.items()})


def load(path: Path, device: str = "cpu") -> Run:
    """The run of a folder at its last checkpoint.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    graph, sizes, variant, settings = read_asked(path)
    run = Run(graph, sizes, variant, settings, device)
    copy_into(run.tensors(), path)
    return run


def read_asked(path: Path) -> tuple[Graph, Sizes, Variant, Settings]:
    """What run.json of a run says of it; UserError where it is not of this version."""
    record = read_record(path, PROGRAM, PARTS)
    try:
        variant = Variant(**record["variant"])
        sizes, settings = Sizes(**record["sizes"]), Settings(**record["settings"])
        return Graph.from_record(record["space"]), sizes, variant, settings
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path / RECORD} is of another version ({error}): train again with another --out") from error


def train(
    path: Path,
    graph: Graph,
    sizes: Sizes,
    variant: Variant,
    settings: Settings,
    device: str = "cpu",
    command: str = "",
    quiet: bool = False,
    compiled: bool | None = None,
) -> Sequence[Row]:
    """Train one navigator in the folder `path`, or go on with it; returns every row.

    Args:
        path, graph, sizes, variant, settings: of the run.
        device, compiled: see `Run`.
        command: that is kept in run.json.
        quiet: without a progress bar.

    Raises:
        UserError: the folder holds another run, is in use, or what it holds is damaged.
    """
    with Folder(path, graph, sizes, variant, settings) as folder:
        if folder.done() == settings.trials:
            return folder.read()
        run = Run(graph, sizes, variant, settings, device, compiled)
        done = folder.restore(run.tensors())
        folder.begin(done, {"command": command, "device": device})
        segments = settings.steps // sizes.segment
        with tqdm(
            total=settings.trials * segments, initial=done * segments, desc=path.name, unit=" segments",
            dynamic_ncols=True, leave=False, disable=quiet,
        ) as bar:  # fmt: skip
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
    return Row(trial, loss, {kind: run.evaluate(kind, trial) for kind in MAPS})
