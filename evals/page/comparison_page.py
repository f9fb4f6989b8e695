"""The page of a comparison: verdict, table, and every picture that the measurements at hand allow."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from evals.harness.suites import DECISION_ACCURACY
from evals.page import curves, figures
from evals.page.loss_curves import draw_loss
from evals.page.training import (
    config_table,
    draw_head_weights,
    draw_learned,
    head_weights,
    learned_curves,
    training_facts,
)
from evals.probes import continuations, heads, incontext, sparsity
from evals.verdict import verdict
from evals.verdict.record import Comparison, arm_rows, change, header, losses_of, saving_rows
from llm.common.errors import UserError
from llm.common.html import Headline, Picture, Section, Table, page, typeset
from llm.common.plots import as_pdf, as_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOVE_CHANCE = 5  # times the chance level, up to which the scale of a head map goes at least: noise does not fill it


def page_sections(arms: Sequence[Comparison]) -> list[Section]:
    """All that the page shows."""
    sections = [_summary(arms)]
    for found in arms:
        of_arm = f"{found.pairs.names[1]}: " if len(arms) > 1 else ""
        sections += [section._replace(title=of_arm + section.title) for section in _sections(found)]
    return sections


def format_page(arms: Sequence[Comparison], sections: Sequence[Section], content: dict[str, Any], made_by: str) -> str:
    """The whole page as HTML; `content` is what results.json holds, and travels inside it."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page(
        f"{', '.join(found.pairs.names[1] for found in arms)} against {arms[0].pairs.names[0]}",
        [
            Headline(
                verdict.headline(found.pairs.names, found.findings),
                verdict.key_numbers(found.findings, found.null),
                found.sentence,
            )
            for found in arms
        ],
        typeset(sections),
        f"{made_by}, {when}",
        json.dumps(content, ensure_ascii=False),
    )


def _sections(found: Comparison) -> list[Section]:
    """All on one arm but the table."""
    sections = [
        _loss(found),
        _saving(found),
        _tasks(found),
        _over_training(found),
        _indirect_object(found),
        _in_context(found),
        _recall(found),
        *_learned(found),
        _trained(found),
        _provenance(found),
    ]
    return [section for section in sections if section is not None]


def _picture(figure: "Figure", caption: str) -> Picture:
    return Picture(as_svg(figure, caption), caption, as_pdf(figure))


def _summary(arms: Sequence[Comparison]) -> Section:
    findings = [finding for found in arms for finding in found.findings]
    level = f"{100 * findings[0].effect.level:g}%" if findings else "95%"
    each = "each among themselves and over all arms" if len(arms) > 1 else "each among themselves"
    note = (
        f"Differences are the second minus the first, with {level} intervals: of one seed from a paired bootstrap over "
        "items, of several from the variance over seeds and items. A difference is shown only where its interval "
        "leaves out zero and its p value agrees; p values are corrected by Holm's method, the tasks' and the other "
        f"lines' {each}. The loss per document is of documents cut at the models' context, that of the curves of "
        "windows."
    )
    table = Table("What was measured", header(arms), arm_rows(arms), note, stacked=True)
    texts = []
    for found in arms:
        of_arm = f" of {found.pairs.names[1]}" if len(arms) > 1 else ""
        cost = verdict.cost_sentence(found.pairs.names, found.costs)
        texts.append(f"The change{of_arm}: {change(found.pairs)}. {cost}".strip())
    return Section("Result", "\n\n".join(texts), tables=[table])


def _loss(found: Comparison) -> Section:
    names, sides = found.pairs.names, losses_of(found.pairs)
    pictures = [
        _picture(draw_loss(sides, second_half=False), "Training and validation loss over tokens"),
        _picture(draw_loss(sides, second_half=True), "Training and validation loss from half of the run on"),
        _picture(figures.draw_difference(found.pairs.pairs, names), "Difference of the validation losses over tokens"),
    ]
    primary = [finding for finding in found.findings if finding.primary]
    pictures += [
        _picture(figures.draw_documents(finding, names), "Difference of the validation loss, document by document")
        for finding in primary
    ]
    return Section("Loss", pictures=pictures)


def _saving(found: Comparison) -> Section:
    header = ["loss, nats per token", "seed", "run", "steps", "tokens", "FLOPs"]
    note = "Read off the validation curves, on the line between two measurements."
    return Section("Until a loss is reached", tables=[Table("Way to a loss", header, saving_rows(found), note)])


def _tasks(found: Comparison) -> Section | None:
    tasks = [finding for finding in found.findings if finding.measure.family == "tasks"]
    pictures = []
    if any(finding.measure.unit == "points" for finding in found.findings):
        pictures = [_picture(figures.draw_intervals(found.findings, "points"), "Differences in accuracy")]
    if not pictures and not tasks:
        return None
    return Section("Tasks", pictures=pictures, tables=[_noise(tasks)] if tasks else [])


def _noise(tasks: Sequence[verdict.Finding]) -> Table:
    """How well each task distinguishes models: as published, and by the noise of this comparison."""
    rows = []
    for finding in tasks:
        effect, published = finding.effect, DECISION_ACCURACY.get(finding.measure.task)
        noise = (effect.high - effect.low) / 2
        rows.append(
            [
                f"{finding.measure.name}, {finding.measure.unit}",
                "–" if published is None else str(published),
                verdict.signed(finding, effect.difference),
                verdict.signed(finding, noise).removeprefix("+"),
                f"{abs(effect.difference) / noise:.2f}" if noise else "–",
            ]
        )
    note = (
        "Decision accuracy is published for models of 150M parameters: in how many percent of pairs of training sets "
        "the task orders such models as it orders models of 1B (Heineman et al. 2025, Signal and Noise); 50 is chance, "
        "–: not published for this task. Noise is half of the interval of this comparison. A ratio below 1 says that "
        "these models, seeds and items cannot tell the difference from none."
    )
    header = ["", "decision accuracy, %", "difference", "noise", "difference / noise"]
    return Table("How well each task distinguishes models", header, rows, note)


def _over_training(found: Comparison) -> Section | None:
    """Figures 5 and 9 of Burns et al. 2025, where several exported steps were evaluated."""
    try:
        points = curves.accuracy_over_steps([run for pair in found.pairs.pairs for run in pair], found.metric)
    except UserError as error:  # earlier steps were evaluated in another way: that is no reason to hold back a verdict
        return Section("Accuracy over training", f"Not drawn: {error}.")
    if len({point.step for point in points}) < 2:
        return None
    return Section(
        "Accuracy over training",
        pictures=[
            _picture(curves.draw_average(points), "Mean accuracy over the tasks, over training"),
            _picture(curves.draw_tasks(points), "Accuracy of each task over training"),
        ],
    )


def _indirect_object(found: Comparison) -> Section | None:
    if found.table_2 is None:
        return None
    lines = "; lines: intervals of the mean over seeds" if len(found.pairs.pairs) > 1 else ""
    caption = f"Probability of the right and the wrong name, four sentences: each model as it was trained{lines}"
    pictures = [_picture(figures.draw_ioi(found.table_2, found.pairs.names), caption)]
    if found.published is None:
        return Section("Indirect objects", pictures=pictures)
    caption = "The same as published: models without a stream inside the one with the stream, dropout on"
    pictures.append(_picture(figures.draw_ioi(found.published, found.pairs.names), caption))
    return Section("Indirect objects", pictures=pictures)


def _in_context(found: Comparison) -> Section | None:
    """Loss by position, heads and sparsity, of the first seed's models."""
    kept = [export.result("incontext") for export in found.exports[0]]
    if None in kept:
        return None
    names = found.pairs.names

    def of(*keys: str) -> dict[str, Any]:
        values: dict[str, Any] = dict(zip(names, kept, strict=True))
        for key in keys:
            values = {name: value[key] for name, value in values.items()}
        return values

    errors = {name: each for name, each in of("positions", "standard_error").items() if each}
    caption = "Loss by position in the context, with standard errors over windows"
    pictures = [_picture(incontext.draw_positions(of("positions", "loss"), errors), caption)]
    first, second = (result["positions"] for result in kept)
    if len(first.get("per_window", ())) > 1 and "per_window" in second:
        caption = "Difference of the loss by position, 95% interval over windows"
        pictures.append(_picture(incontext.draw_position_differences(first, second, names), caption))
    length = kept[0]["heads"].get("length")
    chance = heads.chance_levels(length) if length else {}
    for key, title in (("prefix_matching", "Prefix matching"), ("previous_token", "Previous token")):
        figure = heads.draw_heads(of("heads", key), title, ABOVE_CHANCE * chance.get(key, 0.0))
        at_chance = f"; attention to all tokens alike scores {chance[key]:.3f}" if chance else ""
        pictures.append(_picture(figure, f"{title}, layer by head{at_chance}"))
    if None not in (gini := of("gini")).values():  # null where a model's feed-forward networks are not known
        pictures.append(_picture(sparsity.draw_gini(gini), "Gini index of the feed-forward activations by layer"))
    seed = f", seed {found.pairs.seed_label(0)}" if len(found.pairs.seeds) > 1 else ""
    return Section("In context" + seed, pictures=pictures)


def _recall(found: Comparison) -> Section | None:
    """Key-value pairs by their number and a needle by its depth, of the first seed's models."""
    kept = [export.result("recall") for export in found.exports[0]]
    if None in kept:
        return None
    results = dict(zip(found.pairs.names, kept, strict=True))
    pictures = [
        _picture(figures.draw_pairs(results), "Key-value pairs recalled, with standard errors; dashed: chance"),
        _picture(figures.draw_needle(results), "Gain from a needle in the text by its depth, with standard errors"),
    ]
    seed = f", seed {found.pairs.seed_label(0)}" if len(found.pairs.seeds) > 1 else ""
    return Section("Recall" + seed, pictures=pictures)


def _learned(found: Comparison) -> list[Section]:
    """Learned numbers of switches by layer over training, of the first seed's runs that have them."""
    pictures = [
        _picture(draw_learned(number, layers, name), f"{number} of {name} by layer over training")
        for name, run in zip(found.pairs.names, found.pairs.pairs[0], strict=True)
        for number, layers in learned_curves(run).items()
    ]
    pictures += [
        _picture(draw_head_weights(stream, layers, name), f"Weights of {name}'s stream of {stream} by layer and head")
        for name, export in zip(found.pairs.names, found.exports[0], strict=True)
        for stream, layers in head_weights(export.folder).items()
    ]
    seed = f", seed {found.pairs.seed_label(0)}" if len(found.pairs.seeds) > 1 else ""
    return [Section("Learned numbers" + seed, pictures=pictures)] if pictures else []


def _trained(found: Comparison) -> Section:
    """What both sides share, of the first seed's baseline, and in what their configs differ."""
    pair = found.pairs.pairs[0]
    tables = [config_table(pair, found.pairs.names), *_continuations(found)]
    text = f"Settings of {found.pairs.names[0]}; {found.pairs.names[1]} differs in the keys of the table."
    return Section("What was trained", text, tables=tables, facts=training_facts(pair.first))


def _continuations(found: Comparison) -> list[Table]:
    """What both sides of the first seed write after the same beginnings of validation documents, where it was asked."""
    first, second = (export.result(continuations.NAME, {}).get("texts", {}) for export in found.exports[0])
    rows = [[prompt, text, second[prompt]] for prompt, text in first.items() if prompt in second]
    note = f"The likeliest token each time, up to {continuations.LENGTH} tokens; validation documents, first seed."
    return [Table("What both write", ["beginning", *found.pairs.names], rows, note)] if rows else []


def _provenance(found: Comparison) -> Section:
    def told(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "not known"

    runs = [run for pair in found.pairs.pairs for run in pair]
    facts = [
        ("Runs", told([run.folder for run in runs])),
        ("Seeds", told(found.pairs.seeds)),
        ("Store", told([run.record["store_fingerprint"] for run in runs])),
        ("Commit", told([run.record.get("git_commit") for run in runs])),
        ("Trained on", told([run.record.get("device") for run in runs])),
        ("Losses measured", told([f"{key} {value}" for key, value in found.measured.items() if key != "versions"])),
        *(("Note", note) for note in found.notes),
    ]
    return Section("Where it comes from", facts=facts)
