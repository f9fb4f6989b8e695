"""The navigator against a Transformer-XL written out for one walker; its two objectives against each other."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm.common.errors import UserError
from small.grid.model import Answer, Navigator, Variant
from small.grid.settings import GridSizes

SIZES = GridSizes(width=16, heads=2, head_dim=5, neurons=24, layers=3, code=6, segment=4, memory=3, dropout=0.0)
ACTIONS, LETTERS, WALKERS = 5, 7, 3
VARIANTS = {
    "paper": Variant("nmda:10"),
    "residual": Variant("gelu_sigmoid", position="residual"),
    "actions": Variant("leaky_relu:0.3", position="actions"),
    "values": Variant("nmda:0", streams=("values",)),
    "all streams": Variant("relu", streams=("queries", "keys", "values"), source="accumulated"),
}


def navigator(variant: Variant, sizes: GridSizes = SIZES, spread: float = 0.3) -> Navigator:
    """With weights far from their small start, so that every part shows in the logits."""
    torch.manual_seed(3)
    model = Navigator(ACTIONS, LETTERS, sizes, variant).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(spread * torch.randn_like(weight))
    return model.eval()


def walk(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (WALKERS, length)
    return torch.randint(ACTIONS, shape, generator=generator), torch.randint(LETTERS, shape, generator=generator)


def segments(model: Navigator, objective: str, count: int = 3) -> list[Tensor]:
    """Logits of the targets of some segments, each (B, L, letters)."""
    length = model.sizes.segment
    actions, letters = walk(count * length + 1)
    code, memory, found = torch.ones(WALKERS, model.sizes.code).double() / 3, (), []
    every = tuple(range(1, length + 1))
    for begin in range(0, count * length, length):
        asked = [every] if objective == "parallel" else [(time,) for time in every]
        answers: list[Answer] = [
            model(code, actions[:, begin : begin + t[-1] + 1], letters[:, begin : begin + t[-1]], memory, t)
            for t in asked
        ]
        code, memory = answers[-1].code, answers[-1].memory
        found.append(torch.cat([answer.logits for answer in answers], dim=1))
    return found


# ---- Written out -----------------------------------------------------------------------------------------------------


def normed(x: Tensor, module: torch.nn.Module) -> Tensor:
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt() * module.weight + module.bias


ACTS = {
    "nmda:10": lambda x: x / (1 + 10 * torch.exp(-x)),
    "nmda:0": lambda x: x,
    "gelu_sigmoid": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x * (x > 0),
    "leaky_relu:0.3": lambda x: torch.where(x > 0, x, 0.3 * x),
}


def written_codes(w: dict[str, Tensor], variant: Variant, actions: list[int], width: int) -> list[Tensor]:
    """Of one walker, a code for every action."""
    if variant.position == "actions":
        return [w["codes.embedding.weight"][action] for action in actions]
    codes = [torch.ones(width).double() / 3]
    for action in actions[1:]:
        matrix = w["codes.transitions"].unflatten(0, (ACTIONS, -1))[action]
        codes.append(torch.tanh(codes[-1] @ matrix + (codes[-1] if variant.position == "residual" else 0)))
    return codes


def written_attention(own: dict[str, Tensor], mixed: dict[str, list[Tensor]], t: int, sizes: GridSizes) -> Tensor:
    """What token t of the context adds to itself: every head, every token before it."""
    attended = []
    for head in range(sizes.heads):
        q, scores = mixed["queries"][t][head], []
        for j in range(t + 1):
            d = min(t - j, sizes.window - 1)
            content = (q + own["attention.content_bias"][head, 0]) @ mixed["keys"][j][head]
            place = q @ own["attention.distance_keys"][head, d] + own["attention.distance_bias"][head, 0, d]
            scores.append((content + place) / math.sqrt(sizes.head_dim))
        weights = torch.stack(scores).exp()
        values = [mixed["values"][j][head] for j in range(t + 1)]
        attended.append(sum(a * v for a, v in zip(weights / weights.sum(), values, strict=True)))
    return own["attention.o_proj.weight"] @ torch.cat(attended)


def written_layer(
    model: Navigator, n: int, variant: Variant, memory: list[Tensor], tokens: list[Tensor], before: list[dict]
) -> list[Tensor]:
    """Layer n over memory and tokens; `before` has of every layer below its own parts and its mixed ones."""
    own = {
        name.removeprefix(f"layers.{n}."): weight
        for name, weight in model.named_parameters()
        if name.startswith(f"layers.{n}.")
    }
    context = [normed(x, model.layers[n].attention_norm) for x in memory + tokens]
    parts = {
        stream: [(own[f"attention.{name}_proj.weight"] @ x).unflatten(0, (model.sizes.heads, -1)) for x in context]
        for stream, name in (("queries", "q"), ("keys", "k"), ("values", "v"))
    }
    arriving = before[-1]["own" if variant.source == "previous" else "mixed"] if before else {}
    mixed = {
        name: [a + b for a, b in zip(part, arriving[name], strict=True)]
        if name in variant.streams and arriving
        else part
        for name, part in parts.items()
    }
    before.append({"own": parts, "mixed": mixed})
    tokens = [x + written_attention(own, mixed, len(memory) + t, model.sizes) for t, x in enumerate(tokens)]
    inner = [own["ffn.up_proj.weight"] @ normed(x, model.layers[n].ffn_norm) for x in tokens]
    return [x + own["ffn.down_proj.weight"] @ ACTS[variant.act](h) for x, h in zip(tokens, inner, strict=True)]


def reference(model: Navigator, variant: Variant, count: int = 3) -> list[Tensor]:
    """Step by step, walker by walker, token by token: logits (B, L, letters) of each segment."""
    w = dict(model.named_parameters())
    length, kept = model.sizes.segment, model.sizes.memory
    all_actions, all_letters = walk(count * length + 1)
    results = [torch.empty(WALKERS, length, LETTERS).double() for _ in range(count)]
    for walker in range(WALKERS):
        letters = all_letters[walker].tolist()
        codes = written_codes(w, variant, all_actions[walker].tolist(), model.sizes.code)
        memory: list[list[Tensor]] = [[] for _ in model.layers]
        for segment, step in itertools.product(range(count), range(1, length + 1)):
            begin = segment * length
            embeddings = w["letter.weight"][[*letters[begin : begin + step], LETTERS]]
            tokens = [
                torch.cat([torch.relu(w["position.weight"] @ codes[begin + i] + w["position.bias"]), embedding])
                for i, embedding in enumerate(embeddings)
            ]
            entered, before = [], []
            for n in range(len(memory)):
                entered.append(tokens[:-1])
                tokens = written_layer(model, n, variant, memory[n], tokens, before)
            logits = w["read_out.weight"] @ normed(tokens[-1], model.norm) + w["read_out.bias"]
            results[segment][walker, step - 1] = logits
            if step == length:
                memory = [[x.detach() for x in (m + e)[-kept:]] for m, e in zip(memory, entered, strict=True)]
    return results


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_are_those_of_a_transformer_xl_written_out(name: str) -> None:
    model = navigator(VARIANTS[name])
    found, expected = segments(model, "steps", 2), reference(model, VARIANTS[name], 2)
    mix = torch.randn(WALKERS, SIZES.segment, LETTERS, generator=torch.Generator().manual_seed(1)).double()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)  # the shared softmax is in float32
    weights = [weight for _, weight in model.named_parameters()]
    ours, theirs = (
        torch.autograd.grad(sum((logits * mix).sum() for logits in each), weights, allow_unused=True)
        for each in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_all_targets_at_once_have_the_logits_of_step_by_step(name: str) -> None:
    model = navigator(VARIANTS[name])
    for parallel, steps in zip(segments(model, "parallel"), segments(model, "steps"), strict=True):
        # The softmax is in float32, and how it adds up depends on the processor and on the number of keys.
        torch.testing.assert_close(parallel, steps, atol=2e-6, rtol=0)


def test_a_query_sees_no_letter_of_its_time_or_later() -> None:
    model = navigator(Variant("nmda:1"))
    actions, letters = walk(5)
    code = torch.ones(WALKERS, 6).double()
    every = (1, 2, 3, 4)
    before = model(code, actions, letters[:, :4], (), every).logits
    letters[:, 2] = (letters[:, 2] + 1) % LETTERS
    after = model(code, actions, letters[:, :4], (), every).logits
    changed = (before != after).any(-1).any(0)
    assert changed.tolist() == [False, False, True, True]  # times 1 and 2 ask for letters 1 and 2


def test_the_papers_form_and_the_residual_one_are_one_model() -> None:
    paper, residual = (navigator(Variant(position=form), spread=0) for form in ("paper", "residual"))
    difference = torch.randn(ACTIONS, 6, 6).double() * 0.2
    with torch.no_grad():
        paper.codes.transitions += difference.flatten(0, 1)
        residual.codes.transitions += difference.flatten(0, 1)
    for one, other in zip(segments(paper, "parallel"), segments(residual, "parallel"), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_attention_of_the_queries_is_shown() -> None:
    model = navigator(VARIANTS["paper"])
    actions, letters = walk(9)
    first = model(torch.ones(WALKERS, 6).double(), actions[:, :5], letters[:, :4], (), (4,))
    second = model(first.code, actions[:, 4:], letters[:, 4:8], first.memory, (4,))
    assert [weights.shape for weights in second.weights] == [(WALKERS, 2, 1, 3 + 4 + 1)] * 3
    for weights in second.weights:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_memory_may_be_switched_off_and_keeps_no_gradient() -> None:
    model = navigator(VARIANTS["paper"], replace(SIZES, memory=0))
    actions, letters = walk(5)
    answer = model(torch.ones(WALKERS, 6).double(), actions, letters[:, :4], (), (4,))
    assert all(kept.shape == (WALKERS, 0, 16) for kept in answer.memory)
    kept = navigator(VARIANTS["paper"])(torch.ones(WALKERS, 6).double(), actions, letters[:, :4], (), (4,)).memory
    assert not any(each.requires_grad for each in kept)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GridSizes(width=15), "width 15 must be even"),
        (lambda: GridSizes(heads=0, memory=-1), "heads 0 must be at least 1; memory -1"),
        (lambda: GridSizes(dropout=1), "dropout 1"),
        (lambda: Variant("nmda:-1"), "activation 'nmda:-1'"),
        (lambda: Variant("nmda:x"), "activation 'nmda:x'"),
        (lambda: Variant("gelu:2"), "activation 'gelu:2'"),
        (
            lambda: Variant("swishy", position="there"),
            "position 'there' is unknown: give paper, residual, actions; activ",
        ),
        (lambda: Variant(streams=("value",)), "stream 'value' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(make, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()


def test_one_model_has_one_name() -> None:
    assert Variant("nmda") == Variant("nmda:1.0") == Variant("nmda:1")
    assert Variant("leaky_relu") == Variant("leaky_relu:0.010")
    assert Variant(streams=("values", "queries", "values")).streams == ("queries", "values")
    assert Variant("nmda:0.05").activation.number == 0.05 and Variant("relu").activation.number is None


def test_a_plan_made_under_inference_serves_a_training() -> None:
    model = navigator(VARIANTS["paper"], replace(SIZES, segment=5))
    actions, letters = walk(6)
    asked = (torch.ones(WALKERS, 6).double(), actions, letters[:, :5], (), (5,))
    with torch.inference_mode():
        expected = model(*asked).logits
    logits = model(*asked).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.layers[-1].parameters())
