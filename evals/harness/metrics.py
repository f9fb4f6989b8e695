"""Metrics of tasks: what a result says of each, which one stands for a task, and the values that items are paired by.

lm-eval's aggregation -> kind -> a value and a weight for each item; their mean orders models as the metric does

    mean                  the item's score                          acc, acc_norm, exact_match, F1 of an answer, ...
    perplexity            minus the log-likelihood                  nats per answer
    weighted_perplexity   minus it over words or bytes, by those    nats per word, nats per byte
    bits_per_byte         the same in bits                          bits per byte

A perplexity is paired by its logarithm, of which it is a function. Of any other aggregation (F1 or correlation over all
items, BLEU) no item has a value of its own: it is reported, and not tested.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PREFERRED = ("acc_norm", "acc", "exact_match", "bits_per_byte")
WEIGHTED = ("weighted_perplexity", "bits_per_byte")
PAIRED = ("mean", "perplexity", *WEIGHTED)


class Metric(NamedTuple):
    """What a result says of a metric. better: 1 where more is better, else -1; share: of 1, and shown in percent."""

    kind: str
    better: int
    share: bool

    @property
    def paired(self) -> bool:
        """Whether items have values that can be paired."""
        return self.kind in PAIRED


class Values(NamedTuple):
    """A value an item, (N,), and the items' weights, None where all count alike."""

    values: np.ndarray
    weights: np.ndarray | None


def describe(kind: str, higher_is_better: bool, items: Sequence[Any]) -> Metric:
    """A metric by the name of lm-eval's aggregation and what it gave for each item."""
    share = kind == "mean" and all(0 <= float(item) <= 1 for item in items)
    return Metric(kind, 1 if higher_is_better else -1, share)


def of_result(result: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a result; those from before there were others than accuracies do not name them."""
    if "metrics" in result:
        return {name: Metric(**metric) for name, metric in result["metrics"].items()}
    return {name: Metric("mean", 1, True) for name in ("acc", "acc_norm") if name in result}


def primary(result: Mapping[str, Any], wanted: str | None = None) -> str | None:
    """The metric that stands for a task: the one wanted if it has that, else one of `PREFERRED`, else its first that
    has a value for each item; None if none has."""
    paired = [name for name, metric in of_result(result).items() if metric.paired]
    return next((name for name in (wanted, *PREFERRED, *paired[:1]) if name in paired), None)


def unit(name: str, metric: Metric) -> str:
    """What `values` are in."""
    if metric.kind == "mean":
        return "points" if metric.share else "score"
    if metric.kind == "bits_per_byte":
        return "bits per byte"
    return f"nats per {name.partition('_')[0] if metric.kind == 'weighted_perplexity' else 'answer'}"


def values(metric: Metric, items: Sequence[Any]) -> Values:
    """The value and weight of each item from what lm-eval gave for it: a score, a log-likelihood, or (it, count).

    An item without a word or byte has weight 0.
    """
    scores = np.array(items, dtype=np.float64)  # (N,), or (N, 2) of log-likelihoods and counts
    if metric.kind == "mean":
        return Values(scores, None)
    if metric.kind == "perplexity":
        return Values(-scores, None)
    nats, counts = -scores[:, 0], scores[:, 1]
    each = np.divide(nats, counts, out=np.zeros_like(nats), where=counts > 0)
    return Values(each / math.log(2) if metric.kind == "bits_per_byte" else each, counts)
