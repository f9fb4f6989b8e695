"""Results of the benchmark commands, in terms of JSON, as Markdown: one function for each kind of result."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

Result = dict[str, Any]
Row = Sequence[str]


def table(head: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits, more of large numbers."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """In the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value / 1e-9)} ns"


def spread(values: Sequence[float], write: Callable[[float], str] = number) -> str:
    """Median, and least and greatest."""
    if len(values) == 1:
        return write(values[0])
    return f"{write(statistics.median(values))} ({write(min(values))} to {write(max(values))})"


def origin(result: Result) -> str:
    """Command, device, versions and commit, above every table."""
    versions = result["versions"]
    at = f"torch {versions['torch']}, transformers {versions['transformers']}, commit {result['git_commit'][:7]}"
    changed = " with changes" if "+" in result["git_commit"] else ""
    return f"    {result['command']}\n\n{result['device']}, {at}{changed}."


def ratios(result: Result) -> Iterable[str]:
    """Those of a `llm bench`, each a sentence."""
    for name, ratio in result.items():
        if isinstance(ratio, dict) and "median" in ratio:
            interval = (
                "" if ratio["interval"] is None else "; 95 % interval {:.3f} to {:.3f}".format(*ratio["interval"])
            )
            between = f"{ratio['least']:.3f} to {ratio['greatest']:.3f}"
            yield f"**{name.replace('_', ' ')}: {ratio['median']:.3f}** ({between}{interval})"


def speed(result: Result) -> str:
    """`llm bench`: contenders, ratios, parts of a step."""
    used, memory = result["model_flop_utilisation"], result["peak_memory_mib"]
    first = next(name for name in memory if not name.startswith("transformers"))
    rows, parts = [], []
    for name, rates in result["tokens_per_second"].items():
        times = {part: statistics.median(each) for part, each in result["seconds_of_parts"][name].items()}
        rows.append(
            [
                name,
                spread(rates, "{:,.0f}".format),
                f"{statistics.median(used[name]):.1%}",
                f"{memory[name]:,.0f} MiB",
                f"{memory[first] / memory[name]:.2f}",
                f"{result['seconds_to_first_step'][name]:.1f} s",
            ]
        )
        parts.append([name, *(f"{1e3 * time:,.1f}" for time in times.values())])
    head = ["", "tokens/s", "of the matrix rate", "peak memory", f"{first}'s to it", "first step"]
    names = list(next(iter(result["seconds_of_parts"].values())))
    rate = statistics.median(result["matrix_flops_per_second"]) / 1e9
    about = (
        f"{result['parameters']:,} parameters, {result['rows']} x {result['context']} tokens a step, "
        f"{result['precision']}, {'compiled' if result['compiled'] else 'eager'}; matrix products {rate:,.0f} GFLOP/s."
    )
    told = [origin(result), about, table(head, rows), *ratios(result), table(["ms of a step", *names], parts)]
    return "\n\n".join(told)


def growth(result: Result) -> str:
    """`llm bench-growth`: each size, and how time grew against FLOPs from the size before."""
    rows = []
    for name, sweep in result["sweeps"].items():
        times = [statistics.median(each) for each in sweep["seconds_per_token"]]
        flops = sweep["flops_per_token"]
        more = [
            "",
            *(f"{(b / a) / (d / c):.2f}" for (a, b), (c, d) in zip(pairwise(times), pairwise(flops), strict=True)),
        ]
        for size, each, time, count, grown in zip(
            sweep["size"], sweep["seconds_per_token"], times, flops, more, strict=True
        ):
            rows.append(
                [name, f"{size:,}", spread(each, seconds), f"{count / 1e6:.1f}", f"{count / time / 1e9:.0f}", grown]
            )
    head = ["", "size", "time a token", "MFLOP a token", "GFLOP/s", "time to FLOPs, from the size before"]
    about = f"{result['tokens_per_step']:,} tokens a step, {result['precision']}."
    return "\n\n".join([origin(result), about, table(head, rows)])


def fit(result: Result) -> str:
    """`llm bench --fit`: what was tried."""
    rows = []
    for each in result["tried"]:
        ran = each["measured_mib"] is not None
        measured = f"{each['measured_mib']:,.0f} MiB" if ran else "out of memory"
        over = ran and each["measured_mib"] > result["budget_mib"]
        rate = f"{each['tokens_per_second']:,.0f}" if ran else ""
        every = {0: "none", 1: "every block"}.get(each["checkpointing"], f"every {each['checkpointing']} blocks one")
        rows.append([every, str(each["rows"]), f"{each['predicted_mib']:,.0f} MiB", measured + " (over)" * over, rate])
    head = ["recomputed", "micro-batch", "memory predicted", "measured", "tokens/s"]
    again = [
        f"Again, in turn: {each['rows']} rows, checkpointing {each['checkpointing']}: "
        f"{spread(each['tokens_per_second'])} tokens/s."
        for each in result["finalists"]
        if each["tokens_per_second"]
    ]
    chosen = result["chosen"]
    said = f"Budget {result['budget_mib']:,.0f} MiB, {result['precision']}; taken: {chosen['rows']} rows."
    return "\n\n".join([origin(result), said, table(head, rows), *again])


def loss(result: Result) -> str:
    """`llm bench-loss`: either way."""
    rows = [
        [way, spread(rates, "{:,.0f}".format), f"{result['peak_memory_mib'][way]:,.0f} MiB"]
        for way, rates in result["tokens_per_second"].items()
    ]
    about = f"{result['tokens']:,} tokens, {result['width']} wide, {result['vocabulary']:,} ids, {result['precision']}."
    to_plain = f"**memory, chunks to plain: {result['peak_memory_chunks_to_plain']:.3f}**"
    shown = table(["", "tokens/s", "peak memory"], rows)
    return "\n\n".join([origin(result), about, shown, *ratios(result), to_plain])


def data(result: Result, *wanted: str) -> str:
    """`llm bench-data`: the tasks whose names begin with one of `wanted`, all where none is given."""
    rows = []
    for task, figures in result["figures"].items():
        if not wanted or task.startswith(wanted):
            rows += [[task, unit, spread(values)] for unit, values in figures.items()]
    for name, ratio in result["ratios"].items():
        if not wanted or name.startswith(wanted):
            between = f"{ratio['least']:.3g} to {ratio['greatest']:.3g}"
            rows.append([name, "ratio", f"{ratio['median']:.3g} ({between})"])
    return "\n\n".join([origin(result), table(["", "unit", "median (range)"], rows)])


def ranks(result: Result) -> str:
    """`llm bench-ranks`: a layout a row."""
    rows = []
    for name, found in result["layouts"].items():
        median = {key: each["median"] for key, each in found.items()}
        rows.append(
            [
                name,
                _of(found["tokens_per_second"]),
                _of(found["to_plain"]) if "to_plain" in found else "",
                f"{median['communication_share']:.1%} ({median['alone_share']:.1%})",
                f"{median['peak_memory_mib']:,.0f}, {median['peak_memory_mib_with_checkpoint']:,.0f}",
                f"{median['held_up_seconds']:.3f} s",
                f"{median['checkpoint_share_at_config']:.3%}",
                f"{median['writing_seconds']:.2f} s",
            ]
        )
    head = [
        "", "tokens/s", "to plain", "in collectives (alone)", "peak MiB: steps, with checkpoint", "holds up",
        "of the config's interval", "written in",
    ]  # fmt: skip
    about = (
        f"{result['parameters']:,} parameters, {result['rows']} x {result['context']} tokens a step, "
        f"{result['precision']}, {result['processes']} processes of {result['threads']} thread."
    )
    return "\n\n".join([origin(result), about, table(head, rows)])


def _of(found: dict[str, float]) -> str:
    return f"{number(found['median'])} ({number(found['least'])} to {number(found['greatest'])})"


def timed(result: Result) -> str:
    """`python -m small.X bench`: times of every part, then ratios within a round."""
    rows = []
    for part, found in result.items():
        if not (isinstance(found, dict) and "seconds" in found):
            continue
        name = part.replace("_", " ")
        rows += [[name, what, seconds(time)] for what, time in found["seconds"].items()]
        rows += [[name, f"*{what}*", spread(each)] for what, each in found["ratios"].items()]
    return "\n\n".join([origin(result), table(["", "", "time, or *ratio*: median (range)"], rows)])


KINDS: dict[str, Callable[..., str]] = {
    "speed": speed, "growth": growth, "fit": fit, "loss": loss, "data": data, "ranks": ranks, "timed": timed,
}  # fmt: skip
