"""Commands of `python -m llm`: prepare, inspect, bench-data, fit, validate, export, push, generate, plan, study, batch,
status, bench, bench-loss, bench-growth, bench-ranks.

Each command is a module with `run(args)`, and `add_arguments(parser)` there or, where the module imports torch, beside
it, so that `--help` answers at once; fit and validate parse their words themselves (`train/options.py`).
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .common.arguments import version
from .common.errors import exit_status
from .common.processes import end_with_parent
from .common.threads import set_wait_policy, warn_if_busy

COMMANDS = {  # name: (module, one line for --help)
    "prepare": ("llm.data.preparation.prepare", "text of any source -> token store"),
    "inspect": ("llm.data.inspect", "what a token store holds, and whether it is whole"),
    "bench-data": ("llm.bench.data", "speed of the data path, compared with plain tokenizers and np.memmap"),
    "fit": ("llm.train.cli", "train a model: --config FILE, then dotted overrides"),
    "validate": ("llm.train.cli", "loss of a run's checkpoint on its validation split"),
    "export": ("llm.export", "run -> a folder that transformers and lm-eval load"),
    "push": ("llm.push", "an exported folder -> the Hugging Face hub, with a model card"),
    "generate": ("llm.generate", "continue a prompt with an exported model"),
    "plan": ("llm.plan.plan", "memory, traffic and FLOPs of a run, before it is run"),
    "study": ("llm.study.cli", "one comparison over several sizes, seeds and budgets: plan, run, status"),
    "batch": ("llm.runs.batch", "the text that made a step of a run"),
    "status": ("llm.runs.status", "progress of runs, whether they are still running, and what went wrong"),
    "bench": ("llm.bench.step", "throughput and memory of a config, compared with transformers"),
    "bench-loss": ("llm.bench.loss", "chunked head and loss, compared with all logits at once"),
    "bench-growth": ("llm.bench.growth", "time per token as each size grows, compared with its FLOPs"),
    "bench-ranks": (
        "llm.bench.ranks",
        "throughput, communication, checkpoints and memory of one and several processes",
    ),
}
ARGUMENTS = {  # of commands whose module imports torch, or what is as slow to import
    "export": "llm.options:add_export",
    "push": "llm.options:add_push",
    "generate": "llm.options:add_generate",
    "plan": "llm.plan.options:add_arguments",
    "bench": "llm.bench.options:add_step",
    "bench-loss": "llm.bench.options:add_loss",
    "bench-growth": "llm.bench.options:add_growth",
    "bench-ranks": "llm.bench.options:add_ranks",
}
HELP = "\n".join(
    [
        "usage: python -m llm COMMAND ...; python -m llm COMMAND --help tells more",
        "",
        *(f"  {name:14}{text}" for name, (_, text) in COMMANDS.items()),
        f"  {'--version':14}print the version and exit",
        "",
        "example: python -m llm fit --config configs/stories_values.yaml --trainer.max_steps 100",
    ]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for input that cannot be used."""
    set_wait_policy()
    end_with_parent()
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        print(HELP, file=sys.stderr)
        return 2
    if words[0] in ("-h", "--help", "--version"):
        return exit_status(lambda: print(version() if words[0] == "--version" else HELP))
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}: give one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return exit_status(lambda: _run(command, rest))


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command other than fit and validate."""
    parser = argparse.ArgumentParser(
        prog=f"python -m llm {command}",
        description=COMMANDS[command][1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module, _, function = ARGUMENTS.get(command, f"{COMMANDS[command][0]}:add_arguments").partition(":")
    getattr(importlib.import_module(module), function)(parser)
    return parser


def _run(command: str, words: list[str]) -> None:
    if command in ("fit", "validate"):
        from .train import options

        words = options.checked(command, words)
        importlib.import_module(COMMANDS[command][0]).main(command, words)
        return
    args = parser_of(command).parse_args(words)
    if hasattr(args, "overrides"):  # of the keys of --config
        from .train import config_files, options

        options.check("fit", config_files.with_new_names(["--config", args.config, *args.overrides], quietly=True))
    module = importlib.import_module(COMMANDS[command][0])
    if module.__name__.startswith("llm.bench."):
        warn_if_busy()
    module.run(args)
