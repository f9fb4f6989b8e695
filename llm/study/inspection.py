"""The configs of a study, each arm at each size: what they cost, and what is wrong with them.

Stages: base config + overrides of size and arm -> the classes that a run would make, on the meta device -> sizes and
FLOPs -> steps of each budget -> problems of all of them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UserError
from ..data.module import TokenDataModule
from ..data.store import check_vocabulary
from ..plan.parameters import embedding_parameters, parameters, table
from ..plan.plan import PlannedRun, instantiate, run_of
from ..train.flops import flops_per_token
from ..train.module import LanguageModule
from .description import Study, configured

Key = tuple[str, str]  # (size, arm)


@dataclass(frozen=True)
class Inspected:
    """An arm at a size.

    Args:
        run, model, data: of its config.
        parameters: all of them.
        non_embedding: without embedding, learned positions and an output matrix of its own.
        flops_per_token: model FLOPs, forward and backward.
        on_cpu: whether the config asks for CPUs.
        one_device: whether it asks for one device.
        layout: stage (0: one device, or DDP), and whether it has off-load and is FSDP2's.
    """

    run: PlannedRun
    model: LanguageModule
    data: TokenDataModule
    parameters: int
    non_embedding: int
    flops_per_token: float
    on_cpu: bool
    one_device: bool
    layout: dict[str, Any]

    def steps(self, tokens: float) -> int:
        """Return the optimizer steps that see about so many tokens."""
        return max(1, round(tokens / self.tokens_per_step))

    @property
    def tokens_per_step(self) -> int:
        return self.run.batch_size * self.run.context


@dataclass(frozen=True)
class Inspection:
    """All arms at all sizes; `notes` are sentences that a reader of the result needs, `missing_stores` not here."""

    study: Study
    configs: dict[Key, Inspected]
    notes: list[str]
    missing_stores: list[str]

    def of(self, size: str, arm: str) -> Inspected:
        """Return an arm at a size; the null arm is the baseline."""
        return self.configs[size, arm if arm in self.study.arms else self.study.baseline]

    def budgets(self, size: str) -> list[int]:
        """Return the steps of each budget at a size, ascending."""
        baseline = self.of(size, self.study.baseline)
        return [baseline.steps(tokens) for tokens in self.study.tokens.of(baseline.non_embedding)]

    def cooldown(self, steps: int) -> int:
        """Return how many of a run's last steps cool down; 0 if the study leaves the schedule to the config."""
        share = self.study.tokens.cooldown
        return max(1, round(float(share) * steps)) if share else 0


def inspect(study: Study) -> Inspection:
    """Look through the configs of a study.

    Raises:
        UserError: some of them cannot be run; the message names every problem and where it is.
    """
    found: dict[Key, Inspected] = {}
    problems: dict[str, list[Key]] = {}  # each with the places where it is
    for size in study.sizes:
        for arm in study.arms:
            try:
                found[size, arm] = _inspected(study, size, arm)
            except UserError as error:
                problems.setdefault(str(error), []).append((size, arm))
    away = {path for each in found.values() for path in each.data.weights if not Path(path).exists()}
    inspection = Inspection(study, found, _notes(study), sorted(away))
    if not problems:
        for size, arm in found:
            for problem in _problems(inspection, size, arm):
                problems.setdefault(problem, []).append((size, arm))
        for problem in _size_problems(inspection):
            problems.setdefault(problem, [])
    if problems:
        messages = [f"{_places(study, places)}{problem}" for problem, places in problems.items()]
        raise UserError(f"{study.path} cannot be run: " + "; ".join(messages))
    return inspection


def _inspected(study: Study, size: str, arm: str) -> Inspected:
    config = configured(study.base, study.overrides(size, arm), {"trainer.max_steps": 1})
    cli = instantiate(yaml.safe_dump(config, sort_keys=False))
    decoder, data = cli.model.decoder_config, cli.datamodule
    if problems := data.problems():
        raise UserError("; ".join(problems))
    trainer, strategy = (config.get(section) or {} for section in ("trainer", "strategy"))
    sharded, fsdp = strategy.get("name") in ("deepspeed", "fsdp2"), strategy.get("name") == "fsdp2"
    stage = strategy.get("stage", 1) if sharded else 0
    every = parameters(decoder)
    head = 0 if decoder.tie_word_embeddings else table(decoder)
    return Inspected(
        run=run_of(cli),
        model=cli.model,
        data=data,
        parameters=every,
        non_embedding=every - embedding_parameters(decoder) - head,
        flops_per_token=flops_per_token(decoder, data.context),
        on_cpu=trainer.get("accelerator") == "cpu",
        one_device=str(trainer.get("devices", 1)) == "1",
        layout={"stage": stage, "offload": bool(strategy.get("offload_optimizer")), "fsdp": fsdp},
    )


def _problems(inspection: Inspection, size: str, arm: str) -> Iterator[str]:
    """Yield what is wrong with the runs of an arm at a size, a sentence each."""
    found, study = inspection.of(size, arm), inspection.study
    budgets = inspection.budgets(size)
    schedule = found.model.schedule
    for steps in budgets:
        if cooldown := inspection.cooldown(steps):
            found.model.schedule = dataclasses.replace(schedule, shape="constant", cooldown_steps=cooldown)
        yield from found.model.problems(steps, found.run.context)
    found.model.schedule = schedule
    if len(set(budgets)) < len(budgets):
        yield f"budgets of {budgets} steps are too close to be messages apart: lower data.batch_size or raise tokens"
    try:
        found.data.micro_batches(study.slurm[size].devices)
        if not inspection.missing_stores:
            found.data.open()
            found.data.check_sizes()
            check_vocabulary(found.data.components[0].train, int(found.run.config.unpadded_vocab_size or 0))
            epochs = max(found.data.epochs(budgets[-1]).values())
            if epochs > float(study.tokens.max_epochs):
                wanted = f"{budgets[-1] * found.tokens_per_step:,} tokens"
                yield (
                    f"{wanted} are {epochs:.2f} epochs of {found.data.named}: lower tokens, prepare more, or raise "
                    "tokens.max_epochs"
                )
    except UserError as error:
        yield str(error)


def _size_problems(inspection: Inspection) -> Iterator[str]:
    sizes = {size: inspection.of(size, inspection.study.baseline).non_embedding for size in inspection.study.sizes}
    for (smaller, few), (larger, many) in pairwise(sizes.items()):
        if few >= many:
            yield f"sizes must increase: {smaller} has {few:,} non-embedding parameters, and {larger} after it {many:,}"


def _places(study: Study, places: list[Key]) -> str:
    if not places or len(places) == len(study.sizes) * len(study.arms):
        return ""
    return f"{', '.join(f'{arm} at {size}' for size, arm in places)}: "


def _notes(study: Study) -> list[str]:
    if not study.own_seeds:
        return []
    shared = "the seeds are the user's, the same at every size, so that sizes share their luck"
    return [f"{shared}: an interval of 95% for the mean over sizes covers about 85%"]
