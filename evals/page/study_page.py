"""The page of a study: verdict, tables, pictures of each arm, every run, and the study's YAML."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from matplotlib.figure import Figure

from evals.page import study_figures as figures
from evals.verdict import study_tables as tables
from evals.verdict.study import StudyVerdict
from evals.verdict.study_arms import SEVERAL
from llm.common.html import Headline, Picture, Section, Table, page, typeset
from llm.common.plots import as_svg
from llm.runs.study_record import TUNE

FOREST = "forest"  # file name of the picture of all arms
Drawn = Mapping[str, tuple[Figure, str]]  # file name without its ending -> picture and caption


def draw(found: StudyVerdict) -> dict[str, tuple[Figure, str]]:
    """Draw every picture that the study's numbers allow."""
    drawn: dict[str, tuple[Figure, str]] = {}
    verdict = found.verdict
    base, level = verdict.ladder.baseline, f"{100 * verdict.level:g}%"
    if len(verdict.ladder.changed) > SEVERAL and any(verdict.arms[arm].sizes for arm in verdict.ladder.changed):
        caption = f"Every arm minus {base} with {level} intervals, the best first; filled: shown after Holm's "
        caption += f"correction over all of them; null: {base} with other initial weights; right: parameters and FLOPs "
        caption += f"relative to {base}"
        drawn[FOREST] = figures.draw_forest(verdict, found.costs), caption
    for arm in verdict.ladder.changed:
        sizes = verdict.arms[arm].sizes
        if sizes:
            caption = f"{arm} minus {base} at each size with {level} intervals; filled: shown after Holm's correction; "
            caption += f"null: {base} with other initial weights"
            drawn[f"{arm}-effect"] = figures.draw_effect(verdict, arm), caption
        caption = f"Final loss of {base} and {arm} over compute; hollow: smaller budgets, lines: both joint fits"
        drawn[f"{arm}-loss"] = figures.draw_loss(verdict, arm), caption
        if sizes and sizes[0].log_multiplier is not None:
            caption = f"Compute multiplier of {arm} over compute with {level} intervals; dashed: extrapolated"
            drawn[f"{arm}-multiplier"] = figures.draw_multiplier(verdict, arm), caption
        if verdict.joint is not None:
            caption = f"Residuals of the joint fit with shared exponents, {base} and {arm}"
            drawn[f"{arm}-residuals"] = figures.draw_residuals(verdict, arm), caption
    for arm, losses in _searches(found).items():
        key = str(found.record.content["tune"]["key"])
        caption = f"Search of {key} for {arm}, a line for each size; dotted: the chosen value"
        drawn[f"{arm}-search"] = figures.draw_search(losses, found.record.choices.get(arm, {}), arm, key), caption
    return drawn


def _searches(found: StudyVerdict) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Return the finite losses of a search: arm -> size -> value -> a loss for each seed."""
    losses: dict[str, dict[str, dict[float, list[float]]]] = {}
    for run, state in found.states.items():
        if run.stage == TUNE and run.value is not None and state.loss is not None and math.isfinite(state.loss):
            of_size = losses.setdefault(run.arm, {}).setdefault(run.size, {})
            of_size.setdefault(run.value, []).append(state.loss)
    return losses


def study_sections(found: StudyVerdict, drawn: Drawn) -> list[Section]:
    """Return the page's sections, without those of which the study has nothing."""
    each = [_arm(arm, drawn) for arm in found.verdict.ladder.changed]
    sections = [_result(found, drawn), *each, _evaluations(found), _joint(found), _runs(found), _text(found)]
    return [section for section in sections if section is not None]


def format_study_page(found: StudyVerdict, sections: Sequence[Section], content: dict[str, Any], made_by: str) -> str:
    """Return the page as HTML; `content` is what results.json holds, and travels inside it."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page(
        _title(found),
        [Headline(sentence) for sentence in found.headlines],
        typeset(sections),
        f"{made_by}, {when}",
        json.dumps(content, ensure_ascii=False),
    )


def _title(found: StudyVerdict) -> str:
    arms, baseline = found.verdict.ladder.changed, found.verdict.ladder.baseline
    names = ", ".join(arms) if len(arms) <= SEVERAL else f"{len(arms)} arms"
    return f"{names} against {baseline}" + (" over sizes" if len(found.verdict.ladder.sizes) > 1 else "")


def _result(found: StudyVerdict, drawn: Drawn) -> Section:
    verdict = found.verdict
    by_size = (
        "Differences are arm minus baseline over pairs of equal seed, means over the budgets. Compute is what the arm "
        "needs for a loss, relative to the baseline. The null arm is the baseline with other initial weights. A "
        "difference is shown if its interval excludes zero and its p value, corrected by Holm's method over sizes and "
        "arms, agrees."
    )
    claims = (
        "By seeds: the sample is the seeds at these sizes. By sizes: the sample is the sizes. Firm: both intervals "
        "exclude zero on the same side. Extrapolated: one decade beyond the largest size, with a prediction interval."
    )
    costs = (
        f"Parameters, embeddings included, and FLOPs at equal tokens, relative to {verdict.ladder.baseline}. "
        "Differences in nats are at equal tokens and count neither. At equal parameters or FLOPs: less what the "
        "baseline gains from as many more, by its mean losses at these sizes, taken as exact; it needs two sizes."
    )
    made = [
        Table("At each size", tables.size_header(verdict.level), tables.size_rows(verdict), by_size),
        Table("Over the sizes", tables.CLAIM_HEADER, tables.claim_rows(verdict), claims),
        Table("The arms", tables.arm_header(found), tables.arm_rows(found), costs),
    ]
    lines = [*tables.outlook(found), *found.missing, *(f"Note: {note}" for note in found.notes)]
    pictures = (
        [Picture(as_svg(figure, caption), caption) for figure, caption in [drawn[FOREST]]] if FOREST in drawn else []
    )
    return Section("Result", "\n\n".join(lines), pictures, [table for table in made if table.rows])


def _arm(arm: str, drawn: Drawn) -> Section:
    pictures = [
        Picture(as_svg(figure, caption), caption) for name, (figure, caption) in drawn.items() if _is_of(name, arm)
    ]
    return Section(arm, pictures=pictures)


def _is_of(name: str, arm: str) -> bool:
    return name.rpartition("-")[0] == arm


def _evaluations(found: StudyVerdict) -> Section | None:
    rows = tables.evaluation_rows(found)
    if not rows:
        return None
    note = (
        "Measured of the exports of the last steps. Intervals are over seeds and items, of one seed over items alone. "
        "p values are corrected by Holm's method over sizes, budgets and arms: those of the tasks, all others, and the "
        "null arm's each among themselves. The compute multipliers above rest on the loss, not on these."
    )
    return Section("Evaluations by size", tables=[Table("What was measured", tables.EVALUATION_HEADER, rows, note)])


def _joint(found: StudyVerdict) -> Section | None:
    rows = tables.joint_rows(found.verdict)
    if not rows:
        return Section("Joint fit", "There is none: it needs three sizes, with two finished seeds at each.")
    note = (
        "L = E + A N^-a + B D^-b, or E + K C^-c with one budget. No verdict rests on this fit. The p value is that of "
        "Wald's test."
    )
    return Section("Joint fit", tables=[Table("A second opinion", ["arm", "", "value (interval)"], rows, note)])


def _runs(found: StudyVerdict) -> Section:
    header = ["size", "arm", "seed", "budget", "tokens", "FLOPs", "state", "validation loss", "folder"]
    return Section("Runs", tables=[Table("Every run", header, tables.run_rows(found))])


def _text(found: StudyVerdict) -> Section:
    changed = "\n\n".join(f"Changed since then: {change}." for change in found.changes)
    registered = f"The first run started at {found.record.registered['time']}."
    unchanged = "The text of the study is the same since then."
    return Section("The study", f"{registered}\n\n{changed or unchanged}", code=found.text)
