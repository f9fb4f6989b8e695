"""Training of many two-layer transformers on the pair task: plain SGD, snapshots, exact resume.

Burns et al. 2025, Section 3: SGD 0.01, batch 128. From the authors' code
(github.com/tfburns/AMICL-and-residual-attention-streams): weights times (1 - 1e-6) each step, 75,000 steps, a snapshot
every 500. Stages:

    worlds of the seeds -> batches -> one step of all runs of a model -> every so many steps a snapshot -> checkpoint

Runs of one seed read the same batches and have the same initial weights. A killed training resumes from its last
snapshot with the same command and, on a CPU with as many threads, ends with the same bits.
"""

import itertools
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from llm.common.devices import resolve_device
from llm.common.errors import UserError
from llm.common.processes import progress_bar

from .model import Transformers
from .runs import UNSHIFTED, IclFolder, IclSpec, Snapshot
from .settings import IclSettings, Variant
from .task import KINDS, Sequences, World

AT_ONCE = 500  # sequences of an evaluation: 5 MB of inputs a seed; the fixed ones depend on it
COMPILED_AT_MOST = 256  # forms of a function: one for each variant; torch's own limit is 8


@dataclass(frozen=True)
class Machine:
    """Where and how the work is done; nothing of it is part of what a run is.

    Args:
        device: "cpu" or "cuda".
        compile: the step through torch.compile (a few seconds for each variant at the start).
        together: all runs as one batched model; else one run after the other, those of a seed on the same batch. None
            is the faster: together on a GPU, whose kernels are small here; apart on a CPU, whose caches hold one run.
    """

    device: str = "cpu"
    compile: bool = False
    together: bool | None = None

    def __post_init__(self) -> None:
        resolve_device(self.device)
        if self.compile and self.device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise UserError("torch.compile needs a C++ compiler, and there is none: install g++ or give --no-compile")

    @property
    def batched(self) -> bool:
        """Whether all runs are one model."""
        return self.device != "cpu" if self.together is None else self.together


class Runs:
    """The runs of some seeds: batched models that read the same sequences, their optimizers and their data.

    Args:
        seeds: of every model.
        together: one model of all variants, else one of each.
    """

    def __init__(self, spec: IclSpec, seeds: Sequence[int], together: bool, machine: Machine) -> None:
        task, settings = spec.task, spec.settings
        self.settings, self.seeds = settings, seeds
        self.worlds = [World(task, seed, machine.device, machine.compile) for seed in seeds]
        variants = [Variant.parse(name) for name in settings.variants]
        products = getattr(torch, settings.products)
        self.models = [
            Transformers(those, seeds, spec.sizes, task.tokens, task.content, products, machine.device)
            for those in ([variants] if together else [[variant] for variant in variants])
        ]
        # SGD's weight decay is times the learning rate: w <- w (1 - lr * decay / lr) - lr * gradient.
        decay = settings.decay / settings.lr
        self.optimizers = [
            torch.optim.SGD(model.parameters(), settings.lr, weight_decay=decay, foreach=True) for model in self.models
        ]
        self._losses, self._measures = _losses, _measures
        if machine.compile:
            torch._dynamo.config.recompile_limit = COMPILED_AT_MOST
            self._losses, self._measures = (torch.compile(each, dynamic=False) for each in (_losses, _measures))

    def train(self, step: int) -> None:
        """One step of every run."""
        inputs, answers = _stacked([world.batch(step, self.settings.batch) for world in self.worlds])
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            self._losses(model, inputs, answers).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def snapshot(self, step: int) -> list[Snapshot]:
        """Accuracy and loss of every run on the fixed evaluation sequences."""
        sums = {kind: [torch.zeros(3, len(model.runs)).double() for model in self.models] for kind in KINDS}
        for kind, totals in sums.items():
            for part, start in enumerate(range(0, self.settings.evaluation, AT_ONCE)):
                count = min(AT_ONCE, self.settings.evaluation - start)
                inputs, answers = _stacked([world.evaluation(kind, part, count) for world in self.worlds])
                learned = (answers - int(kind == "ic2")) % self.worlds[0].task.labels
                for model, total in zip(self.models, totals, strict=True):
                    total += self._measures(model, inputs, answers, learned).cpu() * count
        means = {kind: (torch.cat(totals, 1) / self.settings.evaluation).tolist() for kind, totals in sums.items()}
        number = step // self.settings.snapshot_every
        return [
            Snapshot(
                number, step, variant.name, seed,
                {kind: means[kind][0][run] for kind in KINDS},
                {kind: means[kind][1][run] for kind in KINDS} | {UNSHIFTED: means["ic2"][2][run]},
            )
            for run, (variant, seed) in enumerate(run for model in self.models for run in model.runs)
        ]  # fmt: skip


def _stacked(drawn: Sequence[Sequences]) -> tuple[Tensor, Tensor]:
    """Inputs (S, B, T, D) and answers (S, B) of S seeds."""
    return torch.stack([each.inputs for each in drawn]), torch.stack([each.answers for each in drawn])


def _losses(model: Transformers, inputs: Tensor, answers: Tensor) -> Tensor:
    return model.loss(model(inputs), answers)


def _measures(model: Transformers, inputs: Tensor, answers: Tensor, learned: Tensor) -> Tensor:
    """Accuracy and loss of each run, and its loss against the labels that were `learned`, (3, R)."""
    logits = model(inputs)
    right = logits.argmax(-1) == answers.expand(len(model.variants), -1, -1).flatten(0, 1)
    losses = (model.loss(logits, each).double() for each in (answers, learned))
    return torch.stack([right.double().mean(1), *losses])


def train(path: Path, spec: IclSpec, machine: Machine, command: str = "") -> list[Snapshot]:
    """Train all runs in the folder `path`, or resume them; returns every snapshot.

    Raises:
        UserError: the folder holds other runs, is in use, or what it holds is damaged.
    """
    settings = spec.settings
    with IclFolder(path, spec) as folder:
        groups = made(spec, machine)
        models = [model for group in groups for model in group.models]
        step = folder.restore(models)
        folder.begin(step, {"command": command, "machine": asdict(machine)})
        with _progress(settings, step) as bar:
            while not folder.snapshots or not finished(folder.snapshots, settings):
                if folder.snapshots:
                    step = _advance(groups, step, settings.snapshot_every, bar)
                rows = [row for group in groups for row in group.snapshot(step)]
                folder.keep(rows, step, models)
                bar.set_postfix_str(_in_one_line(rows))
        _report_diverged(folder.snapshots)
        return folder.snapshots


def made(spec: IclSpec, machine: Machine) -> list[Runs]:
    """Make untrained runs as this machine trains them best."""
    together, every = machine.batched, spec.settings.seeds
    return [Runs(spec, seeds, together, machine) for seeds in ([every] if together else [(seed,) for seed in every])]


def one_step(spec: IclSpec, machine: Machine) -> Callable[[], object]:
    """Return a function that trains one step of runs that are thrown away, to time it; on a CPU, of one seed."""
    runs, step = made(spec, machine)[0], itertools.count()
    return lambda: runs.train(next(step))


def finished(snapshots: Sequence[Snapshot], settings: IclSettings) -> bool:
    """Return whether nothing is left to train.

    The last step is done, or every run has had the accuracy `until` in the last `patience` snapshots, or no run has a
    finite loss any more.
    """
    last = snapshots[-1].snapshot
    diverged = not any(math.isfinite(row.loss["test"]) for row in snapshots if row.snapshot == last)
    if snapshots[-1].step >= settings.steps or diverged:
        return True
    if settings.until is None or last + 1 < settings.patience:
        return False
    recent = [row for row in snapshots if row.snapshot > last - settings.patience]
    return all(row.accuracy[kind] > settings.until for row in recent for kind in ("ic", "ic2"))


def _advance(groups: Sequence[Runs], step: int, steps: int, bar: tqdm) -> int:
    """`steps` steps of every group, one group after the other; returns the step they then have."""
    for group in groups:
        for number in range(step, step + steps):
            group.train(number)
            bar.update(1 / len(groups))
    return step + steps


def _progress(settings: IclSettings, step: int) -> tqdm:
    form = "{desc}{percentage:3.0f}% {bar} step {n:.0f}/{total} [{elapsed}<{remaining}] {postfix}"
    return progress_bar(settings.steps, step, "", "step", bar_format=form)


def _in_one_line(rows: Sequence[Snapshot]) -> str:
    """IC accuracy of each variant, the mean over its seeds."""
    names = dict.fromkeys(row.variant for row in rows)
    means = {name: fmean(row.accuracy["ic"] for row in rows if row.variant == name) for name in names}
    return "IC " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())


def _report_diverged(snapshots: Sequence[Snapshot]) -> None:
    for row in snapshots:
        if row.snapshot == snapshots[-1].snapshot and not math.isfinite(row.loss["test"]):
            print(
                f"{row.variant}, seed {row.seed}: the loss is not finite any more: pass a smaller --lr",
                file=sys.stderr,
            )
