"""Benchmark results (JSON) as Markdown: one function per kind of place in a template."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Result = dict[str, Any]
Row = Sequence[str]

WIDTH = 118  # characters per line of a command, without the backslash that continues it
PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16"}
LOSSES = {"chunks": "chunked", "plain": "all logits at once"}
CHECKPOINTING = {0: "none", 1: "every block"}


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def table(head: Row, rows: Iterable[Row]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Format with three digits, large numbers with all digits of their integer part."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """Format a time in the largest unit below it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value / 1e-9)} ns"


def spread(values: Sequence[float], write: Callable[[float], str] = number) -> str:
    """Format the median, with minimum and maximum if there are several values."""
    if len(values) == 1:
        return write(values[0])
    return f"{write(statistics.median(values))} ({write(min(values))} to {write(max(values))})"


def spread_of(found: dict[str, float]) -> str:
    """Format a median, minimum and maximum that a result holds ready; the median alone if all are equal."""
    if found["least"] == found["greatest"]:
        return number(found["median"])
    return f"{number(found['median'])} ({number(found['least'])} to {number(found['greatest'])})"


def interval(ratio: dict[str, Any]) -> str:
    """Format a 95% interval; none if there was only one round."""
    return "none" if ratio["interval"] is None else "{:.3f} to {:.3f}".format(*ratio["interval"])


def origin(result: Result) -> str:
    """Return command, device, versions and commit of a result, which stand above every table."""
    versions, commit = result["versions"], result["git_commit"]
    at = f"torch {versions['torch']}, transformers {versions['transformers']}, commit {commit[:7]}"
    changed = " plus uncommitted changes" if "+" in commit else ""
    return f"{command(result)}\n\n{result['device']}, {at}{changed}."


def command(result: Result) -> str:
    """Return the command as an indented block, with lines continued between options."""
    glued = re.sub(r"( -[\w.-]+) (?!-)", "\\1\0", result["command"])  # an option stays on the line of its value
    wrap = textwrap.TextWrapper(WIDTH, "    ", "        ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(wrap.wrap(glued)).replace("\0", " ")


# ---- The training step: llm bench ------------------------------------------------------------------------------------


def speed(result: Result) -> str:
    """Show `llm bench`: contenders, ratios, parts of a step."""
    rate = statistics.median(result["matrix_flops_per_second"]) / 1e9
    how = "compiled" if result["compiled"] else "eager"
    about = f"{sizes(result)}, {how}. Matmul throughput: {rate:,.0f} GFLOP/s."
    parts = result["seconds_of_parts"]
    times = [[name, *(f"{1e3 * statistics.median(each):,.1f}" for each in of.values())] for name, of in parts.items()]
    return "\n\n".join([
        origin(result), about, contenders(result), ratio_table(result),
        table(["ms per step", *next(iter(parts.values()))], times),
    ])  # fmt: skip


def sizes(result: Result) -> str:
    """Return parameters, tokens per step and precision."""
    return (
        f"{result['parameters']:,} parameters, {result['rows']} x {result['context']} tokens per step, "
        f"{result['precision']}"
    )


def contenders(result: Result) -> str:
    """Return one row per contender."""
    memory, first = result["peak_memory_mib"], first_of_ours(result)
    rows = [
        [
            name,
            spread(rates, "{:,.0f}".format),
            f"{statistics.median(result['model_flop_utilisation'][name]):.1%}",
            f"{memory[name]:,.0f} MiB",
            f"{memory[first] / memory[name]:.2f}",
            f"{result['seconds_to_first_step'][name]:.1f} s",
        ]
        for name, rates in result["tokens_per_second"].items()
    ]
    head = ["contender", "tokens/s", "% of matmul throughput", "peak memory", "memory ratio", "time to first step"]
    return table(head, rows)


def ratio_table(result: Result) -> str:
    """Return one row per ratio of two contenders' tokens/s."""
    rows = [
        [
            " / ".join(LOSSES.get(part, part) for part in name.split("_to_")),
            f"**{ratio['median']:.3f}**",
            f"{ratio['least']:.3f} to {ratio['greatest']:.3f}",
            interval(ratio),
        ]
        for name, ratio in result.items()
        if isinstance(ratio, dict) and "interval" in ratio
    ]
    return table(["ratio of tokens/s", "median", "range", "95% interval"], rows)


def first_of_ours(result: Result) -> str:
    """Return our first contender, the baseline of the others."""
    return next(name for name in result["tokens_per_second"] if not name.startswith("transformers"))


def fastest_transformers(result: Result) -> str:
    """Return the transformers contender with the highest median throughput."""
    medians = {
        name: statistics.median(rates)
        for name, rates in result["tokens_per_second"].items()
        if name.startswith("transformers")
    }
    return max(medians, key=medians.__getitem__)


def to_fastest(result: Result) -> dict[str, Any]:
    """Return the ratio of our first contender to the fastest of transformers: median, range and interval."""
    return result[f"{first_of_ours(result)}_to_{fastest_transformers(result)}"]


def row(result: Result, label: str, link: str) -> str:
    """Return a row of the table in BENCHMARKS.md: our first contender."""
    from llm.train.flops import PEAKS  # imports torch, which --help does not need

    ours, ratio = first_of_ours(result), to_fastest(result)
    rate = statistics.median(result["tokens_per_second"][ours])
    peaks = PEAKS.get(result["device"])
    nominal = ""
    if peaks:
        peak = peaks[0] if "bf16" in result["precision"] else peaks[1]
        nominal = f"{rate * result['model_flops_per_token'] / peak:.1%}"
    theirs = fastest_transformers(result).removeprefix("transformers").strip("_") or "eager"
    cells = [
        f"[{label}]({link})",
        result["device"],
        PRECISIONS[result["precision"]],
        f"{rate:,.0f}",
        f"{ratio['median']:.3f} ({interval(ratio)}), {theirs}",
        f"{statistics.median(result['model_flop_utilisation'][ours]):.1%}",
        nominal,
        f"{result['peak_memory_mib'][ours]:,.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


# ---- The other commands ----------------------------------------------------------------------------------------------


def growth(result: Result) -> str:
    """Show `llm bench-growth`: one row per size, with the growth of time relative to FLOPs."""
    rows = []
    for name, sweep in result["sweeps"].items():
        before: tuple[float, float] | None = None
        for size, times, flops in zip(sweep["size"], sweep["seconds_per_token"], sweep["flops_per_token"], strict=True):
            time = statistics.median(times)
            grown = f"{(time / before[0]) / (flops / before[1]):.2f}" if before else ""
            rate = f"{flops / time / 1e9:.0f}"
            rows.append([name, f"{size:,}", spread(times, seconds), f"{flops / 1e6:.1f}", rate, grown])
            before = time, flops
    head = ["", "size", "time per token", "MFLOP per token", "GFLOP/s", "growth of time / FLOPs"]
    about = f"{result['tokens_per_step']:,} tokens per step, {result['precision']}."
    return "\n\n".join([origin(result), about, table(head, rows)])


def fit(result: Result) -> str:
    """Show `llm bench --find-micro-batch`: the candidates tried, then the largest of each kind in alternation."""
    tried = []
    for each in result["tried"]:
        ran = each["measured_mib"] is not None
        over = " (over)" if ran and each["measured_mib"] > result["budget_mib"] else ""
        measured = f"{each['measured_mib']:,.0f} MiB{over}" if ran else "out of memory"
        rate = f"{each['tokens_per_second']:,.0f}" if ran else ""
        tried.append([*_candidate(each), f"{each['predicted_mib']:,.0f} MiB", measured, rate])
    finalists = [
        [*_candidate(each), spread(each["tokens_per_second"])]
        for each in result["finalists"]
        if each["tokens_per_second"]
    ]
    checkpointing, size = _candidate(result["chosen"])
    about = f"Budget {result['budget_mib']:,.0f} MiB, {result['precision']}."
    chosen = f"Fastest: micro-batches of {size} sequences, recomputed blocks: {checkpointing}."
    head = ["recomputed blocks", "micro-batch"]
    return "\n\n".join([
        origin(result), about, table([*head, "predicted memory", "measured", "tokens/s"], tried),
        table([*head, "tokens/s, alternating"], finalists), chosen,
    ])  # fmt: skip


def _candidate(each: dict[str, Any]) -> list[str]:
    every = each["checkpointing"]
    return [CHECKPOINTING.get(every, f"every {every}th" if every > 2 else "every 2nd"), str(each["rows"])]


def loss(result: Result) -> str:
    """Show `llm bench-loss`: the chunked loss and the loss of all logits at once."""
    rows = [
        [LOSSES[way], spread(rates, "{:,.0f}".format), f"{result['peak_memory_mib'][way]:,.0f} MiB"]
        for way, rates in result["tokens_per_second"].items()
    ]
    about = (
        f"{result['tokens']:,} tokens, width {result['width']}, vocabulary {result['vocabulary']:,}, "
        f"{result['precision']}."
    )
    memory = f"Peak memory, chunked / all logits at once: **{result['peak_memory_chunks_to_plain']:.3f}**"
    return "\n\n".join(
        [origin(result), about, table(["", "tokens/s", "peak memory"], rows), ratio_table(result), memory]
    )


def data(result: Result, *wanted: str) -> str:
    """Show `llm bench-data`: the tasks whose names begin with one of `wanted`, or all."""
    rows = []
    for task, figures in result["figures"].items():
        if not wanted or task.startswith(wanted):
            rows += [[task, unit, spread(values)] for unit, values in figures.items()]
    for name, ratio in result["ratios"].items():
        if not wanted or name.startswith(wanted):
            between = f"{ratio['least']:.3g} to {ratio['greatest']:.3g}"
            rows.append([name, "ratio", f"{ratio['median']:.3g} ({between})"])
    return "\n\n".join([origin(result), table(["task", "unit", "median (range)"], rows)])


def ranks(result: Result) -> str:
    """Show `llm bench-ranks`: one row per layout."""
    rows = []
    for name, found in result["layouts"].items():
        median = {key: each["median"] for key, each in found.items()}
        rows.append(
            [
                name,
                spread_of(found["tokens_per_second"]),
                spread_of(found["to_plain"]) if "to_plain" in found else "",
                f"{median['communication_share']:.1%} ({median['alone_share']:.1%})",
                f"{median['peak_memory_mib']:,.0f}, {median['peak_memory_mib_with_checkpoint']:,.0f}",
                f"{median['held_up_seconds']:.3f} s ({median['checkpoint_share_at_config']:.3%})",
                f"{median['writing_seconds']:.2f} s",
            ]
        )
    head = [
        "", "tokens/s", "/ plain", "in collectives (not overlapped)", "peak MiB: steps, with checkpoint",
        "checkpoint stall (% of training)", "writing",
    ]  # fmt: skip
    about = f"{sizes(result)}, {result['processes']} processes with {result['threads']} thread each."
    return "\n\n".join([origin(result), about, table(head, rows)])


def timed(result: Result) -> str:
    """Show `python -m small.X bench`: the times of every part, then ratios within a round."""
    rows = []
    for part, found in result.items():
        if not (isinstance(found, dict) and "seconds" in found):
            continue
        name = part.replace("_", " ")
        rows += [[name, what, seconds(time)] for what, time in found["seconds"].items()]
        rows += [[name, f"*{what.replace(' to ', ' / ')}*", spread(each)] for what, each in found["ratios"].items()]
    return "\n\n".join([origin(result), table(["part", "time, or *ratio*", "median (range)"], rows)])


def threads(result: Result, load: str) -> str:
    """Show `python -m benchmarks.threads` under one load: the ratio of every wait policy to the default."""
    models = result["loads"][load]
    rows = []
    for policy in next(iter(models.values())):
        row = [policy.replace("=", " = ")]
        for rates in models.values():
            ratios = [a / b for a, b in zip(rates[policy], rates["default"], strict=True)]
            row += [f"{statistics.median(rates[policy]):.2f}", spread(ratios, "{:.2f}".format)]
        rows.append(row)
    head = [heading for model in models for heading in (f"{model}, steps/s", "/ default")]
    return table(["wait policy", *head], rows)


def value(result: Result, *keys: str) -> str:
    """Return one figure for a sentence: a number, the median of a list, or a median with its interval or range."""
    found: Any = result
    for key in keys:
        found = found[key]
    if isinstance(found, list):
        return number(statistics.median(found))
    if not isinstance(found, dict):
        return number(found)
    if found.get("interval"):
        return f"{found['median']:.3f} ({interval(found)})"
    return spread_of(found)


KINDS: dict[str, Callable[..., str]] = {
    "row": row, "value": value, "speed": speed, "growth": growth, "fit": fit, "loss": loss, "data": data,
    "ranks": ranks, "timed": timed, "threads": threads, "origin": origin,
}  # fmt: skip
