"""AMICL against its definition, one trial at a time in NumPy and scipy; and the claims of Section 2.2."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy.spatial import distance
from scipy.stats import pearsonr

from llm.common.errors import UserError
from llm.model.attention import eager_attention
from small.icl import amicl
from small.icl.amicl import CONVENTIONS, PROJECTIONS, SEPARATIONS, SIMILARITIES, Rule, accuracies, attention, outcomes
from small.icl.task import World

PAPER, CODE = CONVENTIONS["paper"], CONVENTIONS["code"]
MANY = 20_000


def by_hand(tokens: np.ndarray, rule: Rule, last_key: np.ndarray | None, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Weights (S,) of the last query, and the label, of one trial (S, E): Section 2.2 as it reads."""
    count, a = len(tokens), rule.a
    keys = [(a * tokens[i - 1] + tokens[i]) / (a + 1) for i in range(count)]  # index -1 is the wrap
    query = keys[-1]
    keys[-1] = np.zeros_like(query) if last_key is None else last_key
    similarity = {
        "dot": lambda q, k: float(np.dot(q, k)),
        "pearson": lambda q, k: pearsonr(q, k).statistic if np.ptp(q) > 0 and np.ptp(k) > 0 else 0.0,
        "manhattan": lambda q, k: -distance.cityblock(q, k),
        "euclidean": lambda q, k: -distance.euclidean(q, k),
    }[rule.similarity]
    scores = np.array([similarity(query, key) for key in keys])
    weights = {
        "identity": scores,
        "softmax": special.softmax(scores),
        "argmax": np.eye(count)[scores.argmax()],
    }[rule.separation]
    values = tokens if rule.projection == "identity" else np.roll(tokens, -1, axis=0)
    return weights, int((labels @ (weights @ values)).argmax())


EVERY = [Rule(s, p, v, a) for s in SIMILARITIES for p in SEPARATIONS for v in PROJECTIONS for a in (0.0, 0.7, 2.0)]


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda convention: convention.name)
def test_every_memory_equals_its_definition(convention: amicl.Convention) -> None:
    world = World(convention.task(12, 30), seed=3)
    drawn = world.trials(0, 25)
    last_key = torch.randn(25, 30, generator=torch.Generator().manual_seed(1)) / math.sqrt(30)
    key = last_key if convention.random_last_key else None
    for rule in EVERY:
        weights = attention(drawn.inputs, rule.a, rule.similarity, rule.separation, key, last=True)
        found = amicl.answers(weights, PROJECTIONS[rule.projection](drawn.inputs), world.label_means)
        for trial in range(25):
            tokens, own = drawn.inputs[trial].double().numpy(), None if key is None else key[trial].double().numpy()
            expected, label = by_hand(tokens, rule, own, world.label_means.double().numpy())
            if rule.a > 0 or rule.separation != "argmax":  # at a = 0 the query is zero, and all keys are alike
                np.testing.assert_allclose(weights[trial, 0].numpy(), expected, atol=2e-4)
            if rule.a > 0:
                assert found[trial] == label, (rule, trial)


@given(st.just(0.0) | st.floats(0.001, 4), st.booleans(), st.integers(0, 50), st.sampled_from(["dot", "pearson"]))
@settings(max_examples=40)
def test_scores_by_linearity_equal_the_direct_ones(a: float, random_key: bool, seed: int, similarity: str) -> None:
    drawn = World(PAPER.task(10, 20), seed).trials(0, 6)
    key = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed)) if random_key else None
    direct = attention(drawn.inputs, a, similarity, "identity", key, last=True)
    torch.testing.assert_close(amicl.Linear(drawn.inputs, key).scores(similarity, a), direct, rtol=1e-4, atol=1e-5)


def test_dot_product_with_softmax_is_the_attention_of_the_language_models() -> None:
    tokens = World(PAPER.task(20, 100), 0).trials(0, 8).inputs
    queries, keys = amicl.queries_and_keys(tokens, 2.0)
    out, weights = eager_attention(torch.nn.Identity(), queries[:, None], keys[:, None], tokens[:, None], None, 1.0)
    torch.testing.assert_close(attention(tokens, 2.0, "dot", "softmax"), weights[:, 0])
    torch.testing.assert_close(attention(tokens, 2.0, "dot", "softmax") @ tokens, out[:, :, 0])


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda convention: convention.name)
class TestClaims:
    """What the paper says of width 100 and length 20 unless another is named."""

    def test_dot_product_is_above_099_from_15_on(self, convention: amicl.Convention) -> None:
        assert min(accuracies([Rule(a=a) for a in (1.5, 1.75, 2.0)], convention, trials=MANY)) > 0.99

    def test_pearson_settles_near_085(self, convention: amicl.Convention) -> None:
        found = accuracies([Rule("pearson", a=a) for a in (1.5, 1.75, 2.0)], convention, trials=MANY)
        assert all(0.82 < accuracy < 0.88 for accuracy in found)

    def test_pearson_fails_where_the_first_object_is_asked_for(self, convention: amicl.Convention) -> None:
        found = outcomes([Rule("pearson")], convention, trials=MANY)
        right = found.right[0].double()
        assert right[~found.first].mean() > 0.999
        assert right[found.first].mean() < 0.1
        # Of nine places, a bursty context has four classes on two each and one on one; a free one has nine classes.
        expected = (17 / 81 + 1 / 9) / 2
        assert found.first.double().mean().item() == pytest.approx(expected, abs=0.01)

    def test_below_one_the_object_itself_is_more_alike(self, convention: amicl.Convention) -> None:
        assert max(accuracies([Rule(a=a) for a in (0.2, 0.5, 0.8)], convention, trials=2000)) < 0.1

    @pytest.mark.parametrize("length", [10, 100, 1000])
    def test_accuracy_does_not_fall_with_length(self, convention: amicl.Convention, length: int) -> None:
        assert accuracies([Rule()], convention, length=length, trials=1000)[0] > 0.99

    @pytest.mark.parametrize("width", [50, 200, 1000])
    def test_accuracy_is_above_099_from_width_50_on(self, convention: amicl.Convention, width: int) -> None:
        assert accuracies([Rule()], convention, width=width, trials=2000)[0] > 0.99


def test_the_codes_noise_is_smaller_by_the_root_of_the_width() -> None:
    for convention, deviation in ((PAPER, 0.1 / math.sqrt(400)), (CODE, 0.1 / 400)):
        task = convention.task(20, 400)
        world = World(task, 0)
        drawn = world.trials(0, 200)
        noise = drawn.inputs[:, :-1:2] * math.sqrt(1 + task.noise**2) - world.class_means[drawn.classes]
        assert noise.std().item() == pytest.approx(deviation, rel=0.05)


def test_the_codes_last_key_is_random() -> None:
    """At a small width random keys are often the most alike: the right trials, against each one by hand."""
    world, rules = World(CODE.task(10, 4), 1), [Rule("dot", a=1.0), Rule("pearson")]
    drawn = world.trials(0, 100)
    keys = world.draws("last key", 0).normal(100, 4) / 2
    found = outcomes(rules, CODE, length=10, width=4, trials=100, seed=1)
    labels, plain = world.label_means.double().numpy(), []
    for index, rule in enumerate(rules):
        for trial in range(100):
            tokens = drawn.inputs[trial].double().numpy()
            _, label = by_hand(tokens, rule, keys[trial].double().numpy(), labels)
            assert found.right[index, trial] == (label == drawn.answers[trial]), (rule, trial)
            plain.append(by_hand(tokens, rule, None, labels)[1] == label)
    assert not all(plain), "the key made a difference"


def test_trials_in_parts_are_one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amicl, "ELEMENTS", 20 * 100 * 7)
    found = outcomes([Rule(), Rule("manhattan")], CODE, trials=20)
    assert found.right.shape == (2, 20) and found.first.shape == (20,)


def test_a_run_without_trials_is_refused() -> None:
    with pytest.raises(UserError, match="trials 0"):
        outcomes([Rule()], PAPER, trials=0)
