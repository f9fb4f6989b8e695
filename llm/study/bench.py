"""`python -m llm study bench`: the step time of every arm, relative to the baseline's.

All arms take turns on one device, each through the whole fit loop, so that a drift of the machine meets all of them.
Their configs are those of the study's runs, but for a constant learning rate and random tokens.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from ..bench.contenders import Plan, TrainerLoop
from ..bench.step import ratio, resolve_options, take_turns
from ..common.environment import environment
from ..common.errors import UserError
from ..common.files import write_json
from ..common.tables import text_table
from ..runs.study_record import BENCH
from ..train.compilation import RECOMPILE_LIMIT
from ..train.optim import Schedule
from .description import Study, configured


def bench(study: Study, size: str, rounds: int, steps: int) -> None:
    """Print tokens per second of every arm at a size, and write them to the study's folder.

    Args:
        study: whose arms are timed; the null arm takes the baseline's time.
        size: of the models.
        rounds: turns of each arm.
        steps: counted steps of a turn, of one micro-batch each.

    Raises:
        UserError: an arm cannot be trained here; the message names it.
    """
    with tempfile.TemporaryDirectory() as folder:
        arms = [study.baseline, *(arm for arm in study.arms if arm != study.baseline)]
        contenders = {arm: _contender(study, size, arm, Path(folder, arm), steps) for arm in arms}
        plan = contenders[study.baseline].plan
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT * len(arms)  # their blocks are variants of one function
        windows, _ = take_turns(plan, dict(contenders), rounds, steps)
    result: dict[str, Any] = {
        "command": f"python -m llm study bench {study.path} --size {size} --rounds {rounds} --steps {steps}",
        "size": size,
        "precision": plan.precision,
        "rows": plan.rows,
        "context": plan.context,
        "tokens_per_second": {arm: [each.tokens_per_second for each in windows[arm]] for arm in arms},
        **{f"{arm}_to_{study.baseline}": ratio(windows, arm, study.baseline) for arm in arms[1:]},
        **environment(),
    }
    study.folder.mkdir(parents=True, exist_ok=True)
    write_json(study.folder / BENCH, result, indent=1)
    print(_table(study.baseline, result))
    print(f"{study.folder / BENCH}: {size}, {plan.rows} x {plan.context} tokens a step, {plan.precision}")


def _contender(study: Study, size: str, arm: str, folder: Path, steps: int) -> TrainerLoop:
    """Return an arm with a store of its own."""
    folder.mkdir()
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump(configured(study.base, study.overrides(size, arm), {"trainer.max_steps": 1})), encoding="utf-8"
    )
    try:
        cli, rows, precision, device = resolve_options(str(config), [])
    except UserError as error:
        raise UserError(f"{arm} at {size}: {error}") from error
    module, data = cli.model, cli.datamodule
    module.schedule = Schedule(shape="constant")
    plan = Plan(module, precision, data.context, rows, device, module.compiled, folder, masked=data.mask_documents)
    plan.fill(steps)
    return TrainerLoop(plan, module)


def _table(baseline: str, result: dict[str, Any]) -> str:
    rows = []
    for arm, rates in result["tokens_per_second"].items():
        row = [arm, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"]
        if arm == baseline:
            rows.append([*row, "1", ""])
            continue
        found = result[f"{arm}_to_{baseline}"]
        interval = "{1:.3f} to {0:.3f}".format(*(1 / end for end in found["interval"])) if found["interval"] else ""
        rows.append([*row, f"{1 / found['median']:.3f}", interval])
    return text_table(["arm", "tokens/s", "range", "step time", "95% interval"], rows)
