"""`python -m small.icl bench`: the speed of this experiment's parts, each compared with its straightforward form.

    generator   sequences/s of `World.batch`, beside a NumPy loop that makes one sequence at a time
    AMICL       Figure 7's sweep, beside a loop over values of a and trials
    step        of the four variants with one seed, beside its own matrix products run alone, beside their number of
                operations at the rate of a large product, and beside a plain torch model of one run
    together    16 runs as one model, beside one after the other

The parts of a comparison alternate within a round; a ratio is the median of the rounds' ratios, with the least and
the greatest. The loops at the end of this file are what a first version would have; nothing else uses them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llm.common.devices import device_name
from llm.common.environment import environment
from llm.common.processes import progress_bar

from ..experiment.bench import compared, in_turn, seconds_of
from .amicl import A_VALUES, SHOWN, Rule, outcomes
from .amicl_trials import CONVENTIONS, paper_task
from .runs import IclSpec
from .settings import PRODUCTS, IclSettings, IclSizes, Task
from .task import World
from .train import Machine, Runs, made

BATCH = 128
PAPER = ("classic", "queries", "keys", "values")
LARGE = 4096  # edge of the product that tells the rate of a machine
AMICL_LOOP_TRIALS = 20  # of the loop, at each a; the time of a trial does not depend on their number


def run(rounds: int, device: str, compiled: bool) -> dict[str, Any]:
    """All comparisons, as a JSON object."""
    result: dict[str, Any] = {"rounds": rounds, **environment(), "device": device_name(device)}
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in PRODUCTS:
        parts[f"step_{name}"] = partial(_step, rounds, device, name, compiled)
        parts[f"together_{name}"] = partial(_together, rounds, device, name, compiled)
    parts["amicl"] = partial(_amicl, rounds, device)
    # In a process that has freed larger tensors, as a training has: C's allocator gives the pages of small ones back to
    # the system until then, and asks for them anew at every call.
    parts["generator"] = partial(_generator, rounds, device, compiled)
    for name, measure in progress_bar(len(parts), 0, "bench", "part", iterable=parts.items()):
        result[name] = measure()
    return result


# ---- The comparisons -------------------------------------------------------------------------------------------------


def _generator(rounds: int, device: str, compiled: bool) -> dict[str, Any]:
    world, loop = World(Task(), 0, device, compiled), NumpyLoop(Task())
    times = in_turn(
        rounds,
        {
            "a batch of 128": lambda: seconds_of(lambda: world.batch(0, BATCH), device, 200),
            "a batch of 128, NumPy loop": lambda: seconds_of(lambda: [loop.sequence() for _ in range(BATCH)], "cpu"),
        },
    )
    return compared(times, {"NumPy loop to generator": ("a batch of 128, NumPy loop", "a batch of 128")})


def _amicl(rounds: int, device: str) -> dict[str, Any]:
    rules = [Rule(similarity, a=a) for similarity in SHOWN for a in A_VALUES]
    loop = NumpyLoop(paper_task(length=20, width=100))

    def looped() -> float:
        trials = [rule for rule in rules for _ in range(AMICL_LOOP_TRIALS)]
        return seconds_of(lambda: [loop.amicl(rule.similarity, rule.a) for rule in trials], "cpu") / len(trials)

    def batched() -> float:
        work = partial(outcomes, rules, CONVENTIONS["paper"], trials=1000, device=device)
        return seconds_of(work, device) / (1000 * len(rules))

    times = in_turn(rounds, {"a trial at one a": batched, "a trial at one a, loop": looped})
    return compared(times, {"loop to sweep": ("a trial at one a, loop", "a trial at one a")})


def _step(rounds: int, device: str, products: str, compiled: bool) -> dict[str, Any]:
    """A step of four variants with one seed, all times divided by the four runs."""
    settings = IclSettings(PAPER, (0,), products=products)
    spec = IclSpec(Task(), IclSizes(), settings)
    (runs,) = made(spec, Machine(device, compiled))
    calls, operations = _products_of_a_step(*made(spec, Machine(device)))
    large = torch.randn(LARGE, LARGE, device=device, dtype=getattr(torch, products))
    plain = PlainStep(device)
    step = iter(range(10**9))

    def at_the_rate() -> float:
        rate = 2 * LARGE**3 / seconds_of(lambda: large @ large, device, 2)
        return operations / rate / len(PAPER)

    contenders = {
        "step": lambda: seconds_of(lambda: runs.train(next(step)), device, 20) / len(PAPER),
        "its products alone": lambda: seconds_of(lambda: [call() for call in calls], device, 10) / len(PAPER),
        "its operations at the rate of a 4,096-cube product": at_the_rate,
        "plain torch step, float32": lambda: seconds_of(plain, device, 10),
    }
    times = in_turn(rounds, contenders)
    found = compared(
        times,
        {
            "step to its products alone": ("step", "its products alone"),
            "step to its operations at the machine's rate": (
                "step", "its operations at the rate of a 4,096-cube product",
            ),
            "plain float32 step to step": ("plain torch step, float32", "step"),
        },
    )  # fmt: skip
    return found | {"operations_a_run": operations // len(PAPER), "batch": BATCH, "compiled": compiled}


def _together(rounds: int, device: str, products: str, compiled: bool) -> dict[str, Any]:
    """16 runs as one model, as the trainer takes them by itself, and one after the other."""
    settings = IclSettings(products=products)  # four variants, four seeds
    spec = IclSpec(Task(), IclSizes(), settings)
    alone = [
        replace(spec, settings=replace(settings, variants=(variant,), seeds=(seed,)))
        for variant in settings.variants
        for seed in settings.seeds
    ]
    layouts = {
        "as one model": made(spec, Machine(device, compiled, together=True)),
        "apart, those of a seed on one batch": made(spec, Machine(device, compiled, together=False)),
        "one after the other": [made(one, Machine(device, compiled))[0] for one in alone],
    }
    step = iter(range(10**9))

    def measured(models: list[Runs]) -> Callable[[], float]:
        def work() -> None:
            for runs in models:
                runs.train(next(step))

        return lambda: seconds_of(work, device, 5)

    times = in_turn(rounds, {name: measured(models) for name, models in layouts.items()})
    last = "one after the other"
    return compared(times, {f"{last} to {name}": (last, name) for name in layouts if name != last})


class _Products(TorchDispatchMode):
    """Keeps the matrix products that run under it, to run them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            kept = [part.detach() for part in args]
            self.calls.append(lambda: function(*kept))
        return function(*args, **(kwargs or {}))


def _products_of_a_step(runs: Runs) -> tuple[list[Callable[[], Any]], int]:
    """The matrix products of a step as calls, and the operations in them."""
    with _Products() as products, FlopCounterMode(display=False) as counter:
        runs.train(0)
    return products.calls, counter.get_total_flops()


# ---- Straightforward forms -------------------------------------------------------------------------------------------


class NumpyLoop:
    """One sequence at a time in NumPy, as the rules read."""

    def __init__(self, task: Task) -> None:
        self.task, self.random = task, np.random.default_rng(0)
        self.labels = self.random.normal(size=(task.labels, task.content)) / np.sqrt(task.content)
        self.known = self.random.normal(size=(task.classes, task.content)) / np.sqrt(task.content)
        self.novel = self.random.normal(size=(task.novel_classes, task.content)) / np.sqrt(task.content)

    def sequence(self) -> tuple[np.ndarray, int]:
        """A training sequence (T, D) and its answer."""
        task, random = self.task, self.random
        novel = random.random() < task.novel
        means = self.novel if novel else self.known
        if novel or random.random() < task.bursty:
            labels = random.choice(task.labels, size=task.pairs // task.copies, replace=False)
            classes = labels + task.labels * random.integers(len(means) // task.labels, size=len(labels))
            context = random.permutation(np.tile(classes, task.copies))
            query = random.choice(context)
        else:
            context, query = random.integers(len(means), size=task.pairs), random.integers(len(means))
        inputs = np.zeros((task.tokens, task.width), np.float32)
        offset = random.integers(task.positions - task.tokens + 1)
        for place, which in enumerate(context):
            inputs[2 * place, task.positions :] = self.object(means[which])
            inputs[2 * place + 1, task.positions :] = self.labels[which % task.labels]
        inputs[-1, task.positions :] = self.object(means[query])
        for place in range(task.tokens):
            inputs[place, offset + place] = 1
        return inputs, int(query % task.labels)

    def object(self, mean: np.ndarray) -> np.ndarray:
        noise = self.random.normal(size=len(mean)) / np.sqrt(len(mean))
        return (mean + self.task.noise * noise) / np.sqrt(1 + self.task.noise**2)

    def amicl(self, similarity: str, a: float) -> bool:
        """Return whether AMICL, with argmax, answers one trial rightly."""
        task, random = self.task, self.random
        context = random.integers(task.classes, size=task.pairs)
        query = random.choice(context)
        tokens = np.zeros((task.tokens, task.content))
        for place, which in enumerate(context):
            tokens[2 * place], tokens[2 * place + 1] = self.object(self.known[which]), self.labels[which % task.labels]
        tokens[-2] = self.object(self.known[query])
        keys = np.array([(a * tokens[i - 1] + tokens[i]) / (a + 1) for i in range(task.tokens)])
        asked, keys[-1] = keys[-1].copy(), 0
        if similarity == "pearson":
            keys, asked = keys - keys.mean(1, keepdims=True), asked - asked.mean()
            scores = keys @ asked / np.maximum(np.linalg.norm(keys, axis=1) * np.linalg.norm(asked), 1e-12)
        else:
            scores = keys @ asked
        return bool((self.labels @ tokens[scores.argmax()]).argmax() == query % task.labels)


class PlainStep:
    """One run as a first version in torch would train it: float32, every product of every token, no compiler."""

    def __init__(self, device: str) -> None:
        sizes, task = IclSizes(), Task()
        widths = (sizes.width, sizes.neurons, sizes.neurons, sizes.neurons)
        self.attention = [
            [nn.Linear(sizes.width, out, bias=False, device=device) for out in (*(sizes.key_width,) * 2, sizes.width)]
            for _ in range(sizes.layers)
        ]
        self.mlp = nn.Sequential(
            *(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())),
            nn.Linear(sizes.neurons, sizes.labels),
        ).to(device)
        weights = [*(each.weight for layer in self.attention for each in layer), *self.mlp.parameters()]
        self.optimizer = torch.optim.SGD(weights, lr=0.01, weight_decay=1e-4)
        self.mask = torch.full((task.tokens, task.tokens), -torch.inf, device=device).triu(1)
        drawn = World(task, 0, device).batch(0, BATCH)
        self.inputs, self.answers = drawn.inputs, drawn.answers

    def __call__(self) -> Tensor:
        x = self.inputs
        for query, key, value in self.attention:
            x = x + torch.softmax(query(x) @ key(x).mT + self.mask, -1) @ value(x)
        loss = F.cross_entropy(self.mlp(x)[:, -1], self.answers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
