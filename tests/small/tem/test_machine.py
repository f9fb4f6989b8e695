"""TEM against its equations written out; frequency modules; two-hot symbols; that it learns."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.common.errors import UserError
from small.spaces import space
from small.tem.environments import Environments, accuracy
from small.tem.machine import Machine, two_hot
from small.tem.memory import RULES, Rule
from small.tem.settings import MODULES, MachineSizes

SIZES = MachineSizes(code=12, places=5, sensory=5, neurons=7)
VARIANTS = {
    "paper": (SIZES, Rule()),
    "modules": (MachineSizes(code=12, modules=(6, 3, 3), sensory=5, neurons=7), Rule(steps=3, act="clipped", keep=0.5)),
    "learned": (
        MachineSizes(code=12, places=5, sensory=6, two_hot=False, neurons=7, transition="relu"), Rule(act="identity")
    ),
}  # fmt: skip


def plain(model: Machine, actions: Tensor, symbols: Tensor, rule: Rule) -> Tensor:
    """Equations 3 to 7 for one environment, with its memory matrix."""
    codes = model.codes(actions[None])[0]
    places = [F.normalize(model.code_to_place(code[None])[0], dim=0) for code in codes]
    vectors = [F.normalize(model.sensory[symbol], dim=0) for symbol in symbols]
    width = len(vectors[0]) * len(places[0])
    memory, answers = torch.zeros(width, width), []
    act = {"relu": torch.relu, "identity": lambda p: p, "clipped": lambda p: F.leaky_relu(p.clamp(-1, 1))}[rule.act]
    for time in range(len(symbols) - 1):
        p = torch.outer(vectors[time], places[time]).flatten()
        memory = rule.decay * memory + rule.rate * torch.outer(p, p)
        found = torch.outer(torch.ones_like(vectors[0]), places[time + 1]).flatten()
        for _ in range(rule.steps):
            found = act(rule.keep * found + found @ memory)
        answers.append(model.read_out(found.view(len(vectors[0]), -1).sum(1)))
    return torch.stack(answers)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_equations(name: str) -> None:
    torch.manual_seed(0)
    sizes, rule = VARIANTS[name]
    model = Machine(5, 9, sizes, rule)
    actions, symbols = torch.randint(5, (3, 8)), torch.randint(9, (3, 8))
    found = model(actions, symbols)
    expected = torch.stack([plain(model, *each, rule) for each in zip(actions, symbols, strict=True)])
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert found.weights is None and found.times.tolist() == [list(range(7))] * 3


def test_modules_move_on_by_themselves_and_give_their_first_thirds() -> None:
    torch.manual_seed(0)
    model = Machine(5, 45, MachineSizes(code=sum(MODULES), modules=MODULES), RULES["code"])
    transitions = model.codes.transitions()
    starts = [0, *itertools.accumulate(MODULES)]
    inside = torch.zeros(sum(MODULES), sum(MODULES), dtype=torch.bool)
    for begin, end in itertools.pairwise(starts):
        inside[begin:end, begin:end] = True
    assert not transitions[:, ~inside].any() and transitions[:, inside].abs().mean() > 0.01
    codes = torch.arange(120.0)
    assert model.code_to_place(codes).tolist() == [
        *range(0, 10), *range(30, 40), *range(60, 68), *range(84, 90), *range(102, 108)
    ]  # fmt: skip


def test_two_hot_vectors_differ_and_have_two_ones() -> None:
    table = two_hot(45, 10)
    assert table.shape == (45, 10) and (table.sum(1) == 2).all() and len(table.unique(dim=0)) == 45
    with pytest.raises(UserError, match="10 sensory components have 45 two-hot vectors, and there are 46 symbols"):
        two_hot(46, 10)


def test_it_learns_links_that_it_never_took() -> None:
    torch.manual_seed(0)
    environments = Environments([space("3x3")], 0, symbols=10)
    model = Machine(environments.actions, 10, MachineSizes(code=32, places=16, sensory=5, neurons=64), Rule())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for number in range(300):
        episode = environments.episode("train", number, 32, 30)
        logits = model(episode.actions, episode.symbols).logits
        F.cross_entropy(logits.flatten(0, 1), episode.symbols[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    episode = environments.episode("test", 0, 60, 60)
    with torch.no_grad():
        right = model(episode.actions, episode.symbols).logits.argmax(-1) == episode.symbols[:, 1:]
    assert accuracy(right, episode.zero_shot[:, 1:]) > 0.4  # chance is 0.1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modules": (6, 5, 1)}, r"modules \(6, 5, 1\) must be multiples of 3 and sum to code 64"),
        ({"modules": (6, 6)}, r"modules \(6, 6\) must be multiples of 3 and sum to code 64"),
        ({"places": 0, "transition": "tanh"}, "places 0 must be at least 1; transition 'tanh' is unknown"),
    ],
)
def test_sizes_that_cannot_be(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MachineSizes(**changes)
