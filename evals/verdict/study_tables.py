"""The verdict on a study as rows for the eye, as numbers for a spreadsheet and as JSON."""

import math
from collections.abc import Sequence
from typing import Any

from evals.verdict.ladder import ArmVerdict, AtSize, LadderVerdict, points
from evals.verdict.ladder_words import at_equal_cost, bounds, extrapolation, held_out, in_compute, record
from evals.verdict.statistics import Interval
from evals.verdict.study import StudyVerdict
from evals.verdict.study_arms import adjusted_differences, arm_sources, format_cost
from evals.verdict.verdict import record as finding_record
from evals.verdict.verdict import row as verdict_row
from llm.common.tables import text_table

NONE = "–"
NUMBERS = (
    "arm", "size", "parameters", "flops", "seeds", "difference", "difference_low", "difference_high", "p_value",
    "p_value_holm", "multiplier", "multiplier_low", "multiplier_high", "shown", "arm_parameters", "arm_flops",
    "arm_step_time",
    "tuned", "at_equal_parameters", "at_equal_flops", "source",
)  # fmt: skip


def _shown(at: AtSize) -> str:
    return "yes" if at.shown else "in nats" if at.differs else "no"


def size_header(level: float) -> list[str]:
    """The header of `size_rows`."""
    percent = f"{100 * level:g}%"
    return [
        "size", "parameters", "arm", "seeds", f"difference, nats ({percent})", "p, Holm", f"compute ({percent})",
        "null arm, nats", "shown",
    ]  # fmt: skip


def size_rows(verdict: LadderVerdict) -> list[list[str]]:
    """Each size of each arm with a change, the null arm's difference at that size next to it."""
    null = {at.size.name: nats(at.difference) for at in verdict.null.sizes} if verdict.null else {}
    return [
        [
            at.size.name, f"{at.size.parameters:,.0f}", arm, str(at.seeds), nats(at.difference), _p_value(at.adjusted),
            compute(at.log_multiplier), null.get(at.size.name, NONE), _shown(at),
        ]
        for arm in verdict.ladder.changed
        for at in verdict.arms[arm].sizes
    ]  # fmt: skip


def arm_header(found: StudyVerdict) -> list[str]:
    """The header of `arm_rows`."""
    tune, several = found.record.content.get("tune") or {}, len(found.verdict.ladder.sizes) > 1
    tuned, equal = [str(tune.get("key"))] if tune else [], ["nats at equal parameters", "nats at equal FLOPs"]
    return [
        "arm",
        "size",
        "parameters",
        "FLOPs",
        "step time",
        *(equal if several else []),
        *tuned,
        "where it comes from",
    ]


def arm_rows(found: StudyVerdict) -> list[list[str]]:
    """Every arm: what it has and takes relative to the baseline, and where it comes from. None if nothing is known."""
    sources, tuned = arm_sources(found.record), bool(found.record.content.get("tune"))
    several, equal = len(found.verdict.ladder.sizes) > 1, adjusted_differences(found.verdict, found.costs)
    rows = []
    for (arm, size), cost in sorted(found.costs.items(), key=lambda item: found.record.arms.index(item[0][0])):
        left = [NONE if value is None else f"{value:+.4f}" for value in equal.get((arm, size), (None, None))]
        value = [NONE if cost.tuned is None else f"{cost.tuned:g}"] if tuned else []
        rows.append([arm, size, *format_cost(cost), *(left if several else []), *value, sources.get(arm, NONE)])
    return rows if sources or any(cost.parameters for cost in found.costs.values()) else []


CLAIM_HEADER = ["arm", "claim", "by seeds", "by sizes", "shown"]


def claim_rows(verdict: LadderVerdict) -> list[list[str]]:
    """Mean, slope, largest size and extrapolation of each arm, the null arm last."""
    arms = [*verdict.ladder.changed, *([verdict.ladder.null] if verdict.ladder.null else [])]
    return [row for arm in arms for row in _claims(verdict.arms[arm])]


def _claims(found: ArmVerdict) -> list[list[str]]:
    rows = []
    for name, claim, form in (
        ("compute, mean of the sizes", found.mean, compute),
        ("slope of ln m over ln C", found.slope, plain),
        ("compute, largest size by the line", found.largest, compute),
    ):
        if claim is not None:
            shown = "firm" if claim.firm else "by seeds" if claim.shown else "no"
            rows.append([found.arm, name, form(claim.by_seeds), form(claim.by_sizes), shown])
    if found.beyond is not None:
        rows.append([found.arm, f"extrapolated to {found.beyond_compute:.1e} FLOPs", compute(found.beyond), NONE, NONE])
    return rows


def joint_rows(verdict: LadderVerdict) -> list[list[str]]:
    """The joint fit: floor and exponents, then each arm's own exponents and multipliers at each size."""
    joint = verdict.joint
    if joint is None:
        return []
    rows = [["all arms", "E", plain(joint.floor)]]
    rows += [["all arms", f"exponent of {term}, shared", plain(value)] for term, value in joint.exponents.items()]
    for arm in joint.arms:
        rows += [[arm, f"exponent of {term}, own", plain(value)] for term, value in joint.own_exponents[arm].items()]
        if arm in joint.own_p_values:
            rows.append([arm, "p value, exponents equal to the baseline's", f"{joint.own_p_values[arm]:.3g}"])
            for size, value in zip(verdict.ladder.sizes, joint.log_multipliers[arm], strict=True):
                rows.append([arm, f"compute at {size.name}, own exponents", compute(value)])
    return rows


def outlook(found: StudyVerdict) -> list[str]:
    """Measured cost, extrapolation, held-out size and what is refused, a sentence each, of every arm with a change."""
    verdict, sentences = found.verdict, []
    refused: dict[str, list[str]] = {}  # why -> the arms
    for arm in verdict.ladder.changed:
        for refusal in verdict.arms[arm].refusals:
            refused.setdefault(refusal.sentence, []).append(arm)
        if arm in found.step_times:
            sentences.append(at_equal_cost(verdict, arm, found.step_times[arm]))
        sentences += [extrapolation(verdict, arm), held_out(verdict, arm)]
    sentences += [f"{', '.join(arms)}: {why}." for why, arms in refused.items()]
    return [sentence for sentence in sentences if sentence]


def format_study(found: StudyVerdict) -> str:
    """What `evals study` prints."""
    verdict = found.verdict
    parts = [
        text_table(size_header(verdict.level), rows) if (rows := size_rows(verdict)) else "",
        text_table(CLAIM_HEADER, rows) if (rows := claim_rows(verdict)) else "",
        "\n".join(found.missing),
        "\n".join(f"Changed since the first run: {change}." for change in found.changes),
        "\n".join(f"Note: {note}" for note in found.notes),
        "\n".join(outlook(found)),
        "\n".join(found.headlines),
    ]
    return "\n\n".join(part for part in parts if part)


def number_rows(found: StudyVerdict) -> list[Sequence[Any]]:
    """table.csv: each size of each arm in full precision, the null arm's too, under `NUMBERS`.

    `arm_parameters`, `arm_flops` and `arm_step_time` are ratios to the baseline's.
    """
    arms, sources = found.verdict.arms, arm_sources(found.record)
    equal = adjusted_differences(found.verdict, found.costs)
    rows: list[Sequence[Any]] = [NUMBERS]
    for arm in found.verdict.ladder.arms:
        for at in arms[arm].sizes:
            cost, left = found.costs.get((arm, at.size.name)), equal.get((arm, at.size.name), (None, None))
            costs = [*((*cost[:2], cost.step_time, cost.tuned) if cost else (None,) * 4), *left]
            rows.append([*_numbers(arm, at), *("" if each is None else each for each in costs), sources.get(arm, "")])
    return rows


def _numbers(arm: str, at: AtSize) -> list[Any]:
    multiplier = at.log_multiplier.mapped(math.exp)[:3] if at.log_multiplier else ("", "", "")
    return [
        arm, at.size.name, at.size.parameters, math.exp(at.size.log_compute), at.seeds, *at.difference, at.adjusted,
        *multiplier, at.shown,
    ]  # fmt: skip


def run_rows(found: StudyVerdict) -> list[list[str]]:
    """Every run, searches included: what it is, how it ended, and its folder."""
    return [
        [
            run.size, run.arm, str(run.seed), run.budget if run.value is None else f"{run.budget}, {run.value:g}",
            f"{run.tokens:,}", f"{run.flops:.2e}", state.state,
            f"{state.loss:.4f}" if state.loss is not None and math.isfinite(state.loss) else NONE,
            str(found.record.folder / run.name),
        ]
        for run, state in found.states.items()
    ]  # fmt: skip


EVALUATION_HEADER = [
    "", "size", "budget", "arm", "seeds", "baseline", "of the arm", "difference", "interval", "p, Holm", "shown",
]  # fmt: skip


def evaluation_rows(found: StudyVerdict) -> list[list[str]]:
    """Every quantity by size, budget and arm."""
    rows = []
    order = dict.fromkeys(each.finding.measure.name for each in found.evaluations)
    for name in order:
        for size, budget, arm, finding in found.evaluations:
            if finding.measure.name == name:
                what, *values = verdict_row(finding)
                rows.append([what, size, budget, arm, str(finding.effect.seeds), *values])
    return rows


def study_record(found: StudyVerdict, made_by: str) -> dict[str, Any]:
    """results.json: every number of the verdict, in full precision."""
    verdict, joint = found.verdict, found.verdict.joint
    left = {"shared", "own", "residuals"}
    return {
        "verdict": found.sentences,
        "outlook": outlook(found),
        "step_times": record(found.step_times),
        "missing": found.missing,
        "changes": found.changes,
        "notes": found.notes,
        "registered": found.record.registered["time"],
        "level": verdict.level,
        "baseline": verdict.ladder.baseline,
        "null_arm": verdict.ladder.null,
        "arms": record(verdict.arms),
        "costs": [{"arm": arm, "size": size} | record(cost) for (arm, size), cost in found.costs.items()],
        "sources": arm_sources(found.record),
        "joint_fit": joint and {key: value for key, value in record(joint).items() if key not in left},
        "residuals": [] if joint is None else _residuals(verdict),
        "evaluations": [
            {"size": size, "budget": budget, "arm": arm} | finding_record(finding)
            for size, budget, arm, finding in found.evaluations
        ],
        "choices": found.record.choices,
        "runs": [
            record(run) | {"state": state.state, "loss": record(state.loss), "reason": state.reason}
            for run, state in found.states.items()
        ],
        "made_by": made_by,
    }


def _residuals(verdict: LadderVerdict) -> list[dict[str, Any]]:
    """The joint fit's residuals of ln loss."""
    assert verdict.joint is not None
    fitted = points(verdict.ladder)
    return [
        {"arm": verdict.joint.arms[arm], "flops": float(flops), "residual": float(residual)}
        for arm, flops, residual in zip(fitted.arm, fitted.compute, verdict.joint.residuals, strict=True)
    ]


# ---- Cells -----------------------------------------------------------------------------------------------------------


def nats(interval: Interval) -> str:
    """A difference in nats with its interval."""
    return f"{interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def compute(log_multiplier: Interval | None) -> str:
    """ln m as compute with its interval: "12% less (7 to 16% less)"."""
    return NONE if log_multiplier is None else f"{in_compute(log_multiplier.value)} ({bounds(log_multiplier)})"


def plain(interval: Interval | None) -> str:
    """A number with its interval."""
    return NONE if interval is None else f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"
