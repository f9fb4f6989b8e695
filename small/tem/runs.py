"""Runs of one folder: what each is asked to be, its table, which there are, and what each is called.

models x seeds -> OUT/tem-t,seed=0/ -> runs that are there -> groups of seeds
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import nn

from llm.common.errors import UserError

from ..experiment import groups
from ..experiment.runs import (
    TENSORS,
    RunSpec,
    SavedRun,
    TableFolder,
    checkpoint_step,
    read_record,
    read_rows,
    read_spec,
    run_folders,
)
from ..spaces import Graph, space
from .machine import Machine
from .memory import Rule
from .model import TemTransformer
from .settings import MachineSizes, TemSettings, TransformerSizes

ROWS = "accuracy.csv"
NAMES = {"tem-t": "TEM-t", "tem": "TEM"}


@dataclass(frozen=True)
class Model:
    """What is trained: TEM-t of these sizes, or TEM with its rule.

    Args:
        sizes: of either.
        rule: of TEM; None is TEM-t.
    """

    sizes: TransformerSizes | MachineSizes
    rule: Rule | None = None

    @property
    def name(self) -> str:
        """In a folder's name."""
        return "tem-t" if self.rule is None else "tem"

    def build(self, actions: int, symbols: int) -> nn.Module:
        """Build the model, whose weights torch's own generator draws."""
        if isinstance(self.sizes, MachineSizes):
            assert self.rule is not None
            return Machine(actions, symbols, self.sizes, self.rule)
        return TemTransformer(actions, symbols, self.sizes)

    def record(self) -> dict[str, Any]:
        """Return the model in terms of JSON, for `from_record`."""
        return {"name": self.name, "sizes": asdict(self.sizes), "rule": self.rule and asdict(self.rule)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Model":
        """Make the model of `record()`."""
        if record["rule"] is None:
            return cls(TransformerSizes(**record["sizes"]))
        modules = tuple(record["sizes"]["modules"])
        return cls(MachineSizes(**record["sizes"] | {"modules": modules}), Rule(**record["rule"]))


@dataclass(frozen=True)
class TemSpec(RunSpec):
    """One model, as it is asked for."""

    program: ClassVar = "small.tem"
    model: Model
    settings: TemSettings

    def record(self) -> dict[str, dict[str, Any]]:
        return super().record() | {"spaces": digests(self.settings)}

    def completed(self, record: dict[str, Any]) -> dict[str, Any]:
        model = Model.from_record(record["model"]).record()  # a rule has had more fields since
        return super().completed(record) | {"model": json.loads(json.dumps(model))}

    @cached_property
    def facts(self) -> dict[str, Any]:
        rule = {} if self.model.rule is None else {f"rule.{k}": v for k, v in asdict(self.model.rule).items()}
        found = {"model": self.model.name, **asdict(self.model.sizes), **rule, **asdict(self.settings)}
        del found["seed"]
        return found


class Row(NamedTuple):
    """What is known after a test; step 0 is the untrained model."""

    step: int
    seconds: float  # of training
    loss: float  # nats, the mean since the last test; NaN at step 0
    visited: float  # accuracy at cells that were seen before
    zero_shot: float  # accuracy over new links to such cells
    memories: float  # at the end of a walk of the test, the mean of its environments


def digests(settings: TemSettings) -> dict[str, str]:
    """Return a digest of each space: a file may change under its name."""
    return {text: digest(space(text)) for text in settings.spaces}


def digest(graph: Graph) -> str:
    """Return 16 hex digits of all that a space is."""
    return hashlib.sha256(json.dumps(graph.record()).encode()).hexdigest()[:16]


def largest_space(settings: TemSettings) -> Graph:
    """Return the space of training with most cells."""
    return max(map(space, settings.spaces), key=lambda one: len(one.cells))


def folder_of(path: Path, spec: TemSpec) -> TableFolder[Row]:
    """Return the folder of one run: accuracy.csv has a row for each evaluation."""
    return TableFolder(path, spec, ROWS, Row)


# ---- Many runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TemRun(SavedRun[Row], TemSpec):
    """One model, as of the last checkpoint in its folder."""


def combinations(models: Sequence[Model], settings: TemSettings, seeds: Sequence[int]) -> list[TemSpec]:
    """Return a run of each model with each seed, seed by seed."""
    return [
        TemSpec(model, replace(settings, seed=s), label=f"{model.name},seed={s}") for s in seeds for model in models
    ]


def read_runs(out: Path) -> list[TemRun]:
    """Read the runs of a folder that have a checkpoint, TEM-t first; `out` may be one run itself.

    Raises:
        UserError: there is none, or one is damaged.
    """
    found = [_read(folder) for folder in run_folders(out, TemSpec.program, TENSORS)]
    return sorted(found, key=lambda run: (list(NAMES).index(run.model.name), run.settings.seed))


def read_asked(path: Path) -> TemSpec:
    """Read what run.json of a run says of it; UserError if it is not of this version, or a space has changed."""

    def make(record: dict[str, Any]) -> TemSpec:
        settings = TemSettings(**record["settings"] | {"spaces": tuple(record["settings"]["spaces"])})
        return TemSpec(Model.from_record(record["model"]), settings, label=path.name)

    parts = ("model", "settings", "spaces")
    spec = read_spec(path, TemSpec.program, parts, make)
    if read_record(path, TemSpec.program, parts)["spaces"] != digests(spec.settings):
        raise UserError(f"a file among the spaces of {path} has changed since: put it back, or train again")
    return spec


def _read(folder: Path) -> TemRun:
    spec, step = read_asked(folder), checkpoint_step(folder)  # a kill may have left a table that is one row ahead
    rows = [row for row in read_rows(folder / ROWS, Row) if row.step <= step]
    return TemRun(**spec.parts, label=spec.label, folder=folder, rows=rows)


def names(of: Sequence[Sequence[TemRun]]) -> list[str]:
    """Name each group: its model, and what else tells it from others of this model."""
    found = []
    for group in of:
        alike = [other for other in of if other[0].model.name == group[0].model.name]
        rest = groups.differences(alike, ())[alike.index(group)]
        found.append(", ".join(filter(None, [NAMES[group[0].model.name], rest])))
    return found
