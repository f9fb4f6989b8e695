"""TEM's corrected memory against the reference code's published facts, written out for one environment."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from small.tem.correcting import recall_correcting
from small.tem.machine import Machine
from small.tem.memory import RULES, Rule
from small.tem.settings import MachineSizes

MODULES = (3, 2, 1)  # places of each module, from the fastest


def clipped(values: np.ndarray) -> np.ndarray:
    values = np.clip(values, -1, 1)
    return np.where(values > 0, values, 0.01 * values)


def written_out(xs: np.ndarray, gs: np.ndarray, decay: float, rate: float, every: int) -> tuple[np.ndarray, np.ndarray]:
    """x (S, X), g (S + 1, G) -> letters (S, X) read from module 0, and M, which is clipped every so many steps.

    Entry by entry: module of entry (i, j) of the flattened conjunction, 5 - m rounds of module m, kappa 0.8.
    """
    of = [m for m, width in enumerate(MODULES) for _ in range(width)] * xs.shape[1]
    size = len(of)
    memory, rows = np.zeros((size, size)), []

    def retrieved(g: np.ndarray) -> np.ndarray:
        q = clipped(np.concatenate([g] * xs.shape[1]))
        for number in range(5):
            onward = clipped(0.8 * q + q @ memory)
            q = np.array([onward[j] if number < 5 - of[j] else q[j] for j in range(size)])
        return q

    for time, x in enumerate(xs):
        p, p_hat = clipped(np.outer(x, gs[time]).ravel()), retrieved(gs[time])
        hebbian = np.outer(p + p_hat, p - p_hat)
        for i in range(size):
            for j in range(size):
                if of[i] < of[j]:  # from fast to slow
                    hebbian[i, j] = 0
        memory = decay * memory + rate * hebbian
        if every == 1:
            memory = np.clip(memory, -1, 1)
        rows.append(retrieved(gs[time + 1]).reshape(xs.shape[1], -1)[:, : MODULES[0]].sum(1))
        if (time + 1) % every == 0:  # between two back-propagations
            memory = np.clip(memory, -1, 1)
    return np.array(rows), memory


@pytest.mark.parametrize(("form", "every"), [("matrix", 1), ("sums", 6)])
def test_the_memory_is_the_references(form: str, every: int) -> None:
    """The PyTorch version clips each step, the TensorFlow versions once a back-propagation."""
    random = np.random.default_rng(0)
    xs, gs = np.abs(random.normal(size=(2, 12, 4))), random.normal(size=(2, 13, 6))
    rule = Rule(decay=0.9, rate=4.0, keep=0.8, steps=5, act="clipped", corrects=True, form=form)
    sensory, places = (torch.from_numpy(each).double() for each in (xs, gs))
    rows, before = [], None
    for begin in (0, 6):  # two back-propagations
        parts = sensory[:, begin : begin + 6], places[:, begin : begin + 7]
        found, memory = recall_correcting(*parts, rule, MODULES, before)
        rows.append(found)
        before = memory.after()
    for environment in range(2):
        letters, matrix = written_out(xs[environment], gs[environment], 0.9, 4.0, every)
        np.testing.assert_allclose(torch.cat(rows, 1)[environment], letters, atol=1e-12)
        np.testing.assert_allclose(before[environment], matrix, atol=1e-12)
        assert (np.abs(matrix) == 1).any()  # something was clipped


def test_rates_rise_with_gradient_steps() -> None:
    rule = RULES["code"]
    assert (rule.keep, rule.steps, rule.act, rule.corrects) == (0.8, 5, "clipped", True)
    for update in (0, 99, 199, 5000, 15_999, 50_000):
        now = rule.at(update)
        assert now.decay == pytest.approx(0.9999 * min((update + 1) / 200, 1))
        assert now.rate == pytest.approx(0.5 * min((update + 1) / 16_000, 1))
    assert Rule().at(7) == Rule()


def test_queries_of_their_own_find_what_the_next_place_would() -> None:
    generator = torch.Generator().manual_seed(1)
    sensory, places = (torch.randn(2, n, w, generator=generator) for n, w in ((7, 4), (8, 6)))
    rule = Rule(rate=0.2, keep=0.8, steps=5, act="clipped", corrects=True)
    expected, _ = recall_correcting(sensory, places, rule, MODULES)
    found, _ = recall_correcting(sensory, places, rule, MODULES, queries=places[:, 1:])
    torch.testing.assert_close(found, expected)
    other, _ = recall_correcting(sensory, places, rule, MODULES, queries=places[:, :-1])
    assert not torch.allclose(other, expected)


def plain(model: Machine, actions: Tensor, symbols: Tensor, rule: Rule) -> Tensor:
    """Logits of one walk by the equations of the reference, with the model's codes."""
    codes = model.codes(actions[None])[0]
    of = torch.tensor([m for m, width in enumerate((2, 1, 1)) for _ in range(width)] * model.sizes.sensory)
    within = (of[:, None] >= of).float()
    places = [(model.code_to_place(code) / 2).clamp(-1, 1) for code in codes]
    vectors = F.normalize(model.sensory, dim=-1)[symbols]

    def act(p: Tensor) -> Tensor:
        return F.leaky_relu(p.clamp(-1, 1), 0.01)

    def retrieved(place: Tensor) -> Tensor:
        q = act(place.repeat(model.sizes.sensory))
        for number in range(5):
            q = torch.where(number < 5 - of, act(0.8 * q + q @ memory), q)
        return q

    memory, answers = torch.zeros(len(of), len(of)), []
    for time in range(len(symbols) - 1):
        p, p_hat = act(torch.outer(vectors[time], places[time]).flatten()), retrieved(places[time])
        memory = (rule.decay * memory + rule.rate * torch.outer(p + p_hat, p - p_hat) * within).clamp(-1, 1)
        answers.append(model.read_out(retrieved(places[time + 1]).view(model.sizes.sensory, -1)[:, :2].sum(1)))
    return torch.stack(answers)


def test_logits_and_gradients_are_those_of_the_equations() -> None:
    torch.manual_seed(0)
    rule = Rule(decay=0.9, rate=0.5, keep=0.8, steps=5, act="clipped", form="matrix", corrects=True)
    model = Machine(5, 9, MachineSizes(code=12, modules=(6, 3, 3), sensory=5, neurons=7), rule)
    actions, symbols = torch.randint(5, (3, 8)), torch.randint(9, (3, 8))
    expected = torch.stack([plain(model, *each, rule) for each in zip(actions, symbols, strict=True)])
    gradients = []
    for logits in (model(actions, symbols).logits, expected):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        loss = F.cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
