"""`python -m llm study tasks`: the job arrays of a study, and what a task of one trains; for slurm/study.sh."""

from __future__ import annotations

from collections.abc import Iterator

from ..common.errors import UserError
from .inspection import Inspection
from .registration import is_ready, register
from .run import share
from .runs import config_path


def arrays(inspection: Inspection) -> Iterator[str]:
    """Yield a line for each array: stage, size, tasks, nodes, GPUs and cores per node, time limit.

    A task is a run with the branches that start from it.
    """
    study, chains = inspection.study, dict[tuple[str, str], dict[str, None]]()
    for run in register(inspection).runs:
        chains.setdefault((run.stage, run.size), {})[run.chain] = None
    for (stage, size), tasks in chains.items():
        wanted = study.slurm[size]
        yield f"{stage} {size} {len(tasks)} {wanted.nodes} {wanted.gpus} {wanted.cpus} {wanted.time}"


def task_configs(inspection: Inspection, stage: str, size: str, task: str) -> Iterator[str]:
    """Yield the config of each run of a task that is not over, a trunk before its branches.

    Raises:
        UserError: the search that they wait for is not over, or there is no such task.
    """
    study, record = inspection.study, register(inspection)
    for run in share([run for run in record.runs if (run.stage, run.size) == (stage, size)], task):
        if not is_ready(study, record, run):
            raise UserError(f"the search of {study.path} is not over: see python -m llm study status {study.path}")
        if not record.state(run).over:
            yield str(config_path(study, run))
