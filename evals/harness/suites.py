"""Suites of tasks, and how well tasks distinguish models. Known without lm-eval, which takes seconds to import."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llm.common.errors import UserError

BUILT_IN = frozenset({"stories"})
YAML = (".yaml", ".yml")


class Suite(NamedTuple):
    """Tasks as lm-eval names them, and the numbers of examples before each item; None is each task's own."""

    tasks: tuple[str, ...]
    shots: tuple[int, ...] | None


FIVE = ("arc_easy", "arc_challenge", "piqa", "openbookqa", "hellaswag")

# paper: the tasks of Burns et al. 2025, Section 5.2 (single- and five-shot there), and no examples at all.
SUITES = {
    "paper": Suite(FIVE, (0, 1, 5)),
    "base": Suite((*FIVE, "winogrande", "sciq", "lambada_openai", "boolq"), (0,)),
    "minimal-pairs": Suite(("blimp",), (0,)),
    "perplexity": Suite(("wikitext", "paloma"), (0,)),
    "stories": Suite(("stories",), (0,)),
}

# What a figure calls a task; others go by lm-eval's name.
TITLES = {
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "openbookqa": "OpenBookQA",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "winogrande": "WinoGrande",
    "sciq": "SciQ",
    "lambada_openai": "LAMBADA",
    "boolq": "BoolQ",
    "blimp": "BLiMP",
    "mmlu": "MMLU",
    "wikitext": "WikiText",
}

# Percent of pairs of data recipes that models of 150M parameters order as models of 1B do (Heineman et al. 2025).
DECISION_ACCURACY = {
    "arc_easy": 93,
    "mmlu": 89,
    "arc_challenge": 83,
    "hellaswag": 74,
    "piqa": 74,
    "openbookqa": 65,
    "winogrande": 50,
    "boolq": 48,
}


def chosen(suite: str | None, tasks: Sequence[str] | None, shots: Sequence[int] | None) -> Suite:
    """What was asked for: the suite (None: `stories`), its tasks or shots replaced by those given, each once.

    UserError: there is no such suite.
    """
    if suite is not None and suite not in SUITES:
        raise UserError(f"there is no suite {suite}; the suites are {', '.join(SUITES)}")
    base = SUITES[suite or "stories"]
    names = base.tasks if tasks is None else tuple(dict.fromkeys(tasks))
    if shots is None:
        return Suite(names, base.shots if suite is not None or tasks is None else None)
    return Suite(names, tuple(dict.fromkeys(shots)))


def is_local(task: str) -> bool:
    """Whether a task's rows are on this machine for sure: built in, or a text or token store, told by its path."""
    path = Path(task)
    if task in BUILT_IN or not path.exists() or not (path.suffix or len(path.parts) > 1):
        return task in BUILT_IN
    return path.suffix not in YAML and not any(next(path.rglob(f"*{suffix}"), None) for suffix in YAML)
