"""TEM-t against a loop over environments and times; its codes over long walks; what it learns and what it cannot."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.common.errors import UserError
from small.spaces import space
from small.tem.environments import Environments, accuracy
from small.tem.model import Codes, TemTransformer
from small.tem.settings import TransformerSizes

SIZES = TransformerSizes(code=8, keys=6, values=5, neurons=7)


def plain(model: TemTransformer, actions: Tensor, symbols: Tensor, relu: bool) -> Tensor:
    """Logits of every time but the first, one environment and one time after the other."""
    rows = []
    for steps, seen in zip(actions.tolist(), symbols, strict=True):
        generators = model.codes.generators
        width = generators.shape[-1]
        step_of = [
            torch.eye(width) + g if relu else torch.linalg.matrix_exp(g - g.T) for g in generators
        ]  # fmt: skip
        code = model.codes.start.relu() if relu else model.codes.start
        code = code / code.norm() * width**0.5
        keys, answers = [code @ model.code_to_key.weight.T], []
        for time in range(1, len(steps)):
            code = code @ step_of[steps[time]]
            code = code.relu() if relu else code
            code = code / code.norm() * width**0.5
            query = code @ model.code_to_key.weight.T
            scores = torch.stack([query @ key for key in keys]) / query.shape[0] ** 0.5
            found = scores.softmax(0) @ model.symbol_to_value.weight[seen[:time]]
            answers.append(model.read_out(found))
            keys.append(query)
        rows.append(torch.stack(answers))
    return torch.stack(rows)


@pytest.mark.parametrize("transition", ["identity", "relu"])
def test_logits_and_gradients_equal_a_plain_loop(transition: str) -> None:
    torch.manual_seed(0)
    model = TemTransformer(5, 9, TransformerSizes(8, 6, 5, 7, transition))
    actions, symbols = torch.randint(5, (3, 9)), torch.randint(9, (3, 9))
    found = model(actions, symbols)
    expected = plain(model, actions, symbols, transition == "relu")
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert found.codes.shape == (3, 9, 8) and found.weights.shape == (3, 8, 8)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(3, 8))
    gradients = [
        torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten()), list(model.parameters()))
        for logits in (found.logits, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_no_time_sees_its_own_symbol_or_a_later_one() -> None:
    torch.manual_seed(0)
    model = TemTransformer(5, 9, SIZES)
    actions, symbols = torch.randint(5, (2, 12)), torch.randint(9, (2, 12))
    changed = symbols.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 9
    before, after = (model(actions, each).logits for each in (symbols, changed))
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transition", ["identity", "relu"])
def test_ten_thousand_steps_neither_overflow_nor_freeze(transition: str, dtype: torch.dtype) -> None:
    """With weights far from the start, and rounded to bfloat16."""
    torch.manual_seed(0)
    codes = Codes(5, 32, transition)
    with torch.no_grad():
        codes.generators.mul_(5)
    codes.to(dtype)
    actions = torch.randint(5, (4, 10_001))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = codes(actions)
    assert found.dtype == torch.float32 and found.isfinite().all()
    torch.testing.assert_close(found.norm(dim=-1), torch.full((4, 10_001), 32**0.5), rtol=1e-4, atol=0)
    late = found[:, -1000:]
    alike = torch.stack([late[:, 1:], late[:, :-1]]).prod(0).sum(-1) / 32
    assert alike.mean() < 0.9  # a code that no longer moves would be alike to the one before
    if transition == "identity":
        eigenvalues = torch.linalg.eigvals(codes.transitions())
        torch.testing.assert_close(eigenvalues.abs(), torch.ones(5, 32), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shuffled", [False, True])
def test_zero_shot_links_are_learned_from_actions_alone(shuffled: bool) -> None:
    """Fresh environments of sizes that training had; with actions of another walk the same training is at chance."""
    torch.manual_seed(0)
    environments = Environments([space("3x3"), space("4x4")], 0, symbols=20)
    model = TemTransformer(environments.actions, 20, TransformerSizes(code=32, keys=32, values=32, neurons=32))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def told(kind: str, number: int, count: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        episode = environments.episode(kind, number, count, steps)
        actions = episode.actions.roll(1, 0) if shuffled else episode.actions
        return model(actions, episode.symbols).logits, episode.symbols[:, 1:], episode.zero_shot[:, 1:]

    for number in range(150):
        logits, symbols, _ = told("train", number, 32, 40)
        F.cross_entropy(logits.flatten(0, 1), symbols.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits, symbols, zero_shot = told("test", 0, 60, 60)
    found = accuracy(logits.argmax(-1) == symbols, zero_shot)
    assert found < 0.25 if shuffled else found > 0.7
    assert math.isfinite(found)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(UserError, match="code 0 must be at least 1; transition 'tanh' is unknown: give identity or re"):
        TransformerSizes(code=0, transition="tanh")
