"""`python -m llm bench --find-micro-batch`: the largest micro-batch in a budget of memory, by activation checkpointing.

Stages: budget -> for each activation checkpointing the largest micro-batch that the memory model of `plan` lets in ->
tried in a process of its own: fewer rows where it needs more than the budget, more where it does not -> the largest of
each again, in turn, round after round -> the fastest, as settings.

A micro-batch divides the rows of a step; two of them make a step here where there are several, as the second finds the
gradients of the first. On a CPU the budget is resident memory beyond the imports, on a GPU what torch allocates.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.errors import UserError
from ..plan.activation_memory import Work
from ..plan.plan import PlannedRun
from ..plan.state_memory import Layout, formats
from ..plan.step_memory import Step, largest_micro_batch
from .contenders import MIB

SHARE = 0.9  # of the memory that is free
STARVED = re.compile("out of memory|annot allocate memory|can't allocate memory|MemoryError|bad_alloc|ALLOC_FAILED")
CHECKPOINTING = (0, 4, 2, 1)  # every n-th block recomputed: from none to all


@dataclass(frozen=True)
class Candidate:
    """A setting that was run: rows of a micro-batch, and what it needed; no rate where it did not run to its end."""

    checkpointing: int
    rows: int
    predicted_mib: float
    measured_mib: float | None
    tokens_per_second: float | None

    def within(self, budget: float) -> bool:
        """Whether it ran within `budget` MiB."""
        return self.measured_mib is not None and self.measured_mib <= budget


def free_memory() -> float:
    """MiB that are free: of the GPU, or of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / MIB
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) / 1024  # type: ignore[index]
    except (OSError, TypeError) as error:
        raise UserError("this system does not tell its free memory: give --memory-budget GIB") from error
    with suppress(OSError, ValueError):  # of a Slurm job or a container; "max" is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, (limit - used) / MIB)
    return free


def largest_fitting_divisor(rows: int, start: int, fits: Callable[[int], bool]) -> int | None:
    """The largest divisor of `rows` that fits, sought from `start` upwards or downwards; None where one row does not.

    `fits` is asked as seldom as that allows: what it says is the same for fewer rows where it fits, for more where not.
    """
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    place = max(index for index, size in enumerate(divisors) if size <= start)
    if fits(divisors[place]):
        while place + 1 < len(divisors) and fits(divisors[place + 1]):
            place += 1
        return divisors[place]
    while place > 0:
        place -= 1
        if fits(divisors[place]):
            return divisors[place]
    return None


def tune_micro_batch(
    run: PlannedRun,
    precision: str,
    compiled: bool,
    budget: float,
    rounds: int,
    words: Callable[[int, int, int], list[str]],
) -> dict[str, Any]:
    """Try settings of a run within `budget` MiB; the result in terms of JSON.

    `words` gives the options of `bench` that try (checkpointing, rows of a micro-batch, micro-batches).

    Raises:
        UserError: nothing fits, or trying failed for another reason.
    """
    rows = run.batch_size
    kernels = "cuda" if torch.cuda.is_available() else "cpu"

    def predicted(size: int, recompute: int) -> float:
        work = Work(run.config, size, run.context, formats(precision, 0), kernels, run.masked, compiled)
        layout = Layout(0, 1, run.bucket, overlap=False, optimizer=run.optimizer.name)
        return Step(work, layout, micro_batches(size), recompute).peak().total / MIB

    def micro_batches(size: int) -> int:
        return min(2, rows // size)

    def predicted_to_fit(recompute: int, size: int) -> bool:
        return predicted(size, recompute) <= budget

    def measured(recompute: int, size: int) -> Candidate:
        one = attempt(words(recompute, size, micro_batches(size)), recompute, size, predicted(size, recompute))
        tell(one, budget)
        return one

    def fits(recompute: int, size: int) -> bool:
        tried.append(measured(recompute, size))
        return tried[-1].within(budget)

    tried: list[Candidate] = []
    finalists: list[tuple[int, int]] = []
    for every in [every for every in CHECKPOINTING if every <= run.config.num_hidden_layers]:
        expected = largest_micro_batch(rows, partial(predicted_to_fit, every))
        best = largest_fitting_divisor(rows, expected or 1, partial(fits, every))
        finalists += [] if best is None else [(every, best)]
        if best == rows:
            break  # nothing to gain from recomputing more
    if not finalists:
        raise UserError(
            f"not one row fits into {budget:,.0f} MiB, with every block recomputed: shorten data.context, or see "
            "python -m llm plan for devices and ZeRO stages that hold it"
        )
    rates = rates_in_turns(finalists, rounds, measured)
    every, size = max(finalists, key=lambda each: statistics.median(rates[each] or [0.0]))
    return {
        "budget_mib": budget,
        "rows_per_step": rows,
        "tried": [asdict(one) for one in tried],
        "finalists": [{"checkpointing": a, "rows": b, "tokens_per_second": each} for (a, b), each in rates.items()],
        "chosen": {"checkpointing": every, "rows": size},
    }


def rates_in_turns(
    finalists: list[tuple[int, int]], rounds: int, measure: Callable[[int, int], Candidate]
) -> dict[tuple[int, int], list[float]]:
    """Measure each finalist once per round, in an order that reverses every round; a sole finalist is not measured."""
    rates: dict[tuple[int, int], list[float]] = {each: [] for each in finalists}
    for turn in range(rounds if len(finalists) > 1 else 0):
        for each in finalists if turn % 2 == 0 else finalists[::-1]:
            rates[each].append(measure(*each).tokens_per_second or 0.0)
    return rates


def attempt(words: list[str], every: int, rows: int, predicted: float) -> Candidate:
    """Run a setting in a process of its own. One that ends for want of memory is no error."""
    done = subprocess.run([sys.executable, "-m", "llm", "bench", *words], capture_output=True, text=True)
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
        return Candidate(every, rows, predicted, found["peak_mib"], found["tokens_per_second"])
    starved = done.returncode in (-9, 137) or STARVED.search(done.stderr)
    if not starved:
        raise UserError(
            f"{rows} rows could not be tried: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
        )
    return Candidate(every, rows, predicted, None, None)


def tell(one: Candidate, budget: float) -> None:
    """One line of progress."""
    said = "ran out of memory"
    if one.measured_mib is not None:
        said = f"{one.measured_mib:,.0f} MiB, {one.tokens_per_second:,.0f} tokens/s"
    verdict = "fits" if one.within(budget) else "does not fit"
    print(f"{name_of(one.checkpointing)}, {one.rows} rows: {said}: {verdict}", file=sys.stderr, flush=True)


def name_of(every: int) -> str:
    """An activation checkpointing in words."""
    which = {0: "no", 1: "every", 2: "every 2nd"}.get(every, f"every {every}th")
    return f"{which} block recomputed"


def print_search(result: dict[str, Any]) -> None:
    """What was tried as a table, and what to set."""
    print(f"budget {result['budget_mib']:,.0f} MiB, {result['precision']}, {result['device']}")
    print(f"{'':28}{'micro-batch':>12}{'predicted':>14}{'measured':>14}{'tokens/s':>12}")
    for each in result["tried"]:
        measured = "out of memory" if each["measured_mib"] is None else f"{each['measured_mib']:,.0f} MiB"
        rate = "" if each["tokens_per_second"] is None else f"{each['tokens_per_second']:,.0f}"
        over = " over" if each["measured_mib"] and each["measured_mib"] > result["budget_mib"] else ""
        print(
            f"{name_of(each['checkpointing']):28}{each['rows']:>12}{each['predicted_mib']:>10,.0f} MiB{measured:>14}"
            f"{rate:>12}{over}"
        )
    for each in result["finalists"]:
        rates = each["tokens_per_second"]
        if rates:
            said = f"{statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f})"
            print(f"{name_of(each['checkpointing'])}, {each['rows']} rows, {len(rates)} turns: {said}")
    chosen = result["chosen"]
    every = {0: "false", 1: "true"}.get(chosen["checkpointing"], chosen["checkpointing"])
    print(f"\nfastest: --data.micro_batch_size {chosen['rows']} --model.activation_checkpointing {every}")
