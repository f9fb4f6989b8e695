"""TEM's memory in its three forms, and attention, against loops over memories."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from llm.common.errors import UserError
from small.tem.memory import (
    ACTS,
    FORMS,
    POWER,
    Rule,
    attention,
    conjunction,
    deconjunction,
    memory_after,
    recall,
    retrieve,
    retrieve_by_matrix,
)
from small.tem.settings import SEPARATIONS

FIVE_STEPS = Rule(decay=0.9999, rate=0.5, keep=0.8, steps=5, act="clipped")
CASES = {
    "paper": Rule(),
    "five steps": FIVE_STEPS,
    "linear": Rule(act="identity"),
    "three steps": Rule(decay=0.7, rate=0.2, keep=0.5, steps=3, act="clipped"),
}


def drawn(seed: int = 0, environments: int = 2, memories: int = 7, sensory: int = 4, places: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(environments, memories, n, generator=generator) * 0.4 for n in (sensory, places, places)]


def slow(sensory: Tensor, places: Tensor, queries: Tensor, rule: Rule) -> Tensor:
    """Equations 4 to 6 with a matrix for each environment and time, summed from all memories anew."""
    act = {"identity": lambda v: v, "relu": lambda v: v.clamp(min=0)}.get(
        rule.act, lambda v: torch.where(v.clamp(-1, 1) > 0, v.clamp(-1, 1), 0.01 * v.clamp(-1, 1))
    )
    rows = []
    for x, g, asked in zip(sensory, places, queries, strict=True):
        for time in range(len(x)):
            memory = sum(
                rule.rate * rule.decay ** (time - s) * torch.outer(p := torch.outer(x[s], g[s]).flatten(), p)
                for s in range(time + 1)
            )
            found = torch.outer(torch.ones_like(x[0]), asked[time]).flatten()
            for _ in range(rule.steps):
                found = act(rule.keep * found + found @ memory)
            rows.append(found)
    return torch.stack(rows).view(*sensory.shape, -1)


@pytest.mark.parametrize("rule", CASES.values(), ids=CASES)
def test_both_forms_are_the_papers_equations(rule: Rule) -> None:
    parts = drawn()
    expected = slow(*parts, rule)
    assert expected.abs().max() > 1e-3
    for form, retrieved in (("sums", retrieve), ("matrix", retrieve_by_matrix)):
        torch.testing.assert_close(retrieved(*parts, rule), expected, rtol=1e-4, atol=1e-6)
        found = recall(*parts, replace(rule, form=form))
        torch.testing.assert_close(found, expected.sum(-1), rtol=1e-4, atol=1e-5)


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 30), st.integers(1, 8), st.integers(1, 9),
    st.floats(0.5, 1), st.integers(1, 5), st.sampled_from(sorted(ACTS)),
)  # fmt: skip
@settings(max_examples=40)
def test_the_sums_equal_the_matrix(seed, environments, memories, sensory, places, decay, steps, act) -> None:
    """To 1e-4 of the greatest retrieved number, of the clipped ones in every step; free ones grow with the steps."""
    rule = Rule(decay, 0.3, 0.2, steps if act == "clipped" else 1, act)
    parts = drawn(seed, environments, memories, sensory, places)
    one, other = (form(*parts, rule) for form in (retrieve, retrieve_by_matrix))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * max(1e-3, other.abs().max().item()))


def test_gradients_of_both_forms_are_equal() -> None:
    gradients = []
    for form in (retrieve, retrieve_by_matrix):
        parts = [part.requires_grad_() for part in drawn(1)]
        gradients.append(torch.autograd.grad(form(*parts, FIVE_STEPS).square().sum(), parts))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["paper", "linear", "three steps"])
def test_a_memory_that_is_carried_over_is_that_of_one_walk(name: str, form: str) -> None:
    rule = replace(CASES[name], form=form if CASES[name].act == "identity" or form != "factored" else "sums")
    parts = drawn(5, memories=9)
    whole, before, found = recall(*parts, rule), torch.zeros(2, 20, 20), []
    for now in (slice(0, 4), slice(4, 5), slice(5, 9)):
        sensory, places, queries = (part[:, now] for part in parts)
        found.append(recall(sensory, places, queries, rule, before))
        before = memory_after(sensory, places, rule, before)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_one_linear_step_is_equation_10_and_linear_attention(decay: float) -> None:
    """The bridge: deconjunction of TEM's one step = weighted linear attention; = linear attention at equal weights."""
    sensory, places, queries = drawn(2)
    rule = Rule(decay=decay, rate=0.5, keep=0.3, act="identity")
    whole = deconjunction(retrieve_by_matrix(sensory, places, queries, rule))
    for form in FORMS:
        found = recall(sensory, places, queries, replace(rule, form=form))
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)
    # Where every x and every g sums to one, both weights of Equation 10 are one.
    sensory, places = (part - part.mean(-1, keepdim=True) + 1 / part.shape[-1] for part in (sensory, places))
    tem = deconjunction(retrieve_by_matrix(sensory, places, queries, Rule(act="identity")))
    found, weights = attention(nn.Identity(), queries, places, sensory, "linear")
    torch.testing.assert_close(found * places.shape[-1] ** 0.5, tem, rtol=1e-4, atol=1e-5)
    assert weights.triu(1).abs().max() == 0


def test_conjunctions_are_outer_products() -> None:
    sensory, places, _ = drawn(3)
    torch.testing.assert_close(conjunction(sensory, places)[1, 2], torch.outer(sensory[1, 2], places[1, 2]))
    torch.testing.assert_close(deconjunction(conjunction(sensory, places)), sensory * places.sum(-1, keepdim=True))


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_attention_is_a_sum_over_memories(separation: str) -> None:
    value, key, query = drawn(4)
    found, weights = attention(nn.Identity(), query, key, value, separation)
    for environment in range(2):
        for time in range(7):
            scores = torch.stack([query[environment, time] @ key[environment, s] for s in range(time + 1)]) / 5**0.5
            expected = {
                "softmax": scores.exp() / scores.exp().sum(), "linear": scores, "exponential": scores.exp(),
                "polynomial": scores * scores * scores,
            }[separation]  # fmt: skip
            torch.testing.assert_close(weights[environment, time, : time + 1], expected)
            assert not weights[environment, time, time + 1 :].any()
            torch.testing.assert_close(
                found[environment, time], sum(w * v for w, v in zip(expected, value[environment], strict=False))
            )
    assert POWER == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"corrects": True, "form": "factored"}, "the factored form is of a memory that does not correct"),
        ({"decay": 0.0}, "decay 0.0 must be above 0 and at most 1"),
        (
            {"steps": 2, "act": "identity", "form": "factored"},
            "the factored form is of one step with act identity: give the form sums",
        ),
        (
            {"steps": 0, "act": "tanh", "form": "list"},
            "steps 0 must be at least 1; act 'tanh' is unknown: give identity, relu or clipped; form 'list' is unknown",
        ),
    ],
)
def test_rules_that_cannot_be(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Rule(**changes)
