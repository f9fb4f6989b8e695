"""Suites of tasks, and how well tasks distinguish models. Known without lm-eval, which takes seconds to import."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llm.common.arguments import count
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


# ---- Options ---------------------------------------------------------------------------------------------------------


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Which tasks are asked, how often, and where their rows come from."""
    command.add_argument(
        "--suite",
        metavar="NAME",
        help="paper (ARC, PIQA, OpenBookQA, HellaSwag at 0, 1 and 5 shots), base (these, WinoGrande, SciQ, LAMBADA and "
        "BoolQ at 0), minimal-pairs (BLiMP), perplexity (WikiText, Paloma) or stories (built in; default)",
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="in place of the suite's: tasks, groups and tags of lm-eval, YAML files or folders of your own, and for "
        "bits per byte text files (as `llm prepare` reads them) and token stores",
    )
    command.add_argument(
        "--shots",
        nargs="+",
        type=count(0),
        metavar="N",
        help="examples before each item, in place of the suite's (with --tasks alone each task's own number, mostly 0)",
    )
    command.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="read DIR/TASK/SPLIT.jsonl, with the hub's columns (see `prefetch`), and use no network; else what the "
        "task names, mostly the hub",
    )
    command.add_argument("--limit", type=count(1), metavar="N", help="only the first N items of each task")
    command.add_argument(
        "--batch-size",
        type=_batch_size,
        default=16,
        metavar="N",
        help="requests at once (16), or `auto`: up to 64, as many as the GPU can take; 16 on a CPU",
    )


def _batch_size(text: str) -> int | str:
    """An argument type: a whole number, at least 1, or `auto`."""
    return text if text == "auto" else count(1)(text)
