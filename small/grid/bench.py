"""`python -m small.grid bench`: the speed of this experiment's parts, each compared with its straightforward form.

    world_N     walking steps/s of N walkers; a NumPy walker over cumulative rows; a plain Python loop
    scores      place-cell scores of 4,096 neurons; networkx
    steps       gradient steps of a segment, step by step; a first version in torch; their walks
    parallel    targets/s of all targets at once; step by step; their walks

The parts of a comparison alternate within a round; a ratio is the median of the rounds' ratios, with the least and
the greatest. The straightforward forms at the end of this file are what a first version would have; nothing else uses
them.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.common.devices import device_name
from llm.common.environment import environment
from llm.common.processes import progress_bar

from ..experiment.bench import compared, in_turn, seconds_of
from ..rate_maps import place_cell_scores
from ..spaces import NOWHERE, Graph, space
from .model import Variant
from .runs import GridSpec
from .settings import PRODUCTS, GridSettings, GridSizes
from .train import Run
from .world import World

SPACE = "11x11"
BATCH = 32  # walkers of a gradient step on a CPU
WALKERS, STEPS = (512, 4096), 2048  # the paper's batch, and more; of its trial
PYTHON_WALKERS = 4  # the time of a step of the loop does not depend on their number
NEURONS, NETWORKX_NEURONS = 4096, 64
ALPHA = "nmda:10"


def run(rounds: int, device: str, sizes: GridSizes | None = None) -> dict[str, Any]:
    """All comparisons, as a JSON object."""
    sizes = sizes or GridSizes()
    result: dict[str, Any] = {"rounds": rounds, **environment(), "device": device_name(device), "batch": BATCH}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        f"world_{walkers}": partial(_world, rounds, walkers) for walkers in WALKERS
    } | {
        "scores": partial(_scores, rounds, device)
    }  # fmt: skip
    for products in PRODUCTS:
        parts[f"steps_{products}"] = partial(_steps, rounds, device, products, sizes)
        parts[f"parallel_{products}"] = partial(_parallel, rounds, device, products, sizes)
    for name, measure in progress_bar(len(parts), 0, "bench", "part", iterable=parts.items()):
        result[name] = measure()
    return result


# ---- The comparisons -------------------------------------------------------------------------------------------------


def _world(rounds: int, walkers: int) -> dict[str, Any]:
    graph = space(SPACE)
    world, table, loop = World(graph, 32, 0), TableWalker(graph), PythonWalker(graph)
    ours, rows, plain = "a step of a walker", "a step, cumulative rows in NumPy", "a step, Python loop"
    times = in_turn(
        rounds,
        {
            ours: lambda: _walk_of(world, walkers) / (walkers * STEPS),
            rows: lambda: seconds_of(lambda: table.walk(walkers, STEPS), "cpu") / (walkers * STEPS),
            plain: lambda: seconds_of(lambda: loop.walk(PYTHON_WALKERS, STEPS), "cpu") / (PYTHON_WALKERS * STEPS),
        },
    )
    return compared(times, {"cumulative rows to walkers": (rows, ours), "Python loop to walkers": (plain, ours)})


def _walk_of(world: World, walkers: int) -> float:
    start, generator = np.zeros(walkers, np.int64), np.random.default_rng(0)
    return seconds_of(lambda: world._sampler.walk(start, STEPS, generator), "cpu")


def _scores(rounds: int, device: str) -> dict[str, Any]:
    graph = space(SPACE)
    rates = torch.rand(NEURONS, len(graph.cells), generator=torch.Generator().manual_seed(0))
    few, ours, theirs = rates[:NETWORKX_NEURONS].tolist(), rates.to(device), nx.Graph(graph.directed)
    a, b = "a neuron", "a neuron, networkx"
    times = in_turn(
        rounds,
        {
            a: lambda: seconds_of(lambda: place_cell_scores(ours, graph), device) / NEURONS,
            b: lambda: seconds_of(lambda: [networkx_score(row, theirs) for row in few], "cpu") / NETWORKX_NEURONS,
        },
    )
    return compared(times, {"networkx to scores": (b, a)})


def _steps(rounds: int, device: str, products: str, sizes: GridSizes) -> dict[str, Any]:
    ours, plain = _Segment(device, "steps", products, sizes), PlainSegment(device, sizes)
    walks = World(space(SPACE), 32, 0, device=device).trial("train", 0, BATCH, STEPS)
    a, b, c = "a gradient step", "a gradient step, plain torch in float32", "walks of a gradient step"
    times = in_turn(
        rounds,
        {
            a: lambda: seconds_of(ours, device) / sizes.segment,
            b: lambda: seconds_of(lambda: plain(walks), device) / sizes.segment,
            c: lambda: seconds_of(lambda: ours.run.world.trial("train", 0, BATCH, STEPS), "cpu") / STEPS,
        },
    )
    return compared(times, {"plain step to step": (b, a), "step to its walks": (a, c)})


def _parallel(rounds: int, device: str, products: str, sizes: GridSizes) -> dict[str, Any]:
    steps, parallel = (_Segment(device, objective, products, sizes) for objective in ("steps", "parallel"))
    a, b, c = "a target, all at once", "a target, step by step", "walks of a target"
    targets = BATCH * sizes.segment
    times = in_turn(
        rounds,
        {
            a: lambda: seconds_of(parallel, device) / targets,
            b: lambda: seconds_of(steps, device) / targets,
            c: lambda: seconds_of(lambda: steps.run.world.trial("train", 0, BATCH, STEPS), "cpu") / (BATCH * STEPS),
        },
    )
    return compared(times, {"step by step to all at once": (b, a), "all at once to its walks": (a, c)})


class _Segment:
    """The gradient steps of a segment in the middle of a trial: its memory is whole."""

    def __init__(self, device: str, objective: str, products: str, sizes: GridSizes) -> None:
        settings = GridSettings(batch=BATCH, objective=objective, products=products)
        self.run = Run(GridSpec(space(SPACE), sizes, Variant(ALPHA), settings), device)
        self.walks = self.run.world.trial("train", 0, BATCH, STEPS)
        self.run.model.train()
        _, _, self.code, self.memory = self.run._segment(self.walks, 0, self.run.first_code("train", 0, BATCH), ())

    def __call__(self) -> None:
        self.run._segment(self.walks, self.run.sizes.segment, self.code, self.memory)


# ---- Straightforward forms -------------------------------------------------------------------------------------------


class TableWalker:
    """All walkers at once in NumPy: a row of cumulative probabilities for each cell, a look-up for where it leads."""

    def __init__(self, graph: Graph) -> None:
        can = graph.targets != NOWHERE
        self.cumulative = (can / can.sum(1, keepdims=True)).cumsum(1)
        self.targets, self.random = np.maximum(graph.targets, 0), np.random.default_rng(0)

    def walk(self, walkers: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Cells (steps, walkers) and actions."""
        cells, actions = np.empty((2, steps, walkers), np.int64)
        now = np.zeros(walkers, np.int64)
        for step in range(steps):
            actions[step] = (self.random.random((walkers, 1)) > self.cumulative[now]).sum(1)
            cells[step] = now = self.targets[now, actions[step]]
        return cells, actions


class PythonWalker:
    """One walker at a time."""

    def __init__(self, graph: Graph) -> None:
        self.moves = [[(a, int(to)) for a, to in enumerate(row) if to != NOWHERE] for row in graph.targets]
        self.random = random.Random(0)

    def walk(self, walkers: int, steps: int) -> list[list[tuple[int, int]]]:
        """(action, cell) of every step of every walker."""
        found = []
        for _ in range(walkers):
            cell, walk = 0, []
            for _ in range(steps):
                action, cell = self.random.choice(self.moves[cell])
                walk.append((action, cell))
            found.append(walk)
        return found


def networkx_score(rates: list[float], graph: nx.Graph) -> float:
    """Algorithm 1 for one neuron."""
    directed = nx.DiGraph()
    directed.add_nodes_from(graph)
    directed.add_edges_from((a, b) if rates[a] > rates[b] else (b, a) for a, b in graph.edges if rates[a] != rates[b])
    peak = int(np.argmax(rates))
    reached = {peak, *nx.descendants(directed, peak)}
    inner = sum(1 for cell in reached if cell != peak and directed.out_degree(cell))
    return (1 - inner / len(rates)) * sum(rates[cell] for cell in reached) / sum(rates)


class PlainSegment(nn.Module):
    """The gradient steps of a segment as a first version in torch would make them, in float32.

    Each recomputes the segment's codes, multiplies every walker by a matrix of its own, computes every token in every
    layer down to the read-out, and keeps the attention maps.
    """

    def __init__(self, device: str, sizes: GridSizes, actions: int = 5, letters: int = 10) -> None:
        super().__init__()
        self.sizes, self.letters = sizes, letters
        width, inner, reach = sizes.width, sizes.heads * sizes.head_dim, sizes.window
        self.transitions = nn.Parameter(torch.zeros(actions, sizes.code, sizes.code))
        self.position, self.letter = nn.Linear(sizes.code, width // 2), nn.Embedding(letters + 1, width // 2)
        self.dropout = nn.Dropout(sizes.dropout)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(width), "q": nn.Linear(width, inner, bias=False),
                "kv": nn.Linear(width, 2 * inner, bias=False), "o": nn.Linear(inner, width, bias=False),
                "ffn_norm": nn.LayerNorm(width), "up": nn.Linear(width, sizes.neurons, bias=False),
                "down": nn.Linear(sizes.neurons, width, bias=False),
            })
            for _ in range(sizes.layers)
        )  # fmt: skip
        self.content_bias = nn.Parameter(torch.zeros(sizes.layers, sizes.heads, sizes.head_dim))
        self.distance_keys = nn.Parameter(torch.randn(sizes.layers, reach, sizes.heads, sizes.head_dim) * 0.02)
        self.distance_bias = nn.Parameter(torch.zeros(sizes.layers, reach, sizes.heads))
        self.norm, self.read_out = nn.LayerNorm(width), nn.Linear(width, letters)
        self.to(device)
        self.optimizer = torch.optim.Adam(self.parameters(), 1e-4)
        self.code = torch.randn(BATCH, sizes.code, device=device)
        self.memory = [torch.randn(BATCH, sizes.memory, width, device=device) for _ in range(sizes.layers)]
        self.maps: list[Tensor] = []

    def forward(self, walks: Any) -> None:
        """The segment's gradient steps."""
        for step in range(1, self.sizes.segment + 1):
            logits = self.logits(walks.actions[:, : step + 1], walks.letters[:, :step])
            loss = F.cross_entropy(logits[:, -1], walks.letters[:, step])
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 0.25)
            self.optimizer.step()

    def logits(self, actions: Tensor, letters: Tensor) -> Tensor:
        """Of every token, (B, L + 1, letters)."""
        codes = [self.code]
        for step in range(1, actions.shape[1]):
            matrices = self.transitions[actions[:, step]]  # (B, C, C)
            codes.append(torch.tanh(codes[-1] + torch.bmm(codes[-1][:, None], matrices)[:, 0]))
        masked = torch.cat([letters, torch.full_like(letters[:, :1], self.letters)], 1)
        hidden = torch.cat([F.relu(self.position(torch.stack(codes, 1))), self.letter(masked)], -1)
        hidden, self.maps = self.dropout(hidden), []
        for index in range(len(self.layers)):
            hidden = self.layer(hidden, index)
        return self.read_out(self.norm(hidden))

    def layer(self, hidden: Tensor, index: int) -> Tensor:
        """Transformer-XL's, with its shift of the scores by distance."""
        part, count = self.layers[index], hidden.shape[1]
        context = part["norm"](torch.cat([self.memory[index], hidden], 1))  # type: ignore[index]
        heads = (self.sizes.heads, self.sizes.head_dim)
        query = part["q"](context[:, -count:]).unflatten(-1, heads)  # type: ignore[index]
        key, value = (each.unflatten(-1, heads) for each in part["kv"](context).chunk(2, -1))  # type: ignore[index]
        size = context.shape[1]
        table, bias = (
            torch.cat([each[index, -1:].expand(size - len(each[index]), *each.shape[2:]), each[index].flip(0)])
            if size > len(each[index])
            else each[index, :size].flip(0)
            for each in (self.distance_keys, self.distance_bias)
        )
        scores = torch.einsum("bihd,bjhd->bhij", query + self.content_bias[index], key)
        place = torch.einsum("bihd,jhd->bhij", query, table) + bias.T[:, None]
        scores = (scores + self.shifted(place)) * self.sizes.head_dim**-0.5
        later = torch.ones(count, size, dtype=torch.bool, device=hidden.device).triu(1 + size - count)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        self.maps.append(weights)
        out = torch.einsum("bhij,bjhd->bihd", weights, value).flatten(-2)
        hidden = hidden + self.dropout(part["o"](out))  # type: ignore[index]
        inner = part["up"](part["ffn_norm"](hidden))  # type: ignore[index]
        return hidden + self.dropout(part["down"](inner / (1 + 10 * torch.exp(-inner))))  # type: ignore[index]

    @staticmethod
    def shifted(scores: Tensor) -> Tensor:
        """Row i moved by so many places that the column of a key holds its distance."""
        padded = F.pad(scores, (1, 0))
        batch, heads, rows, columns = padded.shape
        return padded.view(batch, heads, columns, rows)[:, :, 1:].reshape(scores.shape)
