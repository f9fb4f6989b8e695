"""What exported models can do, and two runs side by side."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.exports import DTYPES, open_export
from evals.harness import suites
from llm.common.arguments import accept_old_name, add_command, add_trust, add_version, count, positive, share
from llm.common.errors import UserError, exit_status
from llm.common.files import write_json
from llm.common.threads import set_wait_policy, warn_if_busy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for input that cannot be used, said in one line on stderr."""
    set_wait_policy()
    words = sys.argv[1:] if arguments is None else list(arguments)
    return exit_status(lambda: _run_command(words))


def _run_command(words: list[str]) -> None:
    options = _parser().parse_args(words, argparse.Namespace(words=words))
    if hasattr(options, "device"):  # a command that computes
        warn_if_busy()
    options.command(options)


# ---- Commands: torch and lm-eval are imported inside, so that --help answers at once ---------------------------------


def _ioi(options: argparse.Namespace) -> None:
    from evals.probes import ioi, ioi_published

    groups = ioi.parse_groups(options.models, options.trusted)
    stream = ioi_published.stream_of([each for group in groups.values() for each in group], options.as_published)
    outcome = ioi.run(groups, options.device, options.dtype, options.sentences, options.seed, options.batch_size)
    if options.as_published:
        outcome["as_published"] = ioi_published.run(groups, stream, options.device, options.dtype)
    if options.out is None:
        ioi.write_results(groups, outcome)
    else:
        write_json(options.out, outcome)
    print(ioi.format_outcome(outcome))


def _run(options: argparse.Namespace) -> None:
    from evals.harness.suites import chosen, is_local

    suite = chosen(options.suite, options.tasks, options.shots)
    if not options.checkpoints and (options.out is not None or options.metric is not None):
        raise UserError("--out and --metric are for the figures of --checkpoints; give them with it")
    if options.data is not None or all(map(is_local, suite.tasks)):
        # Read once, when huggingface_hub and datasets are imported: nothing then waits for a network.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from evals.harness import catalogue, results
    from evals.harness import run as harness
    from evals.harness.tasks import lacking
    from evals.page import curves

    if len(unknown := catalogue.find(suite.tasks).missing) == len(suite.tasks):
        raise UserError(lacking(unknown))
    protocol = harness.Protocol(suite.tasks, suite.shots, options.limit, options.batch_size)
    wanted = (protocol, options.data, options.device, options.dtype, options.again)
    if options.checkpoints:
        metric = options.metric or "acc_norm"
        text, missing = curves.evaluate(options.exports, options.out, metric, options.trusted, *wanted)
    else:
        made, missing = harness.run([open_export(folder, options.trusted) for folder in options.exports], *wanted)
        text = results.format_results((harness.label(export), result) for export, result in made) if made else ""
    print(text, end="\n" * bool(text))
    if missing:
        raise UserError(lacking(missing))


def _prefetch(options: argparse.Namespace) -> None:
    from evals.harness.prefetch import prefetch
    from evals.harness.suites import chosen
    from evals.harness.tasks import lacking

    suite = chosen(options.suite or "paper", options.tasks, None)
    lines, missing = prefetch(options.folder, suite.tasks)
    print("\n".join(lines))
    if missing:
        raise UserError(lacking(missing))


def _compare(options: argparse.Namespace) -> None:
    if options.plan:
        from evals.verdict import power

        print(power.pair_power(options))
        return
    if options.out is None:
        raise UserError("where the comparison goes is not said; give --out DIR")
    from evals.page.comparison_files import compare
    from evals.verdict.compare import ComparisonSettings

    settings = ComparisonSettings(
        tuple(options.declare), tuple(options.exports), tuple(options.store), options.documents, options.metric,
        options.level, tuple(options.target_loss), options.device, options.dtype, options.batch_size,
        options.trusted, tuple(options.null), options.bench,
    )  # fmt: skip
    print(compare(options.runs, options.out, settings, shlex.join(["python", "-m", "evals", *options.words])))


def _study(options: argparse.Namespace) -> None:
    if options.plan:
        from evals.verdict.study_plan import study_power

        print(study_power(options))
        return
    from evals.page.study_files import study

    made_by = shlex.join(["python", "-m", "evals", *options.words])
    print(study(options.study, options.out, options.level, options.bench, made_by))


def _losses(options: argparse.Namespace) -> None:
    from evals.probes import losses

    exports = [open_export(folder, options.trusted) for folder in options.exports]
    asked = (options.store, options.documents, options.batch_size, options.device, options.dtype, options.split)
    results = [losses.measure_losses(export, *asked, options.again, options.context) for export in exports]
    print(losses.format_results(losses.labels(exports), results))


def _incontext(options: argparse.Namespace) -> None:
    from evals.probes import incontext
    from evals.probes.losses import labels

    exports = [open_export(folder, options.trusted) for folder in options.exports]
    results = incontext.measure_incontext(
        exports, options.store, options.windows, options.context, options.batch_size, options.device, options.dtype,
        options.split,
    )  # fmt: skip
    names = labels(exports)
    print(incontext.format_results(names, results))
    print("\n".join(map(str, incontext.write_figures(names, results, options.out or exports[0].results))))


def _recall(options: argparse.Namespace) -> None:
    from evals.probes import recall
    from evals.probes.losses import labels

    exports = [open_export(folder, options.trusted) for folder in options.exports]
    settings = recall.RecallSettings(tuple(options.pairs), tuple(options.lengths), options.sequences, options.seed)
    results = recall.measure_recall(
        exports, options.store, settings, options.context, options.batch_size, options.device, options.dtype,
        options.split,
    )  # fmt: skip
    print(recall.format_results(labels(exports), results))


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__)
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_ioi, _add_run, _add_prefetch, _add_compare, _add_study, _add_losses, _add_incontext, _add_recall):
        add(commands)
    return parser


def _add_ioi(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = add_command(
        commands,
        "ioi",
        "the indirect-object task: probability of the right and the wrong name",
        "The indirect-object task of Burns et al. 2025, Section 4.2, as in its Table 2: mean ± standard "
        "deviation (of the population) over the models of a group. Then the same on a balanced, generated set, with "
        "accuracy and logit difference. Every prompt's values go to EXPORT/evals/ioi.json and ioi_generated.json.",
        "python -m evals ioi classic=out/classic-seed1,out/classic-seed2 values=out/values-seed1,out/values-seed2",
    )
    command.add_argument(
        "models", nargs="+", metavar="EXPORT", help="an exported folder, or a group of them as NAME=FOLDER,FOLDER"
    )
    command.add_argument(
        "--sentences",
        type=count(0),
        default=1024,
        metavar="N",
        help="of the generated set, rounded up to a multiple of four; 0 leaves it out (1024)",
    )
    command.add_argument(
        "--as-published", action="store_true", help="also as the authors' script does, see docs/papers.md"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the generated set (0)")
    command.add_argument(
        "--batch-size", type=count(1), default=32, metavar="N", help="generated sentences at once (32)"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write all results to this one JSON file instead")
    _add_device(command)
    command.set_defaults(command=_ioi)


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = add_command(
        commands,
        "run",
        "tasks of lm-eval, by name or from your own YAML",
        "Any task of lm-eval, on its own prompts and metrics: multiple choice, log-likelihood, perplexity, generation. "
        "Results are merged by task and shots into EXPORT/evals/lm_eval.json, every item goes to EXPORT/evals/samples. "
        "Results for the same weights, rows, versions and arguments are reused, so a killed run resumes. A task "
        "that is missing or fails does not stop the others; the last line then names it.",
        "python -m evals run out/classic out/values --suite paper --data data/evals\n"
        "  python -m evals run out/values --tasks blimp gsm8k my_tasks/riddles.yaml --limit 200\n"
        "  python -m evals run out/values --tasks books.txt runs/stories/store\n"
        "  python -m evals run --checkpoints runs/classic runs/values --suite paper --out out/curves",
    )
    command.add_argument(
        "exports", nargs="+", type=Path, metavar="EXPORT", help="an exported folder; with --checkpoints a run folder"
    )
    suites.add_arguments(command)
    command.add_argument(
        "--overwrite", dest="again", action="store_true", help="rerun evaluations that already have results"
    )
    accept_old_name(command, "--again", "--overwrite")
    command.add_argument(
        "--checkpoints",
        action="store_true",
        help="evaluate every exported step of the given runs, and draw accuracy and training loss over steps",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="where these figures and their CSV go (exports/ of the first run)"
    )
    command.add_argument(
        "--metric", metavar="NAME", help="what these figures show, of the tasks that have it (acc_norm)"
    )
    _add_device(command)
    command.set_defaults(command=_run)


def _add_prefetch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = add_command(
        commands,
        "prefetch",
        "the tasks' rows, for machines without a network",
        "Fetches the rows of tasks from the hub, as their definitions name them, and writes DIR/TASK/SPLIT.jsonl, "
        "which `run --data DIR` reads without a network. What is there and whole is not fetched again.",
        "python -m evals prefetch data/evals && python -m evals run out/values --suite paper --data data/evals",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="where the rows go")
    command.add_argument("--suite", metavar="NAME", help="whose tasks (paper)")
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="these instead, named as for `run`")
    command.set_defaults(command=_prefetch)


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from evals.verdict import power

    command = add_command(
        commands,
        "compare",
        "the verdict on finished runs with and without a change",
        "Finished runs of a baseline and of one or more arms, each with a change, once or with several seeds: checks "
        "that they are pairs, then prints one table and a sentence for each arm, with p values corrected over the "
        "arms, and writes report.html, results.json, the table as CSV and LaTeX, and every picture. The last "
        "steps are exported and the loss of every validation document is measured where that is not kept already; what "
        "`run`, `ioi`, `incontext` and `recall` left in the exports is compared too. --plan says beforehand what can "
        "be found.",
        "python -m evals compare runs/classic runs/values --out out/comparison\n"
        "  python -m evals compare runs/classic-seed* runs/values-seed* runs/keys-seed* --out out/comparison\n"
        "  python -m evals compare --plan --seeds 1 3 5 --items 400 1172",
    )
    command.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders; the first is of the baseline")
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder for the page, the numbers and the table")
    command.add_argument(
        "--exports", nargs="+", type=Path, default=[], metavar="EXPORT", help="of the last steps (RUN/exports/step-N)"
    )
    command.add_argument(
        "--allow-difference",
        dest="declare",
        nargs="+",
        default=[],
        metavar="KEY",
        help="config keys allowed to differ, in addition to the stream and activation keys",
    )
    accept_old_name(command, "--declare", "--allow-difference")
    command.add_argument(
        "--null", nargs="+", type=Path, default=[], metavar="RUN",
        help="runs of the baseline with other initial weights, for one seed also with other seeds (those of the study)",
    )  # fmt: skip
    command.add_argument("--bench", type=Path, metavar="FILE", help="step times, from `llm bench --json FILE`")
    command.add_argument("--store", nargs="+", type=Path, default=[], metavar="DIR", help="(those that the runs name)")
    command.add_argument(
        "--documents", type=count(0), default=1000, metavar="N", help="of validation, by a hash; 0: what is kept (1000)"
    )
    command.add_argument(
        "--metric", default="acc_norm", metavar="NAME", help="of the tasks that have it (acc_norm), else their first"
    )
    command.add_argument("--level", type=share, default=0.95, metavar="P", help="of the intervals (0.95)")
    command.add_argument("--target-loss", nargs="+", type=positive, default=[], metavar="NATS", help="also to reach")
    command.add_argument("--batch-size", type=count(1), default=16, metavar="N", help="documents at once (16)")
    command.add_argument("--plan", action="store_true", help="print what n seeds and m items can detect, and no more")
    power.add_arguments(command)
    _add_device(command)
    command.set_defaults(command=_compare)


def _add_study(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from evals.verdict import study_plan

    command = add_command(
        commands,
        "study",
        "the verdict on a study: whether a change helps over sizes, and what it is worth in compute",
        "Reads the finished runs of a study (docs/study.md) and prints a table by size, the compute multiplier of each "
        "arm with its slope and extrapolation, what is missing, and one sentence per arm. Writes report.html, "
        "results.json, table.csv, study.yaml and every picture as PNG and SVG. Trains and measures nothing. --plan "
        "prints the smallest gain that the study can show.",
        "python -m evals study configs/studies/toy.yaml --out runs/studies/toy/verdict\n"
        "  python -m evals study configs/studies/toy.yaml --plan",
    )
    study_plan.add_arguments(command)
    command.set_defaults(command=_study)


def _add_losses(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = add_command(
        commands,
        "losses",
        "validation loss of every document of a token store",
        "Loss of each of N documents of a store, drawn by a hash, which `compare` pairs between two models. Kept in "
        "EXPORT/evals/losses.json, one result for each store and split; what is there is not measured again.",
        "python -m evals losses out/classic out/values --store runs/stories/store --documents 1000",
    )
    _add_store(command)
    command.add_argument(
        "--documents", type=count(1), default=1000, metavar="N", help="how many documents of the split (1000)"
    )
    command.add_argument("--overwrite", dest="again", action="store_true", help="measure again what has results")
    accept_old_name(command, "--again", "--overwrite")
    command.set_defaults(command=_losses)


def _add_incontext(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = add_command(
        commands,
        "incontext",
        "what a model takes from its context: loss by position, induction heads, sparsity",
        "On windows of a token store: loss by position, the in-context score (loss at token 500 minus loss at token "
        "50, both scaled down for a context below 512), induction and previous-token heads on repeated random tokens, "
        "and sparsity (Gini) of FFN activations. Kept in EXPORT/evals/incontext.json.",
        "python -m evals incontext out/classic out/values --store runs/stories/store --out out/incontext",
    )
    _add_store(command)
    command.add_argument("--windows", type=count(1), default=256, metavar="N", help="windows of the context (256)")
    command.add_argument("--out", type=Path, metavar="DIR", help="where figures go (evals/ of the first EXPORT)")
    command.set_defaults(command=_incontext)


def _add_recall(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = add_command(
        commands,
        "recall",
        "recall from the context: key-value pairs, repeated random tokens, a needle in text",
        "Generated for the models' vocabulary and context, with chance levels: multi-query associative recall (MQAR) "
        "of random key-value pairs, the loss of the second of two copies of random tokens, the gain from a needle put "
        "into text of a token store. Kept in EXPORT/evals/recall.json, which `compare` pairs.",
        "python -m evals recall out/classic out/values --store runs/stories/store --pairs 4 16 64",
    )
    _add_store(command)
    command.add_argument("--pairs", nargs="+", type=count(2), default=[], metavar="P", help="(2, 8, 32 if they fit)")
    command.add_argument(
        "--lengths", nargs="+", type=count(1), default=[], metavar="T", help="tokens around the pairs (the context)"
    )
    command.add_argument("--sequences", type=count(2), default=64, metavar="N", help="of each kind (64)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the random tokens (0)")
    command.set_defaults(command=_recall)


def _add_store(command: argparse.ArgumentParser) -> None:
    """The models, and what is read of a token store."""
    command.add_argument("exports", nargs="+", type=Path, metavar="EXPORT", help="an exported folder")
    command.add_argument(
        "--store", type=Path, required=True, metavar="DIR", help="a token store made with the models' tokenizer"
    )
    command.add_argument("--split", default="validation", choices=("train", "validation"), help="(validation)")
    command.add_argument("--context", type=count(1), metavar="N", help="tokens at once (as the model was trained)")
    command.add_argument("--batch-size", type=count(1), default=16, metavar="N", help="documents or windows (16)")
    _add_device(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")
    command.add_argument("--dtype", default="auto", choices=DTYPES, help="(the folder's)")
    add_trust(command)


if __name__ == "__main__":
    sys.exit(main())
