"""Values of items against lm-eval's own aggregations, and which metric stands for a task."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api import metrics as theirs

from evals.harness import metrics
from evals.harness.metrics import Metric

nats = st.floats(-500, -0.01)
counts = st.integers(1, 300)


@given(st.lists(st.tuples(nats, counts), min_size=1, max_size=30))
def test_weighted_values_have_the_metric_for_their_mean(items):
    logarithm = np.average(
        *metrics.values(Metric("weighted_perplexity", -1, False), items)[:1], weights=[n for _, n in items]
    )
    assert logarithm == pytest.approx(math.log(theirs.weighted_perplexity(items)), rel=1e-9)
    found = metrics.values(Metric("bits_per_byte", -1, False), items)
    assert np.average(found.values, weights=found.weights) == pytest.approx(theirs.bits_per_byte(items), rel=1e-9)


@given(st.lists(nats, min_size=1, max_size=30))
def test_unweighted_values(items):
    found = metrics.values(Metric("perplexity", -1, False), items)
    assert found.weights is None and found.values.mean() == pytest.approx(-np.mean(items))
    assert metrics.values(Metric("mean", 1, True), [1.0, 0.0]).values.tolist() == [1, 0]


def test_an_item_without_bytes_has_no_weight():
    found = metrics.values(Metric("bits_per_byte", -1, False), [[-8.0, 4.0], [0.0, 0.0]])
    assert found.values.tolist() == [2 / math.log(2), 0] and found.weights.tolist() == [4, 0]


@pytest.mark.parametrize(
    ("kinds", "wanted", "expected"),
    [
        ({"acc": "mean", "acc_norm": "mean"}, None, "acc_norm"),
        ({"acc": "mean", "acc_norm": "mean"}, "acc", "acc"),
        ({"acc": "mean", "f1": "f1_score"}, "f1", "acc"),
        ({"perplexity": "perplexity", "acc": "mean"}, "acc_norm", "acc"),
        ({"word_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}, "acc_norm", "bits_per_byte"),
        ({"exact_match,strict": "mean", "exact_match,loose": "mean"}, "acc_norm", "exact_match,strict"),
        ({"bleu": "bleu", "ter": "ter"}, "acc_norm", None),
    ],
)
def test_the_metric_that_stands_for_a_task(kinds, wanted, expected):
    result = {"metrics": {name: Metric(kind, 1, False)._asdict() for name, kind in kinds.items()}}
    assert metrics.primary(result, wanted) == expected


def test_results_from_before_there_were_others():
    assert metrics.of_result({"task": "piqa", "acc": 0.5}) == {"acc": Metric("mean", 1, True)}


def test_units():
    units = [metrics.unit(name, metrics.describe(kind, True, items)) for name, kind, items in (
        ("acc", "mean", [0.0, 1.0]), ("rouge", "mean", [31.0, 2.0]), ("perplexity", "perplexity", [-3.0]),
        ("word_perplexity", "weighted_perplexity", [(-3.0, 2)]), ("bits_per_byte", "bits_per_byte", [(-3.0, 2)]),
    )]  # fmt: skip
    assert units == ["points", "score", "nats per answer", "nats per word", "bits per byte"]
