"""What exported models can do, and two runs side by side."""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from evals.models import DTYPES, open_export, write_json
from llm.errors import exit_status

# Tasks whose rows are written here, so that no network is needed; the same set as evals.harness.BUILT_IN, which this
# module cannot ask without importing the libraries that read the setting.
WITHOUT_NETWORK = frozenset({"stories"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for input that cannot be used, said in one line on stderr."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.command(options))


# ---- Commands: torch and lm-eval are imported inside, so that --help answers at once ---------------------------------


def _ioi(options: argparse.Namespace) -> None:
    from evals import ioi

    groups = ioi.parse_groups(options.models)
    outcome = ioi.run(groups, options.device, options.dtype)
    if options.out is None:
        ioi.write_results(groups, outcome)
    else:
        write_json(options.out, outcome)
    print(ioi.format_outcome(outcome))


def _run(options: argparse.Namespace) -> None:
    if options.data is not None or set(options.tasks) <= WITHOUT_NETWORK:
        # Read once, when huggingface_hub and datasets are imported: nothing then waits for a network.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from evals import harness

    protocol = harness.Protocol(
        tuple(dict.fromkeys(options.tasks)), tuple(dict.fromkeys(options.shots)), options.limit, options.batch_size
    )
    exports = [open_export(folder) for folder in options.exports]
    print(harness.format_results(harness.run(exports, protocol, options.data, options.device, options.dtype)))


def _compare(options: argparse.Namespace) -> None:
    from evals.compare import compare

    print(compare([options.run_a, options.run_b], options.exports, options.out))


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_ioi, _add_run, _add_compare):
        add(commands)
    return parser


def _add_ioi(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _add_command(
        commands,
        "ioi",
        "the indirect-object task: probability of the right and the wrong name",
        "The indirect-object task of residual-attention-streams, Section 4.2, as in its Table 2: mean ± standard "
        "deviation (of the population) over the models of a group. Every prompt's values go to EXPORT/evals/ioi.json.",
        "python -m evals ioi classic=out/classic-seed1,out/classic-seed2 values=out/values-seed1,out/values-seed2",
    )
    command.add_argument(
        "models", nargs="+", metavar="EXPORT", help="an exported folder, or a group of them as NAME=FOLDER,FOLDER"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write all results to this one JSON file instead")
    _add_device(command)
    command.set_defaults(command=_ioi)


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _add_command(
        commands,
        "run",
        "accuracy on multiple-choice tasks, through lm-eval",
        "Multiple-choice accuracy through lm-eval, on its official prompts and metrics. Results are merged by task and "
        "shots into EXPORT/evals/lm_eval.json, every item's log-likelihoods go to EXPORT/evals/samples.",
        "python -m evals run out/classic out/values --tasks piqa hellaswag --shots 0 1 --data data/evals --limit 200",
    )
    command.add_argument("exports", nargs="+", type=Path, metavar="EXPORT", help="an exported folder")
    command.add_argument(
        "--tasks",
        nargs="+",
        default=["stories"],
        metavar="TASK",
        help="piqa hellaswag openbookqa arc_easy arc_challenge, or stories (built in, needs no data; the default)",
    )
    command.add_argument(
        "--shots", nargs="+", type=_count(0), default=[0], metavar="N", help="examples before each item (0)"
    )
    command.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="read DIR/TASK/{train,validation,test}.jsonl, with the hub's columns, and use no network; else the hub",
    )
    command.add_argument("--limit", type=_count(1), metavar="N", help="only the first N items of each task")
    command.add_argument("--batch-size", type=_count(1), default=16, metavar="N", help="requests at once (16)")
    _add_device(command)
    command.set_defaults(command=_run)


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _add_command(
        commands,
        "compare",
        "two finished runs side by side",
        "Two finished runs side by side: prints a table and one sentence, writes loss.png, table.csv and metrics.csv.",
        "python -m evals compare runs/classic runs/values --exports out/classic out/values --out out/comparison",
    )
    command.add_argument("run_a", type=Path, metavar="RUN_A", help="the run folder without the change")
    command.add_argument("run_b", type=Path, metavar="RUN_B", help="the run folder with it")
    command.add_argument(
        "--exports",
        nargs=2,
        type=Path,
        default=[],
        metavar=("EXPORT_A", "EXPORT_B"),
        help="their exported folders, for what `ioi` and `run` left there",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder for the figure and the CSVs"
    )
    command.set_defaults(command=_compare)


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str, text: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(text, 100),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")
    command.add_argument("--dtype", default="auto", choices=DTYPES, help="(the folder's)")


def _count(least: int) -> Callable[[str], int]:
    """An argument type: a whole number, at least `least`."""

    def count(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return count


if __name__ == "__main__":
    sys.exit(main())
