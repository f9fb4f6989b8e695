"""What a comparison can find, before anything is trained: the smallest difference that n seeds and m items show.

seeds, documents, items and what is assumed of their spread -> power of the tests of `evals.verdict.statistics` ->
tables

scipy is imported where it is needed: the options are part of `--help`.
"""

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llm.common.errors import UserError
from llm.common.tables import text_table

# The 8M models of Burns et al. 2025, Section 4: validation loss ± 0.01 over three seeds on either side.
SEED_DEVIATION = round(0.01 * math.sqrt(2), 4)
# Measured: 0.039 over 400 validation stories, of 125 tokens in the mean, between configs/stories_classic and _values.
DOCUMENT_DEVIATION = 0.04
# Measured on the same pair's 200 `stories` items: 0.12 by acc, 0.16 by acc_norm.
DISCORDANCE = 0.15
# Evaluated items of OpenBookQA, ARC-Challenge, PIQA, ARC-Easy and HellaSwag, and two smaller --limit.
ITEMS = (200, 400, 500, 1172, 1838, 2376, 10042)
TESTS = 15  # the five tasks at three numbers of shots

NODES = 4000  # of the integral over a variance: power to within 0.001
NEXT = """Next: each config with each seed, then all of them in one comparison.
  python -m llm fit --config CONFIG.yaml --seed_everything SEED --run.folder runs/NAME-seedSEED
  python -m evals compare runs/A-seed* runs/B-seed* --out out/comparison"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`, in a group of their own; --documents and --level are the command's already."""
    group = parser.add_argument_group("with --plan, which takes --documents and --level too")
    group.add_argument("--seeds", nargs="+", type=int, default=[1, 3, 5], metavar="N", help="pairs of runs (1 3 5)")
    group.add_argument("--items", nargs="+", type=int, default=list(ITEMS), metavar="N", help="of a task, one a row")
    group.add_argument("--power", type=float, default=0.8, metavar="P", help="chance of showing what is there (0.8)")
    group.add_argument(
        "--tests", type=int, default=TESTS, metavar="N", help=f"that share Holm's correction: tasks x shots ({TESTS})"
    )
    group.add_argument(
        "--seed-deviation",
        type=float,
        default=SEED_DEVIATION,
        metavar="NATS",
        help=f"of a pair's loss difference from seed to seed ({SEED_DEVIATION:.3f}: the paper's, for independent runs)",
    )
    group.add_argument(
        "--document-deviation",
        type=float,
        default=DOCUMENT_DEVIATION,
        metavar="NATS",
        help=f"of the loss difference from document to document ({DOCUMENT_DEVIATION}: of the stories pair)",
    )
    group.add_argument(
        "--discordance",
        type=float,
        default=DISCORDANCE,
        metavar="SHARE",
        help=f"of items that one model of a pair has right and the other wrong ({DISCORDANCE}: of the stories pair)",
    )
    group.add_argument(
        "--accuracy-deviation",
        type=float,
        default=0.0,
        metavar="POINTS",
        help="of a pair's accuracy difference from seed to seed, beyond the items' own chance (0: assumed)",
    )


def pair_power(options: argparse.Namespace) -> str:
    """The two tables, what they assume, and the commands to run next. Raises UserError for values out of range."""
    _check(options)
    rate = 100 * (1 - options.level)
    promise = (
        f"The smallest true differences that a comparison shows with a chance of {options.power:.0%}, where it calls "
        f'{rate:.3g}% of pairs that do not differ different. Smaller ones mostly end as "no difference is shown".'
    )
    return "\n\n".join([_lines(promise), _losses(options), _tasks(options), NEXT])


def _lines(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _check(options: argparse.Namespace) -> None:
    """Every value that is out of range, in one sentence."""
    rules = {
        "--seeds of at least 1": min(options.seeds) >= 1,
        "--documents of at least 2": options.documents >= 2,
        "--items of at least 2": min(options.items) >= 2,
        "--tests of at least 1": options.tests >= 1,
        "--level between 0.5 and 1": 0.5 < options.level < 1,
        "--power between 1 - level and 1": 1 - options.level < options.power < 1,
        "--seed-deviation of 0 or more": 0 <= options.seed_deviation < math.inf,
        "--document-deviation of 0 or more": 0 <= options.document_deviation < math.inf,
        "--discordance between 0 and 1": 0 < options.discordance < 1,
        "--accuracy-deviation of 0 or more": 0 <= options.accuracy_deviation < math.inf,
    }
    if broken := [rule for rule, kept in rules.items() if not kept]:
        raise UserError(f"a plan needs {', '.join(broken)}; give such values")


# ---- The two tables --------------------------------------------------------------------------------------------------


def _losses(options: argparse.Namespace) -> str:
    found = [
        smallest_loss(
            seeds, options.documents, options.seed_deviation, options.document_deviation, options.level, options.power
        )
        for seeds in options.seeds
    ]
    shown = [f"{least:.4f}" if least < math.inf else "–" for least in found]
    rows = [[str(seeds), least] for seeds, least in zip(options.seeds, shown, strict=True)]
    assumed = (
        f"Assumed: a pair's difference varies from seed to seed with a standard deviation of "
        f"{options.seed_deviation:.3g} nats (--seed-deviation; by default that of independent runs of the paper's 8M "
        "models, ±0.01 a side over three seeds: pairs that share weights and order may vary less), and from document "
        f"to document by {options.document_deviation:.3g} (--document-deviation; by default that of the stories pair). "
        "One seed: of the two models that are trained, whatever other seeds would have given."
    )
    title = f"Validation loss, nats per token, {options.documents:,} documents:"
    return "\n\n".join([title, text_table(["seeds", "difference"], rows), _lines(assumed)])


def _tasks(options: argparse.Namespace) -> str:
    header = ["items", *(f"{seeds} seed{'s' * (seeds > 1)}" for seeds in options.seeds)]
    tables = []
    for tests in dict.fromkeys((1, options.tests)):
        level = 1 - (1 - options.level) / tests
        rows = [
            [f"{items:,}", *(_points(smallest_accuracy(s, items, options, level)) for s in options.seeds)]
            for items in options.items
        ]
        alone = "one task alone" if tests == 1 else f"the one of {tests} tests that differs, after Holm's correction"
        tables.append(f"Accuracy, points of percent, {alone}:\n\n{text_table(header, rows)}")
    assumed = (
        f"Assumed: the models of a pair disagree on {options.discordance:.0%} of the items (--discordance; by default "
        "about that of the stories pair), on others in each seed, and from seed to seed a pair's difference has a "
        f"standard deviation of {options.accuracy_deviation:g} points beyond that (--accuracy-deviation). One seed: "
        "McNemar's exact test, of the two models that are trained. Several seeds: of the change, for which few seeds, "
        "whose own spread is hardly known, can show less than one shows of its two models. –: not shown even where all "
        "disagreement is in favour of one side."
    )
    return "\n\n".join([*tables, _lines(assumed)])


def _points(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


# ---- The smallest difference -----------------------------------------------------------------------------------------


def smallest_loss(
    seeds: int, documents: int, seed_deviation: float, document_deviation: float, level: float, power: float
) -> float:
    """Nats per token that `stats.paired_effect` shows with probability `power`.

    The documents' part is taken to be the same in all seeds, as where the change helps some documents and not others:
    more seeds then do not lessen it.
    """
    of_seeds, of_items = seed_deviation**2, document_deviation**2 / documents
    scale = math.sqrt(of_items + (of_seeds if seeds > 1 else 0.0))
    if scale == 0:
        return 0.0
    found = _smallest(
        lambda nats: power_of_mean(nats, seeds, documents, of_seeds, of_items, 1 - level), power, 1000 * scale
    )
    return math.inf if found is None else found


def smallest_accuracy(seeds: int, items: int, options: argparse.Namespace, level: float) -> float | None:
    """Share of the items by which accuracy differs and is shown; None where it would exceed the discordance.

    One seed: McNemar's test; several: `stats.paired_effect`. `options`: power, discordance, accuracy_deviation.
    """
    discordance, of_seeds = options.discordance, (options.accuracy_deviation / 100) ** 2

    def power_at(share: float) -> float:
        if seeds == 1:
            return power_of_mcnemar(share, discordance, items, 1 - level)
        return power_of_mean(share, seeds, items, of_seeds + (discordance - share**2) / items, 0.0, 1 - level)

    return _smallest(power_at, options.power, discordance)


def _smallest(power_at: Callable[[float], float], power: float, largest: float) -> float | None:
    from scipy.optimize import brentq

    if power_at(largest) < power:
        return None
    return float(brentq(lambda difference: power_at(difference) - power, 0.0, largest, xtol=1e-7))


# ---- Power -----------------------------------------------------------------------------------------------------------


def power_of_mean(
    difference: float, seeds: int, items: int, seed_variance: float, item_variance: float, alpha: float
) -> float:
    """Chance that the interval of `stats.paired_effect` leaves out zero where the truth is `difference`.

    Args:
        seed_variance: of one pair's difference from seed to seed; of no account with one seed.
        item_variance: what the items add to the mean's variance in all seeds alike.

    The normal chance of leaving an interval, over the distribution of the variance that its width is estimated from:
    chi square with S - 1 degrees of freedom for the seeds' part, with N - 1 for the items' where there is one seed. So
    with one part alone it is the noncentral t, whose function in scipy fails for large differences.
    """
    if 2.0 ** (1 - items) >= alpha:  # no test of signs would find it either
        return 0.0
    from scipy.special import ndtr
    from scipy.stats import chi2

    from evals.verdict.statistics import critical

    levels = (np.arange(NODES) + 0.5) / NODES
    if seeds == 1:
        error, share = math.sqrt(item_variance), 0.0
        variance = item_variance * chi2.ppf(levels, items - 1) / (items - 1)
    else:
        error = math.sqrt(seed_variance / seeds + item_variance)
        of_seeds = seed_variance / seeds * chi2.ppf(levels, seeds - 1) / (seeds - 1)
        variance = of_seeds + item_variance
        share = of_seeds / variance
    half = critical(alpha, share, max(seeds, 2), items) * np.sqrt(variance)
    return float(np.mean(ndtr((difference - half) / error) + ndtr((-half - difference) / error)))


def power_of_mcnemar(difference: float, discordance: float, items: int, alpha: float) -> float:
    """Chance that McNemar's exact test has p < alpha where accuracies truly differ by `difference` (a share).

    Over the number of items the models disagree on, binomial with `discordance`, of which one side has its part right.
    """
    from scipy.stats import binom

    disagreed = np.arange(binom.ppf(1e-9, items, discordance), binom.isf(1e-9, items, discordance) + 1)
    part = min(1.0, (1 + difference / discordance) / 2)
    fewest = binom.ppf(alpha / 2, disagreed, 0.5) - 1  # the most in the smaller count with p < alpha
    rejected = binom.cdf(fewest, disagreed, part) + binom.sf(disagreed - fewest - 1, disagreed, part)
    return float(np.sum(binom.pmf(disagreed, items, discordance) * rejected))


# ---- A ladder of sizes -----------------------------------------------------------------------------------------------


class LadderPlan(NamedTuple):
    """The smallest compute multipliers, at every size alike, that a ladder shows with the asked-for chance.

    `firm`: by both intervals of `evals.verdict.ladder`; infinite with three sizes, where nothing is firm.
    """

    shown: float
    firm: float


def smallest_multiplier(
    log_compute: Sequence[float],
    slopes: Sequence[float],
    deviations: Sequence[float],
    seeds: Sequence[int],
    level: float = 0.95,
    power: float = 0.8,
) -> LadderPlan:
    """The smallest multiplier m > 1 that the mean over sizes shows.

    Args:
        log_compute: ln FLOPs of each size.
        slopes: by how much the baseline's loss falls per unit of ln FLOPs at each size, nats per token.
        deviations: of a pair's loss difference from seed to seed at each size, nats per token; of a whole trunk's mean
            with branches.
        seeds: pairs at each size.

    To first order ln m is a difference over the slope. Its mean's variance is known by the seeds with the degrees of
    freedom of `ladder_estimator`, by the sizes with S - 2. A firm verdict needs both, taken as independent. Simulated
    ladders of 3 to 6 sizes and 2 to 5 seeds show such a multiplier in 76 to 82% where 80% are asked for.

    Raises:
        UserError: under three sizes, a size with one seed, a slope or deviation that is not positive.
    """
    from scipy.stats import nct, t

    from evals.verdict.ladder_estimator import FALL_SD, fall_weights

    if len(slopes) < 3 or min(seeds) < 2 or min(*slopes, *deviations) <= 0:
        raise UserError("a ladder needs three sizes of two seeds, slopes and deviations above 0: add sizes or seeds")
    x = np.asarray(log_compute) - np.mean(log_compute)
    variances = (np.asarray(deviations) / np.asarray(slopes)) ** 2 / np.asarray(seeds)
    error = math.sqrt(variances.sum()) / len(x)
    _, information = fall_weights(x, np.asarray(seeds) - 1.0)
    unknown = (variances @ x / variances.sum()) ** 2 * information / (information + FALL_SD**-2) ** 2

    def least(*degrees: float) -> float:
        bounds = [t.isf((1 - level) / 2, one) for one in degrees]

        def chance(y: float) -> float:
            return math.prod(float(nct.sf(b, one, y / error)) for b, one in zip(bounds, degrees, strict=True))

        found = _smallest(chance, power, 100 * error)
        return math.inf if found is None else math.exp(found)

    by_seeds, by_sizes = 1 / (1 / (sum(seeds) - len(x)) + unknown), len(x) - 2
    return LadderPlan(least(by_seeds), least(by_seeds, by_sizes) if by_sizes > 1 else math.inf)
