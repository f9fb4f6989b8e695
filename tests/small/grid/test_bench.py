"""The straightforward forms of the benchmark do what they are measured for; its ratios are written down."""

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch

from small.experiment.bench import format_ratios
from small.grid import bench
from small.grid.model import Navigator, Variant
from small.grid.settings import GridSizes
from small.grid.world import World
from small.rate_maps import place_cell_scores
from small.spaces import space

SIZES = GridSizes(width=32, heads=2, head_dim=16, neurons=64, code=8, segment=4, memory=4, dropout=0.0)


def test_the_plain_navigator_has_the_logits_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BATCH", 3)
    torch.manual_seed(0)
    plain, ours = bench.PlainSegment("cpu", SIZES), Navigator(5, 10, SIZES, Variant("nmda:10", position="residual"))
    with torch.no_grad():
        for weight in plain.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
        ours.codes.transitions.copy_(plain.transitions.flatten(0, 1))
        for name in ("position", "letter", "norm", "read_out"):
            getattr(ours, name).load_state_dict(getattr(plain, name).state_dict())
        for index, (there, here) in enumerate(zip(plain.layers, ours.layers, strict=True)):
            here.attention_norm.load_state_dict(there["norm"].state_dict())
            here.ffn_norm.load_state_dict(there["ffn_norm"].state_dict())
            here.ffn.up_proj.weight.copy_(there["up"].weight)
            here.ffn.down_proj.weight.copy_(there["down"].weight)
            here.attention.q_proj.weight.copy_(there["q"].weight)
            here.attention.k_proj.weight.copy_(there["kv"].weight[:32])
            here.attention.v_proj.weight.copy_(there["kv"].weight[32:])
            here.attention.o_proj.weight.copy_(there["o"].weight)
            here.attention.content_bias.copy_(plain.content_bias[index][:, None])
            here.attention.distance_keys.copy_(plain.distance_keys[index].transpose(0, 1))
            here.attention.distance_bias.copy_(plain.distance_bias[index].T[:, None])
        walks = World(space("4x4"), 2, 0).trial("train", 0, 3, 8)
        for step in (1, 2, 4):  # with four letters the context is one longer than the tables
            now = walks.actions[:, : step + 1], walks.letters[:, :step]
            found = ours(plain.code, *now, tuple(plain.memory), (step,)).logits[:, 0]
            torch.testing.assert_close(found, plain.logits(*now)[:, -1], atol=1e-4, rtol=1e-4)
    assert len(plain.maps) == 2


def test_the_other_walkers_walk_the_same_space() -> None:
    graph = space("4x5")
    table, loop = bench.TableWalker(graph), bench.PythonWalker(graph)
    cells, actions = table.walk(500, 400)
    pairs = [cells[:-1].ravel() * 20 + cells[1:].ravel()]
    walks = loop.walk(200, 1000)
    pairs.append(np.concatenate([20 * np.array([c for _, c in w[:-1]]) + [c for _, c in w[1:]] for w in walks]))
    for found in pairs:
        counts = np.bincount(found, minlength=400).reshape(20, 20)
        np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), graph.transition, atol=0.02)
    assert (graph.targets[cells[:-1], actions[1:]] == cells[1:]).all()
    assert all(
        graph.targets[before, action] == after
        for (_, before), (action, after) in zip(walks[0], walks[0][1:], strict=False)
    )


def test_the_networkx_loop_scores_as_we_do() -> None:
    graph, rates = space("5x5"), torch.rand(30, 25)
    found = [bench.networkx_score(row, nx.Graph(graph.directed)) for row in rates.tolist()]
    np.testing.assert_allclose(place_cell_scores(rates, graph).numpy(), found, rtol=1e-6)


def test_the_benchmark_compares_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BATCH", 4), ("WALKERS", (8, 16)), ("STEPS", 16), ("NEURONS", 32), ("NETWORKX_NEURONS", 4)):
        monkeypatch.setattr(bench, name, value)
    result = bench.run(1, "cpu", replace(SIZES, dropout=0.1))
    text = format_ratios(result)
    for ratio in (
        "cumulative rows to walkers",
        "networkx to scores",
        "plain step to step",
        "step by step to all at once",
    ):
        assert ratio in text
    for part in ("world_8", "world_16", "scores", "steps_bfloat16", "parallel_float32"):
        assert all(seconds > 0 for seconds in result[part]["seconds"].values())
