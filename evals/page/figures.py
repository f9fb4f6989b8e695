"""The pictures of a comparison: differences with their intervals, document by document and over training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.page.loss_curves import token_unit
from evals.verdict.pair import Pair
from evals.verdict.verdict import Finding, scaled
from llm.common.plots import COLOURS, INK, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_difference(pairs: Sequence[Pair], names: Sequence[str]) -> "Figure":
    """Validation loss of the second side minus the first over tokens: a thin line a seed, their mean bold."""
    lines = []
    for pair in pairs:
        first, second = (dict(zip(*run.curve("validation_loss"), strict=True)) for run in pair)
        lines.append({at: second[at] - first[at] for at in sorted(first.keys() & second.keys())})
    shared = sorted(set.intersection(*map(set, lines)))
    unit, word = token_unit(shared[-1] if shared else 0.0)
    with style():
        figure = new_figure()
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=0.8)
        if len(lines) > 1:
            for line in lines:
                axes.plot([at / unit for at in line], list(line.values()), color=COLOURS[1], linewidth=0.8, alpha=0.5)
        mean = [float(np.mean([line[at] for line in lines])) for at in shared]
        axes.plot([at / unit for at in shared], mean, color=COLOURS[1], linewidth=2, marker="s", markersize=4.5)
        axes.set(xlabel=f"tokens seen{word}", ylabel="difference (nats per token)", xlim=(0, None))
        axes.set_title(f"validation loss, {names[1]} − {names[0]}")
        axes.grid(axis="y")
    return figure


def draw_documents(finding: Finding, names: Sequence[str]) -> "Figure":
    """How the difference is spread over the documents (means over the seeds), its outer hundredths left out."""
    differences = (finding.measure.second - finding.measure.first).mean(axis=0)
    low, high = np.quantile(differences, (0.005, 0.995))
    share = 100 * float((differences < 0).mean())
    with style():
        figure = new_figure()
        axes = figure.subplots()
        axes.hist(np.clip(differences, low, high), bins=40, color=COLOURS[1], alpha=0.7)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.axvline(finding.effect.difference, color=COLOURS[1], linewidth=2)
        axes.set(xlabel="difference (nats per token)", ylabel="documents")
        axes.set_title(f"{names[1]} lower on {share:.0f}% of {differences.size:,} documents")
    return figure


def draw_intervals(findings: Sequence[Finding], unit: str) -> "Figure":
    """Every quantity of one unit with its interval, zero marked; filled where a difference is shown."""
    shown = [finding for finding in findings if finding.measure.unit == unit]
    with style():
        figure = new_figure(4.6, 1.2 + 0.32 * len(shown))
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for place, finding in enumerate(shown):
            low, middle, high = (
                scaled(finding.measure, value)
                for value in (finding.effect.low, finding.effect.difference, finding.effect.high)
            )
            axes.plot([low, high], [place, place], color=COLOURS[1], linewidth=1.6, solid_capstyle="butt")
            axes.plot(
                [middle], [place], "s", color=COLOURS[1], markersize=6, fillstyle="full" if finding.differs else "none"
            )
        axes.set_yticks(range(len(shown)), [finding.measure.name for finding in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel(f"difference ({unit})")
        axes.grid(axis="x")
    return figure


def draw_pairs(results: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Key-value pairs recalled over their number, a line a model and length; chance dashed. results: of recall.json."""
    with style():
        figure = new_figure()
        axes = figure.subplots()
        for (name, result), colour in zip(results.items(), COLOURS, strict=False):
            lengths = sorted({each["length"] for each in result["mqar"]})
            for length, dashes in zip(lengths, ("-", "--", ":", "-.") * len(lengths), strict=False):
                some = sorted((e for e in result["mqar"] if e["length"] == length), key=lambda each: each["pairs"])
                label = f"{name}, {length:,} tokens" if len(lengths) > 1 else name
                axes.errorbar(
                    [each["pairs"] for each in some],
                    [100 * each["accuracy"] for each in some],
                    [100 * (each["standard_error"] or 0.0) for each in some],
                    color=colour, linestyle=dashes, marker="s", markersize=4.5, label=label,
                )  # fmt: skip
        pairs = sorted({each["pairs"] for result in results.values() for each in result["mqar"]})
        axes.plot(pairs, [100 / number for number in pairs], color=INK, linewidth=0.8, linestyle="--", label="chance")
        axes.set_xscale("log")
        axes.set_xticks(pairs, [str(number) for number in pairs])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="pairs", ylabel="right among the values (%)", ylim=(0, 102))
        axes.grid(axis="y")
        axes.legend(fontsize=8)
    return figure


def draw_needle(results: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Gain from a needle over its depth in the text, a line a model; chance is zero. results: of recall.json."""
    with style():
        figure = new_figure()
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=0.8, linestyle="--")
        for (name, result), colour in zip(results.items(), COLOURS, strict=False):
            depths, gains = ([each[key] for each in result["needle"]] for key in ("depth", "gain"))
            errors = [each["standard_error"] or 0.0 for each in result["needle"]]
            percent = [100 * depth for depth in depths]
            axes.errorbar(percent, gains, errors, color=colour, marker="s", markersize=4.5, label=name)
        axes.set(xlabel="depth of the needle (% of the text)", ylabel="gain (nats per token)")
        axes.grid(axis="y")
        axes.legend()
    return figure


def draw_ioi(sentences: Sequence[dict[str, dict[str, list[float]]]], names: Sequence[str]) -> "Figure":
    """Table 2 of Burns et al. 2025: the right name's probability on each sentence, as bars, a model a colour.

    sentences: of either side, {"correct": {"mean": [4], "half_width": [4] or None}, "incorrect": ...} in [0, 1].
    """
    with style():
        figure = new_figure()
        axes = figure.subplots()
        for side, (outcomes, colour) in enumerate(zip(sentences, COLOURS, strict=True)):
            for outcome, alpha in (("correct", 1.0), ("incorrect", 0.4)):
                mean = 100 * np.array(outcomes[outcome]["mean"])
                places = np.arange(mean.size) + (side - 0.5) * 0.4 + (0.1 if outcome == "incorrect" else -0.1)
                axes.bar(places, mean, 0.18, color=colour, alpha=alpha, label=f"{names[side]}, {outcome}")
                if half := outcomes[outcome]["half_width"]:
                    ends = np.array([np.minimum(mean, 100 * np.array(half)), 100 * np.array(half)])  # not below 0
                    axes.errorbar(places, mean, ends, fmt="none", ecolor=INK, elinewidth=0.8)
        axes.set_xticks(range(4), [f"sentence {n}" for n in range(1, 5)])
        axes.set_ylabel("probability (%)")
        figure.legend(loc="outside upper center", ncols=2, fontsize=8)
        axes.grid(axis="y")
    return figure
