"""Whether runs are pairs: the same run with and without a declared change, once or with several seeds.

run folders -> baseline and arms by their configs -> pairs by seed -> checked against each other -> an arm's `Pairs`

A difference between two models is the change's only where nothing else differs: the same tokens in the same order
(store fingerprint, digests of the batches), the same seed (so the same initial weights wherever the two models share
them), the same number of steps, and configs that agree in every key which is not declared. What differs is named, all
of it at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.exported_steps import ExportedRun, read_run
from llm.common.errors import UserError
from llm.runs import reading

SEED = "seed_everything"
INITIAL_SEED = ("initializer_seed", "decoder.initializer_seed")  # of a null arm alone


class Pair(NamedTuple):
    """Two finished runs of one seed: without the change, and with it."""

    first: ExportedRun
    second: ExportedRun


@dataclass(frozen=True)
class Pairs:
    """One pair a seed, ascending; `names` of the two sides; `change`: declared key -> its value on either side.

    `notes`: sentences on what does not forbid the comparison and a reader should know.
    """

    pairs: list[Pair]
    names: tuple[str, str]
    change: dict[str, tuple[Any, Any]]
    notes: list[str]

    def side(self, which: int) -> list[ExportedRun]:
        """The runs of one side (0 or 1), in the order of the seeds."""
        return [pair[which] for pair in self.pairs]

    @property
    def seeds(self) -> list[int]:
        return [pair.first.seed for pair in self.pairs]

    def seed_label(self, number: int) -> str:
        """The seed of a pair, counted from 0; of several with its place, unless the seeds are 1, 2, 3 themselves."""
        seed, count = self.seeds[number], len(self.pairs)
        return f"{number + 1} of {count} ({seed})" if count > 1 and seed != number + 1 else str(seed)


def read_arms(folders: Sequence[str | Path], declared: Sequence[str] = ()) -> list[Pairs]:
    """Pair the run folders: each arm with the baseline, which is the first folder's side.

    Args:
        folders: for each seed one of the baseline and one of each arm, in any order.
        declared: dotted config keys that may differ in addition to `reading.allowed_differences`.

    Raises:
        UserError: a run is not finished or given twice, or they are no pairs; the sentence names all that differs.
    """
    if len(folders) < 2:
        raise UserError("one run is no pair; give the run without the change and the run with it")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise UserError("a run folder is given twice; give each run of the pairs once")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        check_finished(run)
    declared = [reading.new_name(key) for key in declared]
    allowed = reading.allowed_differences([run.config for run in runs]) | {*declared}
    _check_declared(runs, declared)
    baseline, *sides = _sides(runs, allowed)
    arms = [_by_seed(baseline, side) for side in sides]
    problems = [
        problem
        for pairs in arms
        for problem in (
            *(problem for pair in pairs for problem in pair_problems(pair, allowed)),
            *_seed_problems(pairs, allowed),
        )
    ]
    if problems := list(dict.fromkeys(problems)):
        raise UserError(
            "these runs are no pairs: "
            + "; ".join(problems)
            + "; train both alike, or name with --allow-difference what is meant "
            "to differ"
        )
    names = _names(baseline, *sides)
    return [_declared(pairs, (names[0], name), allowed) for pairs, name in zip(arms, names[1:], strict=True)]


def _declared(pairs: list[Pair], names: tuple[str, str], allowed: set[str]) -> Pairs:
    change = {key: values for key, values in differences(pairs[0], allowed).items() if key in allowed}
    return Pairs(pairs, names, change, _notes(pairs, change))


def read_null(baseline: Sequence[ExportedRun], folders: Sequence[str | Path]) -> Pairs:
    """Pair the baseline with a null arm: the same runs with other initial weights.

    Args:
        baseline: its runs.
        folders: of the null arm, one for each of these runs.

    Raises:
        UserError: a run is not finished, has no run of its seed, or differs in more than its initial weights.
    """
    null = [read_run(folder) for folder in folders]
    for run in null:
        check_finished(run)
    pairs = _by_seed(baseline, null)
    problems = [problem for pair in pairs for problem in pair_problems(pair, set(INITIAL_SEED))]
    problems += [
        f"{pair.first.folder} and {pair.second.folder} have the same initial weights"
        for pair in pairs
        if not differences(pair, set(INITIAL_SEED)).keys() & set(INITIAL_SEED)
    ]
    if problems:
        raise UserError(
            f"--null takes the baseline with other initial weights (--initializer_seed): {'; '.join(problems)}"
        )
    names = _names(baseline, null)
    return _declared(pairs, (names[0], names[1]), set(INITIAL_SEED))


def read_companions(run: ExportedRun, folders: Sequence[str | Path]) -> list[Pairs]:
    """Pair a run with each of others that differ from it in initial weights or seed alone, those of its seed first.

    Raises:
        UserError: a run is not finished, or differs in more, or in neither.
    """
    allowed = {*INITIAL_SEED, SEED}
    pairs = [Pair(run, read_run(folder)) for folder in folders]
    problems = []
    for pair in pairs:
        check_finished(pair.second)
        problems += pair_problems(pair, allowed, seeds=pair.first.seed != pair.second.seed)
        if not differences(pair, allowed).keys() & allowed:
            problems.append(f"{pair.first.folder} and {pair.second.folder} have the same initial weights")
    if problems:
        raise UserError(
            f"--null takes the baseline with other initial weights (--initializer_seed) or seeds: {'; '.join(problems)}"
        )
    pairs.sort(key=lambda pair: pair.second.seed != run.seed)
    return [_declared([pair], (run.name, pair.second.name), allowed) for pair in pairs]


def check_finished(run: ExportedRun) -> None:
    """Refuse a run without a whole summary and metrics."""
    summary = run.summary
    if summary is None:
        raise UserError(
            f"{run.folder} is not finished (no whole summary.json); resume with `python -m llm fit --config "
            f"{run.folder}/config.yaml --resume auto`"
        )
    needed = ("step", "tokens_seen", "validation_loss", "seconds", "parameters")
    lacking = [f"{key} in summary.json" for key in needed if summary.get(key) is None]
    columns = run.metrics[0] if run.metrics else {}
    lacking += [f"{key} in metrics.csv" for key in ("tokens", "train_loss", "validation_loss") if key not in columns]
    if lacking:
        raise UserError(f"{run.folder} lacks {', '.join(lacking)}; give a folder that `python -m llm fit` wrote")
    validated = run.curve("validation_loss", over="step").tokens
    if not validated or validated[-1] != summary["step"]:
        raise UserError(
            f"{run.folder}/metrics.csv is not whole: its last validation is not of the run's last step, "
            f"{summary['step']}; put the whole file back"
        )


# ---- Sides and seeds -------------------------------------------------------------------------------------------------


def settings(run: ExportedRun) -> dict[str, Any]:
    """What of a run's config reaches its weights, by dotted key."""
    return reading.settings(run.config)


def differences(pair: Pair, allowed: set[str]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which the two configs differ, those of `allowed` first, with their values."""
    first, second = map(settings, pair)
    keys = [key for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
    return {key: (first.get(key), second.get(key)) for key in sorted(keys, key=lambda key: (key not in allowed, key))}


def _check_declared(runs: Sequence[ExportedRun], declared: Sequence[str]) -> None:
    known = {key for run in runs for key in settings(run)}
    if unknown := [key for key in declared if key not in known]:
        raise UserError(f"no run has a config key {', '.join(unknown)}; give it as config.yaml has it, dotted")


def _sides(runs: Sequence[ExportedRun], allowed: set[str]) -> list[list[ExportedRun]]:
    """The runs by their values of the declared keys, in the order in which these first occur."""
    if len(runs) == 2:
        return [[run] for run in runs]
    sides: dict[str, list[ExportedRun]] = {}
    for run in runs:
        known = settings(run)
        sides.setdefault(repr([known.get(key) for key in sorted(allowed)]), []).append(run)
    if len(sides) == 1:
        raise UserError("all these runs have the same declared settings; give the runs with the change too")
    return list(sides.values())


def _by_seed(first: Sequence[ExportedRun], second: Sequence[ExportedRun]) -> list[Pair]:
    """Pairs of one seed each, ascending; two runs alone are paired whatever their seeds, for the check to name them."""
    if len(first) == len(second) == 1:
        return [Pair(first[0], second[0])]
    by_seed: list[dict[int, ExportedRun]] = []
    for side in (first, second):
        seeds = [run.seed for run in side]
        if twice := [run for run in side if seeds.count(run.seed) > 1]:
            raise UserError(f"{twice[0].folder} and {twice[1].folder} have one seed; give one run a seed and side")
        by_seed.append({run.seed: run for run in side})
    alone = sorted(by_seed[0].keys() ^ by_seed[1].keys())
    if alone:
        run = (by_seed[0] | by_seed[1])[alone[0]]
        raise UserError(f"{run.folder} (seed {run.seed}) has no run of its seed on the other side; give that one too")
    return [Pair(by_seed[0][seed], by_seed[1][seed]) for seed in sorted(by_seed[0])]


def _names(*sides: Sequence[ExportedRun]) -> list[str]:
    """What the sides are called: their runs' names without a seed at the end; with A, B, ... if two have one name."""
    names = [side[0].name if len(side) == 1 else min((run.side for run in side), key=len) for side in sides]
    if len(set(names)) < len(names):
        names = [f"{name} ({chr(ord('A') + n)})" for n, name in enumerate(names)]
    return names


# ---- Checks ----------------------------------------------------------------------------------------------------------


def pair_problems(pair: Pair, allowed: set[str], seeds: bool = False) -> list[str]:
    """In what the two runs differ that they should share; each a phrase. `seeds`: they may differ, and with them the
    order of the data."""
    first, second = pair
    said = [{**run.record, **(run.summary or {})} for run in pair]
    names = f"{first.folder} and {second.folder}"
    problems = [
        f"{names} differ in {key} ({said[0].get(key)} and {said[1].get(key)})"
        for key in ("store_fingerprint", "seed", "step", "tokens_seen", "init_sha256")
        if said[0].get(key) != said[1].get(key) and not (seeds and key == "seed")
    ]
    undeclared = {k: v for k, v in differences(pair, allowed).items() if k not in allowed and k != SEED}
    problems += [f"{names} differ in {key} ({one} and {other})" for key, (one, other) in undeclared.items()]
    if not problems and not seeds and (step := first_digest_that_differs(pair)) is not None:
        problems.append(f"{names} have not seen the same batches: their data digests differ from step {step} on")
    return problems


def first_digest_that_differs(pair: Pair) -> int | None:
    """The first step at which both have a data digest and not the same; None where there is none."""
    first, second = ({row["step"]: row["data_digest"] for row in run.metrics if row.get("data_digest")} for run in pair)
    return next((int(step) for step, digest in first.items() if second.get(step, digest) != digest), None)


def _digests(pair: Pair) -> int:
    """At how many steps both have a digest."""
    first, second = ({row["step"] for row in run.metrics if row.get("data_digest")} for run in pair)
    return len(first & second)


def _seed_problems(pairs: Sequence[Pair], allowed: set[str]) -> list[str]:
    """In what the pairs of several seeds differ beside the seed."""
    problems = []
    for pair in pairs[1:]:
        between = Pair(pairs[0].first, pair.first)
        others = {key: values for key, values in differences(between, allowed).items() if key != SEED}
        if between.first.record["store_fingerprint"] != between.second.record["store_fingerprint"]:
            others["store_fingerprint"] = tuple(run.record["store_fingerprint"] for run in between)
        problems += [
            f"{between.first.folder} and {between.second.folder} differ in {key} ({one} and {other})"
            for key, (one, other) in others.items()
        ]
    return problems


def _notes(pairs: Sequence[Pair], change: Mapping[str, Any]) -> list[str]:
    """What a reader of the comparison should know."""
    runs = [run for pair in pairs for run in pair]
    notes = []
    if not change:
        notes.append("The two configs differ in nothing: this compares a run with itself.")
    if any(_digests(pair) == 0 for pair in pairs):
        notes.append(
            "Not every pair has digests of its batches in common: that both saw the same ones rests on seed and store."
        )
    for key, what in (("git_commit", "commits"), ("device", "devices"), ("versions", "package versions")):
        if any(run.record.get(key) != runs[0].record.get(key) for run in runs):
            notes.append(f"The runs were trained with different {what}; losses and times may differ by that too.")
    for run in runs:
        skipped = [row["skipped_steps"] for row in run.metrics if row.get("skipped_steps")]
        if skipped and float(skipped[-1]):
            notes.append(f"{run.folder} skipped {float(skipped[-1]):.0f} steps whose gradient was not finite.")
    return notes
