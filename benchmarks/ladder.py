"""How often the intervals of a ladder of sizes contain the truth: python -m benchmarks.ladder.

Simulates ladders of every truth and design of `evals.verdict.ladder_simulation`. Writes docs/scaling_coverage.csv, its
picture, and the tables between the marks of docs/scaling.md.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from evals.verdict.ladder_simulation import BRANCHES, DESIGNS, EFFECTS, TRUTHS, Design, Truth, measure_coverage
from llm.common.errors import UserError, exit_status
from llm.common.files import write_files
from llm.common.plots import COLOURS, INK, MARKERS, as_png, new_figure, style

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE, RESULT = (DOCS / name for name in ("scaling.md", "scaling_coverage.png", "scaling_coverage.csv"))
LOW, HIGH = 0.93, 0.97  # the coverage that a 95% interval must have

Row = dict[str, str]

COVERED = {
    "each size": ("size_least", "size_most"),
    "mean": ("mean",),
    "slope": ("slope",),
    "largest size": ("largest",),
    "held-out size": ("held_out",),
    "mean, by sizes": ("mean_by_sizes",),
    "slope, by sizes": ("slope_by_sizes",),
}
VERDICTS = {
    "mean": "shown_mean",
    "slope": "shown_slope",
    "either": "shown_either",
    "firm mean": "firm_mean",
    "firm slope": "firm_slope",
    "line given up": "misfit",
    "refused": "refused",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.ladder --ladders 2000",
    )
    parser.add_argument("--ladders", type=int, default=2000, metavar="N", help="per truth and design (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the simulation (default: 0)")
    options = parser.parse_args(arguments)

    def run() -> None:
        if options.ladders < 1:
            raise UserError(f"--ladders {options.ladders} simulates nothing: pass 1 or more")
        rows = list(simulated(options.ladders, options.seed))
        write_files({RESULT: as_csv(rows), PAGE: page(rows), PICTURE: draw(rows)})
        print(f"{coverage_table(rows)}\n\n{verdict_table(rows)}\n\n{power_table(rows)}")

    return exit_status(run)


def simulated(ladders: int, seed: int) -> Iterator[Row]:
    """Measure every truth in every design; a row each, as the CSV has it."""
    for truth in (*TRUTHS, *EFFECTS):
        for design in (*DESIGNS, BRANCHES) if truth in TRUTHS else DESIGNS:
            yield as_row(truth, design, ladders, seed)


def as_row(truth: Truth, design: Design, ladders: int, seed: int) -> Row:
    """Measure one truth in one design."""
    found = measure_coverage(truth, design, ladders, seed)._asdict()
    size = found.pop("size")
    ends = (min(size), max(size)) if size else (None, None)
    found = {"refused": found.pop("refused"), "size_least": ends[0], "size_most": ends[1], **found}
    numbers = {key: "" if value is None else f"{value:.4f}" for key, value in found.items()}
    return {"truth": truth.name, "kind": truth.kind, **{k: str(v) for k, v in design._asdict().items()}, **numbers}


def as_csv(rows: Sequence[Row]) -> str:
    """All rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows() -> list[Row]:
    """Return the rows of the CSV that is there."""
    with RESULT.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- Tables ----------------------------------------------------------------------------------------------------------


def page(rows: Sequence[Row]) -> str:
    """Return docs/scaling.md with its tables made of these rows."""
    made = {"coverage": coverage_table, "verdicts": verdict_table, "power": power_table}
    return page_with({name: table(rows) for name, table in made.items()})


def page_with(tables: dict[str, str]) -> str:
    """Return docs/scaling.md with these tables, by the name of their marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if start not in text or end not in text:
            raise UserError(f"{PAGE} lacks the marks {start.strip()} and {end.strip()}: put them around the table")
        text = text[: text.index(start) + len(start)] + table + text[text.index(end) :]
    return text


def coverage_table(rows: Sequence[Row]) -> str:
    """Coverage in percent of each truth, least to most over the designs; bold outside of 93 to 97."""

    def cell(truth: str, keys: Sequence[str]) -> str:
        values = [float(row[key]) for row in rows if row["truth"] == truth for key in keys if row[key]]
        ends = (min(values), max(values))
        shares = [f"{100 * end:.0f}" if LOW <= round(end, 2) <= HIGH else f"**{100 * end:.0f}**" for end in ends]
        return shares[0] if shares[0] == shares[1] else "-".join(shares)

    return markdown(
        ["truth", *COVERED],
        [[truth, *(cell(truth, keys) for keys in COVERED.values())] for truth in _truths(rows, "effect", False)],
    )


def verdict_table(rows: Sequence[Row]) -> str:
    """Ladders in percent of which something is said, least to most over the designs of four to six sizes."""

    def cell(truth: str, key: str) -> str:
        values = [100 * float(row[key]) for row in rows if row["truth"] == truth and row["sizes"] != "3" and row[key]]
        ends = [f"{end:.1f}" if end < 9.95 else f"{end:.0f}" for end in (min(values), max(values))]
        return ends[0] if ends[0] == ends[1] else "-".join(ends)

    return markdown(
        ["truth", *VERDICTS],
        [[truth, *(cell(truth, key) for key in VERDICTS.values())] for truth in _truths(rows, "effect", False)],
    )


def power_table(rows: Sequence[Row]) -> str:
    """Ladders in percent whose mean is shown, and in parentheses those where it is firm; a column for each design."""
    designs = [design for design in DESIGNS if design.sizes > 3]
    header = ["truth", *(f"{design.sizes} x {design.seeds}" for design in designs)]

    def cell(truth: str, design: Design) -> str:
        shape = {key: str(value) for key, value in design._asdict().items()}
        (row,) = [row for row in rows if row["truth"] == truth and shape.items() <= row.items()]
        return f"{100 * float(row['shown_mean']):.0f} ({100 * float(row['firm_mean']):.0f})"

    return markdown(header, [[t, *(cell(t, design) for design in designs)] for t in _truths(rows, "effect", True)])


def _truths(rows: Sequence[Row], kind: str, of_kind: bool) -> list[str]:
    return list(dict.fromkeys(row["truth"] for row in rows if (row["kind"] == kind) == of_kind))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


# ---- Picture ---------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row]) -> bytes:
    """Draw the coverage of five intervals as a PNG: a point per design, a line per truth, the band of 93 to 97%."""
    truths = _truths(rows, "effect", False)
    shown = dict(list(COVERED.items())[:5])
    with style():
        figure = new_figure(9.5, 0.6 + 0.27 * len(truths))
        panels = figure.subplots(1, len(shown), sharey=True)
        for axes, (title, keys) in zip(panels, shown.items(), strict=True):
            axes.axvspan(100 * LOW, 100 * HIGH, color=INK, alpha=0.12, linewidth=0)
            axes.axvline(95, color=INK, linewidth=0.8)
            for n, truth in enumerate(truths):
                of_truth = [row for row in rows if row["truth"] == truth]
                fails = of_truth[0]["kind"] == "fails"
                values = [100 * float(row[key]) for row in of_truth for key in keys if row[key]]
                axes.plot(
                    [max(value, 50) for value in values], [n] * len(values), MARKERS[fails], color=COLOURS[fails],
                    markersize=4, alpha=0.6, markeredgewidth=0,
                )  # fmt: skip
            axes.set_xlim(49, 101)
            axes.set_title(title, fontsize=10)
            axes.grid(axis="y")
        panels[0].set_yticks(range(len(truths)), truths)
        panels[0].invert_yaxis()
        figure.supxlabel("intervals that contain the truth, %", fontsize=10)
        return as_png(figure)


if __name__ == "__main__":
    sys.exit(main())
