"""How often a comparison calls two equal models different: python -m benchmarks.null_pairs.

Draws pairs without a true difference in each regime, and asks `evals.verdict` as `evals compare` does. Writes
docs/null_pairs.csv and the table between the marks of docs/evaluation.md.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evals.verdict.measurements import Measure
from evals.verdict.statistics import Spread, paired_effect
from evals.verdict.verdict import FEWEST, warnings
from llm.common.errors import UserError, exit_status
from llm.common.files import write_files

from .ladder import markdown

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULT = DOCS / "evaluation.md", DOCS / "null_pairs.csv"
MARKS = "<!-- null pairs -->\n", "<!-- end of null pairs -->"
LOW, HIGH = 4.0, 6.0  # false verdicts in percent that a nominal 5% should have
RESAMPLES = 999
OF_DOCUMENTS = 0.05  # nats per token, standard deviation over documents


class Regime(NamedTuple):
    """One way to draw a null pair.

    Args:
        name: in words.
        documents: of all groups together.
        groups: how many groups they are of; 0: each stands alone.
        correlation: intra-class, of the differences of one group.
        named: the groups are known to the comparison.
        uneven: standard deviation of the logarithm of a group's size.
        noise: of documents and groups: "t4" (Student's), "exponential" or "log-normal".
        seeds: pairs.
        of_seeds: standard deviation of a run's own loss, nats per token; a pair differs by root 2 of it.
        companions: other runs of the baseline, with one seed.
    """

    name: str
    documents: int
    groups: int = 0
    correlation: float = 0.0
    named: bool = True
    uneven: float = 0.0
    noise: str = "t4"
    seeds: int = 1
    of_seeds: float = 0.0
    companions: int = 0


REGIMES = (
    Regime("independent documents", 1000),
    Regime("200 groups of 5, not named", 1000, 200, 0.1, named=False),
    Regime("50 groups of 20, not named", 1000, 50, 0.3, named=False),
    Regime("200 groups of 5", 1000, 200, 0.1),
    Regime("50 groups of 20", 1000, 50, 0.3),
    Regime("50 groups of very different size", 1000, 50, 0.3, uneven=0.8),
    Regime("30 groups of 20", 600, 30, 0.3),
    Regime("12 groups of 20", 240, 12, 0.3),
    Regime("12 groups of very different size", 240, 12, 0.3, uneven=0.8),
    Regime("10 documents", 10),
    Regime("30 documents", 30),
    Regime("100 documents", 100),
    Regime("skewed (log-normal), 200 documents", 200, noise="log-normal"),
    Regime("skewed (log-normal), 1,000 documents", 1000, noise="log-normal"),
    Regime("skewed (exponential), 50 groups of 20", 1000, 50, 0.3, noise="exponential"),
    Regime("2 seeds, 50 groups of 20", 1000, 50, 0.3, seeds=2, of_seeds=0.01),
    Regime("3 seeds, 50 groups of 20", 1000, 50, 0.3, seeds=3, of_seeds=0.01),
    Regime("5 seeds, 50 groups of 20", 1000, 50, 0.3, seeds=5, of_seeds=0.01),
    Regime("3 seeds, 50 groups of very different size", 1000, 50, 0.3, uneven=0.8, seeds=3, of_seeds=0.01),
    Regime("one seed, seed noise 0.01, no other run", 200, of_seeds=0.01),
    Regime("one seed, seed noise 0.01, one null run", 200, of_seeds=0.01, companions=1),
    Regime("one seed, seed noise 0.01, three other runs", 200, of_seeds=0.01, companions=3),
)

Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.null_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.null_pairs --pairs 1000",
    )
    parser.add_argument("--pairs", type=int, default=1000, metavar="N", help="of each regime (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the simulation (default: 0)")
    options = parser.parse_args(arguments)

    def run() -> None:
        if options.pairs < 1:
            raise UserError(f"--pairs {options.pairs} simulates nothing: pass 1 or more")
        rows = []
        for regime in REGIMES:
            rows.append(measured(regime, options.pairs, options.seed))
            print(" ".join(rows[-1].values()), file=sys.stderr, flush=True)
        write_files({RESULT: as_csv(rows), PAGE: page_with(table(rows))})
        print(table(rows))

    return exit_status(run)


def draw(regime: Regime, numbers: np.random.Generator) -> tuple[Measure, Spread | None]:
    """One pair of equal models: losses per document of both sides, and the spread of other runs where there are any."""
    groups = None
    shared = np.zeros(regime.documents)
    if regime.groups:
        sizes = numbers.lognormal(0, regime.uneven, regime.groups)
        counts = np.maximum(1, np.round(sizes / sizes.sum() * regime.documents)).astype(int)
        groups = np.repeat(np.arange(regime.groups), counts)
        shared = noise(regime.noise, regime.groups, numbers)[groups]
    items = regime.documents if groups is None else len(groups)
    shared = shared[:items] if groups is None else shared
    tokens = numbers.lognormal(5.3, 0.5, items).clip(20, 1024).round()
    rho = regime.correlation
    # What a document adds is half its own in all seeds alike, half of each seed.
    of_items, single = noise(regime.noise, items, numbers), noise(regime.noise, (regime.seeds, items), numbers)
    of_documents = (of_items + single) / np.sqrt(2) if regime.seeds > 1 else single
    differences = OF_DOCUMENTS * (np.sqrt(rho) * shared + np.sqrt(1 - rho) * of_documents)
    of_runs = regime.of_seeds * numbers.standard_normal((regime.seeds, 2, 1))
    base = numbers.normal(2, 0.5, items)
    first, second = base + of_runs[:, 0], base + of_runs[:, 1] + differences
    spread = None
    if regime.companions:
        others = [of_runs[0, 0, 0], *regime.of_seeds * numbers.standard_normal(regime.companions)]
        spread = Spread(float(np.std(others, ddof=1)), len(others))
    labels = groups if regime.named else None
    return Measure("loss", "nats per token", -1, first, second, tokens, family="primary", groups=labels), spread


def noise(kind: str, shape: int | tuple[int, ...], numbers: np.random.Generator) -> np.ndarray:
    """Values of mean 0 and variance 1."""
    if kind == "exponential":
        return numbers.exponential(size=shape) - 1
    if kind == "log-normal":  # of exp(z): mean e^(1/2), variance (e - 1) e
        return (numbers.lognormal(0, 1, shape) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    return numbers.standard_t(4, shape) / np.sqrt(2)


def measured(regime: Regime, pairs: int, seed: int) -> Row:
    """How many pairs in percent are called different, come with a warning, and speak of their documents alone."""
    numbers = np.random.default_rng([seed, *regime.name.encode()])
    false = warned = alone = 0
    for _ in range(pairs):
        measure, spread = draw(regime, numbers)
        effect = paired_effect(
            measure.first, measure.second, measure.weights, resamples=RESAMPLES, groups=measure.groups, spread=spread
        )
        false += not effect.low <= 0 <= effect.high
        warned += bool(warnings(measure)) or (regime.seeds == 1 and regime.of_seeds > 0 and spread is None)
        alone += effect.independent < FEWEST
    shares = {"false": false, "warned": warned, "alone": alone}
    return {
        "regime": regime.name,
        "seeds": str(regime.seeds),
        "pairs": str(pairs),
        **{key: f"{100 * count / pairs:.1f}" for key, count in shares.items()},
    }


def as_csv(rows: Sequence[Row]) -> str:
    """All rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(rows: Sequence[Row]) -> str:
    """The table of the page; bold outside of 4 to 6% by more than chance (two standard errors)."""

    def cell(row: Row) -> str:
        rate = float(row["false"])
        chance = 200 * np.sqrt(0.05 * 0.95 / int(row["pairs"]))
        return row["false"] if LOW - chance <= rate <= HIGH + chance else f"**{row['false']}**"

    lines = [[row["regime"], cell(row), row["warned"], "yes" if float(row["alone"]) == 100 else ""] for row in rows]
    return markdown(["null pairs of", "called different, %", "with a warning, %", "of these documents alone"], lines)


def page_with(made: str) -> str:
    """Return docs/evaluation.md with this table between its marks."""
    text, (start, end) = PAGE.read_text(encoding="utf-8"), MARKS
    if start not in text or end not in text:
        raise UserError(f"{PAGE} lacks the marks {start.strip()} and {end.strip()}: put them around the table")
    return text[: text.index(start) + len(start)] + made + "\n" + text[text.index(end) :]


if __name__ == "__main__":
    sys.exit(main())
