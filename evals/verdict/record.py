"""What a comparison found, as rows for the eye and as a record of every number."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from evals.exported_steps import Curve
from evals.verdict import efficiency, verdict
from evals.verdict.measurements import Exports
from evals.verdict.pair import Pairs
from llm.runs import reading


class Losses(NamedTuple):
    """The two losses of one side, in nats per token: a curve of each for every seed."""

    name: str
    training: Sequence[Curve]
    validation: Sequence[Curve]


class Comparison(NamedTuple):
    """All that was found out about two sides."""

    pairs: Pairs
    exports: Exports
    findings: list[verdict.Finding]
    savings: list[efficiency.Saving]  # a pair each, to the higher of the two final losses
    targets: dict[float, list[efficiency.Saving]]
    costs: list[efficiency.Cost]
    table_2: tuple[dict[str, Any], dict[str, Any]] | None
    metric: str  # of the tasks
    measured: dict[str, Any]  # how the losses were: device, dtype, batch size, context, versions
    notes: list[str]
    sentence: str
    null: verdict.Finding | None = None  # of the baseline with other initial weights, in the primary quantity
    published: tuple[dict[str, Any], dict[str, Any]] | None = None  # `table_2` as the authors' script measures it


def change(pairs: Pairs) -> str:
    """What was declared to differ, in words."""
    told = [f"{key} {_told(one)} → {_told(other)}" for key, (one, other) in pairs.change.items()]
    return ", ".join(told) or "none"


def _told(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def rows(found: Comparison) -> list[list[str]]:
    """The table's lines: what was tested, then what the change costs, then the paper's sentences; all as text."""
    lines = [verdict.row(finding) for finding in found.findings]
    for cost in found.costs:
        first, second = cost.means
        form = ".3g" if cost.name in ("FLOPs per token", "step time") else ",.2f" if cost.unit == "GB" else ",.0f"
        name = f"{cost.name}, {cost.unit}" if cost.unit else cost.name
        ranges = [100 * (ratio - 1) for ratio in cost.ratios]
        spread = cost.interval
        if not spread and len(ranges) > 1:
            least, most = efficiency.in_percent(min(ranges)), efficiency.in_percent(max(ranges))
            spread = f"{least} in every seed" if least == most else f"{least} to {most} by seed"
        lines.append([name, f"{first:{form}}", f"{second:{form}}", efficiency.in_percent(cost.percent), spread, "", ""])
    busy = [f"{len(runs)} of {len(found.pairs.pairs)}" for runs in efficiency.busy_runs(found.pairs.pairs)]
    lines.append(["runs on a busy machine", *busy, "", "", "", ""])
    for table, how in ((found.table_2, ""), (found.published, ", as published")):
        for outcome in ("correct", "incorrect") if table else ():
            means = [100 * float(np.mean(side[outcome]["mean"])) for side in table or ()]
            name, values = f"IOI {outcome} name, 4 sentences{how}, %", [f"{mean:.2f}" for mean in means]
            lines.append([name, *values, f"{means[1] - means[0]:+.2f}", "", "", ""])
    return lines


def saving_rows(found: Comparison) -> list[list[str]]:
    """Steps, tokens and FLOPs to the higher final loss and to the losses asked for; a line a seed."""
    lines = []
    for savings in (found.savings, *found.targets.values()):
        for number, saving in enumerate(savings):
            seed = found.pairs.seed_label(number)
            for name, reached in zip(found.pairs.names, (saving.first, saving.second), strict=True):
                values = (reached.steps, reached.tokens, reached.flops)
                cells = [
                    ("–" if reached.tokens else "never") if value is None else f"{'≤ ' * reached.at_most}{value:{form}}"
                    for value, form in zip(values, (",.0f", ",.0f", ".3g"), strict=True)
                ]
                lines.append([f"{saving.target:.4f}", seed, name, *cells])
    return lines


def losses_of(pairs: Pairs) -> list[Losses]:
    """Both sides' curves of training and validation loss."""
    return [
        Losses(
            name,
            [run.curve("train_loss") for run in pairs.side(side)],
            [run.curve("validation_loss") for run in pairs.side(side)],
        )
        for side, name in enumerate(pairs.names)
    ]


def sentence(arms: Sequence[Comparison]) -> str:
    """The verdicts on all arms."""
    return " ".join(found.sentence for found in arms)


def header(arms: Sequence[Comparison]) -> list[str]:
    """The header of `arm_rows`."""
    if len(arms) == 1:
        return ["", *arms[0].pairs.names, *verdict.HEADER]
    return ["arm", "", arms[0].pairs.names[0], "of the arm", *verdict.HEADER]


def arm_rows(arms: Sequence[Comparison]) -> list[list[str]]:
    """`rows` of each arm, with the arm in front where there are several."""
    if len(arms) == 1:
        return rows(arms[0])
    return [[found.pairs.names[1], *row] for found in arms for row in rows(found)]


def records(arms: Sequence[Comparison], made_by: str) -> dict[str, Any]:
    """results.json: `record` of one arm; of several, a list under "arms"."""
    if len(arms) == 1:
        return record(arms[0], made_by)
    every = [record(found, made_by) for found in arms]
    return {"verdict": sentence(arms), "baseline": arms[0].pairs.names[0], "arms": every, "made_by": made_by}


def record(found: Comparison, made_by: str) -> dict[str, Any]:
    """Every number of the comparison of one arm, in full precision."""
    pairs = found.pairs
    return reading.finite(
        {
            "verdict": found.sentence,
            "names": list(pairs.names),
            "change": {key: list(values) for key, values in pairs.change.items()},
            "notes": found.notes,
            "runs": [
                {
                    "side": name,
                    "folder": str(run.folder),
                    "name": run.name,
                    "export": str(export.folder),
                    **{key: run.record.get(key) for key in ("seed", "git_commit", "device", "store_fingerprint")},
                    "summary": run.summary,
                }
                for pair, both_exports in zip(pairs.pairs, found.exports, strict=True)
                for name, run, export in zip(pairs.names, pair, both_exports, strict=True)
            ],
            "losses_measured": found.measured,
            "findings": [verdict.record(finding) for finding in found.findings],
            "null": verdict.record(found.null) if found.null else None,
            "to_loss": [
                {
                    "seed": seed,
                    "target": s.target,
                    "ratio_of_tokens": s.ratio,
                    "reached": [s.first._asdict(), s.second._asdict()],
                }
                for savings in (found.savings, *found.targets.values())
                for seed, s in zip(pairs.seeds, savings, strict=True)
            ],
            "costs": [cost._asdict() | {"ratios": cost.ratios} for cost in found.costs],
            "table_2": list(found.table_2) if found.table_2 else None,
            "table_2_as_published": list(found.published) if found.published else None,
            "made_by": made_by,
        }
    )
